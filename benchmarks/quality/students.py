"""The students of the quality benchmark: what all ways share, training, and what is measured of a student.

Legend: P positions, T those of a sequence, C those of a chunk, V vocabulary, D width of the student.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import cache_logits
import numpy as np
import torch
import xxhash
from quality_ways import MAKERS, Targets, load_targets
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from retort.fused_loss import LossSettings, compute_fused_loss

CHUNK = 64  # positions whose logits are held at once
NUM_BINS = 15  # of the calibration error


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a student's numbers depend on, besides the way and the seed."""

    teacher: cache_logits.Settings
    steps: int = 300
    positions_per_step: int = 256  # in a row, of one sequence
    num_evaluated: int = 24  # sequences at the end, which no student trains on
    num_angle: int = 16  # sequences at the beginning, whose mean gradient the angles are of
    learning_rate: float = 4e-3  # greatest: a tenth of the steps up to it, then a cosine down to 0
    width: int = 64
    num_layers: int = 2
    num_heads: int = 4


def digest(entry: dict[str, Any]) -> str:
    """Return 16 hex digits of a JSON object."""
    return xxhash.xxh3_64_hexdigest(json.dumps(entry, sort_keys=True).encode())


class Bench:
    """The plan, the teacher's distributions, what is made of them in the folder, and the finished students."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.plan, self.folder = plan, folder
        self.given = cache_logits.ensure(folder / "logits", plan.teacher)
        self.length = self.given.tokens.shape[1]
        self.num_train = len(self.given.tokens) - plan.num_evaluated
        text = {"text": self.given.measured["text_digest"]}
        self.made_of = digest(dataclasses.asdict(plan) | text)
        trained_on = dataclasses.asdict(plan.teacher) | text | {"num_train": self.num_train}
        self.targets_folder = folder / f"targets-{digest(trained_on)}"
        self.targets_folder.mkdir(exist_ok=True)
        self.results: dict[tuple[str, int], dict[str, float]] = {}
        if self.results_path.exists():
            rows = map(json.loads, self.results_path.read_text().splitlines())
            self.results = {
                (r["way"], r["seed"]): r["found"] for r in rows if r["made_of"] == self.made_of
            }

    @property
    def results_path(self) -> Path:
        """A line of JSON for each finished student, of any plan."""
        return self.folder / "results.jsonl"

    def state_path(self, state: str) -> Path:
        """Where the weights are that gradients are compared at."""
        return self.folder / f"{state}-{self.made_of}.pt"

    def add(self, way: str, seed: int, found: dict[str, float]) -> None:
        """Keep a finished student's numbers."""
        self.results[way, seed] = found
        row = {"way": way, "seed": seed, "found": found, "made_of": self.made_of}
        with self.results_path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self, i: int) -> slice:
        """Return the positions of sequence i."""
        return slice(i * self.length, (i + 1) * self.length)

    def labels(self, rows: slice) -> Tensor:
        """Return the tokens of the text that follow these positions."""
        return torch.from_numpy(self.given.next_tokens[rows]).long()

    def logprobs(self, rows: slice) -> Tensor:
        """Return the teacher's [C, V], copied into memory."""
        return torch.from_numpy(np.array(self.given.logprobs[rows]))

    def load_targets(self, way: str) -> Targets | None:
        """Return a way's targets, None for CE and FullKD."""
        if way not in MAKERS:
            return None
        return load_targets(self.targets_folder, way, self.given, self.num_train)

    def build_student(self, *, seed: int) -> PreTrainedModel:
        """Return a Llama with a tied head, whose bias begins at the log of the unigram."""
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=self.plan.teacher.vocabulary,
            hidden_size=self.plan.width,
            intermediate_size=3 * self.plan.width,
            num_hidden_layers=self.plan.num_layers,
            num_attention_heads=self.plan.num_heads,
            max_position_embeddings=self.length,
            tie_word_embeddings=True,
        )
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        counts_V = torch.from_numpy(self.given.unigram_counts) + 0.1
        model.bias_V = torch.nn.Parameter((counts_V / counts_V.sum()).log().float())
        return model

    def compute_logits(self, model: PreTrainedModel, features_CD: Tensor) -> Tensor:
        """Return the student's logits [C, V]."""
        return torch.addmm(model.bias_V, features_CD, model.lm_head.weight.t())

    def compute_features(self, model: PreTrainedModel, rows: slice) -> Tensor:
        """Return the student's last hidden states [P, D] at positions of one sequence, which is read from its start."""
        i, first = divmod(rows.start, self.length)
        stop = first + rows.stop - rows.start
        tokens_BT = torch.from_numpy(self.given.tokens[i : i + 1, :stop]).long()
        hidden_BTD: Tensor = model.base_model(tokens_BT, use_cache=False).last_hidden_state
        return hidden_BTD[0, first:]


# --- training ---


def backpropagate(
    bench: Bench, model: PreTrainedModel, rows: slice, way: str, targets: Targets | None
) -> None:
    """Add to the student's gradients those of its mean loss at positions of one sequence."""
    features_PD = bench.compute_features(model, rows)
    if way == "FullKD":
        backpropagate_dense(bench, model, features_PD, rows)
        return
    labels_P = bench.labels(rows)
    teacher = targets.rows(rows) if targets else None
    settings = LossSettings(alpha=0.0 if teacher else 1.0)
    terms = compute_fused_loss(
        features_PD,
        model.lm_head.weight,
        labels_P,
        teacher,
        settings,
        bias_V=model.bias_V,
        normalizer=len(labels_P),
    )
    terms.total.backward()


def backpropagate_dense(
    bench: Bench, model: PreTrainedModel, features_PD: Tensor, rows: slice
) -> None:
    """The same of KL(teacher || student) over the whole vocabulary; the teacher's entropy has no gradient."""
    leaf_PD = features_PD.detach().requires_grad_()
    for start in range(0, len(leaf_PD), CHUNK):
        logits_CV = bench.compute_logits(model, leaf_PD[start : start + CHUNK])
        first = rows.start + start
        probs_CV = bench.logprobs(slice(first, first + len(logits_CV))).exp_()
        cross = logits_CV.logsumexp(dim=-1).sum() - (probs_CV * logits_CV).sum()
        (cross / len(leaf_PD)).backward()  # type: ignore[no-untyped-call]
    features_PD.backward(leaf_PD.grad)  # type: ignore[no-untyped-call]


def choose_rate(plan: Plan, step: int) -> float:
    """Return the learning rate of a step."""
    warmup_steps = max(1, plan.steps // 10)
    if step < warmup_steps:
        return plan.learning_rate * (step + 1) / warmup_steps
    done = (step - warmup_steps) / (plan.steps - warmup_steps)
    return plan.learning_rate * (1 + math.cos(math.pi * done)) / 2


def order_windows(bench: Bench, *, seed: int) -> list[slice]:
    """Return the positions of each step: all training positions in random order, then all in another."""
    random = np.random.default_rng(seed)
    size = bench.plan.positions_per_step
    num_windows = bench.num_train * bench.length // size
    num_epochs = math.ceil(bench.plan.steps / num_windows)
    order = np.concatenate([random.permutation(num_windows) for _ in range(num_epochs)])
    return [slice(w * size, (w + 1) * size) for w in order[: bench.plan.steps].tolist()]


def train_student(bench: Bench, way: str, *, seed: int) -> PreTrainedModel:
    """Train one student; FullKD's of seed 0 leaves its weights for the angles."""
    plan, targets = bench.plan, bench.load_targets(way)
    model = bench.build_student(seed=seed).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    states = {plan.steps // 2: "half", plan.steps: "end"} if (way, seed) == ("FullKD", 0) else {}
    for step, rows in enumerate(order_windows(bench, seed=seed)):
        for group in optimizer.param_groups:
            group["lr"] = choose_rate(plan, step)
        backpropagate(bench, model, rows, way, targets)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step + 1 in states:
            torch.save(model.state_dict(), bench.state_path(states[step + 1]))
    return model.eval()


# --- measures ---


@torch.inference_mode()
def evaluate(bench: Bench, model: PreTrainedModel | None) -> dict[str, float]:
    """Return means over the evaluated positions; without a model, of the teacher itself.

    loss: of the text, nats. kl: KL(teacher || student) over the whole vocabulary, nats. ece: expected calibration
    error of the most probable id, NUM_BINS bins of equal width (Guo et al., arXiv 1706.04599, equation 3).
    acceptance: the chance that the teacher accepts a token that the student drafted, sum of min(p, q) (Leviathan et
    al., arXiv 2211.17192, section 3).
    """
    sums: dict[str, list[Tensor]] = {"loss": [], "kl": [], "acceptance": []}
    confidences, hits = [], []
    for i in range(bench.num_train, len(bench.given.tokens)):
        features_TD = None if model is None else bench.compute_features(model, bench.rows(i))
        for start in range(0, bench.length, CHUNK):
            rows = slice(bench.rows(i).start + start, bench.rows(i).start + start + CHUNK)
            logp_CV, labels_C = bench.logprobs(rows), bench.labels(rows)
            logq_CV = logp_CV
            if model is not None and features_TD is not None:
                logits_CV = bench.compute_logits(model, features_TD[start : start + CHUNK])
                logq_CV = logits_CV.log_softmax(dim=-1)
            p_CV, q_CV = logp_CV.exp(), logq_CV.exp()
            sums["loss"].append(F.nll_loss(logq_CV, labels_C, reduction="none"))
            sums["acceptance"].append(torch.minimum(p_CV, q_CV).sum(dim=-1))
            sums["kl"].append((p_CV * (logp_CV - logq_CV)).sum(dim=-1))
            best = q_CV.max(dim=-1)
            confidences.append(best.values)
            hits.append(best.indices == labels_C)
    found = {name: torch.cat(values).double().mean().item() for name, values in sums.items()}
    return found | {"ece": compute_ece(torch.cat(confidences), torch.cat(hits))}


def compute_ece(confidences_P: Tensor, hits_P: Tensor) -> float:
    """Return the gap between mean confidence and accuracy of each bin, weighed by its positions."""
    bins_P = (confidences_P * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    gaps = torch.zeros(NUM_BINS, dtype=torch.float64)
    gaps.index_add_(0, bins_P, confidences_P.double() - hits_P.double())
    return gaps.abs().sum().item() / len(hits_P)


def compute_gradient(bench: Bench, model: PreTrainedModel, way: str) -> Tensor:
    """Return the gradient of a way's mean loss over the first num_angle sequences, all parameters in one row."""
    targets = bench.load_targets(way)
    model.zero_grad()
    for i in range(bench.plan.num_angle):
        backpropagate(bench, model, bench.rows(i), way, targets)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
