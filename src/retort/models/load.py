"""Load models and record teachers.

A causal LM is split into its *backbone*, token ids -> hidden states, and its *head*, hidden states -> logits, so that
the head (most of the work at a large vocabulary) runs only where a prediction counts.

Legend: B sequences in a batch, T positions, D width, V vocabulary.
"""

import logging
import math
import os
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from retort.cli import is_rank
from retort.cluster.ranks import local_rank
from retort.config.sections import Teacher
from retort.io.digests import digest, digest_file_states
from retort.io.fingerprints import TeacherRecord, fingerprint_weights, list_weights
from retort.io.run_record import RUN_FILE, describe_run, name_cpu
from retort.models.attention import keep_softcap
from retort.models.heads import Head
from retort.tokens.tokenizer import explain_load_error, identify_tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

# Largest error of head(backbone(x)), relative to the largest logit, in float32.
_SPLIT_TOLERANCE = 1e-4
# Largest effect of a later token on an earlier logit: 0 in the causal models tried, 7e-5 in the mildest random BERT.
_CAUSAL_TOLERANCE = 1e-5
_LOW_PRECISION_TOLERANCE = 2e-2  # of both, in bfloat16 and float16


def choose_device(device: str) -> torch.device:
    """Return the torch device for `auto`, `cpu` or `cuda`; warns if GPUs were assigned that torch does not see.

    Raises ValueError for `cuda` if torch sees no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device 'cuda' was requested, but this PyTorch ({torch.__version__}) sees no GPU. Use device: auto or "
            "cpu, or install the CUDA build of the same PyTorch version."
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        if device == "cpu" and given not in ("", "-1"):
            _say_unseen(given)
    return torch.device(device)


@cache
def _say_unseen(gpus: str) -> None:
    logger.warning(
        f"GPUs {gpus} were assigned, but this PyTorch ({torch.__version__}) sees none: it runs on the CPU. "
        "Install the CUDA build of the same version; with device: cuda this is an error."
    )


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the torch dtype; `auto` is bfloat16 on a GPU that has it, else float32."""
    if dtype != "auto":
        chosen: torch.dtype = getattr(torch, dtype)
        return chosen
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def load_model_config(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PretrainedConfig:
    """Load a model's config from a folder or a Hub id. Raises ValueError when it cannot be loaded."""
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise ValueError(explain_load_error("model", path, error)) from error
    return config


def fingerprint_model(path: str, *, revision: str | None = None) -> tuple[str, str | None]:
    """Return (digest of a folder's files, None), or (digest of a Hub id's commit, the commit).

    Raises ValueError when a Hub id cannot be resolved.
    """
    folder = Path(path)
    if folder.is_dir():
        return fingerprint_weights(folder), None
    commit = getattr(load_model_config(path, revision=revision), "_commit_hash", None)
    return digest([path, commit]), commit


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
    ) -> Tensor:
        """Return hidden states [B, T, D], or logits [B, T, V] of a model that cannot be split; all inputs are [B, T].

        Several sequences in one row are separated by position ids that start over, without an attention mask.
        """
        inputs = {"input_ids": input_ids_BT, "use_cache": False}
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
    def num_parameters(self) -> int:
        """Number of parameters, tied ones counted once."""
        return int(self.model.num_parameters())


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
    was_training = model.training
    model.eval()
    try:
        expected = model(input_ids=ids, use_cache=False).logits.float()
        found = split.head.logits(split.features(ids, torch.ones_like(ids))).to(expected.device)
        if found.shape != expected.shape:
            return False
        error = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
    except (TypeError, AttributeError, RuntimeError):
        return False
    finally:
        model.train(was_training)
    return bool(error <= _choose_tolerance(model, _SPLIT_TOLERANCE))


def _choose_tolerance(model: PreTrainedModel, in_float32: float) -> float:
    return in_float32 if model.dtype == torch.float32 else _LOW_PRECISION_TOLERANCE


@torch.no_grad()
def require_causal(model: PreTrainedModel, *, name: str) -> None:
    """Raise ValueError when a model sees the tokens that it should predict, as BERT does; `name`: in the message."""
    size = int(model.config.get_text_config().vocab_size)
    ids = torch.arange(1, 9, device=model.get_input_embeddings().weight.device).repeat(2, 1) % size
    ids[1, -1] = (ids[1, -1] + 1) % size  # the two rows differ in their last token only
    was_training = model.training
    logits = model.eval()(input_ids=ids, use_cache=False).logits.float()
    model.train(was_training)
    error = (logits[0, :-1] - logits[1, :-1]).abs().max() / logits.abs().max().clamp(min=1e-6)
    if bool(error > _choose_tolerance(model, _CAUSAL_TOLERANCE)):
        raise ValueError(
            f"{name} ({type(model).__name__}) is not a causal language model: its prediction at a position changes "
            "with the tokens after it. Use a model that predicts the next token (Llama, GPT-2, Qwen, ...)."
        )


@torch.inference_mode()
def measure_packing_leak(split: CausalLM) -> float:
    """Return how much the features of two sequences change when both are read in one row.

    Relative to the greatest feature; infinite for a model that takes no position ids. Below 1e-4 in float32 for Llama,
    GPT-2, Qwen2, Gemma2 and GPT-NeoX; in BLOOM, OPT, Falcon with ALiBi and Mamba one sequence attends to the other.
    """
    ids_BT = torch.arange(1, 33, device=split.device).view(2, 16) % split.vocabulary
    positions_BT = torch.arange(16, device=split.device).expand(2, 16)
    padded = split.features(ids_BT, torch.ones_like(ids_BT)).float().flatten(0, 1)
    try:
        packed = split.features(
            ids_BT.reshape(1, -1), None, position_ids_BT=positions_BT.reshape(1, -1)
        )
    except (TypeError, ValueError, RuntimeError, IndexError):
        return math.inf
    error = (packed.float().flatten(0, 1) - padded).abs().max() / padded.abs().max().clamp(min=1e-6)
    return float(error)


def load_teacher(path: str, section: Teacher) -> CausalLM:
    """Load a teacher, frozen, on its device, spread over all visible GPUs if there are several.

    Raises ValueError when it cannot be loaded, does not fit the GPUs, or is not causal.
    """
    device = choose_device(section.device)
    options: dict[str, Any] = {
        "revision": section.revision,
        "dtype": choose_dtype(section.dtype, device),
        "trust_remote_code": section.trust_remote_code,
    }
    if section.attn_implementation is not None:
        options["attn_implementation"] = section.attn_implementation
    if device.type == "cuda":
        # A rank of a training run uses its own GPU, a worker all that it sees.
        options["device_map"] = {"": local_rank()} if is_rank() else "auto"
    model = load_pretrained(path, **options).eval().requires_grad_(False)
    _refuse_offloaded(getattr(model, "hf_device_map", {}), path=path)
    require_causal(model, name=f"teacher {path!r}")
    teacher = split_model(model)
    return replace(teacher, packs_sequences=section.generation.packing and _can_pack(teacher))


def _refuse_offloaded(device_map: dict[str, Any], *, path: str) -> None:
    """Raise ValueError when accelerate could not place all of the teacher on the group's GPUs."""
    outside = [name for name, device in device_map.items() if str(device) in ("cpu", "disk")]
    if outside:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise ValueError(
            f"the teacher {path!r} does not fit its GPU group (CUDA_VISIBLE_DEVICES: {visible}): {len(outside)} of its "
            f"{len(device_map)} pieces, {outside[0]!r} first, would be offloaded. Raise "
            "teacher.generation.gpus_per_model, or use a smaller teacher.dtype."
        )


def _can_pack(teacher: CausalLM) -> bool:
    """Say whether the teacher can read several sequences in one row, and log it if it cannot."""
    leak = measure_packing_leak(teacher)
    tolerance = _choose_tolerance(teacher.model, _SPLIT_TOLERANCE)
    if leak <= tolerance:
        return True
    logger.debug(
        f"{type(teacher.model).__name__}: packed sequences see each other (features change by {leak:.0e} of the "
        f"largest, expected below {tolerance:.0e}): they are padded instead."
    )
    return False


def load_pretrained(path: str, **options: Any) -> PreTrainedModel:
    """Load a causal LM from a folder or a Hub id. Raises ValueError when it cannot be loaded."""
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(explain_load_error("model", path, error)) from error
    if "attn_implementation" not in options:
        keep_softcap(model)
    return model


def refuse_short_context(
    config: PretrainedConfig, length: int, name: str, *, what: str = "the longest sequence"
) -> None:
    """Raise ValueError, naming model and text by `name` and `what`, when a model has fewer than `length` positions."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and 0 < limit < length:
        raise ValueError(
            f"{what} is {length} tokens, but {name} has at most {limit} positions (max_position_embeddings). Set "
            f"dataset.max_length: {limit} or less, or use a model with a longer context."
        )


def name_dtype(dtype: torch.dtype) -> str:
    """Return the name of a dtype, as in the config: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def describe_device(device: torch.device) -> str:
    """Return the device for run.json: "NVIDIA H100 x 2", "cpu (AMD EPYC 9654), 2 threads of 16 cores"."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} x {torch.cuda.device_count()}"
    threads = torch.get_num_threads()
    return f"cpu ({name_cpu()}), {threads} thread{'s' if threads > 1 else ''} of {os.cpu_count()} cores"


def record_teacher(path: Path, section: Teacher) -> None:
    """Write fingerprint.json of a teacher, and run.json beside it.

    Raises ValueError when its tokenizer or config cannot be loaded.
    """
    started, source = time.monotonic(), str(section.model_path)
    tokenizer = load_tokenizer(
        source, revision=section.revision, trust_remote_code=section.trust_remote_code
    )
    config = load_model_config(
        source, revision=section.revision, trust_remote_code=section.trust_remote_code
    )
    weights, commit = fingerprint_model(source, revision=section.revision)
    made = describe_run(section={"teacher": section}, seconds=time.monotonic() - started)
    made.write(path.with_name(RUN_FILE))
    TeacherRecord(
        weights=weights,
        revision=commit,
        name=source,
        tokenizer=identify_tokenizer(source, tokenizer),
        vocabulary=output_width(config),
    ).write(path)


def count_parameters(config: PretrainedConfig) -> int:
    """Return the number of a causal LM's parameters, tied ones counted once, without loading any."""
    with torch.device("meta"):
        return int(AutoModelForCausalLM.from_config(config).num_parameters())


def output_width(config: PretrainedConfig) -> int:
    """Return V, the width of a causal LM's output layer; often more than the number of its tokens."""
    return int(config.get_text_config().vocab_size)


def require_weights(record: TeacherRecord, path: str, *, source: Path) -> None:
    """Raise ValueError when a model's weights, or its Hub id, are not those of the record (its fingerprint.json)."""
    if not Path(path).is_dir() and path != record.name:
        raise ValueError(
            f"{path!r} is not the teacher that {source} records ({record.name!r}). Use the fingerprint.json that "
            "resolve_teacher.py wrote for it."
        )
    if Path(path).is_dir() and (found := fingerprint_weights(Path(path))) != record.weights:
        raise ValueError(
            f"{path} holds other weights (fingerprint {found}) than {source} records ({record.weights}). Restore "
            "the old weights, or set teacher.generation.force_regenerate to a new value (for example a date)."
        )


def load_recorded_teacher(
    path: str, section: Teacher, *, record_path: Path, longest: int = 0
) -> CausalLM:
    """Load a teacher after checking that it is the recorded one, at the recorded revision.

    Raises ValueError before the weights are loaded when it is another one, or cannot read sequences of `longest`
    tokens, and as `load_teacher` does.
    """
    record = TeacherRecord.read(record_path)
    source = Path(path) if Path(path).is_dir() else None
    file_states = digest_file_states(list_weights(source)) if source else None
    require_weights(record, path, source=record_path)
    if source is None:
        section = section.model_copy(update={"revision": record.revision})
    config = load_model_config(
        path, revision=section.revision, trust_remote_code=section.trust_remote_code
    )
    refuse_short_context(config, longest, f"teacher {path!r}")
    teacher = replace(load_teacher(path, section), source=source, file_states=file_states)
    assert teacher.vocabulary == record.vocabulary, (teacher.vocabulary, record.vocabulary)
    return teacher
