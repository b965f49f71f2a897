"""Training from the caches of several teachers: losses, held-out KL, restarts, and what is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from retort.cache.mixed import CacheMix
from retort.cache.reader import LogitCache
from retort.config.teacher import MixedTeacher
from retort.models.load import load_pretrained
from retort.teacher.features import MixedFeatures, read_features
from retort.teacher.records import CacheRun
from retort.training.held_out import HeldOut, open_held_out
from retort.training.signals import open_signal, require_mixable
from support.bench import Bench, assert_same_curve, assert_same_weights, read_log
from support.jobs import make_job
from support.records import make_run_record, make_worker_record
from support.sections import section
from support.tiny import make_cache, score_held_out, tokenize

WEIGHTS = (0.75, 0.25)
STILL = 1e-30  # a learning rate that leaves the weights as they are


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """Return the tiny teacher with other weights."""
    folder = tmp_path_factory.mktemp("other") / "teacher"
    shutil.copytree(tiny_teacher, folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.05)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def top8(bench: Bench, other: Path, tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    return make_cache(tmp_path_factory.mktemp("top8"), bench.index_path, other, top_k=8)


@pytest.fixture(scope="module")
def full(bench: Bench, other: Path, tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    return make_cache(tmp_path_factory.mktemp("full"), bench.index_path, other, top_k="full")


def read_soft(folder: Path) -> list[float]:
    return [float(row["soft_loss"]) for row in read_log(folder)]


def test_the_loss_is_the_weighted_mean_of_those_from_each_teacher(
    bench: Bench, top8: LogitCache, tmp_path: Path
) -> None:
    found = {}
    for name, source in (
        ("mixed", CacheMix((bench.cache, top8), WEIGHTS)),
        ("one", bench.cache),
        ("other", top8),
    ):
        bench.train(tmp_path / name, source, learning_rate=STILL, temperature=2.0)
        found[name] = read_soft(tmp_path / name)
    pairs = zip(found["one"], found["other"], strict=True)
    expected = [WEIGHTS[0] * one + WEIGHTS[1] * other for one, other in pairs]
    assert found["mixed"] == pytest.approx(expected, rel=1e-5)
    assert found["one"] != pytest.approx(found["other"], rel=1e-2)


@pytest.mark.parametrize("kept", ["top8", "full"])
def test_a_training_that_was_killed_ends_with_the_weights_of_one_that_was_not(
    kept: str, bench: Bench, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    mine = bench.cache if kept == "top8" else bench.full
    mix = CacheMix((mine, request.getfixturevalue(kept)), WEIGHTS)
    keys: dict[str, Any] = {"max_steps": 5, "save_steps": 3, "learning_rate": 1e-2}
    keys |= {"temperature": 2.0, "temperature_end": 1.0, "packing": True, "batch_size": 2}
    bench.train(tmp_path / "whole", mix, **keys)
    checkpoint = "checkpoint-3"
    shutil.copytree(tmp_path / "whole" / checkpoint, tmp_path / "resumed" / checkpoint)
    bench.train(tmp_path / "resumed", mix, **keys)
    assert_same_curve(tmp_path / "whole", tmp_path / "resumed")
    assert_same_weights(tmp_path / "whole", tmp_path / "resumed")


def test_the_held_out_kl_is_from_the_mixture(bench: Bench, other: Path, tmp_path: Path) -> None:
    paths = []
    for name, teacher in (("one", bench.teacher_path), ("other", other)):
        (tmp_path / name).mkdir()
        paths.append(score_held_out(tmp_path / name, bench.index, teacher))
    training = section("training", eval_sequences=9, eval_steps=2)

    def hold_out(chosen: list[Path], weights: tuple[float, ...]) -> HeldOut:
        features = dict.fromkeys(chosen, None)
        found = open_held_out(
            bench.index, training, section("evaluation"), features=features, weights=weights
        )
        assert found is not None
        return found

    held_out = hold_out(paths, WEIGHTS)
    bench.train(tmp_path / "run", bench.cache, held_out=held_out, learning_rate=STILL, eval_steps=2)
    found = float(read_log(tmp_path / "run")[-1]["eval_kl"])
    members = tuple(read_features(path) for path in paths)
    mixed = MixedFeatures(members, WEIGHTS)
    assert mixed.name == f"0.75 {bench.teacher_path} + 0.25 {other}"
    table = held_out.table
    student = load_pretrained(str(tmp_path / "run" / "final"), dtype=torch.float32)
    pairs = list(zip(members, WEIGHTS, strict=True))
    total, val = 0.0, bench.index.read_split("val")
    for i in range(len(val)):
        row = val[i]
        if not (table.keys == val.keys[i]).all(axis=1).any():
            continue
        rows = slice(*val.position_offsets[i : i + 2].tolist())
        logits_PV = student(torch.from_numpy(row.ids.copy())[None].long()).logits[0].double()
        logq_PV = logits_PV[:-1][torch.from_numpy(row.loss_mask[:-1].copy())].log_softmax(-1)
        each = [w * m.logprobs("val", rows).double().exp() for m, w in pairs]
        p_PV = each[0] + each[1]
        torch.testing.assert_close(mixed.logprobs("val", rows).double().exp(), p_PV)
        total += float((p_PV * (p_PV.log() - logq_PV)).nan_to_num(0.0).sum().detach())
    assert found == pytest.approx(total / table.num_positions, rel=2e-3)


def test_weights_are_never_given_to_another_teachers_cache(
    bench: Bench, top8: LogitCache, other: Path, tmp_path: Path
) -> None:
    names = {"one": str(bench.teacher_path), "other": str(other)}
    for name, cache in (("one", bench.cache), ("other", top8)):
        shutil.copytree(cache.path.parent, tmp_path / name)
        made = make_run_record({"teacher": {"model_path": names[name]}}, dtype="float32")
        record = CacheRun(**dict(made), workers=(make_worker_record(made=made),), kinds=())
        record.write(tmp_path / name / "run.json")
    first, second = (tmp_path / name / "manifest.json" for name in names)
    mix = tuple(
        MixedTeacher(model_path=path, weight=weight)
        for path, weight in zip(names.values(), WEIGHTS, strict=True)
    )
    job = make_job(teacher=section("teacher", model_path=names["one"], mix=mix))

    def check(*paths: Path) -> None:
        require_mixable(job, [open_signal(path) for path in paths], paths)

    check(first, second)
    with pytest.raises(ValueError, match=r"is the cache of teacher .*whose weight it would get"):
        check(second, first)
    with pytest.raises(ValueError, match=r"learns from 2 teachers .* but --signal names 1 files"):
        check(first)
    with pytest.raises(ValueError, match=r"fingerprint.json is of a live teacher, but several"):
        check(first, bench.fingerprint)


def test_what_cannot_be_mixed_is_refused(
    bench: Bench, top8: LogitCache, tiny_corpus: Path, other: Path, tmp_path: Path
) -> None:
    mix = CacheMix((bench.cache, top8), WEIGHTS)
    for key, value in (("divergence", "reverse_kl"), ("position_weights", "teacher_entropy")):
        with pytest.raises(ValueError, match=rf"{value}.*mixture of several teachers is not known"):
            changed: dict[str, Any] = {key: value}
            bench.train(tmp_path / key, mix, **changed)
    index_path = tokenize(tmp_path / "tokens", tiny_corpus, other, max_length=32)
    foreign = make_cache(tmp_path / "foreign", index_path, other, top_k=8)
    with pytest.raises(ValueError, match=r"holds other sequences than .*cannot be mixed"):
        CacheMix((bench.cache, foreign), WEIGHTS)
    warmer = make_cache(tmp_path / "warm", bench.index_path, other, temperatures=(1.0, 4.0))
    with pytest.raises(ValueError, match=r"holds the tail's mass at \(1.0, 4.0\)"):
        CacheMix((bench.cache, warmer), WEIGHTS)
