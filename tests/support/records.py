"""Made-up records: each function fills in a record of its type, with the values that a test gives."""

from collections import Counter
from typing import Any

from retort.artifacts.responses import Paid, PromptCounts, ResponsesFile, SynthesisRecord
from retort.cache.cost import CacheCost
from retort.corpus.documents import Counts
from retort.corpus.sharding import Assignment
from retort.corpus.snapshot import CorpusRecord
from retort.evaluation.intervals import Estimate
from retort.evaluation.records import (
    BenchmarkRecord,
    Bin,
    ClassRow,
    Comparison,
    Metrics,
    Score,
    Scorecard,
    Scores,
    TaskResult,
    TextCounts,
)
from retort.evaluation.scores import METRICS, NO_TEACHER, OF_BOTH, UNITS
from retort.io.fingerprints import TeacherRecord, TokenizerIdentity
from retort.io.run_record import RunRecord
from retort.models.samples import ModelSamples, Sample, SamplePrompt, SamplesRecord
from retort.pipeline.preflight import CheckRecord
from retort.teacher.records import Fidelity, Manifest, WorkerRecord
from retort.tokens.index import IndexCounts, IndexRecord, Part, SplitTotals
from retort.tokens.tokenize import TokenCounts
from retort.training.checkpoints import CheckpointRecord, Progress
from retort.training.record import TrainingRecord, TrainingSummary

ALPHA = {"output": 1.0, "logit": 0.0, "hybrid": 0.5}
LOSS = {"output": 3.294, "logit": 3.226, "hybrid": 3.213}


def _split(values: dict[str, Any], model: Any) -> dict[str, Any]:
    """Remove the values of a model's fields, and return them."""
    return {name: values.pop(name) for name in list(values) if name in model.model_fields}


def make_run_record(config: dict[str, Any] | None = None, **values: Any) -> RunRecord:
    made: dict[str, Any] = {
        "command": ("train.py",),
        "source": "config.yaml",
        "run": None,
        "commit": "0123456789abcdef",
        "uncommitted_changes": False,
        "config": config or {},
        "seed": 0,
        "dtype": "float32",
        "device": "cpu",
        "seconds": 71.25,
        "finished": "2026-11-29T04:00:00Z",
        "python": "3.12.1",
        "versions": {"torch": "2.9"},
    }
    return RunRecord(**(made | values))


def make_training_record(name: str, kind: str = "hybrid", **values: Any) -> TrainingRecord:
    summary: dict[str, Any] = {
        "steps": 400,
        "trained_positions": 1_638_400,
        "seconds": 71.25,
        "seconds_waiting_for_data": 0.5,
        "student_parameters": 54_272,
        "device": "cpu",
        "dtype": "float32",
    } | _split(values, TrainingSummary)
    about: dict[str, Any] = {
        "run": name,
        "id": "0123456789ab",
        "distillation_type": kind,
        "alpha": ALPHA[kind],
        "temperature": 2.0,
        "seed": 0,
        "tokens": "beef",
        "teacher": "c0ffee",
        "cache": None,
        "student": "5eed",
        "summary": TrainingSummary(**summary),
        "final": {"model.safetensors": "0" * 32},
    }
    return TrainingRecord(**(about | values))


def make_manifest(**values: Any) -> Manifest:
    fidelity: dict[str, Any] = {
        "positions": 2000,
        "kl": 3.1e-5,
        "agreement": 0.9991,
        "tail_mass": 0.0182,
    }
    fidelity |= {
        name: values.pop(name) for name in ("kl", "agreement", "tail_mass") if name in values
    }
    about: dict[str, Any] = {
        "file": "teacher_logits.h5",
        "mode": "copy",
        "file_bytes": 241_920_000,
        "sha256": "0" * 64,
        "sequences": 5000,
        "tokens": 1_848_200,
        "positions": 1_843_200,
        "bytes_per_position": 131.25,
        "method": "top_k",
        "top_k": 64,
        "min_probability": None,
        "halved_parts": 0,
        "header": {"teacher": "c0ffee"},
        "fidelity": Fidelity(**fidelity),
    }
    return Manifest(**(about | values))


def make_estimate(value: float, *, width: float = 0.1) -> Estimate:
    return Estimate(value, value - width, value + width)


def _make_bin(confidence: float, accuracy: float) -> Bin:
    found = Estimate(accuracy, accuracy - 0.02, accuracy + 0.03)
    return Bin(start=0.0, stop=1.0, positions=300, confidence=confidence, accuracy=found)


def _make_class(name: str, loss: float) -> ClassRow:
    values = {"loss": loss, "teacher_loss": loss - 0.5, "kl_to_teacher": 0.4}
    metrics = {name: make_estimate(value) for name, value in values.items()}
    return ClassRow(name=name, positions=32_768, documents=300, metrics=metrics)


def _estimates(values: dict[str, Any]) -> dict[str, Estimate]:
    return {
        name: value if isinstance(value, Estimate) else Estimate(value, None, None)
        for name, value in values.items()
    }


def make_scores(loss: float = LOSS["hybrid"], *, has_teacher: bool = True, **values: Any) -> Scores:
    """Return scores; a metric of the student is given by its name, one of the teacher as teacher_<name>.

    A metric is a number or an estimate.
    """
    student: dict[str, Any] = {
        "loss": loss,
        "perplexity": 24.9,
        "bits_per_byte": 1.21,
        "accuracy": 0.4,
        "calibration_error": 0.02,
        "kl_to_teacher": 0.5,
        "reverse_kl": 0.61,
        "agreement": Estimate(0.431, 0.42, 0.44),
        "overlap": 0.6,
        "acceptance": 0.72,
    }
    teacher: dict[str, Any] = {"loss": 2.752, "perplexity": 15.674, "bits_per_byte": 1.0}
    student |= {name: values.pop(name) for name in METRICS if name in values}
    teacher |= {
        name: values.pop(f"teacher_{name}") for name in METRICS if f"teacher_{name}" in values
    }
    if not has_teacher:
        student = {name: value for name, value in student.items() if name not in OF_BOTH}
    counts: dict[str, Any] = {"positions": 65_536, "documents": 412, "bytes": 180_000} | _split(
        values, Scorecard
    )
    card = Scorecard(
        metrics=_estimates(student),
        reliability=(_make_bin(0.2, 0.25), _make_bin(0.7, 0.6)),
        **counts,
    )
    of_teacher = Scorecard(
        metrics=_estimates(teacher),
        reliability=(_make_bin(0.5, 0.5),),
        **counts,
    )
    breakdown = {
        "language": (_make_class("de", 2.5), _make_class("en", 3.4)),
        "place": (_make_class("1 to 15", 4.0), _make_class("from 1,024", 3.0)),
    }
    about: dict[str, Any] = {
        "student": card,
        "teacher": of_teacher if has_teacher else None,
        "not_defined": {} if has_teacher else dict.fromkeys(OF_BOTH, NO_TEACHER),
        "breakdown": breakdown if has_teacher else {},
    }
    return Scores(**(about | values))


def make_metrics(training: TrainingRecord, **values: Any) -> Metrics:
    about: dict[str, Any] = {
        "training": training,
        "teacher": "demo",
        "teacher_parameters": 1_312_256,
        "content": "c0ffee",
        "tokens": "beef",
        "sequences": 500,
        "leaked_sequences": 0,
        "text": TextCounts(
            documents=Counts(read=100, used=99, skipped=Counter(empty=1), rows={"empty": [4]}),
            train=make_totals(819_200),
        ),
        "units": UNITS,
        "scores": make_scores(LOSS[training.distillation_type]),
        "cache": None if training.distillation_type == "output" else make_manifest(),
        "trained": make_run_record({"training": {"alpha": 0.5}}),
        "made": make_run_record(),
    }
    return Metrics(**(about | values))


def make_score(task: str, value: float, error: float | None = 0.01, **values: Any) -> Score:
    about: dict[str, Any] = {"task": task, "metric": "acc", "value": value, "standard_error": error}
    return Score(**(about | {"is_less_better": False} | values))


def make_benchmark(task: str, scores: list[Score], **values: Any) -> BenchmarkRecord:
    counts: dict[str, Any] = {"examples": 100, "examples_in_all": 100} | _split(values, TaskResult)
    result = TaskResult(scores=tuple(scores), versions={}, **counts)
    about: dict[str, Any] = {
        "task": task,
        "run": None,
        "id": None,
        "teacher": None,
        "result": result,
    }
    return BenchmarkRecord(**(about | {"made": make_run_record()} | values))


def make_worker_record(**values: Any) -> WorkerRecord:
    about: dict[str, Any] = {"worker": 0, "num_workers": 1, "parts_done": ("c0ffee",), "tokens": 0}
    return WorkerRecord(**(about | {"made": make_run_record()} | values))


def make_teacher_record(**values: Any) -> TeacherRecord:
    tokenizer = TokenizerIdentity(fingerprint="0123456789ab", size=290)
    about: dict[str, Any] = {"weights": "feedc0ffee00", "revision": None, "name": "synthetic"}
    return TeacherRecord(**(about | {"tokenizer": tokenizer, "vocabulary": 300} | values))


def make_totals(positions: int) -> SplitTotals:
    """Return the totals of a split of this size, in sequences of 100 positions."""
    return SplitTotals(
        documents=9, sequences=positions // 100, tokens=positions, positions=positions, longest=101
    )


def make_index_record(positions: int, *, num_parts: int = 1) -> IndexRecord:
    """Return the index of a training split of this size."""
    totals = make_totals(positions)
    part = Part(name="c0ffee", shard=0, first=0, sequences=9, tokens=900, positions=891)
    return IndexRecord(
        tokenizer=TokenizerIdentity(fingerprint="0123456789ab", size=290),
        content="c0ffee",
        counts=IndexCounts(documents=Counts(read=9, used=9), tokens=TokenCounts()),
        train=totals,
        val=totals,
        token_counts="0" * 32,
        shards=("shard_00000.h5",),
        parts=(part,) * num_parts,
    )


def make_corpus_record(**values: Any) -> CorpusRecord:
    counts = Counts(read=9, used=8, skipped=Counter(not_text=1), cleaned=Counter(nul=1))
    about: dict[str, Any] = {
        "name": "json",
        "revision": None,
        "packages": {},
        "bytes": 812,
        "counts": counts,
    }
    about |= {"sha256_of_steps": "0" * 64, "shard": 0, "assignment": Assignment(9, 1, 9, 1)}
    return CorpusRecord(**(about | {"shards": (counts,)} | values))


def make_synthesis_record(**values: Any) -> SynthesisRecord:
    numbers: dict[str, Any] = dict.fromkeys(Paid.model_fields, 3)
    paid = Paid(**(numbers | {"cost": 0.5}))
    about: dict[str, Any] = {
        "provider": "local",
        "model": None,
        "responses": ResponsesFile(file="responses.jsonl", rows=2, digest="c0ffee"),
        "prompts": PromptCounts(different=3, empty=0, duplicates=0, asked=3),
        "dropped": {"refusal": 1},
        "paid": paid,
        "code_parsed_in": (),
        "not_compared_with": (),
        "made": make_run_record(),
    }
    return SynthesisRecord(**(about | values))


def make_samples_record() -> SamplesRecord:
    prompts = (SamplePrompt((1, 2), "a b", None),)
    models = {"teacher": ModelSamples(missing=None, continued=(Sample("c", "d"),))}
    return SamplesRecord(of="c0ffee", prompts=prompts, models=models)


def make_checkpoint_record() -> CheckpointRecord:
    progress = Progress(step=4, seconds=1.5, positions=400.0, window={"positions": 12.0})
    return CheckpointRecord(
        run="c0ffee",
        strategy="ddp",
        settings={"learning_rate": 0.001, "warmup_steps": 3, "lr_scheduler_type": "cosine"},
        progress=progress,
        files={"a": "0" * 32},
    )


def make_check_record() -> CheckRecord:
    return CheckRecord(runs=("mine",), notes=("corpus: json",), made=make_run_record())


def make_comparison(**values: Any) -> Comparison:
    about: dict[str, Any] = {
        "model": "mine",
        "teacher": None,
        "units": UNITS,
        "scores": make_scores(),
    }
    return Comparison(**(about | {"made": make_run_record()} | values))


def make_plan() -> CacheCost:
    return CacheCost(
        positions=9,
        parts=1,
        basis="codec",
        sampled_positions=0,
        record_bytes=800,
        relative_error=None,
        file_bytes=4000,
        total_bytes=9000,
        disk_free_bytes=10**9,
    )
