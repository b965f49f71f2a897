"""transformers' Trainer with our losses: what is computed at each step, logged and shown.

The loss of a global batch is divided by the number of its positions, so it does not matter how the batch was cut into
forward passes and over GPUs.

Legend: B batch, T tokens of a sequence, P counted positions, D the teacher's hidden size, V vocabulary.
"""

import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Sampler
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from retort.cluster.ranks import rank, world_size
from retort.io.progress import Meter
from retort.losses.live_loss import compute_live_loss
from retort.losses.model_loss import LossTargets
from retort.losses.terms import LossSettings, LossTerms
from retort.models.causal_lm import CausalLM, take_rows
from retort.training.batches import Row, RowOrder, RowStream
from retort.training.checkpoints import (
    CheckpointId,
    Progress,
    remove_old_checkpoints,
    write_marker,
)
from retort.training.held_out import HeldOut
from retort.training.loss_window import LossWindow
from retort.training.optimizers import build_muon
from retort.training.stopping import heed_parent_alone
from retort.training.weights import any_rank, are_finite, gradient_norm, require_equal_weights

_READ = ("input_ids", "attention_mask", "position_ids", "bounds")  # by a model
# Beside the bar: the hard loss, which is of one meaning for every way of training.
_SHOWN = ("hard_loss", "learning_rate", "tokens_per_second")
_ADVICE = (
    "Rerunning will fail the same way: try a lower training.learning_rate, more training.warmup_steps, or "
    "training.use_mixed_precision: false (where you run train.py yourself, with another --output)."
)


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer for a student that `attach_loss` has patched.

    order: of the training data's rows; teacher: a live one, None where the batches bring its distributions or alpha is
    1; num_tokens: ids of the tokenizer, beyond which a live teacher's probabilities are 0; held_out: for `evaluate`.
    """

    optimizer: torch.optim.Optimizer | None
    # compute_loss divides by the number of positions of the whole global batch.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *,
        settings: LossSettings,
        order: RowOrder,
        teacher: CausalLM | None,
        num_tokens: int,
        is_muon: bool = False,
        held_out: HeldOut | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        # True makes Trainer count the labels of the whole global batch, whatever the model's signature.
        self.model_accepts_loss_kwargs = True
        self.settings = settings
        self.order = order
        self.teacher = teacher
        self.num_tokens = num_tokens
        self.is_muon = is_muon
        self.held_out = held_out
        self.window = LossWindow(self.args.device)
        self.waited_s = 0.0  # for batches

    @property
    def global_batch(self) -> int:
        """Rows of one optimizer step, over all ranks."""
        return int(
            self.args.per_device_train_batch_size
            * self.args.gradient_accumulation_steps
            * world_size()
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Row]:
        """Return one stream for the whole training, which is a single epoch to Trainer."""
        return RowStream(self.order, count=self.args.max_steps * self.global_batch)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return Trainer's, whose processes outlive a signal that is not their parent's."""
        loader: Any = super().get_train_dataloader()
        inner = loader.base_dataloader  # accelerate's is a wrapper
        inner.worker_init_fn = partial(_begin_worker, inner.worker_init_fn)
        return cast(DataLoader[Any], loader)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return Trainer's optimizer, or Muon."""
        if self.optimizer is None and self.is_muon:
            model = model or self.model
            decayed = self.get_decay_parameter_names(model)
            self.optimizer = build_muon(model, self.args, decayed=decayed)
        made: torch.optim.Optimizer = super().create_optimizer(model)
        return made

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the batches of a step, and add the seconds that they took to `waited_s`."""
        started = time.perf_counter()
        found = super().get_batch_samples(*args, **kwargs)
        self.waited_s += time.perf_counter() - started
        return found

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the loss [] of one batch of the Collator, summed over its counted positions and divided by
        `num_items_in_batch`, their number in the global batch.

        Times the number of ranks, because DDP and FSDP take the mean of the ranks' gradients.
        """
        assert num_items_in_batch is not None and not return_outputs
        settings, step = self.settings, self.state.global_step
        temperature = settings.find_temperature(step, max_steps=self.args.max_steps)
        teacher = inputs.get("teacher")
        if teacher is not None and settings.stored:
            teacher = teacher.at(settings.stored.index(temperature))
        targets = LossTargets(
            inputs["labels"],
            inputs["counted"],
            teacher,
            num_items_in_batch,
            alpha=settings.find_alpha(step, max_steps=self.args.max_steps),
            temperature=temperature,
        )
        read = {name: inputs[name] for name in _READ if name in inputs}
        terms: LossTerms = (
            model(**read, targets=targets)
            if self.teacher is None
            else self._compute_live(model, read, targets)
        )
        self.window.add(
            terms,
            positions=len(targets.counted),
            normalizer=num_items_in_batch,
            sequences=inputs["sequences"],
        )
        return terms.total * world_size()

    def _compute_live(
        self, model: nn.Module, inputs: dict[str, Any], targets: LossTargets
    ) -> LossTerms:
        """Return the losses against the live teacher, over the whole vocabulary."""
        assert self.teacher is not None
        logits_PV = take_rows(model(**inputs, use_cache=False).logits, targets.counted)
        with torch.no_grad():
            features_BTD = self.teacher.features(
                inputs["input_ids"],
                inputs.get("attention_mask"),
                position_ids_BT=inputs.get("position_ids"),
                bounds=inputs.get("bounds"),
            )
            teacher_logits_PV = self.teacher.head.logits(take_rows(features_BTD, targets.counted))
            teacher_logits_PV = teacher_logits_PV[:, : self.num_tokens]
        return compute_live_loss(
            logits_PV,
            targets.find_labels(),
            teacher_logits_PV,
            targets.choose(self.settings),
            normalizer=targets.normalizer,
        )

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Log and return eval_loss and, with a teacher, eval_kl: means over the held-out sample, in nats.

        Raises ValueError, on every rank, when one is not finite.
        """
        assert self.held_out is not None
        needs_mask = self.data_collator.needs_mask
        with self.window.paused():
            found = self.held_out.measure(
                self.model, device=self.args.device, needs_mask=needs_mask
            )
        metrics = {f"eval_{name}": v.item() for name, v in found._asdict().items() if v is not None}
        if not all(map(math.isfinite, metrics.values())):
            raise ValueError(f"{metrics} after step {self.state.global_step}. {_ADVICE}")
        self.log(dict(metrics))
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the means of our terms, under the names users know, instead of Trainer's `loss`."""
        if "loss" in logs:
            logs.pop("loss")
            logs |= self.window.take()
        # Trainer's own epoch is the fraction of the whole training.
        self.state.epoch = self.state.global_step * self.global_batch / self.order.rows_per_epoch
        super().log(logs, *args, **kwargs)


def _begin_worker(seed_worker: Callable[[int], None], number: int) -> None:
    heed_parent_alone()
    seed_worker(number)


class ProgressCallback(TrainerCallback):  # type: ignore[misc]
    """Shows progress, marks checkpoints as complete, and stops the training at numbers that are not finite.

    before: the `read_progress` of the checkpoint that is resumed from; write_curve: called at every line of progress;
    save_total_limit: checkpoints kept beside the best; interval_s: seconds between two such lines.
    """

    def __init__(
        self,
        trainer: DistillationTrainer,
        *,
        name: str,
        checkpoint_id: CheckpointId,
        before: Progress,
        write_curve: Callable[[], None],
        save_total_limit: int,
        interval_s: float = 10.0,
    ) -> None:
        self.trainer = trainer
        self.save_total_limit = save_total_limit
        self.name = name
        self.checkpoint_id = checkpoint_id
        self.before = before
        self.write_curve = write_curve
        self.interval_s = interval_s
        self.started = time.monotonic()
        self.first_step = before.step  # of this attempt
        self._logs: dict[str, float] = {}

    @property
    def totals(self) -> Progress:
        """Seconds and positions of this attempt and of those before it, without a window."""
        return Progress(
            step=self.trainer.state.global_step,
            seconds=self.before.seconds + time.monotonic() - self.started,
            positions=self.before.positions + self.trainer.window.total_positions,
            window={},
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Note this attempt's first step, and check that the ranks share their gradients."""
        self.first_step = state.global_step
        if not self.before.step:  # they are of another run, whose checkpoint the config names
            state.log_history, state.best_metric, state.best_global_step = [], None, None
            state.best_model_checkpoint = None
        _require_wrapper(self.trainer, self.checkpoint_id.strategy)
        self._meter = Meter(
            state.max_steps,
            unit="steps",
            describe=lambda: ", ".join(f"{n}={self._logs.get(n, 0):.4g}" for n in _SHOWN),
            line=lambda: self._describe_line(state),
            interval_s=self.interval_s,
            has_bar=rank() == 0
            and sys.stderr.isatty(),  # by hand: a workflow may train several at once
            initial=state.global_step,
            desc=f"train {self.name}",
        )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Raise ValueError, before the weights are changed, when a loss or the gradient is not finite on any rank."""
        bad = self.trainer.window.end_step()
        # With fp16, GradScaler skips steps with infinite gradients itself.
        is_scaled = getattr(self.trainer.accelerator, "scaler", None) is not None
        norm = 0.0 if is_scaled or bad else gradient_norm(self.trainer.model)
        is_bad = bool(bad) or not norm < float("inf")
        if not any_rank(is_bad, self.trainer.args.device):
            return
        losses = "; ".join(
            f"{loss} from sequences {sequences} of the token index" for loss, sequences in bad
        )
        found = f"the loss is {losses}" if bad else f"the gradient's norm is {norm}"
        raise ValueError(
            f"{found if is_bad else 'another rank has a loss or gradient that is not finite'} at step "
            f"{state.global_step + 1}. The weights were not changed by it. {_ADVICE}"
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Have the last step logged."""
        control.should_log |= state.global_step >= state.max_steps

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Any = None,
        **_: Any,
    ) -> None:
        """Show a line of progress and write the curve so far, at most once every `interval_s` and at the end."""
        if rank() > 0 or not logs or "total_loss" not in logs:
            return
        is_first, is_last = not self._logs, state.global_step >= state.max_steps
        self._logs, self._meter.done = logs, state.global_step
        is_due = is_first or is_last or self._meter.is_due
        if is_due:
            self.write_curve()
        self._meter.show(is_due=is_due)

    def _describe_line(self, state: TrainerState) -> str:
        steps = max(1, state.global_step - self.first_step)
        left_s = (time.monotonic() - self.started) / steps * (state.max_steps - state.global_step)
        return (
            f"train {self.name}  step {state.global_step}/{state.max_steps}  hard loss {self._logs['hard_loss']:.4f}  "
            f"{self._logs['tokens_per_second']:,.0f} tokens/s  {left_s:,.0f} s left"
        )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Mark the checkpoint that was just written as complete.

        Raises ValueError when weights are not finite, RuntimeError when the ranks' weights differ under DDP.
        """
        if any_rank(not are_finite(self.trainer.model), self.trainer.args.device):
            raise ValueError(
                f"weights are no longer finite numbers after step {state.global_step}; the student is useless. "
                f"{_ADVICE}"
            )
        if self.checkpoint_id.strategy == "ddp":
            require_equal_weights(self.trainer.model)
        window = (
            self.trainer.window.gather()
        )  # which also waits until all ranks have written their files
        if rank() == 0:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            positions = self.totals.positions - window["positions"]  # a restored window has them
            progress = self.totals.model_copy(update={"positions": positions, "window": window})
            write_marker(folder, self.checkpoint_id, progress)
            best = state.best_global_step
            remove_old_checkpoints(folder.parent, limit=self.save_total_limit, best=best)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Release the terminal."""
        self._meter.close()


def _require_wrapper(trainer: DistillationTrainer, strategy: str) -> None:
    """Assert that the ranks share their gradients: with some settings, accelerate silently trains each alone."""
    found = trainer.accelerator.num_processes
    assert found == world_size() == trainer.args.world_size, (found, world_size())
    wanted = {"ddp": DistributedDataParallel, "fsdp": FSDPModule}[strategy]
    if found > 1:
        assert isinstance(trainer.model_wrapped, wanted), (type(trainer.model_wrapped), strategy)
