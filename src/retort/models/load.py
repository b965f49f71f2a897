"""Load a teacher, build a student: the only room that knows transformers' model classes.

A causal LM is used in two halves: its *body*, token ids -> hidden states, and its *head*, hidden states -> logits,
so that the head (most of the work at a large vocabulary) runs only where a prediction counts.
"""

import logging
import math
import os
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
from retort.io.files import read_json, write_json
from retort.io.fingerprints import fingerprint_weights, list_weights
from retort.models.heads import Head
from retort.tokens.tokenizer import explain_load_error, identify_tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

# How far head(body(x)) may be from the model's own logits, relative to the largest logit, in float32.
_PROBE_TOLERANCE = 1e-4
# How far a later token may move an earlier logit: 0 in the causal models tried, 7e-5 in the mildest random BERT.
_LEAK_TOLERANCE = 1e-5


def choose_device(device: str) -> torch.device:
    """Return the torch device for `auto`, `cpu` or `cuda`; says so where GPUs were given that torch does not see.

    Raises ValueError for `cuda` where torch sees none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device 'cuda' was asked for, but this PyTorch ({torch.__version__}) sees no GPU. Use device: auto "
            "or cpu, or install the CUDA build of the same PyTorch version."
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
        f"GPUs {gpus} were given, but this PyTorch ({torch.__version__}) sees none: it runs on the CPU. "
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
    """Load a model's config from a folder or a Hub id. Raises ValueError with the next step when it cannot."""
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise ValueError(explain_load_error("model", path, error)) from error
    return config


def fingerprint_model(path: str, *, revision: str | None = None) -> dict[str, Any]:
    """Return {"weights", "revision"}: of a local folder its content, of a Hub id its resolved commit."""
    folder = Path(path)
    if folder.is_dir():
        return {"weights": fingerprint_weights(folder), "revision": None}
    commit = getattr(load_model_config(path, revision=revision), "_commit_hash", None)
    return {"weights": digest([path, commit]), "revision": commit}


@dataclass(frozen=True)
class CausalLM:
    """A model in two halves. `is_split` is False where the halves do not reproduce the model: then the body
    returns the model's own logits and the head passes them on."""

    model: PreTrainedModel
    head: Head
    vocabulary: int  # V, width of the output layer
    is_split: bool
    source: Path | None = None  # the folder that a recorded teacher was loaded from
    stamp: str | None = None  # of its files, before they were compared with the record
    packs: bool = False  # whether several sequences are read in one row

    def require_unchanged(self) -> None:
        """Raise ValueError when the files were written since: on a CPU, weights are mapped, and change with them."""
        if self.source is not None and digest_file_states(list_weights(self.source)) != self.stamp:
            raise ValueError(
                f"the files of {self.source} were changed while the teacher was at work; nothing of the part in hand "
                "was kept. Put the old files back and run the same command again, or set "
                "teacher.generation.force_regenerate to a new value (a date, say)."
            )

    def features(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor | None,
        *,
        position_ids_BT: Tensor | None = None,
    ) -> Tensor:
        """Return hidden states [B, T, D], or logits [B, T, V] of a model that cannot be split.

        Several sequences in one row are told apart by position ids that begin again, without an attention mask.
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
        """Where the input ids go."""
        device: torch.device = self.model.get_input_embeddings().weight.device  # type: ignore[assignment]
        return device

    @property
    def num_parameters(self) -> int:
        """Parameters, tied ones once."""
        return int(self.model.num_parameters())


def split_model(model: PreTrainedModel) -> CausalLM:
    """Split a causal LM into body and head, and prove on eight tokens that the halves make the whole."""
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
        if _is_whole(split):
            return split
    logger.debug(
        f"{type(model).__name__}: its head is of an unknown form; the whole model is run at every position."
    )
    return CausalLM(model, Head(weight=None), vocabulary, is_split=False)


@torch.inference_mode()
def _is_whole(split: CausalLM) -> bool:
    """Say whether body and head give the model's own logits."""
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
    return bool(error <= (_PROBE_TOLERANCE if model.dtype == torch.float32 else 2e-2))


@torch.no_grad()
def require_causal(model: PreTrainedModel, *, name: str) -> None:
    """Raise ValueError when a model sees the tokens that it is to predict, as BERT does."""
    size = int(model.config.get_text_config().vocab_size)
    ids = torch.arange(1, 9, device=model.get_input_embeddings().weight.device).repeat(2, 1) % size
    ids[1, -1] = (ids[1, -1] + 1) % size  # the two rows differ in their last token only
    was_training = model.training
    logits = model.eval()(input_ids=ids, use_cache=False).logits.float()
    model.train(was_training)
    error = (logits[0, :-1] - logits[1, :-1]).abs().max() / logits.abs().max().clamp(min=1e-6)
    if bool(error > (_LEAK_TOLERANCE if model.dtype == torch.float32 else 2e-2)):
        raise ValueError(
            f"{name} ({type(model).__name__}) is no causal language model: its prediction at a position changes "
            "with the tokens after it. Use a model that predicts the next token (Llama, GPT-2, Qwen, ...)."
        )


@torch.inference_mode()
def measure_packing_leak(split: CausalLM) -> float:
    """Return how far the tokens of one sequence move the other's features when both are in one row.

    Relative to the greatest feature; infinite for a model that takes no position ids. Below 1e-4 in float32 for Llama,
    GPT-2, Qwen2, Gemma2 and GPT-NeoX; BLOOM, OPT, Falcon with ALiBi and Mamba mix the two.
    """
    ids_BT = torch.arange(1, 33, device=split.device).view(2, 16) % split.vocabulary
    places_BT = torch.arange(16, device=split.device).expand(2, 16)
    apart = split.features(ids_BT, torch.ones_like(ids_BT)).float().flatten(0, 1)
    try:
        packed = split.features(
            ids_BT.reshape(1, -1), None, position_ids_BT=places_BT.reshape(1, -1)
        )
    except (TypeError, ValueError, RuntimeError, IndexError):
        return math.inf
    error = (packed.float().flatten(0, 1) - apart).abs().max() / apart.abs().max().clamp(min=1e-6)
    return float(error)


def load_teacher(path: str, section: Teacher) -> CausalLM:
    """Load a teacher, frozen, on its device: spread over all visible GPUs where there are several.

    Raises ValueError where it does not fit them.
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
        # A rank of a training has its own GPU; a worker has all that it sees.
        options["device_map"] = {"": local_rank()} if is_rank() else "auto"
    model = load_pretrained(path, **options).eval().requires_grad_(False)
    _refuse_offloaded(getattr(model, "hf_device_map", {}), path=path)
    require_causal(model, name=f"teacher {path!r}")
    teacher = split_model(model)
    return replace(teacher, packs=section.generation.packing and _can_pack(teacher))


def _refuse_offloaded(device_map: dict[str, Any], *, path: str) -> None:
    """Raise ValueError where accelerate found no room for a part of the teacher on the group's GPUs."""
    outside = [name for name, place in device_map.items() if str(place) in ("cpu", "disk")]
    if outside:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise ValueError(
            f"the teacher {path!r} does not fit its GPU group (CUDA_VISIBLE_DEVICES: {visible}): {len(outside)} of its "
            f"{len(device_map)} pieces, {outside[0]!r} first, would be left outside. Raise "
            "teacher.generation.gpus_per_model, or use a smaller teacher.dtype."
        )


def _can_pack(teacher: CausalLM) -> bool:
    """Say, aloud where it is not so, whether several sequences can be read in one row."""
    leak = measure_packing_leak(teacher)
    tolerance = _PROBE_TOLERANCE if teacher.model.dtype == torch.float32 else 2e-2
    if leak <= tolerance:
        return True
    logger.debug(
        f"{type(teacher.model).__name__}: packed sequences see each other (features move by {leak:.0e} of the largest, "
        f"expected below {tolerance:.0e}): they are padded instead."
    )
    return False


def load_pretrained(path: str, **options: Any) -> PreTrainedModel:
    """Load a causal LM from a folder or a Hub id. Raises ValueError with the next step when it cannot."""
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(explain_load_error("model", path, error)) from error
    return model


def refuse_short_context(
    config: PretrainedConfig, length: int, name: str, *, what: str = "the longest sequence"
) -> None:
    """Raise ValueError when a model was made for fewer positions than the `length` tokens of a sequence."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and 0 < limit < length:
        raise ValueError(
            f"{what} is {length} tokens, but {name} was made for at most {limit} positions "
            f"(max_position_embeddings). Set dataset.max_length: {limit} or less (by hand: tokenize_shard.py "
            f"--dataset-max-length {limit}), or use a model with a longer context."
        )


def describe_device(device: torch.device) -> str:
    """Return the device in words, for run.json."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} x {torch.cuda.device_count()}"
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'s' if threads > 1 else ''} of {os.cpu_count()} cores"


def record_teacher(path: Path, section: Teacher) -> None:
    """Write fingerprint.json of a teacher: what its weights and tokenizer are, and the width of its output."""
    source = str(section.model_path)
    tokenizer = load_tokenizer(
        source, revision=section.revision, trust_remote_code=section.trust_remote_code
    )
    config = load_model_config(
        source, revision=section.revision, trust_remote_code=section.trust_remote_code
    )
    record = fingerprint_model(source, revision=section.revision) | {
        "name": source,
        "tokenizer": identify_tokenizer(source, tokenizer),
        "vocabulary": output_width(config),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)


def output_width(config: PretrainedConfig) -> int:
    """Return V, the width of a causal LM's output layer; often more than its tokenizer has tokens."""
    return int(config.get_text_config().vocab_size)


def require_weights(record: dict[str, Any], path: str, *, source: Path) -> None:
    """Raise ValueError when a model is not the one whose fingerprint was recorded: by its weights, or its Hub id."""
    if not Path(path).is_dir() and path != record["name"]:
        raise ValueError(
            f"{path!r} is not the teacher that {source} records ({record['name']!r}). Give the fingerprint.json that "
            "resolve_teacher.py wrote for it."
        )
    if Path(path).is_dir() and (found := fingerprint_weights(Path(path))) != record["weights"]:
        raise ValueError(
            f"{path} holds other weights (fingerprint {found}) than {source} records ({record['weights']}). Put "
            "the old weights back, or set teacher.generation.force_regenerate to a new value (a date, say)."
        )


def load_recorded_teacher(
    path: str, section: Teacher, *, record_path: Path, longest: int = 0
) -> CausalLM:
    """Load a teacher after checking that it is the recorded one, at the recorded revision.

    Raises ValueError, before the weights are loaded, when sequences of `longest` tokens are more than it can read.
    """
    record = read_json(record_path)
    source = Path(path) if Path(path).is_dir() else None
    stamp = digest_file_states(list_weights(source)) if source else None
    require_weights(record, path, source=record_path)
    if source is None:
        section = replace(section, revision=record["revision"])
    config = load_model_config(
        path, revision=section.revision, trust_remote_code=section.trust_remote_code
    )
    refuse_short_context(config, longest, f"teacher {path!r}")
    teacher = replace(load_teacher(path, section), source=source, stamp=stamp)
    assert teacher.vocabulary == record["vocabulary"], (teacher.vocabulary, record["vocabulary"])
    return teacher
