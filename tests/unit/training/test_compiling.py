"""torch.compile and attention implementations: the losses of a plain student, resumed as if never stopped."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from retort.training.arguments import training_arguments
from retort.training.loop import build_trainer
from support.bench import Bench, assert_same_curve, assert_same_weights, read_log

KEYS: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2}


def assert_close_curves(one: Path, other: Path) -> None:
    for mine, theirs in zip(read_log(one), read_log(other), strict=True):
        for name in ("total_loss", "hard_loss", "soft_loss"):
            assert float(mine[name]) == pytest.approx(float(theirs[name]), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"packing": True}], ids=["padded", "packed"])
def test_a_compiled_student_has_the_losses_of_a_plain_one_and_resumes(
    more: dict[str, Any], bench: Bench, tmp_path: Path
) -> None:
    keys = KEYS | more
    bench.train(tmp_path / "plain", bench.cache, **keys)
    compiled = keys | {"torch_compile": True}
    bench.train(tmp_path / "compiled", bench.cache, **compiled)
    assert_close_curves(tmp_path / "compiled", tmp_path / "plain")
    assert (tmp_path / "compiled/training_log.csv").read_text() != (
        tmp_path / "plain/training_log.csv"
    ).read_text()
    shutil.copytree(tmp_path / "compiled/checkpoint-2", tmp_path / "resumed/checkpoint-2")
    bench.train(tmp_path / "resumed", bench.cache, **compiled)
    assert_same_weights(tmp_path / "resumed", tmp_path / "compiled")
    assert_same_curve(tmp_path / "resumed", tmp_path / "compiled")


@pytest.mark.parametrize("packing", [False, True])
def test_eager_attention_gives_the_losses_of_sdpa(
    packing: bool, bench: Bench, tmp_path: Path
) -> None:
    for name in ("sdpa", "eager"):
        keys = KEYS | {"attn_implementation": name, "packing": packing}
        bench.train(tmp_path / name, bench.cache, **keys)
    assert_close_curves(tmp_path / "eager", tmp_path / "sdpa")
    job = bench.job(bench.cache, device="cpu", attn_implementation="eager", temperature=1.0)
    trainer = build_trainer(training_arguments(tmp_path, job), job)
    assert trainer.model.config._attn_implementation == "eager"
