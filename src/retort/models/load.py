"""Load models and record teachers."""

import os
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file, extract_commit_hash

from retort.cli import is_rank
from retort.cluster.given import require_given
from retort.cluster.ranks import local_rank
from retort.config.sections import Teacher
from retort.io.digests import digest, digest_file_states
from retort.io.fingerprints import TeacherRecord, fingerprint_weights, list_weights
from retort.io.run_record import RUN_FILE, describe_run, name_cpu
from retort.models.attention import keep_softcap
from retort.models.causal_lm import CausalLM, needs_mask, require_causal, split_model
from retort.models.packing import can_pack
from retort.models.quantized import find_faults
from retort.models.spread import copy_beside_work
from retort.tokens.tokenizer import explain_load_error, identify_tokenizer, load_tokenizer

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


def choose_device(device: str) -> torch.device:
    """Return the torch device for `auto`, `cpu` or `cuda`.

    Raises ValueError for `cuda` if torch sees no GPU, and where it does not see those that were given to this process,
    or a job sees some though none was given to it.
    """
    if device == "cpu":
        return torch.device(device)
    num_seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    has_cuda = (torch.version.cuda or torch.version.hip) is not None
    require_given(num_seen, build=torch.__version__, has_cuda=has_cuda)
    if device == "cuda" and not num_seen:
        raise ValueError(
            f"device 'cuda' was requested, but this PyTorch ({torch.__version__}) sees no GPU. Use device: auto or "
            "cpu, or install the CUDA build of the same PyTorch version."
        )
    return torch.device("cuda" if num_seen else "cpu")


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the torch dtype; `auto` is bfloat16 on a GPU that has it, else float32."""
    if dtype != "auto":
        chosen: torch.dtype = getattr(torch, dtype)
        return chosen
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
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


def fingerprint_model(
    path: str, *, revision: str | None = None, record: Path | None = None
) -> tuple[str, str | None]:
    """Return (digest of a folder's files, None), or (digest of a Hub id's commit, the commit).

    `record`: as in `fingerprint_weights`. Raises ValueError when a Hub id cannot be resolved.
    """
    folder = Path(path)
    if folder.is_dir():
        return fingerprint_weights(folder, record=record), None
    try:
        file = cached_file(path, "config.json", revision=revision)
    except Exception as error:
        raise ValueError(explain_load_error("model", path, error)) from error
    commit = extract_commit_hash(file, None)
    assert commit, file  # a model's config has had none since transformers 5.20
    return digest([path, commit]), commit


def load_teacher(path: str, section: Teacher) -> CausalLM:
    """Load a teacher, frozen, on its device, spread over all visible GPUs if there are several.

    Raises ValueError when it cannot be loaded, does not fit the GPUs, or is not causal.
    """
    device = choose_device(section.device)
    options = section.source | {"dtype": choose_dtype(section.dtype, device)}
    if section.attn_implementation is not None:
        options["attn_implementation"] = section.attn_implementation
    if device.type == "cuda":
        # A rank of a training run uses its own GPU, a worker all that it sees.
        options["device_map"] = {"": local_rank()} if is_rank() else "auto"
    model = load_pretrained(path, **options).eval().requires_grad_(False)
    refuse_offloaded(getattr(model, "hf_device_map", {}), path=path)
    copy_beside_work(model)
    require_causal(model, name=f"teacher {path!r}")
    teacher = split_model(model)
    return replace(
        teacher,
        packs_sequences=section.generation.packing and can_pack(teacher),
        needs_mask=needs_mask(teacher),
    )


def refuse_offloaded(device_map: dict[str, Any], *, path: str) -> None:
    """Raise ValueError when accelerate could not place all of the teacher on the group's GPUs."""
    outside = [name for name, device in device_map.items() if str(device) in ("cpu", "disk")]
    if outside:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise ValueError(
            f"the teacher {path!r} does not fit its GPU group (CUDA_VISIBLE_DEVICES: {visible}): {len(outside)} of its "
            f"{len(device_map)} pieces, {outside[0]!r} first, would be offloaded. Raise "
            "teacher.generation.gpus_per_model, or use a smaller teacher.dtype."
        )


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


def read_peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has had: allocated on its fullest GPU, or resident.

    Of the system's two numbers not that of getrusage: it counts the program that started this one too.
    """
    if device.type == "cuda":
        return max(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found
    return 1024 * int(found[1])


def record_teacher(path: Path, section: Teacher) -> None:
    """Write fingerprint.json of a teacher, and run.json beside it.

    Raises ValueError when its tokenizer or config cannot be loaded.
    """
    started, source = time.monotonic(), str(section.model_path)
    tokenizer = load_tokenizer(source, **section.source)
    config = load_model_config(source, **section.source)
    weights, commit = fingerprint_model(source, revision=section.revision, record=path)
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
    if not Path(path).is_dir():
        if path == record.name:
            return
        raise ValueError(
            f"{path!r} is not the teacher that {source} records ({record.name!r}). Use the fingerprint.json that "
            "resolve_teacher.py wrote for it."
        )
    if (found := fingerprint_weights(Path(path), record=source)) != record.weights:
        raise ValueError(
            f"{path} holds other weights (fingerprint {found}) than {source} records ({record.weights}). Restore "
            "the old weights, or set teacher.generation.force_regenerate to a new value (for example a date)."
        )


def load_recorded_teacher(
    path: str, section: Teacher, *, record_path: Path, longest: int = 0
) -> CausalLM:
    """Load a teacher after checking that it is the recorded one, at the recorded revision.

    Raises ValueError before the weights are loaded when it is another one, cannot read sequences of `longest` tokens,
    or needs packages for its quantized weights that are missing, and as `load_teacher` does.
    """
    record = TeacherRecord.read(record_path)
    source = Path(path) if Path(path).is_dir() else None
    file_states = digest_file_states(list_weights(source)) if source else None
    require_weights(record, path, source=record_path)
    if source is None:
        section = section.model_copy(update={"revision": record.revision})
    config = load_model_config(path, **section.source)
    refuse_short_context(config, longest, f"teacher {path!r}")
    for fault in find_faults(config, on_cpu=choose_device(section.device).type == "cpu"):
        raise ValueError(f"teacher {path!r} {fault}")
    teacher = replace(load_teacher(path, section), source=source, file_states=file_states)
    assert teacher.vocabulary == record.vocabulary, (teacher.vocabulary, record.vocabulary)
    return teacher
