"""What others' caches keep of a distribution, in how many bytes: the opponents of the cache benchmark.

An opponent is a function from logprobs [P, V] (float32, natural log) to a `Stored`: bytes for a position, and what a
reader gets back. DistillKit (github.com/arcee-ai/DistillKit) and Megatron-LM (github.com/NVIDIA/Megatron-LM) run
their own code, from a checkout whose path is given; without it their rows say "not run".

Shapes: P positions, V vocabulary, K most ids kept at any position.
"""

import contextlib
import dataclasses
import importlib
import os
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

CHUNK = 256  # positions of all V that are in memory at once
BLOCK = 8192  # positions coded together
MIN_TAIL = (
    1e-8  # where the kept probabilities sum to 1 or more: what DistillKit's loss clamps the rest to
)

Logprobs = NDArray[np.float32]  # [P, V]


@dataclasses.dataclass(frozen=True)
class Stored:
    """What one opponent kept of P positions.

    ids [P, K] has -1 where fewer are kept; logprobs [P, K] is then -inf. tail_logprobs [P] is the log of the mass of
    all other ids, None where it is not stored: then it is what the kept ones leave of 1. unbiased: each
    position's kept probabilities, and 0 elsewhere, have the exact ones as their mean over random draws.
    """

    name: str
    bytes_per_position: float
    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    tail_logprobs: NDArray[np.float32] | None = None
    unbiased: bool = False


# --- opponents ---


def keep_top_k(logprobs_PV: Logprobs, k: int = 64) -> Stored:
    """Keep the k most probable: id in 16 bits (32 for a larger vocabulary), logprob in float16."""
    ids, values = select_top_k(logprobs_PV, k)
    id_bytes = 2 if logprobs_PV.shape[1] <= 1 << 16 else 4
    rounded = values.astype(np.float16).astype(np.float32)
    return Stored(f"top-{k}, u{8 * id_bytes} + f16", k * (id_bytes + 2), ids, rounded)


def select_top_k(logprobs_PV: Logprobs, k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return (ids, logprobs) [P, k], most probable first, exactly."""
    found = [chunk.topk(k, dim=-1) for chunk in iterate_chunks(logprobs_PV)]
    ids = torch.cat([f.indices for f in found]).to(torch.int32)
    return ids.numpy(), torch.cat([f.values for f in found]).numpy()


def draw_rs_kd(logprobs_PV: Logprobs, num_draws: int = 50, seed: int = 0) -> Stored:
    """RS-KD (arXiv 2503.16870): num_draws with replacement; t_i = c_i / num_draws. 24 bits for each different id.

    The authors released no code: this is their estimator for q = t, and their table's format (17 bits of id, 7 of
    count). Sum of squares of its error: (1 - sum of p squared) / num_draws.
    """
    torch.manual_seed(seed)
    drawn = torch.cat(
        [c.exp().multinomial(num_draws, replacement=True) for c in iterate_chunks(logprobs_PV)]
    )
    P, V = logprobs_PV.shape
    keys = drawn.numpy().astype(np.int64) + np.arange(P, dtype=np.int64)[:, None] * V
    unique, counts = np.unique(keys, return_counts=True)
    rows = unique // V
    per_row = np.bincount(rows, minlength=P)
    slots = np.arange(len(unique)) - np.repeat(np.cumsum(per_row) - per_row, per_row)
    ids = np.full((P, per_row.max()), -1, np.int32)
    logprobs = np.full(ids.shape, -np.inf, np.float32)
    ids[rows, slots] = unique % V
    logprobs[rows, slots] = np.log(counts / num_draws)
    return Stored(
        f"RS-KD N={num_draws}, 24 bit/id", 3 * per_row.mean(), ids, logprobs, unbiased=True
    )


def recode_rs_kd(
    stored: Stored, unigram_counts_V: NDArray[np.int64], num_draws: int = 50
) -> Stored:
    """The same draws, entropy-coded by us: gaps of unigram ranks, counts and sizes in columns through zstd -19.

    No one publishes this; it is the honest opponent of an entropy-coded format, beside the published one.
    """
    rank_V = np.empty(len(unigram_counts_V), np.int64)
    rank_V[np.argsort(-unigram_counts_V, kind="stable")] = np.arange(len(rank_V))
    num_bytes = 0
    for start in range(0, len(stored.ids), BLOCK):
        ids, kept = stored.ids[start : start + BLOCK], stored.ids[start : start + BLOCK] >= 0
        ranks = np.where(kept, rank_V[ids], np.iinfo(np.int64).max)
        order = np.argsort(ranks, axis=1)
        gaps = np.diff(np.take_along_axis(ranks, order, 1), axis=1, prepend=0)[
            np.sort(kept, axis=1)[:, ::-1]
        ]
        counts = np.rint(np.exp(stored.logprobs[start : start + BLOCK]) * num_draws)
        counts = np.take_along_axis(counts, order, 1)[np.sort(kept, axis=1)[:, ::-1]]
        columns = (kept.sum(axis=1), gaps & 255, gaps >> 8, counts)
        packed = [
            zstandard.ZstdCompressor(level=19).compress(c.astype(np.uint8).tobytes())
            for c in columns
        ]
        num_bytes += sum(map(len, packed))
    name = f"RS-KD N={num_draws}, our zstd"
    return dataclasses.replace(stored, name=name, bytes_per_position=num_bytes / len(stored.ids))


DISTILLKIT_CONFIGS: dict[str, dict[str, Any]] = {  # the README's, at a61c2e7; `d` is the vocabulary
    "budget": {"k": 50, "exact_k": 1, "polynomial_terms": [0, 1, "sqrt"]},
    "recommended": {"k": 128, "exact_k": 16, "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"]},
    "recommended, normalize_t": {
        "k": 128,
        "exact_k": 16,
        "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"],
        "normalize_t": True,
    },
}


def compress_distillkit(logprobs_PV: Logprobs, checkout: Path, config: str) -> Stored:
    """DistillKit's LogprobCompressor, there and back: its bytes counted, its logprobs as its loss reads them."""
    if not (checkout / "distillkit/compression").is_dir():
        raise ValueError(
            f"{checkout} is no checkout of DistillKit: it has no distillkit/compression."
        )
    with import_from(checkout):
        configuration = importlib.import_module("distillkit.compression.config")
        compressor = importlib.import_module("distillkit.compression.compressor")
    entries = {
        "exact_dtype": "bfloat16",
        "term_dtype": "float32",
        "residual_bins": [],
        "delta_encoding": False,
    }
    entries |= {"d": logprobs_PV.shape[1], "error_diffusion": False, **DISTILLKIT_CONFIGS[config]}
    codec = compressor.LogprobCompressor(configuration.DistributionQuantizationConfig(**entries))
    ids, logprobs, num_bytes = [], [], 0
    for chunk in iterate_chunks(logprobs_PV):
        row = codec.compress(chunk[None])
        num_bytes += sum(column.numel() for column in row.values())
        decoded_ids, decoded = codec.decompress_to_sparse(row)
        ids.append(decoded_ids[0].to(torch.int32))
        logprobs.append(decoded[0].float())
    name = f"DistillKit {config}"
    return Stored(
        name, num_bytes / len(logprobs_PV), torch.cat(ids).numpy(), torch.cat(logprobs).numpy()
    )


MEGATRON_STUBS = (  # what its two modules import; nothing of it takes part in what is measured
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


def save_megatron(
    logprobs_PV: Logprobs, checkout: Path, k: int = 64, microbatch: int = 512
) -> tuple[Stored, Stored]:
    """Megatron-LM's LogitsSaverHooks, there and back: (before zstd: 5 B an entry, the tar that it writes).

    Each `microbatch` positions are one of its microbatches, each BLOCK positions one of its iterations.
    """
    saving, storage, arguments = import_megatron(checkout)
    saver = make_megatron_saver(saving, k)
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


def make_megatron_saver(saving: Any, k: int) -> Any:
    """Return a LogitsSaverHooks of one rank; its constructor wants a whole training run."""
    saver = object.__new__(saving.LogitsSaverHooks)
    saver.k, saver.p, saver.min_k, saver._save_dtype = k, None, 1, torch.float16
    saver.tp_rank, saver.tp_size = 0, 1
    saver._topp_kept_counts, saver._pending_writes = [], {}
    return saver


def import_megatron(checkout: Path) -> tuple[Any, Any, types.SimpleNamespace]:
    """Import (logits_saver, utils_logits) from a checkout, with empty modules in place of the rest of Megatron.

    Also returns what its `get_args()` will return.
    """
    folder = checkout / "megatron/training/distillation"
    if not folder.is_dir():
        raise ValueError(
            f"{checkout} is no checkout of Megatron-LM: it has no megatron/training/distillation."
        )
    arguments = types.SimpleNamespace(curr_iteration=0)
    stubs = {name: make_stub(name) for name in MEGATRON_STUBS}
    stubs["megatron.training"].get_args = lambda: arguments
    stubs["megatron.training.distillation"].__path__ = [str(folder)]
    msc = stubs["megatron.core.msc_utils"]  # remote storage: off
    msc.MultiStorageClientFeature = types.SimpleNamespace(is_enabled=lambda: False)
    msc.maybe_msc = types.SimpleNamespace(os=os)
    with mock.patch.dict(sys.modules, stubs):
        saving = importlib.import_module("megatron.training.distillation.logits_saver")
        storage = importlib.import_module("megatron.training.distillation.utils_logits")
    return saving, storage, arguments


def make_stub(name: str) -> Any:
    """Return a module that has whatever is imported from it."""

    def get_attribute(attribute: str) -> mock.MagicMock:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return mock.MagicMock(name=attribute)

    module: Any = types.ModuleType(name)
    module.__getattr__ = get_attribute
    return module


@contextlib.contextmanager
def import_from(folder: Path) -> Iterator[None]:
    """Look for modules in `folder` first."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def iterate_chunks(logprobs_PV: Logprobs, size: int = CHUNK) -> Iterator[torch.Tensor]:
    """Yield `size` positions at a time, copied into memory."""
    for start in range(0, len(logprobs_PV), size):
        yield torch.from_numpy(np.array(logprobs_PV[start : start + size]))


# --- metrics ---


@dataclasses.dataclass(frozen=True)
class Exact:
    """Sums over the whole vocabulary that every opponent's measures need, each float64 [P]."""

    logprobs: Logprobs  # [P, V]
    log_spread: NDArray[np.float64]  # [V], log of the unigram that a tail is spread by
    negative_entropy: NDArray[np.float64]  # sum of p log p
    spread_term: NDArray[np.float64]  # sum of p log_spread
    sum_of_squares: NDArray[np.float64]  # sum of p squared


def sum_exact(logprobs_PV: Logprobs, unigram_counts_V: NDArray[np.int64]) -> Exact:
    """Read all distributions once. The spread is the unigram counts plus 1: no id has none of a tail."""
    spread = unigram_counts_V + 1.0
    log_spread = np.log(spread / spread.sum())
    log_spread_V = torch.from_numpy(log_spread)
    columns: list[list[torch.Tensor]] = [[], [], []]
    for chunk in iterate_chunks(logprobs_PV):
        chunk = chunk.double()
        probs = chunk.exp()
        columns[0].append(torch.nan_to_num(probs * chunk).sum(dim=-1))  # 0 log 0 = 0
        columns[1].append(probs @ log_spread_V)
        columns[2].append(probs.square().sum(dim=-1))
    sums = [torch.cat(c).numpy() for c in columns]
    return Exact(logprobs_PV, log_spread, sums[0], sums[1], sums[2])


@dataclasses.dataclass(frozen=True)
class Parts:
    """A Stored beside the exact distributions, on its kept ids S and one tail bucket; all float64."""

    kept: NDArray[np.bool_]  # [P, K]
    exact: NDArray[np.float64]  # [P, K] probabilities
    exact_tail: NDArray[np.float64]  # [P]
    stored: NDArray[np.float64]  # [P, K], divided by what they and the tail sum to
    stored_tail: NDArray[np.float64]  # [P]
    raw: NDArray[np.float64]  # [P, K], as stored


def split_parts(exact: Exact, stored: Stored) -> Parts:
    """Gather what the measures compare. A tail that is not stored is 1 minus the kept, at least MIN_TAIL."""
    kept = stored.ids >= 0
    rows = np.arange(len(stored.ids))[:, None]
    exact_PK = np.where(
        kept, np.exp(exact.logprobs[rows, np.maximum(stored.ids, 0)].astype(np.float64)), 0
    )
    raw_PK = np.where(kept, np.exp(stored.logprobs.astype(np.float64)), 0)
    if stored.tail_logprobs is None:
        tail_P = np.maximum(1 - raw_PK.sum(axis=1), MIN_TAIL)
    else:
        tail_P = np.maximum(np.exp(stored.tail_logprobs.astype(np.float64)), MIN_TAIL)
    total_P = raw_PK.sum(axis=1) + tail_P
    exact_tail_P = np.maximum(1 - exact_PK.sum(axis=1), 0)
    return Parts(kept, exact_PK, exact_tail_P, raw_PK / total_P[:, None], tail_P / total_P, raw_PK)


def compute_head_kl(parts: Parts) -> NDArray[np.float64]:
    """KL(exact || stored) over the kept ids and one bucket for the rest, nats [P]: what quantising alone costs."""
    head = np.where(parts.kept, parts.exact * log_ratio(parts.exact, parts.stored), 0).sum(axis=1)
    return head + parts.exact_tail * log_ratio(parts.exact_tail, parts.stored_tail)


def compute_shape_kl(parts: Parts) -> NDArray[np.float64]:
    """KL(exact || stored) over the kept ids alone, both made to sum to 1, nats [P].

    What is lost of the head however a reader treats the rest: fair to formats that store no tail.
    """
    exact = parts.exact / parts.exact.sum(axis=1, keepdims=True)
    stored = parts.raw / parts.raw.sum(axis=1, keepdims=True)
    return np.where(parts.kept, exact * log_ratio(exact, stored), 0).sum(axis=1)


def compute_full_kl(exact: Exact, stored: Stored, parts: Parts) -> NDArray[np.float64]:
    """KL(exact || stored) over the whole vocabulary, nats [P], the tail spread in proportion to the unigram counts."""
    log_spread_PK = exact.log_spread[np.maximum(stored.ids, 0)]
    spread_left = np.log1p(-np.where(parts.kept, np.exp(log_spread_PK), 0).sum(axis=1))
    cross_head = np.where(
        parts.kept, parts.exact * np.log(np.maximum(parts.stored, 1e-300)), 0
    ).sum(axis=1)
    spread_tail = exact.spread_term - np.where(parts.kept, parts.exact * log_spread_PK, 0).sum(
        axis=1
    )
    cross_tail = spread_tail + parts.exact_tail * (np.log(parts.stored_tail) - spread_left)
    return exact.negative_entropy - cross_head - cross_tail


def compute_squared_error(exact: Exact, parts: Parts) -> NDArray[np.float64]:
    """Sum over the vocabulary of (stored - exact) squared [P], 0 where nothing is stored.

    The squared length of the error of the gradient by the student's logits. Its mean is the variance of an
    unbiased opponent: RS-KD's is (1 - sum of p squared) / N.
    """
    difference = np.where(parts.kept, (parts.raw - parts.exact) ** 2 - parts.exact**2, 0).sum(
        axis=1
    )
    return exact.sum_of_squares + difference


def log_ratio(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return log(a / b), 0 where a is 0; finite where b underflowed."""
    return np.where(a > 0, np.log(np.maximum(a, 1e-300)) - np.log(np.maximum(b, 1e-300)), 0)


def measure(exact: Exact, stored: Stored) -> dict[str, float]:
    """Return the row of the table: means over positions.

    bytes: a position's, ids included. ids: kept at a position. head_kl, shape_kl, full_kl in nats. squared_error: see
    compute_squared_error. above_one: the share of positions whose kept probabilities sum to more than 1.001. An
    unbiased opponent has no tail: its KLs are not defined, and are left out.
    """
    parts = split_parts(exact, stored)
    row = {
        "bytes": stored.bytes_per_position,
        "ids": parts.kept.sum(axis=1).mean(),
        "squared_error": compute_squared_error(exact, parts).mean(),
        "above_one": (parts.raw.sum(axis=1) > 1.001).mean(),
    }
    if not stored.unbiased:
        row["head_kl"] = compute_head_kl(parts).mean()
        row["shape_kl"] = compute_shape_kl(parts).mean()
        row["full_kl"] = compute_full_kl(exact, stored, parts).mean()
    return {name: float(value) for name, value in row.items()}


# --- table ---

KLS = ("head_kl", "shape_kl", "full_kl")


def run_opponents(
    logprobs_PV: Logprobs,
    unigram_counts_V: NDArray[np.int64],
    *,
    distillkit: Path | None,
    megatron: Path | None,
) -> Iterator[tuple[str, Stored | None]]:
    """Yield (name, what it stored) of each opponent, None for one whose code was not given."""
    for k in (12, 50, 64, 256):
        top_k = keep_top_k(logprobs_PV, k)
        yield top_k.name, top_k
    if megatron is None:
        yield "Megatron-LM top-64", None
    else:
        for saved in save_megatron(logprobs_PV, megatron):
            yield saved.name, saved
    for config in DISTILLKIT_CONFIGS:
        name = f"DistillKit {config}"
        yield name, compress_distillkit(logprobs_PV, distillkit, config) if distillkit else None
    drawn = draw_rs_kd(logprobs_PV)
    yield drawn.name, drawn
    recoded = recode_rs_kd(drawn, unigram_counts_V)
    yield recoded.name, recoded


def format_row(name: str, row: dict[str, float] | None) -> str:
    """Return a line of the table."""
    if row is None:
        return f"{name:<36} not run: give the path of its checkout"
    kls = [f"{row[key]:>10.2e}" if key in row else f"{'-':>10}" for key in KLS]
    error, above = f"{row['squared_error']:>10.2e}", f"{row['above_one']:>9.1%}"
    return f"{name:<36}{row['bytes']:>8.1f}{row['ids']:>7.1f}" + "".join([*kls, error, above])
