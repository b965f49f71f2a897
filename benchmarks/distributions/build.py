"""Make the distributions and keep them in a folder; see `python -m benchmarks.distributions --help` for its files.

Legend: P positions, S sequences, T positions of a sequence, V vocabulary.
"""

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.common import log
from benchmarks.distributions.gpt import TinyGPT, train_gpt
from benchmarks.distributions.mixture import (
    Mixture,
    compute_loss,
    fit_mixture,
    gather_evidence,
    mix,
)
from benchmarks.distributions.ngrams import NextTokens, look_up_all
from benchmarks.distributions.settings import Settings
from benchmarks.distributions.temperature import count_unique, find_temperature
from benchmarks.distributions.text import describe_text, prepare_text

TOP_K = (1, 12, 50, 64, 128, 256)  # whose mass is measured


@dataclasses.dataclass(frozen=True)
class Distributions:
    """The folder's arrays; logprobs is mapped, not read. `measured` is settings.json's entry of that name."""

    tokens: NDArray[np.int32]  # [S, T]
    next_tokens: NDArray[np.int32]  # [P]
    logprobs: NDArray[np.float32]  # [P, V]
    unigram_counts: NDArray[np.int64]  # [V]
    measured: dict[str, Any]


def default_folder() -> Path:
    """Return the folder used without --out: in the user's cache, never in the repository."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "retort-benchmarks/logits-32k"


def load(folder: Path) -> Distributions:
    """Open what `build` made."""
    described = json.loads((folder / "settings.json").read_text())
    return Distributions(
        np.load(folder / "tokens.npy"),
        np.load(folder / "next_tokens.npy"),
        np.load(folder / "logprobs.npy", mmap_mode="r"),
        np.load(folder / "unigram_counts.npy"),
        described["measured"],
    )


def measure(logprobs_PV: NDArray[np.float32], next_tokens_P: NDArray[np.int32]) -> dict[str, Any]:
    """Return entropy (nats), unique ids, top-k masses, sum of squares and the held-out loss of distributions."""
    entropies, uniques, squares, masses, losses = [], [], [], [], []
    for start in range(0, len(logprobs_PV), 256):
        chunk = torch.from_numpy(logprobs_PV[start : start + 256])
        probs = chunk.exp()
        entropies.append(-(probs * chunk).sum(dim=-1))
        squares.append(probs.square().sum(dim=-1))
        uniques.append(count_unique(chunk))
        top = probs.topk(256, dim=-1).values.cumsum(dim=-1)
        masses.append(top[:, [k - 1 for k in TOP_K]])
        next_tokens = torch.from_numpy(next_tokens_P[start : start + 256]).long()
        losses.append(-chunk.gather(-1, next_tokens[:, None])[:, 0])
    entropy = torch.cat(entropies)
    quantiles = np.quantile(entropy.numpy(), [0.1, 0.5, 0.9]).tolist()
    mass = torch.cat(masses).mean(dim=0)
    return {
        "entropy": round(entropy.mean().item(), 4),
        "entropy_quantiles_10_50_90": [round(q, 3) for q in quantiles],
        "unique_ids_in_50": round(torch.cat(uniques).mean().item(), 3),
        "sum_of_squares": round(torch.cat(squares).mean().item(), 5),
        "mass_of_top": {str(k): round(m, 4) for k, m in zip(TOP_K, mass.tolist(), strict=True)},
        "held_out_loss": round(torch.cat(losses).mean().item(), 4),
    }


def write_distributions(
    path: Path,
    sequences: NDArray[np.int32],
    model: TinyGPT,
    indexes: list[NextTokens],
    unigram_V: NDArray[np.float64],
    mixture: Mixture,
) -> float:
    """Write logprobs [P, V] float32 to `path`, at the temperature that calibrates them; return it."""
    length = sequences.shape[1] - 1
    shape = (len(sequences) * length, len(unigram_V))
    logprobs_PV = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    for s, sequence in enumerate(sequences):
        probs_TV = mix(
            mixture,
            model.compute_probs(sequence[:-1]),
            unigram_V,
            look_up_all(indexes, sequence[:-1]),
        )
        logprobs_PV[s * length : (s + 1) * length] = np.log(probs_TV)
        if (s + 1) % 8 == 0:
            log(f"distributions: sequence {s + 1}/{len(sequences)}")
    temperature = find_temperature(logprobs_PV)
    for start in range(0, len(logprobs_PV), 256):
        chunk = torch.from_numpy(logprobs_PV[start : start + 256])
        chunk.copy_(torch.log_softmax(chunk.double() / temperature, dim=-1))
    logprobs_PV.flush()
    return temperature


def build(folder: Path, settings: Settings) -> None:
    """Make the distributions in `folder`."""
    text = prepare_text(settings)
    counts_V = np.bincount(text.stream, minlength=settings.vocabulary).astype(np.int64)
    unigram_V = (counts_V + 0.1) / (counts_V + 0.1).sum()
    model = train_gpt(text.stream, unigram_V, settings)
    indexes = [NextTokens(text.stream, n) for n in (1, 2, 3, 4)]
    evidence = gather_evidence(model, indexes, unigram_V, text.fit_sequences)
    mixture = fit_mixture(evidence)
    losses = {
        "gpt": float(-np.log(evidence.gpt).mean()),
        "mixture": compute_loss(mixture, evidence),
    }
    log(f"mixture: loss {losses['mixture']:.3f}, GPT alone {losses['gpt']:.3f}; {mixture}")

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").unlink(missing_ok=True)
    logprobs_path = folder / "logprobs.npy"
    temperature = write_distributions(
        logprobs_path, text.sequences, model, indexes, unigram_V, mixture
    )
    next_tokens = np.ascontiguousarray(text.sequences[:, 1:]).reshape(-1)
    measured = measure(np.load(logprobs_path, mmap_mode="r+"), next_tokens) | {
        "temperature": temperature,
        "fit_losses": losses,
        "mixture": dataclasses.asdict(mixture),
        **text.described,
        "cpu_seconds": round(time.process_time()),
    }
    text.tokenizer.save(str(folder / "tokenizer.json"))
    np.save(folder / "tokens.npy", np.ascontiguousarray(text.sequences[:, :-1]))
    np.save(folder / "next_tokens.npy", next_tokens)
    np.save(folder / "unigram_counts.npy", counts_V)
    described = describe_text(settings) | {"measured": measured}
    (folder / "settings.json").write_text(json.dumps(described, indent=2) + "\n")


def ensure(folder: Path, settings: Settings) -> Distributions:
    """Return the folder's distributions, made again unless they are of these settings and this machine's text."""
    path = folder / "settings.json"
    if path.exists():
        found = json.loads(path.read_text())
        found.pop("measured")
        if found == describe_text(settings):
            return load(folder)
        log(f"{folder} holds distributions of other settings or another text: they are made again")
    build(folder, settings)
    return load(folder)


def load_or_make(folder: Path) -> Distributions:
    """Return the folder's distributions whatever their settings; make those of the default settings if it has none."""
    if (folder / "settings.json").exists():
        return load(folder)
    return ensure(folder, Settings())
