"""Optimizers and schedules: the numbers of PyTorch and of the formulas, and resuming as if never stopped."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW, Muon
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from retort.training.arguments import training_arguments
from retort.training.loop import build_trainer
from retort.training.optimizers import build_muon
from retort.training.trainer import DistillationTrainer
from support.bench import Bench, assert_same_curve, assert_same_weights, read_log, read_weights

LINES: dict[str, Any] = {"lr_scheduler_type": "constant", "learning_rate": 1e-2}


def make_trainer(bench: Bench, folder: Path, **keys: Any) -> DistillationTrainer:
    job = bench.job(
        bench.table, device="cpu", distillation_type="output", dataloader_num_workers=0, **keys
    )
    return build_trainer(training_arguments(folder, job), job)


def read_rates(folder: Path) -> list[float]:
    return [float(row["learning_rate"]) for row in read_log(folder)]


@pytest.fixture(scope="module")
def default(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("default")
    bench.train(folder, bench.cache, save_steps=2, **LINES)
    return folder


def differ(one: Path, other: Path) -> bool:
    mine, theirs = read_weights(one), read_weights(other)
    return any(not torch.equal(mine[name], theirs[name]) for name in mine)


# ---------------------------------------------------------------------------------------------------------
# Optimizers


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "muon"])
def test_a_resumed_training_ends_as_an_uninterrupted_one_with_every_optimizer(
    optim: str, bench: Bench, default: Path, tmp_path: Path
) -> None:
    keys = LINES | {"optim": optim, "save_steps": 2, "weight_decay": 0.1}
    bench.train(tmp_path / "whole", bench.cache, **keys)
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "resumed/checkpoint-2")
    bench.train(tmp_path / "resumed", bench.cache, **keys)
    assert_same_weights(tmp_path / "resumed", tmp_path / "whole")
    assert_same_curve(tmp_path / "resumed", tmp_path / "whole")
    assert differ(tmp_path / "whole", default)


def make_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=2, **shape))


def fill_gradients(model: LlamaForCausalLM, *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator)


def test_muon_is_pytorchs_for_the_matrices_of_layers_and_adamw_for_the_rest(tmp_path: Path) -> None:
    model, other = make_llama(), make_llama()
    rate, decay, betas, eps = 0.01, 0.1, (0.8, 0.95), 1e-6
    arguments = TrainingArguments(
        str(tmp_path),
        learning_rate=rate,
        weight_decay=decay,
        adam_beta1=betas[0],
        adam_beta2=betas[1],
        adam_epsilon=eps,
        use_cpu=True,
    )
    decayed = [name for name, weight in model.named_parameters() if weight.ndim > 1]
    found = build_muon(model, arguments, decayed=decayed)
    named = dict(other.named_parameters())
    hidden = [w for name, w in named.items() if "_proj." in name]
    assert len(hidden) == 14
    ends = [named["model.embed_tokens.weight"], named["lm_head.weight"]]
    norms = [weight for name, weight in named.items() if "norm" in name]
    assert len(hidden) + len(ends) + len(norms) == len(named)
    muon = Muon(hidden, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    adamw = AdamW(
        [{"params": ends, "weight_decay": decay}, {"params": norms, "weight_decay": 0.0}],
        lr=rate,
        betas=betas,
        eps=eps,
        fused=True,
    )
    for step in range(3):
        for group in (*found.param_groups, *muon.param_groups, *adamw.param_groups):
            group["lr"] = rate / (step + 1)  # as a schedule does
        for each in (model, other):
            fill_gradients(each, seed=step)
        found.step()
        muon.step()
        adamw.step()
        if step == 1:  # restored, with other objects in place of the groups and the state
            found.load_state_dict(found.state_dict())
    for (name, mine), theirs in zip(model.named_parameters(), named.values(), strict=True):
        assert torch.equal(mine, theirs), name


def test_muon_leaves_frozen_weights_out(bench: Bench, tmp_path: Path) -> None:
    trainer = make_trainer(bench, tmp_path, optim="muon", freeze=["q_proj", "embed_tokens"])
    groups = trainer.create_optimizer().param_groups
    inside = {id(weight) for group in groups for weight in group["params"]}
    for name, weight in trainer.model.named_parameters():
        assert (id(weight) in inside) == ("q_proj" not in name and "embed" not in name), name


def test_betas_epsilon_and_decay_reach_the_optimizer(bench: Bench, tmp_path: Path) -> None:
    keys = {"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6, "weight_decay": 0.1}
    trainer = make_trainer(bench, tmp_path, **keys)
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, AdamW)
    names = {id(weight): name for name, weight in trainer.model.named_parameters()}
    decayed = set()
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["fused"]) == ((0.8, 0.9), 1e-6, True)
        decayed |= {names[id(w)] for w in group["params"] if group["weight_decay"] == 0.1}
    assert decayed == {name for name in names.values() if "norm" not in name}
    assert len(decayed) < len(names)


def test_a_norm_of_0_clips_no_gradient(bench: Bench, tmp_path: Path) -> None:
    for norm in (0.0, 1e9, 1e-3):
        keys = LINES | {"adam_epsilon": 1e-3}  # beside which the size of a gradient matters
        bench.train(tmp_path / str(norm), bench.cache, max_grad_norm=norm, **keys)
    assert_same_weights(tmp_path / "0.0", tmp_path / str(1e9))
    assert differ(tmp_path / "0.0", tmp_path / "0.001")


# ---------------------------------------------------------------------------------------------------------
# Schedules


@pytest.mark.parametrize(
    ("given", "decay", "last"),
    [
        ({}, 2, lambda part: (1 + math.cos(math.pi * part)) / 2),
        ({"num_decay_steps": 5, "decay_type": "1-sqrt"}, 5, lambda part: 1 - math.sqrt(part)),
        (
            {"num_decay_steps": 4, "decay_type": "linear", "min_lr_ratio": 0.1},
            4,
            lambda part: 1 - 0.9 * part,
        ),
    ],
)
def test_warmup_stable_decay_is_flat_until_its_last_steps(
    given: dict[str, Any], decay: int, last: Any, bench: Bench, tmp_path: Path
) -> None:
    steps, warmup = 12, 3
    bench.train(
        tmp_path,
        bench.table,
        distillation_type="output",
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs=given,
        learning_rate=0.01,
        warmup_steps=warmup,
        max_steps=steps,
    )
    low = given.get("min_lr_ratio", 0.0)
    expected = [low + (1 - low) * n / warmup for n in range(warmup)]
    expected += [1.0] * (steps - warmup - decay) + [last(n / decay) for n in range(decay)]
    assert read_rates(tmp_path) == pytest.approx([0.01 * part for part in expected], rel=1e-3)


def test_a_cosine_ends_at_its_least_rate(bench: Bench, tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.5},
    }
    bench.train(tmp_path, bench.table, distillation_type="output", learning_rate=0.01, **keys)
    expected = [0.01 * (0.5 + 0.5 * (1 + math.cos(math.pi * n / 4)) / 2) for n in range(4)]
    assert read_rates(tmp_path) == pytest.approx(expected, rel=1e-3)


def test_a_decay_longer_than_the_training_is_refused_once_its_steps_are_known(
    bench: Bench, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"max_steps": None, "num_epochs": 1, "warmup_steps": 10_000}
    with pytest.raises(ValueError, match=r"warmup_steps is 10000 and the rate falls in the last"):
        make_trainer(bench, tmp_path, lr_scheduler_type="warmup_stable_decay", **keys)


# ---------------------------------------------------------------------------------------------------------
# Another run's checkpoint


def test_a_stable_phase_is_continued_with_another_end(bench: Bench, tmp_path: Path) -> None:
    """What warmup_stable_decay is for: one long run, from which shorter ones branch off to decay."""
    wsd = LINES | {"lr_scheduler_type": "warmup_stable_decay", "save_steps": 2}
    long, whole, branch = (tmp_path / name for name in ("long", "whole", "branch"))
    bench.train(long, bench.cache, max_steps=10, save_total_limit=9, **wsd)
    ends = wsd | {"max_steps": 6, "lr_scheduler_kwargs": {"num_decay_steps": 2}}
    bench.train(whole, bench.cache, **ends)
    start = str(long / "checkpoint-4")
    bench.train(branch, bench.cache, resume_from_checkpoint=start, **ends)
    assert_same_weights(branch, whole)
    late = wsd | {"max_steps": 14, "resume_from_checkpoint": str(long / "checkpoint-10")}
    with pytest.raises(
        ValueError, match=r"goes on with max_steps 10, but training.max_steps is 14"
    ):
        bench.train(tmp_path / "late", bench.cache, **late)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"optim": "adamw_torch"}, "optim adamw_torch_fused, but training.optim is adamw_torch"),
        ({"adam_beta1": 0.8}, "adam_beta1 0.9, but training.adam_beta1 is 0.8"),
        ({"adam_beta2": 0.99}, "adam_beta2 0.999, but"),
        ({"adam_epsilon": 1e-6}, "adam_epsilon 1e-08, but"),
        ({"freeze": ["norm"]}, "freeze none, but training.freeze is norm"),
    ],
)
def test_a_checkpoint_of_another_optimizer_is_refused(
    changed: dict[str, Any], said: str, bench: Bench, default: Path, tmp_path: Path
) -> None:
    keys = LINES | {"max_steps": 6, "resume_from_checkpoint": str(default / "checkpoint-2")}
    with pytest.raises(ValueError, match=f"which goes on with {said}"):
        bench.train(tmp_path, bench.cache, **keys, **changed)


# ---------------------------------------------------------------------------------------------------------
# Frozen weights


def split_by_name(weights: dict[str, Tensor], part: str) -> tuple[set[str], set[str]]:
    inside = {name for name in weights if part in name}
    return inside, weights.keys() - inside


@pytest.mark.parametrize("pattern", ["embed_tokens", "lm_head", r"layers\.0\."])
def test_frozen_weights_keep_their_bits_and_have_no_state(
    pattern: str, bench: Bench, tmp_path: Path
) -> None:
    start = make_trainer(bench, tmp_path / "start").model.state_dict()
    summary = bench.train(
        tmp_path / "run",
        bench.cache,
        freeze=[pattern],
        save_steps=2,
        use_gradient_checkpointing=True,
        weight_decay=0.1,
        **LINES,
    )
    found = read_weights(tmp_path / "run")
    frozen, trained = split_by_name(found, pattern.replace("\\", ""))
    assert frozen and trained
    for name in frozen:
        assert torch.equal(found[name], start[name]), name
    for name in trained:
        assert not torch.equal(found[name], start[name]), name
    state = torch.load(tmp_path / "run/checkpoint-2/optimizer.pt", weights_only=True)["state"]
    assert len(state) == len(trained)
    assert summary.trained_parameters == sum(found[name].numel() for name in trained)
    assert summary.student_parameters == sum(weight.numel() for weight in found.values())


def test_a_tied_output_layer_is_frozen_by_either_name(
    bench: Bench, tied_student: Path, tmp_path: Path
) -> None:
    start = make_trainer(bench, tmp_path / "start", student=tied_student).model.state_dict()
    for name in ("embed_tokens", "lm_head"):
        bench.train(tmp_path / name, bench.cache, student=tied_student, freeze=[name], **LINES)
        found = read_weights(tmp_path / name)
        assert torch.equal(found["lm_head.weight"], start["lm_head.weight"])
        assert not torch.equal(found["model.norm.weight"], start["model.norm.weight"])


@pytest.fixture(scope="module")
def tied_student(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import json

    path = tmp_path_factory.mktemp("tied") / "student.json"
    content = json.loads(tiny_student.read_text()) | {"tie_word_embeddings": True}
    path.write_text(json.dumps(content))
    return path


def test_patterns_that_freeze_nothing_or_everything_are_refused(
    bench: Bench, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"has 'embedding', which is found in no parameter of the"):
        make_trainer(bench, tmp_path, freeze=["norm", "embedding"])
    with pytest.raises(ValueError, match="which together freeze every parameter"):
        make_trainer(bench, tmp_path, freeze=["weight"])
