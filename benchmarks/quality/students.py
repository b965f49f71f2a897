"""Training one student of the quality benchmark.

Legend: P positions, T those of a sequence, C those of a chunk, V vocabulary, D width of the student.
"""

import math

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.quality.experiment import CHUNK, Experiment, Plan
from benchmarks.quality.targets import Targets
from retort.losses.fused_loss import compute_fused_loss
from retort.losses.terms import LossSettings


def backpropagate(
    experiment: Experiment, model: PreTrainedModel, rows: slice, way: str, targets: Targets | None
) -> None:
    """Add to the student's gradients those of its mean loss at positions of one sequence."""
    features_PD = experiment.compute_features(model, rows)
    if way == "FullKD":
        backpropagate_dense(experiment, model, features_PD, rows)
        return
    labels_P = experiment.labels(rows)
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
    experiment: Experiment, model: PreTrainedModel, features_PD: Tensor, rows: slice
) -> None:
    """The same for KL(teacher || student) over the whole vocabulary; the teacher's entropy has no gradient."""
    leaf_PD = features_PD.detach().requires_grad_()
    for start in range(0, len(leaf_PD), CHUNK):
        logits_CV = experiment.compute_logits(model, leaf_PD[start : start + CHUNK])
        first = rows.start + start
        probs_CV = experiment.logprobs(slice(first, first + len(logits_CV))).exp_()
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


def order_windows(experiment: Experiment, *, seed: int) -> list[slice]:
    """Return the positions of each step: every epoch has all training positions in an order of its own."""
    rng = np.random.default_rng(seed)
    size = experiment.plan.positions_per_step
    num_windows = experiment.num_train * experiment.length // size
    num_epochs = math.ceil(experiment.plan.steps / num_windows)
    order = np.concatenate([rng.permutation(num_windows) for _ in range(num_epochs)])
    return [slice(w * size, (w + 1) * size) for w in order[: experiment.plan.steps].tolist()]


def train_student(experiment: Experiment, way: str, *, seed: int) -> PreTrainedModel:
    """Train one student; FullKD's of seed 0 saves its weights for the angles."""
    plan, targets = experiment.plan, experiment.load_targets(way)
    model = experiment.build_student(seed=seed).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    states = {plan.steps // 2: "half", plan.steps: "end"} if (way, seed) == ("FullKD", 0) else {}
    for step, rows in enumerate(order_windows(experiment, seed=seed)):
        for group in optimizer.param_groups:
            group["lr"] = choose_rate(plan, step)
        backpropagate(experiment, model, rows, way, targets)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step + 1 in states:
            torch.save(model.state_dict(), experiment.state_path(states[step + 1]))
    return model.eval()


def compute_gradient(experiment: Experiment, model: PreTrainedModel, way: str) -> Tensor:
    """Return the gradient of a way's mean loss over the first num_angle sequences, all parameters in one row."""
    targets = experiment.load_targets(way)
    model.zero_grad()
    for i in range(experiment.plan.num_angle):
        backpropagate(experiment, model, experiment.rows(i), way, targets)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
