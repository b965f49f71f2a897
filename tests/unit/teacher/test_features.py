"""Stored features give the live teacher's distributions, and damaged or foreign files are refused."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config

from retort.config.handoff import Job
from retort.io.fingerprints import TeacherRecord
from retort.models.causal_lm import CausalLM, split_model
from retort.models.heads import Head
from retort.models.load import load_teacher
from retort.teacher.features import (
    TeacherFeatures,
    digest_keys,
    iterate_rows,
    read_features,
    write_features,
)
from retort.teacher.validation import score_tables, score_validation
from retort.tokens.index import TokenIndex
from retort.tokens.indexing import build_index
from retort.tokens.sequences import SequenceTable
from support.jobs import make_job
from support.sections import section
from support.tiny import NUM_TOKENS, WIDTH, record, score_held_out, tiny_dataset, tokenize


def job_of(teacher: Path, **evaluation: Any) -> Job:
    return make_job(
        teacher=section("teacher", model_path=str(teacher), device="cpu"),
        evaluation=section("evaluation", **evaluation),
    )


@pytest.fixture(scope="module")
def features_path(
    tmp_path_factory: pytest.TempPathFactory, index: TokenIndex, tiny_teacher: Path
) -> Path:
    return score_held_out(
        tmp_path_factory.mktemp("validation"), index, tiny_teacher, fidelity_positions=500
    )


def live_logprobs(teacher: CausalLM, table: SequenceTable, *, num_tokens: int) -> Tensor:
    """The live model's log_softmax at every counted position, each sequence alone and unpadded."""
    found = []
    for i in range(len(table)):
        row = table[i]
        with torch.inference_mode():
            ids = torch.from_numpy(row.ids.astype(np.int64))[None]
            logits_PV = teacher.model(input_ids=ids).logits[0][torch.from_numpy(row.loss_mask)]
            logits_PV[:, num_tokens:] = -torch.inf
            found.append(logits_PV.double().log_softmax(-1))
    return torch.cat(found)


def test_stored_features_give_the_live_models_distribution(
    features_path: Path, index: TokenIndex, tiny_teacher: Path
) -> None:
    found = read_features(features_path)
    teacher = load_teacher(str(tiny_teacher), section("teacher", device="cpu"))
    places, sample = index.read_sample(num_positions=500)
    np.testing.assert_array_equal(found.train_sequences, places)
    for split, table in (("val", index.read_split("val")), ("train", sample)):
        assert table.num_positions > 100
        expected_PV = live_logprobs(teacher, table, num_tokens=NUM_TOKENS)
        found_PV = found.logprobs(split, slice(None))
        assert found_PV.shape == (table.num_positions, WIDTH)
        torch.testing.assert_close(
            found_PV[:, :NUM_TOKENS].double(), expected_PV[:, :NUM_TOKENS], rtol=0, atol=1e-5
        )
        assert bool((found_PV[:, NUM_TOKENS:] == -torch.inf).all())
        error_PV = (found_PV.double().exp() - expected_PV.exp()).abs()
        assert float(error_PV.max()) < 1e-6
        rows = slice(3, 9)
        assert torch.equal(found.logprobs(split, rows), found_PV[rows])


def test_file_says_which_teacher_it_is_of(
    features_path: Path, index: TokenIndex, tiny_teacher: Path
) -> None:
    found = read_features(features_path)
    fingerprint = TeacherRecord.read(features_path.parent / "fingerprint.json")
    assert (found.teacher, found.name) == (fingerprint.weights, str(tiny_teacher))
    assert found.num_tokens == NUM_TOKENS and found.num_parameters > 1000
    found.require("val", index.read_split("val"), source=features_path)
    found.require("train", index.read_sample(num_positions=500)[1], source=features_path)


def test_the_umask_says_who_reads_the_file(features_path: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    assert features_path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_scoring_again_gives_the_same_bytes(
    features_path: Path, index: TokenIndex, tiny_teacher: Path, tmp_path: Path
) -> None:
    score_validation(
        tmp_path / "again.safetensors",
        job_of(tiny_teacher, fidelity_positions=500),
        index_path=index.path,
        fingerprint_path=features_path.parent / "fingerprint.json",
    )
    assert (tmp_path / "again.safetensors").read_bytes() == features_path.read_bytes()


def test_other_sequences_than_those_scored_are_refused(
    features_path: Path, index: TokenIndex
) -> None:
    found, table = read_features(features_path), index.read_split("val")
    fewer = index.read_split("val", max_positions=table.num_positions // 2)
    for other in (fewer, table.slice(1, len(table)), index.read_split("train")):
        with pytest.raises(ValueError, match=rf"other val sequences.*{digest_keys(other)}.*Delete"):
            found.require("val", other, source=features_path)


@pytest.mark.parametrize("keep", [0, 7, 0.3, 0.999])
def test_a_torn_file_is_refused(keep: float, features_path: Path, tmp_path: Path) -> None:
    content = features_path.read_bytes()
    length = int(len(content) * keep) if isinstance(keep, float) else keep
    (tmp_path / "torn.safetensors").write_bytes(content[:length])
    with pytest.raises(ValueError, match=r"torn\.safetensors cannot be read.*delete it"):
        read_features(tmp_path / "torn.safetensors")


def test_a_missing_or_foreign_file_is_refused(tmp_path: Path, tiny_teacher: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        read_features(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=r"None version None; this Retort reads 'retort-features'"):
        read_features(tiny_teacher / "model.safetensors")


@pytest.mark.parametrize("is_split", [True, False])
def test_softcap_bias_and_unsplit_teachers_survive_the_file(
    is_split: bool, tmp_path: Path, index: TokenIndex
) -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=NUM_TOKENS,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=1.5,
        initializer_range=0.5,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    teacher = split_model(model)
    assert teacher.is_split
    if not is_split:
        teacher = CausalLM(model, Head(weight=None), NUM_TOKENS, is_split=False)
    table = index.read_split("val", max_positions=200)
    found = score_tables(
        teacher,
        fingerprint="f",
        name="gemma",
        num_tokens=NUM_TOKENS,
        validation=table,
        training=table,
        train_sequences=np.arange(len(table)),
        batch_size=4,
    )
    write_features(tmp_path / "features.safetensors", found)
    expected_PV = live_logprobs(teacher, table, num_tokens=NUM_TOKENS)
    again = read_features(tmp_path / "features.safetensors")
    for features in (found, again):
        found_PV = features.logprobs("val", slice(None)).double()
        torch.testing.assert_close(found_PV, expected_PV, rtol=0, atol=1e-5)


def test_asking_for_logprobs_leaves_the_features_as_they_are() -> None:
    features = torch.randn(4, 10)
    found = TeacherFeatures(
        features={"val": features.clone(), "train": features},
        train_sequences=np.zeros(0, np.int64),
        head=Head(weight=None),
        num_tokens=8,
        teacher="",
        name="",
        num_parameters=1,
        keys={},
    )
    found.logprobs("val", slice(None))
    assert torch.equal(found.features["val"], features)


def test_a_flipped_bit_is_refused(features_path: Path, tmp_path: Path) -> None:
    content = bytearray(features_path.read_bytes())
    for place in (len(content) // 2, len(content) - 5):
        damaged = bytearray(content)
        damaged[place] ^= 128
        (tmp_path / "damaged.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match="has checksum"):
            read_features(tmp_path / "damaged.safetensors")


def test_no_held_out_document_is_refused(
    tmp_path: Path, tiny_corpus: Path, tiny_teacher: Path
) -> None:
    with pytest.raises(ValueError, match="held out"):
        tokenize(tmp_path, tiny_corpus, tiny_teacher, validation_fraction=0.0)
    index_path = tmp_path / "index.json"  # as if it existed
    shards = sorted(tmp_path.glob("shard_*.h5"))
    build_index(shards, streaming_chunk_size=20)[0].write(index_path)
    with pytest.raises(ValueError, match=r"no document is held out.*validation_fraction"):
        score_validation(
            tmp_path / "features.safetensors",
            job_of(tiny_teacher),
            index_path=index_path,
            fingerprint_path=record(tmp_path, tiny_teacher),
        )


def test_progress_is_said_about_ten_times(
    index: TokenIndex, tiny_teacher: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = load_teacher(str(tiny_teacher), section("teacher", device="cpu"))
    table = index.read_split("train")
    score_tables(
        teacher,
        fingerprint="",
        name="",
        num_tokens=NUM_TOKENS,
        validation=table,
        training=table.slice(0, 1),
        train_sequences=np.zeros(1, np.int64),
        batch_size=2,
    )
    total = len(table.ids) + int(table.lengths[0])
    said = [line for line in caplog.messages if line.startswith("scored ")]
    assert 5 <= len(said) <= 10 and said[-1] == f"scored {total:,} of {total:,} tokens"


@pytest.mark.parametrize(("count", "rows"), [(0, 3), (1, 3), (3, 3), (10, 3)])
def test_slices_cover_a_range_once(count: int, rows: int) -> None:
    places = [i for s in iterate_rows(count, rows=rows) for i in range(count)[s]]
    assert places == list(range(count))


def test_tiny_dataset_holds_some_documents_out(index: TokenIndex, tiny_corpus: Path) -> None:
    assert tiny_dataset(tiny_corpus).validation_fraction == 0.2
    assert index.record.val.documents > 10
    assert replace(index).record.train.documents > 50
