"""The function of the rule generate_logits: receipts, and errors before any work."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from retort.cache.merged import merge_parts
from retort.cache.methods import build_codec
from retort.cache.parts import (
    build_header,
    part_files,
    read_kinds,
)
from retort.cache.reader import CacheHeader, read_kind
from retort.cluster.deadlines import RESUMABLE
from retort.config.schema import flatten
from retort.config.sections import Merge
from retort.io.fingerprints import TeacherRecord
from retort.models.causal_lm import CausalLM
from retort.teacher.records import WorkerRecord
from retort.teacher.worker import generate_logits
from support.jobs import make_job
from support.sections import section
from support.teacher_job import After, Job, read_parts
from support.tiny import NUM_TOKENS, WIDTH


def run_rule(
    job: Job,
    receipt: Path,
    *,
    worker: int = 0,
    num_workers: int = 1,
    merge: Merge = section("merge"),  # noqa: B008
) -> None:
    teacher = section(
        "teacher", model_path=job.teacher_path, device="cpu", generation={"batch_size": 4}
    )
    generate_logits(
        receipt,
        make_job(teacher=teacher, cache=job.cache, merge=merge),
        index_path=job.index_path,
        fingerprint_path=job.fingerprint,
        worker=worker,
        num_workers=num_workers,
    )


def test_receipt_says_who_did_what_with_which_gpus(
    job: Job,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    run_rule(job, tmp_path / "metadata_worker1.json", worker=1, num_workers=2)
    assert caplog.messages[0] == "Worker 1/2  CUDA_VISIBLE_DEVICES: 4,5"
    receipt = WorkerRecord.read(tmp_path / "metadata_worker1.json")
    assert (receipt.worker, receipt.num_workers) == (1, 2)
    assert receipt.tokens == job.index.record.train.tokens
    assert len(receipt.parts_done) == len(job.index.parts)
    assert dict(flatten(receipt.made.config))["cache.top_k"] == 8
    assert receipt.made.dtype == "float32"
    assert read_parts(tmp_path / "parts") == undisturbed
    run_rule(job, tmp_path / "metadata_worker0.json")
    assert caplog.messages[-1].startswith("worker 0: 0 parts")


def test_a_worker_does_not_add_to_parts_of_another_kind_unless_told(
    job: Job, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an upgrade of transformers between two runs."""
    existing = job.part(tmp_path / "parts", 1)
    existing.parent.mkdir()
    existing.write_bytes(undisturbed[existing.name])
    kind = read_kind(existing)
    assert kind is not None and (kind.device, kind.dtype) == ("cpu", "float32")
    assert (kind.torch, kind.transformers) == (torch.__version__, transformers.__version__)
    receipt = tmp_path / "metadata_worker0.json"
    monkeypatch.setattr(transformers, "__version__", "99.0")
    with pytest.raises(ValueError, match=r"here: cpu, float32, .* transformers 99\.0\n"):
        run_rule(job, receipt)
    assert read_parts(tmp_path / "parts") == {existing.name: undisturbed[existing.name]}
    assert not receipt.exists()

    run_rule(job, receipt, merge=section("merge", accept_unlike_parts=True))
    parts = part_files(job.index, tmp_path / "parts", job.header)
    versions = [kind.transformers for kind in read_kinds(parts, most=len(parts)).values() if kind]
    assert versions.count("99.0") == len(parts) - 1


def test_a_merged_cache_means_nothing_to_do(
    job: Job, undisturbed: dict[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "parts").mkdir()
    for name, content in undisturbed.items():
        (tmp_path / "parts" / name).write_bytes(content)
    merge_parts(job.index, tmp_path / "parts", job.header, tmp_path / "teacher_logits.h5")
    run_rule(job, tmp_path / "metadata_worker0.json")
    assert "nothing to do" in caplog.text


def test_header_names_teacher_tokenizer_tokens_and_codec(job: Job) -> None:
    content = TeacherRecord.read(job.fingerprint)
    expected = CacheHeader(
        content.weights,
        content.tokenizer.fingerprint,
        job.index.record.content,
        build_codec(job.cache, vocabulary=WIDTH),
    )
    assert job.header == expected


def test_a_tokenizer_with_ids_beyond_the_output_layer_is_refused_with_both_numbers(
    job: Job, tmp_path: Path
) -> None:
    record = TeacherRecord.read(job.fingerprint)
    narrow = record.model_copy(update={"vocabulary": NUM_TOKENS - 1})
    with pytest.raises(ValueError, match=r"has 300 tokens.*has only 299.*dataset\.tokenizer"):
        build_header(job.index, narrow, job.cache, source=tmp_path)
    exact = record.model_copy(update={"vocabulary": NUM_TOKENS})
    assert build_header(job.index, exact, job.cache, source=tmp_path).codec.vocabulary == NUM_TOKENS


def test_tokens_of_another_tokenizer_are_refused(job: Job, tmp_path: Path) -> None:
    record = TeacherRecord.read(job.fingerprint)
    files = record.tokenizer.model_copy(update={"fingerprint": "0123456789ab"})
    other = record.model_copy(update={"tokenizer": files})
    with pytest.raises(
        ValueError, match=r"teacher's is 0123456789ab.*would belong to other tokens"
    ):
        build_header(job.index, other, job.cache, source=tmp_path / "fingerprint.json")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")]
)
def test_a_teacher_that_does_not_fit_is_one_sentence(
    error: RuntimeError, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> CausalLM:
        raise error

    monkeypatch.setattr("retort.teacher.worker.load_recorded_teacher", load)
    with pytest.raises(ValueError, match=r"does not fit .*gpus_per_model, now 1.*dtype"):
        run_rule(job, tmp_path / "metadata_worker0.json")


def test_out_of_time_the_rule_leaves_no_receipt_and_says_so(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("retort.teacher.worker.Deadline", lambda: After(0))
    with pytest.raises(SystemExit) as ended:
        run_rule(job, tmp_path / "metadata_worker0.json")
    assert ended.value.code == RESUMABLE
    told = caplog.messages[-1]
    assert re.search(
        r"stopped before the job's time limit: \d+ of \d+ parts are still missing", told
    )
    assert not (tmp_path / "metadata_worker0.json").exists()
