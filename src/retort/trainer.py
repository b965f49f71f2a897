"""transformers' Trainer with our losses: what is computed at each step, what is logged, what is shown.

The loss of an accumulated batch is normalised by the number of its positions, so how it was cut into micro-batches
does not matter.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from retort.batches import IGNORE_INDEX, EpochShuffle
from retort.fused_loss import (
    LossSettings,
    TeacherRows,
    compute_fused_loss,
    compute_loss_of_logits,
)
from retort.losses import (
    LossTerms,
    combine,
    compute_dense_divergence,
    compute_hard_loss,
    perplexity,
)
from retort.models import (
    CausalLM,
)
from retort.provenance import digest_folder, write_json

# Written last into a checkpoint, so that one cut short by a kill is told from a whole one.
COMPLETE_MARK = "complete.json"
_PROGRESS_S = 10.0


def attach_loss(split: CausalLM, settings: LossSettings) -> None:
    """Let a student's own forward pass return its losses where it is given `labels`.

    In forward, and not outside, because what wraps a model to train it on several devices sees nothing else: a loss
    made outside trains with other weights on every device, without a word.
    """
    model = split.model
    original = model.forward

    def forward(
        *args: Any,
        labels: Tensor | None = None,
        normalizer: Tensor | float = 1.0,
        kept_offsets: Tensor | None = None,
        kept_ids: Tensor | None = None,
        kept_logprobs: Tensor | None = None,
        tail_logprobs: Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        if labels is None:
            return original(*args, **inputs)
        teacher = None
        if kept_offsets is not None:
            assert kept_ids is not None and kept_logprobs is not None and tail_logprobs is not None
            teacher = TeacherRows(kept_offsets, kept_ids, kept_logprobs, tail_logprobs)
        counts_BT = labels[:, 1:] != IGNORE_INDEX
        labels_P = labels[:, 1:][counts_BT]
        if not split.is_split:
            logits_PV = original(**inputs, use_cache=False).logits[:, :-1][counts_BT]
            return compute_loss_of_logits(
                logits_PV, labels_P, teacher, settings, normalizer=normalizer
            )
        hidden_BTD = split.features(inputs["input_ids"], inputs["attention_mask"])
        head = model.get_output_embeddings()
        return compute_fused_loss(
            hidden_BTD[:, :-1][counts_BT],
            head.weight,
            labels_P,
            teacher,
            replace(settings, scale=split.head.scale, softcap=split.head.softcap),
            bias_V=getattr(head, "bias", None),
            normalizer=normalizer,
        )

    model.forward = forward  # type: ignore[method-assign]


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer with the loss of room `losses`, normalised by the global number of positions."""

    # compute_loss divides by the number of positions of the whole accumulated batch.
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
        # True makes Trainer count the labels of the whole accumulated batch, whatever the model's signature.
        self.model_accepts_loss_kwargs = True
        self.settings = settings
        self.teacher = teacher
        self.num_tokens = (
            num_tokens  # of the tokenizer: a live teacher's ids beyond have probability 0
        )
        self.window = LossWindow()

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return EpochShuffle(len(train_dataset or self.train_dataset), seed=self.args.seed)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return this micro-batch's share of the mean loss over the accumulated batch's positions."""
        assert num_items_in_batch is not None and not return_outputs
        terms = (
            self._compute_live(model, inputs, num_items_in_batch)
            if self.teacher is not None
            else model(**inputs, normalizer=num_items_in_batch)
        )
        if not bool(torch.isfinite(terms.total)):
            raise ValueError(
                f"the loss is {terms.total.item()} at step {self.state.global_step + 1} (hard {terms.hard.item():.4g}, "
                f"soft {terms.soft.item() if terms.soft is not None else 0:.4g}). Checkpoints before it are kept. "
                "Try a lower training.learning_rate, or training.use_mixed_precision: false."
            )
        positions = int((inputs["labels"][:, 1:] != IGNORE_INDEX).sum())
        self.window.add(terms, positions=positions, normalizer=float(num_items_in_batch))
        return terms.total

    def _compute_live(
        self, model: torch.nn.Module, inputs: dict[str, Tensor], normalizer: Tensor | int
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
            teacher_logits_PV,
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
        super().log(logs, *args, **kwargs)


class LossWindow:
    """Sums of the loss terms since the last log line."""

    def __init__(self) -> None:
        self.positions = 0
        self.total_positions = 0
        self._sums = {"total_loss": 0.0, "hard_loss": 0.0, "soft_loss": 0.0}
        self._has_soft = False
        self._since = time.monotonic()

    def add(self, terms: LossTerms, *, positions: int, normalizer: float) -> None:
        """Add one micro-batch, whose terms are sums over `normalizer`."""
        self.positions += positions
        self.total_positions += positions
        self._sums["total_loss"] += float(terms.total.detach()) * normalizer
        self._sums["hard_loss"] += float(terms.hard.detach()) * normalizer
        if terms.soft is not None:
            self._has_soft = True
            self._sums["soft_loss"] += float(terms.soft.detach()) * normalizer

    def take(self) -> dict[str, float]:
        """Return the means over the window's positions, and start a new window."""
        positions = max(1, self.positions)
        means = {name: value / positions for name, value in self._sums.items()}
        if not self._has_soft:
            del means["soft_loss"]
        now = time.monotonic()
        rates = {
            "perplexity": perplexity(means["hard_loss"]),
            "tokens_per_second": self.positions / max(1e-9, now - self._since),
        }
        self.positions, self._since = 0, now
        self._sums = dict.fromkeys(self._sums, 0.0)
        return means | rates


class ProgressCallback(TrainerCallback):  # type: ignore[misc]
    """Plain progress lines, and the mark that makes a checkpoint whole."""

    def __init__(
        self,
        trainer: DistillationTrainer,
        *,
        name: str,
        before: dict[str, float],
        say: Callable[[str], None],
    ) -> None:
        self.trainer = trainer
        self.say = say
        self.name = name
        self.before = before
        self.started = time.monotonic()
        self._said = 0.0
        self._first_step = 0

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
        """Remember where this attempt begins, for the time left."""
        self._first_step = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Any = None,
        **_: Any,
    ) -> None:
        """Say one line at most every few seconds."""
        now = time.monotonic()
        is_due = now - self._said >= _PROGRESS_S or state.global_step >= state.max_steps
        if not logs or "total_loss" not in logs or not is_due:
            return
        self._said = now
        steps = max(1, state.global_step - self._first_step)
        left = (now - self.started) / steps * (state.max_steps - state.global_step)
        self.say(
            f"train {self.name}  step {state.global_step}/{state.max_steps}  loss {logs['total_loss']:.4f}  "
            f"{logs['tokens_per_second']:,.0f} tokens/s  {left:,.0f} s left"
        )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Mark the checkpoint that was just written as whole."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        found = {"step": state.global_step, **self.totals, "files": digest_folder(folder)}
        write_json(folder / COMPLETE_MARK, found)
