"""A causal LM split into its *backbone*, token ids -> hidden states, and its *head*, hidden states -> logits.

So the head, most of the work at a large vocabulary, runs only where a prediction counts. Probes on a few tokens say
whether a model can be split, is causal, and must be told of padding (`packing`: whether sequences can share a row).

Legend: B sequences in a batch, T positions, D width, V vocabulary.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from retort.cli import is_out_of_memory
from retort.io.digests import digest_file_states
from retort.io.fingerprints import list_weights
from retort.models.heads import Head

logger = logging.getLogger(__name__)

# Largest error of head(backbone(x)), relative to the largest logit, in float32.
SPLIT_TOLERANCE = 1e-4
# Largest effect of a later token on an earlier logit: 0 in the causal models tried, 7e-5 in the mildest random BERT.
_CAUSAL_TOLERANCE = 1e-5
_LOW_PRECISION_TOLERANCE = 2e-2  # of both, in bfloat16 and float16


@dataclass(frozen=True)
class RowBounds:
    """Where the S sequences of a row are: their lengths on the host, and starts int32 [S + 1], beside the row's ids."""

    lengths: tuple[int, ...]
    starts: Tensor

    @classmethod
    def of(cls, lengths: Iterable[int]) -> "RowBounds":
        """Return the bounds of sequences that follow each other."""
        lengths = tuple(lengths)
        return cls(lengths, torch.tensor([0, *accumulate(lengths)], dtype=torch.int32))

    def to(self, device: torch.device, non_blocking: bool = False) -> "RowBounds":
        """Return a copy on a device; accelerate calls this when it moves a batch."""
        return replace(self, starts=self.starts.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "RowBounds":
        """Return a copy in pinned memory; the DataLoader calls this."""
        return replace(self, starts=self.starts.pin_memory())

    def name_inputs(self) -> dict[str, Any]:
        """Return them as transformers' keywords for flash attention, and the lengths for `attend_by_sequence`."""
        longest = max(self.lengths)
        return {
            "cu_seq_lens_q": self.starts,
            "cu_seq_lens_k": self.starts,
            "max_length_q": longest,
            "max_length_k": longest,
            "sequence_lengths": self.lengths,
        }


@dataclass(frozen=True)
class CausalLM:
    """A causal LM split into backbone and head.

    is_split is False if the two would not reproduce the model: then the features are the model's own logits.
    """

    model: PreTrainedModel
    head: Head
    vocabulary: int  # V, width of the output layer
    is_split: bool
    source: Path | None = None  # the folder that a recorded teacher was loaded from
    file_states: str | None = (
        None  # `digest_file_states` of its weights, before they were compared with the record
    )
    packs_sequences: bool = False  # whether the teacher reads several sequences in one row
    needs_mask: bool = True  # whether it must be told of padding on the right

    def require_unchanged(self) -> None:
        """Raise ValueError if the weights' files have changed: on a CPU they are mapped into memory, and change too."""
        if (
            self.source is not None
            and digest_file_states(list_weights(self.source)) != self.file_states
        ):
            raise ValueError(
                f"the files of {self.source} have changed while the teacher was running; the current part was not "
                "saved. Restore the old files and rerun the same command, or set teacher.generation.force_regenerate "
                "to a new value (for example a date)."
            )

    def features(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor | None,
        *,
        position_ids_BT: Tensor | None = None,
        bounds: "RowBounds | None" = None,
    ) -> Tensor:
        """Return hidden states [B, T, D], or logits [B, T, V] of a model that cannot be split; all inputs are [B, T].

        Several sequences in one row are separated by position ids that start over, without an attention mask, and by
        `bounds` where B is 1 and its attention goes by sequence.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids_BT, "use_cache": False}
        if bounds is not None:
            inputs |= bounds.name_inputs()
        if attention_mask_BT is not None:
            inputs["attention_mask"] = attention_mask_BT
        if position_ids_BT is not None:
            inputs["position_ids"] = position_ids_BT
        if not self.is_split:
            logits: Tensor = self.model(**inputs).logits
            return logits
        hidden: Tensor = self.model.base_model(**inputs).last_hidden_state
        return hidden

    @property
    def device(self) -> torch.device:
        """The device that input ids must be on."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @property
    def devices(self) -> set[torch.device]:
        """The devices that its weights are on."""
        return {weight.device for weight in self.model.parameters()}

    @property
    def num_gpus(self) -> int:
        """Number of GPUs that its weights are on."""
        return sum(device.type != "cpu" for device in self.devices)

    @property
    def num_parameters(self) -> int:
        """Number of parameters, tied ones counted once."""
        return int(self.model.num_parameters())


def take_rows(values_BTX: Tensor, counted_P: Tensor) -> Tensor:
    """Return the values [P, X] at some of [B * T] positions: with a boolean mask the host would wait for a GPU."""
    return values_BTX.flatten(0, 1).index_select(0, counted_P.to(values_BTX.device))


def split_model(model: PreTrainedModel) -> CausalLM:
    """Split a causal LM into backbone and head, unless a test on eight tokens shows that these do not reproduce it."""
    config = model.config.get_text_config()
    layer = model.get_output_embeddings()
    vocabulary = int(layer.weight.shape[0]) if layer is not None else int(config.vocab_size)
    if layer is not None and model.base_model is not model:
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        softcap = getattr(config, "final_logit_softcapping", None)
        bias = getattr(layer, "bias", None)
        bias = None if bias is None else bias.detach()
        head = Head(layer.weight.detach(), bias, scale, softcap)
        split = CausalLM(model, head, vocabulary, is_split=True)
        if _reproduces_model(split):
            return split
    logger.debug(
        f"{type(model).__name__}: its head is of an unknown form; the whole model is run at every position."
    )
    return CausalLM(model, Head(weight=None), vocabulary, is_split=False)


@torch.inference_mode()
def _reproduces_model(split: CausalLM) -> bool:
    """Say whether backbone and head give the model's own logits."""
    model = split.model
    ids = torch.arange(1, 9, device=split.device)[None] % split.vocabulary
    try:
        with evaluating(model):
            expected = model(input_ids=ids, use_cache=False).logits.float()
            found = split.head.logits(split.features(ids, torch.ones_like(ids))).to(expected.device)
        if found.shape != expected.shape:
            return False
        error = relative_error(found, expected)
    except (TypeError, AttributeError, RuntimeError) as failure:
        if is_out_of_memory(failure):
            raise  # says nothing about the head
        return False
    return bool(error <= choose_tolerance(model, SPLIT_TOLERANCE))


def compile_layers(split: CausalLM) -> None:
    """Compile the backbone of a student; its losses, and the embedding's and the head's gradients, stay as they are.

    Lengths are variables from the beginning, so that a resumed training runs the code of an uninterrupted one.
    Raises ValueError for a model that cannot be split.
    """
    if not split.is_split:
        raise ValueError(
            f"training.torch_compile is true, but {type(split.model).__name__} has a head of an unknown form, and is "
            "not compiled. Use training.torch_compile: false."
        )
    split.model.base_model.compile(dynamic=True)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Run a model without dropout."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def choose_tolerance(model: PreTrainedModel, in_float32: float) -> float:
    """Return the largest relative error of a model of some dtype, whose is `in_float32` in float32."""
    return in_float32 if model.dtype == torch.float32 else _LOW_PRECISION_TOLERANCE


@torch.no_grad()
def require_causal(model: PreTrainedModel, *, name: str) -> None:
    """Raise ValueError when a model sees the tokens that it should predict, as BERT does; `name`: in the message."""
    size = int(model.config.get_text_config().vocab_size)
    ids = torch.arange(1, 9, device=model.get_input_embeddings().weight.device).repeat(2, 1) % size
    ids[1, -1] = (ids[1, -1] + 1) % size  # the two rows differ in their last token only
    with evaluating(model):
        logits = model(input_ids=ids, use_cache=False).logits.float()
    error = relative_error(logits[0, :-1], logits[1, :-1], scale=logits)
    if bool(error > choose_tolerance(model, _CAUSAL_TOLERANCE)):
        raise ValueError(
            f"{name} ({type(model).__name__}) is not a causal language model: its prediction at a position changes "
            "with the tokens after it. Use a model that predicts the next token (Llama, GPT-2, Qwen, ...)."
        )


class UnmaskedError(ValueError):
    """What a model says where it cannot read without a mask."""


def read_unmasked(
    split: CausalLM,
    ids_BT: Tensor,
    positions_BT: Tensor | None = None,
    bounds: RowBounds | None = None,
) -> Tensor:
    """Return the features without a mask. Raises UnmaskedError of a model that needs one or takes no position ids."""
    try:
        found = split.features(ids_BT, None, position_ids_BT=positions_BT, bounds=bounds)
        return found.float()
    except (TypeError, ValueError, RuntimeError, IndexError) as failure:
        if is_out_of_memory(failure):
            raise  # says nothing about the model
        raise UnmaskedError(str(failure).partition("\n")[0]) from failure


def relative_error(found: Tensor, expected: Tensor, *, scale: Tensor | None = None) -> Tensor:
    """Return the greatest difference [], relative to the greatest of `expected`, or of `scale` if it is given."""
    greatest = (expected if scale is None else scale).abs().max()
    return (found - expected).abs().max() / greatest.clamp(min=1e-6)


@torch.inference_mode()
def needs_mask(split: CausalLM) -> bool:
    """Say whether a sequence that is padded on the right must be marked as such for the model.

    A causal model cannot see the padding behind a token. Without a mask PyTorch's attention uses its fastest kernels,
    and builds neither a [B, 1, T, T] mask nor copies of shared key and value heads.
    """
    ids_BT = torch.arange(1, 33, device=split.device).view(2, 16) % split.vocabulary
    attention_BT = torch.ones_like(ids_BT)
    attention_BT[1, 9:] = 0
    with evaluating(split.model):
        with_mask = split.features(ids_BT, attention_BT).float()
        try:
            without = read_unmasked(split, ids_BT)
        except UnmaskedError:
            return True
    real_BT = attention_BT.bool().to(without.device)
    error = relative_error(without[real_BT], with_mask[real_BT])
    return bool(error > choose_tolerance(split.model, SPLIT_TOLERANCE))
