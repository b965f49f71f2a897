"""A training step from the cache beside other ways to the same gradient: time and memory, as ratios to cross-entropy.

    make benchmark-training
    python benchmarks/training.py [--vocabulary 32768] [--dtype float32] [--chunk-size 128]

One step is forward and backward of a student (Llama, 6 layers of 256, tied head: 13 million parameters at 32,768 ids,
38 at 131,072) over 2 x 512 tokens, without the optimizer. The teacher keeps 17 tokens a position on average. Every way
has a process of its own; they take turns, and the table gives medians of the fastest step of each turn. Memory is the
greatest resident size during the steps less that before the first one. `liger` (liger-kernel) and `veomni` (its file
chunk_topk_distill.py) run where Python finds them.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from retort.fused_loss import LossSettings, TeacherRows, compute_fused_loss
from retort.losses import compute_dense_divergence

BATCH, LENGTH, HIDDEN, LAYERS, KEPT = 2, 512, 256, 6, 17
_STEPS = 4
Step = Callable[[], Tensor]


def build_model(vocabulary: int, *, seed: int) -> PreTrainedModel:
    """Return a student."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=688,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def make_teacher(vocabulary: int) -> TeacherRows:
    """Return made-up distributions of `KEPT` tokens a position on average."""
    chance = np.random.default_rng(0)
    sizes = np.minimum(chance.geometric(1 / KEPT, BATCH * LENGTH), 100)
    ids = np.concatenate([chance.choice(vocabulary, n, replace=False) for n in sizes])
    weights = [chance.random(n) ** 4 + 0.01 for n in sizes]
    logprobs = np.concatenate([np.log(0.9 * w / w.sum()) for w in weights]).astype(np.float32)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    tails = np.full(len(sizes), np.log(0.1), np.float32)
    return TeacherRows(*map(torch.from_numpy, (offsets, ids, logprobs, tails)))


def to_rows(teacher: TeacherRows) -> tuple[Tensor, Tensor]:
    """Return ids and logprobs [P, K], padded by the last id at -inf."""
    sizes_P = teacher.offsets.diff()
    places_PK = teacher.offsets[:-1, None] + torch.arange(int(sizes_P.max()))
    is_kept_PK = places_PK < teacher.offsets[1:, None]
    places_PK = places_PK.minimum(teacher.offsets[1:, None] - 1)
    return teacher.ids[places_PK], teacher.logprobs[places_PK].masked_fill(~is_kept_PK, -torch.inf)


def build_step(model: PreTrainedModel, way: str, chunk_size: int | None) -> Step:
    """Return the forward pass of one way to train, up to its loss."""
    vocabulary = model.config.vocab_size
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(0, vocabulary, (BATCH, LENGTH + 1), generator=generator)
    inputs_BT, labels_P = ids_BT[:, :-1], ids_BT[:, 1:].reshape(-1)
    teacher = make_teacher(vocabulary)
    ids_PK, logprobs_PK = to_rows(teacher)
    count = BATCH * LENGTH

    def features() -> Tensor:
        hidden: Tensor = model.base_model(inputs_BT, use_cache=False).last_hidden_state
        return hidden.reshape(count, -1)

    def logits() -> Tensor:
        found: Tensor = model(inputs_BT, use_cache=False).logits
        return found.reshape(count, -1)

    def fused(alpha: float, temperature: float) -> Step:
        settings = LossSettings(alpha, temperature, chunk_size=chunk_size)

        def step() -> Tensor:
            return compute_fused_loss(
                features(),
                model.lm_head.weight,
                labels_P,
                teacher if alpha < 1 else None,
                settings,
                normalizer=count,
            ).total

        return step

    def cross_entropy() -> Tensor:
        shifted = torch.cat([inputs_BT[:, :1], ids_BT[:, 1:]], dim=1)[:, : LENGTH + 1]
        loss: Tensor = model(inputs_BT, labels=shifted[:, :LENGTH], use_cache=False).loss
        return loss

    def dense_sparse() -> Tensor:
        logits_PV = logits()
        hard = F.cross_entropy(logits_PV.float(), labels_P, reduction="sum")
        logq_PK = logits_PV.log_softmax(dim=-1).gather(1, ids_PK)
        probs_PK = logprobs_PK.exp()
        kl = (probs_PK * (logprobs_PK.clamp(min=-100.0) - logq_PK)).sum()
        return (0.5 * hard + 0.5 * kl) / count

    def online() -> Tensor:
        with torch.no_grad():
            teacher_logits = live(inputs_BT, use_cache=False).logits.reshape(count, -1)
        return compute_dense_divergence(logits(), teacher_logits, temperature=1.0) / count

    if way == "online":
        live = build_model(vocabulary, seed=2).eval().requires_grad_(False)
    if way == "liger":
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        live = build_model(vocabulary, seed=2).eval().requires_grad_(False)
        jsd = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False
        )

        def liger() -> Tensor:
            with torch.no_grad():
                theirs = live.base_model(inputs_BT, use_cache=False).last_hidden_state
            found: Tensor = jsd(
                features(),
                model.lm_head.weight,
                theirs.reshape(count, -1),
                live.lm_head.weight,
                labels_P,
            )
            return found

        return liger
    if way == "veomni":
        from chunk_topk_distill import chunk_topk_distill_function

        padded = logprobs_PK.clamp(min=-100.0)

        def veomni() -> Tensor:
            found = chunk_topk_distill_function(
                features()[None],
                model.lm_head.weight,
                labels_P[None],
                ids_PK[None],
                padded[None],
                chunk_size=1024,
                shift_labels=labels_P[None],
            )
            return found

        return veomni
    ways: dict[str, Step] = {
        "cross-entropy": cross_entropy,
        "sparse, dense logits": dense_sparse,
        "fused, cross-entropy": fused(1.0, 1.0),
        "fused, T = 1": fused(0.5, 1.0),
        "fused, T = 2": fused(0.5, 2.0),
        "online": online,
    }
    return ways[way]


def read_status(key: str) -> int:
    """Return a number of this process's /proc/self/status, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def run_way(flags: argparse.Namespace) -> None:
    """Print the seconds of the fastest step, and the greatest memory of one."""
    torch.set_num_threads(flags.threads)
    model = build_model(flags.vocabulary, seed=0).train()
    step = build_step(model, flags.way, flags.chunk_size)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=flags.dtype == "bfloat16")
    before = read_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    seconds = []
    for _ in range(_STEPS):
        started = time.perf_counter()
        with autocast:
            loss = step()
        loss.backward()  # type: ignore[no-untyped-call]
        seconds.append(time.perf_counter() - started)
        del loss
        model.zero_grad()
    print(json.dumps({"seconds": min(seconds), "bytes": read_status("VmHWM") - before}))


WAYS = (
    "cross-entropy",
    "fused, cross-entropy",
    "fused, T = 1",
    "fused, T = 2",
    "sparse, dense logits",
    "online",
    "liger",
    "veomni",
)


def main() -> None:
    """Let every way run in turn, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabulary", type=int, default=32_768)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--chunk-size", type=int, help="positions; default: Retort's own choice")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=WAYS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.way:
        run_way(flags)
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in flags.ways}
    for _ in range(flags.turns):
        for way in flags.ways:
            command = [sys.executable, *sys.argv, "--way", way]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(way, done.stderr[-300:])
            else:
                found[way].append(json.loads(done.stdout.splitlines()[-1]))
    base = {
        k: statistics.median(r[k] for r in found["cross-entropy"]) for k in ("seconds", "bytes")
    }
    print(f"{flags.vocabulary:,} ids, {flags.dtype}, {BATCH * LENGTH:,} positions")
    for way, runs in found.items():
        if not runs:
            print(f"{way:24} not run")
            continue
        seconds, peak = (statistics.median(r[k] for r in runs) for k in ("seconds", "bytes"))
        times = f"{seconds:8.3f} s ({seconds / base['seconds']:.2f})"
        print(f"{way:24}{times}{peak / 2**20:8.0f} MiB ({peak / base['bytes']:.2f})")


if __name__ == "__main__":
    main()
