"""transformers' Trainer with our losses: what is computed at each step, what is logged, what is shown.

The loss of a global batch is normalised by the number of its positions, so how it was cut into forward passes, and
over GPUs, does not matter.
"""

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Sampler
from tqdm import tqdm
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from retort.cli import open_terminal
from retort.cluster.ranks import rank, world_size
from retort.models.load import CausalLM
from retort.training.batches import IGNORE_INDEX, ShuffledStream
from retort.training.checkpoints import Stamp, mark_checkpoint
from retort.training.fused_loss import LossSettings
from retort.training.losses import (
    LossTerms,
    combine,
    compute_dense_divergence,
    compute_hard_loss,
    perplexity,
)
from retort.training.model_loss import Lesson

logger = logging.getLogger(__name__)

_PROGRESS_S = 10.0
_ADVICE = (
    "The same command would meet it again: try a lower training.learning_rate, more training.warmup_steps, or "
    "training.use_mixed_precision: false (by hand, with another --output)."
)


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer with the losses of a student that `attach_loss` prepared."""

    # compute_loss divides by the number of positions of the whole global batch.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *,
        settings: LossSettings,
        teacher: CausalLM | None,
        num_tokens: int,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        # True makes Trainer count the labels of the whole global batch, whatever the model's signature.
        self.model_accepts_loss_kwargs = True
        self.settings = settings
        self.teacher = teacher
        self.num_tokens = (
            num_tokens  # of the tokenizer: a live teacher's ids beyond have probability 0
        )
        self.window = LossWindow(self.args.device)
        self.waited_s = 0.0  # for the next batch

    @property
    def global_batch(self) -> int:
        """Sequences of one optimizer step, over all ranks."""
        return int(
            self.args.per_device_train_batch_size
            * self.args.gradient_accumulation_steps
            * world_size()
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        """One stream for the whole training: to Trainer it is one long epoch."""
        count = self.args.max_steps * self.global_batch
        return ShuffledStream(
            len(train_dataset or self.train_dataset), seed=self.args.seed, count=count
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Collect the batches of a step, and count the seconds that it took."""
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
        """Return this forward pass's share of the mean loss over the global batch's positions, times the ranks: what
        shares gradients among ranks takes their mean."""
        assert num_items_in_batch is not None and not return_outputs
        ids_BT, mask_BT, labels_BT = (inputs[k] for k in ("input_ids", "attention_mask", "labels"))
        if self.teacher is not None:
            terms = self._compute_live(model, inputs, num_items_in_batch)
        else:
            lesson = Lesson(labels_BT, inputs.get("teacher"), num_items_in_batch)
            terms = model(input_ids=ids_BT, attention_mask=mask_BT, lesson=lesson)
        positions = (labels_BT[:, 1:] != IGNORE_INDEX).sum()
        self.window.add(
            terms, positions=positions, normalizer=num_items_in_batch, places=inputs["places"]
        )
        return terms.total * world_size()

    def _compute_live(
        self, model: nn.Module, inputs: dict[str, Tensor], normalizer: Tensor | int
    ) -> LossTerms:
        """Return the losses beside the live teacher, over the whole vocabulary."""
        assert self.teacher is not None
        labels_BT = inputs["labels"]
        counts_BT = labels_BT[:, 1:] != IGNORE_INDEX
        ids_BT, mask_BT = inputs["input_ids"], inputs["attention_mask"]
        logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
        logits_PV = logits_BTV[:, :-1][counts_BT]
        hard = compute_hard_loss(logits_PV, labels_BT[:, 1:][counts_BT])
        with torch.no_grad():
            features_BTD = self.teacher.features(ids_BT, mask_BT)
            teacher_logits_PV = self.teacher.head.logits(features_BTD[:, :-1][counts_BT])
            teacher_logits_PV = teacher_logits_PV[:, : self.num_tokens]  # a wider student is legal
        temperature = self.settings.temperature
        kl = compute_dense_divergence(
            logits_PV,
            teacher_logits_PV.to(logits_PV.device),
            temperature=temperature,
            divergence=self.settings.divergence,
        )
        return combine(
            hard / normalizer,
            kl / normalizer,
            alpha=self.settings.alpha,
            temperature=temperature,
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the means of our terms under the names users know, in place of Trainer's `loss`."""
        if "loss" in logs:
            logs.pop("loss")
            logs |= self.window.take()
        # Trainer's is of its one long epoch.
        self.state.epoch = self.state.global_step * self.global_batch / len(self.train_dataset)
        super().log(logs, *args, **kwargs)


class LossWindow:
    """Sums of the loss terms since the last log line, on the device: reading them at every step would make it wait."""

    NAMES = ("total_loss", "hard_loss", "soft_loss", "positions")

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(self.NAMES), dtype=torch.float64, device=device)
        self._has_soft = False
        self._taken = 0.0  # positions of earlier windows
        self._since = time.monotonic()
        self._step: list[tuple[Tensor, Tensor]] = []  # total and places of each forward pass

    def add(
        self, terms: LossTerms, *, positions: Tensor, normalizer: Tensor | int, places: Tensor
    ) -> None:
        """Add one forward pass of some sequences, whose terms are sums over `normalizer`."""
        zero = torch.zeros_like(terms.total)
        self._has_soft = terms.soft is not None
        losses = torch.stack([terms.total, terms.hard, zero if terms.soft is None else terms.soft])
        self._sums[:3] += losses.detach().double() * normalizer
        self._sums[3] += positions
        self._step.append((terms.total.detach(), places))

    def end_step(self) -> list[tuple[float, list[int]]]:
        """Return what was not finite among the step's forward passes: its total, the places of its sequences."""
        step, self._step = self._step, []
        if bool(torch.isfinite(torch.stack([total for total, _ in step])).all()):
            return []
        return [(t.item(), p.tolist()) for t, p in step if not bool(torch.isfinite(t))]

    def gather(self) -> dict[str, float]:
        """Bring the sums of all ranks to the first one, and return them."""
        if world_size() > 1:
            torch.distributed.all_reduce(self._sums)
            if rank() > 0:
                self._sums.zero_()
        return dict(zip(self.NAMES, self._sums.tolist(), strict=True))

    def restore(self, sums: dict[str, float] | None) -> None:
        """Go on with the sums that a checkpoint holds."""
        if sums is not None and rank() == 0:
            values = [sums[name] for name in self.NAMES]
            self._sums.copy_(torch.tensor(values, dtype=torch.float64))

    @property
    def total_positions(self) -> float:
        """Positions since the training (this attempt's, with a restored window) began, as of the last `gather`."""
        return self._taken + float(self._sums[3])

    def take(self) -> dict[str, float]:
        """Return the means over the window's positions, and start a new window."""
        found = self.gather()
        count = max(1.0, found.pop("positions"))
        means = {name: value / count for name, value in found.items()}
        if not self._has_soft:
            del means["soft_loss"]
        now = time.monotonic()
        rates = {
            "perplexity": perplexity(means["hard_loss"]),
            "tokens_per_second": count / max(1e-9, now - self._since),
        }
        self._taken += float(self._sums[3])
        self._since = now
        self._sums.zero_()
        return means | rates


class ProgressCallback(TrainerCallback):  # type: ignore[misc]
    """Progress for people, the mark that makes a checkpoint whole, and a watch over what must never be learned from."""

    def __init__(
        self,
        trainer: DistillationTrainer,
        *,
        name: str,
        stamp: Stamp,
        before: dict[str, Any],
        write_curve: Callable[[], None],
    ) -> None:
        self.trainer = trainer
        self.name = name
        self.stamp = stamp
        self.before = before
        self.write_curve = write_curve
        self.started = time.monotonic()
        self._said = 0.0
        self._first_step = 0
        self._bar: tqdm[Any] | None = None
        self._terminal: TextIO | None = None

    @property
    def totals(self) -> dict[str, float]:
        """Seconds and positions of this attempt and of those before it."""
        return {
            "seconds": self.before["seconds"] + time.monotonic() - self.started,
            "positions": self.before["positions"] + self.trainer.window.total_positions,
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Remember where this attempt begins, and see that what shares the training does."""
        self._first_step = state.global_step
        _require_wrapper(self.trainer, self.stamp.strategy)
        # Under a rule there are lines: several students may be trained at once.
        self._terminal = open_terminal() if rank() == 0 and sys.stderr.isatty() else None
        if self._terminal is not None:
            steps = {"total": state.max_steps, "initial": state.global_step}
            self._bar = tqdm(desc=f"train {self.name}", unit="step", file=self._terminal, **steps)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Raise ValueError before a loss or a gradient that is no number reaches the weights."""
        scaled = (
            getattr(self.trainer.accelerator, "scaler", None) is not None
        )  # fp16 skips such steps itself
        bad = self.trainer.window.end_step()
        norm = 0.0 if scaled or bad else _gradient_norm(self.trainer.model)
        is_bad = bool(bad) or not norm < float("inf")
        if not _any_rank(is_bad, self.trainer.args.device):
            return
        losses = "; ".join(
            f"{loss} from sequences {places} of the token index" for loss, places in bad
        )
        found = f"the loss is {losses}" if bad else f"the gradient's norm is {norm}"
        raise ValueError(
            f"{found if is_bad else 'another rank met a loss that is no number'} at step {state.global_step + 1}. "
            f"Nothing was learned from it. {_ADVICE}"
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Move the bar, and see that the curve ends with the last step."""
        control.should_log |= state.global_step >= state.max_steps
        if self._bar is not None:
            self._bar.update(1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Any = None,
        **_: Any,
    ) -> None:
        """Say one line at most every few seconds, and write the curve so far."""
        now = time.monotonic()
        is_due = now - self._said >= _PROGRESS_S or state.global_step >= state.max_steps
        if rank() > 0 or not logs or "total_loss" not in logs:
            return
        if self._bar is not None:
            shown = ("total_loss", "learning_rate", "tokens_per_second")
            self._bar.set_postfix({name: f"{logs[name]:.4g}" for name in shown})
        if not is_due:
            return
        self._said = now
        self.write_curve()
        steps = max(1, state.global_step - self._first_step)
        left = (now - self.started) / steps * (state.max_steps - state.global_step)
        if self._bar is None:
            logger.info(
                f"train {self.name}  step {state.global_step}/{state.max_steps}  loss {logs['total_loss']:.4f}  "
                f"{logs['tokens_per_second']:,.0f} tokens/s  {left:,.0f} s left"
            )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Mark the checkpoint that was just written as whole."""
        if _any_rank(not _are_finite(self.trainer.model), self.trainer.args.device):
            raise ValueError(
                f"weights are no longer finite numbers after step {state.global_step}: the student is lost. {_ADVICE}"
            )
        if self.stamp.strategy == "ddp":
            _require_equal_weights(self.trainer.model)
        window = self.trainer.window.gather()  # all ranks have written theirs
        if rank() == 0:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            totals = self.totals
            totals["positions"] -= window["positions"]  # they come back with the window
            mark_checkpoint(
                folder, self.stamp, {"step": state.global_step, **totals, "window": window}
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Close the bar, and let go of the terminal."""
        if self._bar is not None and self._terminal is not None:
            self._bar.close()
            self._terminal.close()


def _require_wrapper(trainer: DistillationTrainer, strategy: str) -> None:
    """Assert that several ranks share the training: some settings make each train alone, without a word."""
    found = trainer.accelerator.num_processes
    assert found == world_size() == trainer.args.world_size, (found, world_size())
    wanted = {"ddp": DistributedDataParallel, "fsdp": FSDPModule}[strategy]
    if found > 1:
        assert isinstance(trainer.model_wrapped, wanted), (type(trainer.model_wrapped), strategy)


@torch.no_grad()
def _require_equal_weights(model: nn.Module) -> None:
    """Raise RuntimeError when the ranks hold different weights: their gradients were not shared."""
    if world_size() == 1:
        return
    sums = torch.stack([p.detach().double().sum() for p in model.parameters()])
    least, most = sums.clone(), sums.clone()
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    if not torch.equal(least, most):
        raise RuntimeError(
            f"{world_size()} ranks hold different weights: their gradients were not shared"
        )


def _are_finite(model: nn.Module) -> bool:
    """Say whether all weights are finite, or this rank's pieces of them."""
    weights = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    return bool(torch.stack([w.detach().isfinite().all() for w in weights]).all())


def _gradient_norm(model: nn.Module) -> float:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def _any_rank(is_so: bool, device: torch.device) -> bool:
    """Say whether it is so on any rank: all of them must stop, or the others wait for the one that did."""
    if world_size() == 1:
        return is_so
    flag = torch.tensor(float(is_so), device=device)
    torch.distributed.all_reduce(flag)
    return bool(flag > 0)
