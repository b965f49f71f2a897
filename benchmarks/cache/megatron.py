"""Megatron-LM's cache (github.com/NVIDIA/Megatron-LM), by its own code from a checkout."""

import dataclasses
import os
import sys
import tempfile
import types
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.cache.stored import BLOCK, Logprobs, Stored, iterate_chunks
from benchmarks.common import import_opponent, require_checkout

REPOSITORY = "NVIDIA/Megatron-LM"
FOLDER = "megatron/training/distillation"
_STUBS = (  # what its two modules import; nothing of it takes part in what is measured
    "megatron",
    "megatron.core",
    "megatron.core.models",
    "megatron.core.models.common",
    "megatron.core.models.common.language_module",
    "megatron.core.models.common.language_module.language_module",
    "megatron.core.msc_utils",
    "megatron.core.num_microbatches_calculator",
    "megatron.core.parallel_state",
    "megatron.training",
    "megatron.training.utils",
    "megatron.training.distillation",
)


def save(
    logprobs_PV: Logprobs, checkout: Path | None, k: int = 64, microbatch: int = 512
) -> tuple[Stored, Stored]:
    """Return what its LogitsSaverHooks give back, as (before zstd: 5 bytes an entry, the tar that they write).

    Each `microbatch` positions are one of its microbatches, each BLOCK positions one of its iterations. Raises
    UnavailableError when there is no checkout, or what it imports is not installed.
    """
    checkout = require_checkout(checkout, repository=REPOSITORY, flag="--megatron")
    saving, storage, arguments = _import(checkout)
    saver = _make_saver(saving, k)
    for start in range(0, len(logprobs_PV), BLOCK):
        chunks = iterate_chunks(logprobs_PV[start : start + BLOCK], microbatch)
        saver._accumulated_results = [
            saver._process_single_microbatch(chunk[:, None]) for chunk in chunks
        ]
        arguments.curr_iteration = start // BLOCK
        saver._save_accumulated_log_probs()
    with tempfile.TemporaryDirectory() as folder:
        tar = Path(folder, "cp0_dp0__0.tar")
        saving.LogitsSaverHooks._write_batched_tar(str(tar), saver._pending_writes, b"{}")
        tar_bytes = tar.stat().st_size / len(logprobs_PV)
        entries = [
            storage.decode_logprobs_payload(e.data)
            for e in storage.iter_logprobs_tar_entries(str(tar))
        ]
    values = torch.cat([v[:, 0] for entry in entries for v in entry[0]]).float().numpy()
    ids = torch.cat([i[:, 0] for entry in entries for i in entry[1]]).to(torch.int32).numpy()
    before = Stored(f"Megatron-LM top-{k}, before zstd", 5 * k, ids, values)
    return before, dataclasses.replace(
        before, name=f"Megatron-LM top-{k}, its tar", bytes_per_position=tar_bytes
    )


def _make_saver(saving: Any, k: int) -> Any:
    """Return a LogitsSaverHooks of one rank; its constructor needs a whole training run."""
    saver = object.__new__(saving.LogitsSaverHooks)
    saver.k, saver.p, saver.min_k, saver._save_dtype = k, None, 1, torch.float16
    saver.tp_rank, saver.tp_size = 0, 1
    saver._topp_kept_counts, saver._pending_writes = [], {}
    return saver


def _import(checkout: Path) -> tuple[Any, Any, types.SimpleNamespace]:
    """Import (logits_saver, utils_logits) from a checkout, with empty modules in place of the rest of Megatron.

    Also returns the object that its `get_args()` returns.
    """
    arguments = types.SimpleNamespace(curr_iteration=0)
    stubs = {name: _make_stub(name) for name in _STUBS}
    stubs["megatron.training"].get_args = lambda: arguments
    stubs["megatron.training.distillation"].__path__ = [str(checkout / FOLDER)]
    msc = stubs["megatron.core.msc_utils"]  # remote storage: off
    msc.MultiStorageClientFeature = types.SimpleNamespace(is_enabled=lambda: False)
    msc.maybe_msc = types.SimpleNamespace(os=os)
    with mock.patch.dict(sys.modules, stubs):
        install = f"pip install what {checkout}/pyproject.toml names"
        names = ("logits_saver", "utils_logits")
        saving, storage = (
            import_opponent(f"megatron.training.distillation.{name}", install=install)
            for name in names
        )
    return saving, storage, arguments


def _make_stub(name: str) -> Any:
    """Return a module that has whatever is imported from it."""

    def get_attribute(attribute: str) -> mock.MagicMock:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return mock.MagicMock(name=attribute)

    module: Any = types.ModuleType(name)
    module.__getattr__ = get_attribute
    return module
