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
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from retort.batches import IGNORE_INDEX
from retort.codec import SparseTargets
from retort.fused_loss import LossSettings, TeacherRows
from retort.losses import LossTerms, compute_dense_divergence
from retort.models import split_model
from retort.student_loss import Lesson, attach_loss

BATCH, LENGTH, HIDDEN, LAYERS, KEPT = 2, 512, 256, 6, 17
COUNT = BATCH * LENGTH
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


def make_teacher(vocabulary: int) -> SparseTargets:
    """Return made-up distributions of `KEPT` tokens a position on average."""
    chance = np.random.default_rng(0)
    sizes = np.minimum(chance.geometric(1 / KEPT, BATCH * LENGTH), 100)
    ids = np.concatenate([chance.choice(vocabulary, n, replace=False) for n in sizes])
    weights = [chance.random(n) ** 4 + 0.01 for n in sizes]
    logprobs = np.concatenate([np.log(0.9 * w / w.sum()) for w in weights]).astype(np.float32)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    tails = np.full((len(sizes), 1), np.log(0.1), np.float32)
    return SparseTargets(offsets, ids, logprobs, tails)


class Bench:
    """A student, a text, and the teacher's distributions as all ways take them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.vocabulary = int(model.config.vocab_size)
        generator = torch.Generator().manual_seed(1)
        ids_BT = torch.randint(0, self.vocabulary, (BATCH, LENGTH + 1), generator=generator)
        self.inputs_BT, self.labels_P = ids_BT[:, :-1], ids_BT[:, 1:].reshape(-1)
        targets = make_teacher(self.vocabulary)
        columns = (targets.offsets, targets.ids, targets.logprobs, targets.tail_logprobs[:, 0])
        self.rows = TeacherRows(*map(torch.from_numpy, columns))
        self.ids_PK, self.logprobs_PK = map(torch.from_numpy, targets.to_rows())
        self.ids_PK = self.ids_PK.long()

    def features(self, model: PreTrainedModel | None = None) -> Tensor:
        """Return hidden states [P, D] of the student, or of another model."""
        body = (model or self.model).base_model
        hidden: Tensor = body(self.inputs_BT, use_cache=False).last_hidden_state
        return hidden.reshape(COUNT, -1)

    def logits(self, model: PreTrainedModel | None = None) -> Tensor:
        """Return logits [P, V]."""
        found: Tensor = (model or self.model)(self.inputs_BT, use_cache=False).logits
        return found.reshape(COUNT, -1)

    def live_teacher(self) -> PreTrainedModel:
        """Return a frozen model of the student's size."""
        return build_model(self.vocabulary, seed=2).eval().requires_grad_(False)


def run_cross_entropy(bench: Bench) -> Step:
    """transformers' own loss, which counts one position less a row."""

    def step() -> Tensor:
        inputs_BT = bench.inputs_BT
        loss: Tensor = bench.model(inputs_BT, labels=inputs_BT, use_cache=False).loss
        return loss

    return step


def run_fused(bench: Bench, alpha: float, temperature: float, chunk_size: int | None) -> Step:
    """Retort's."""
    settings = LossSettings(alpha, temperature, chunk_size=chunk_size)
    attach_loss(split_model(bench.model), settings)
    ids_BT = bench.inputs_BT
    # A place for the label of the last position, and none for the first one's.
    padded_BT = F.pad(ids_BT, (0, 1))
    labels_BT = F.pad(bench.labels_P.view(BATCH, LENGTH), (1, 0), value=IGNORE_INDEX)
    lesson = Lesson(labels_BT, bench.rows if alpha < 1 else None, COUNT)

    def step() -> Tensor:
        terms: LossTerms = bench.model(
            input_ids=padded_BT, attention_mask=torch.ones_like(padded_BT), lesson=lesson
        )
        return terms.total

    return step


def run_dense_sparse(bench: Bench) -> Step:
    """Sparse targets on all logits, by autograd, without a tail."""

    def step() -> Tensor:
        logits_PV = bench.logits()
        hard = F.cross_entropy(logits_PV.float(), bench.labels_P, reduction="sum")
        logq_PK = logits_PV.log_softmax(dim=-1).gather(1, bench.ids_PK)
        logp_PK = bench.logprobs_PK
        kl = (logp_PK.exp() * (logp_PK.clamp(min=-100.0) - logq_PK)).sum()
        return (0.5 * hard + 0.5 * kl) / COUNT

    return step


def run_online(bench: Bench) -> Step:
    """A live teacher of the student's own size, over the whole vocabulary."""
    live = bench.live_teacher()

    def step() -> Tensor:
        with torch.no_grad():
            teacher_PV = bench.logits(live)
        return compute_dense_divergence(bench.logits(), teacher_PV, temperature=1.0) / COUNT

    return step


def run_liger(bench: Bench) -> Step:
    """Liger's chunked loss, beside a live teacher as well."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    live = bench.live_teacher()
    jsd = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False
    )

    def step() -> Tensor:
        with torch.no_grad():
            theirs = bench.features(live)
        weights = bench.model.lm_head.weight, live.lm_head.weight
        found: Tensor = jsd(bench.features(), weights[0], theirs, weights[1], bench.labels_P)
        return found

    return step


def run_veomni(bench: Bench, chunk_size: int = 1024) -> Step:
    """VeOmni's chunked loss of sparse targets, without a tail; in its own chunks, or in ours."""
    from chunk_topk_distill import chunk_topk_distill_function

    logprobs_PK = bench.logprobs_PK.clamp(min=-100.0)

    def step() -> Tensor:
        logprobs_P, _, divergence_P, _, _ = chunk_topk_distill_function(
            bench.features()[None],
            bench.model.lm_head.weight,
            bench.labels_P[None],
            bench.ids_PK[None],
            logprobs_PK[None],
            chunk_size=chunk_size,
            shift_labels=bench.labels_P[None],
        )
        loss: Tensor = 0.5 * (divergence_P - logprobs_P).mean()
        return loss

    return step


def build_step(model: PreTrainedModel, way: str, chunk_size: int | None) -> Step:
    """Return the forward pass of one way to train, up to its loss."""
    bench = Bench(model)
    if way in FUSED:
        return run_fused(bench, *FUSED[way], chunk_size)
    return OTHERS[way](bench)


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


FUSED = {  # alpha, temperature
    "fused, cross-entropy": (1.0, 1.0),
    "fused, T = 1": (0.5, 1.0),
    "fused, T = 2": (0.5, 2.0),
}
OTHERS: dict[str, Callable[[Bench], Step]] = {
    "cross-entropy": run_cross_entropy,
    "sparse, dense logits": run_dense_sparse,
    "online": run_online,
    "liger": run_liger,
    "veomni": run_veomni,
    "veomni, chunks of 64": partial(run_veomni, chunk_size=64),
}
WAYS = ("cross-entropy", *FUSED, *list(OTHERS)[1:])


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
