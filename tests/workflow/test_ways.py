"""Every way to train a student, as a user would ask for it: from a config, through Snakemake, to evaluated metrics."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from retort.evaluation.records import Metrics, Scores
from retort.models.samples import SamplesRecord
from retort.tokens.index import IndexRecord
from retort.training.record import TrainingRecord
from support.bench import read_log
from support.place import Once, Place, tiny


def find_run(place: Place, name: str) -> tuple[Path, TrainingRecord, Scores]:
    """Return a run's folder, its training.json and its scores."""
    (folder,) = (place.results / "runs" / name).iterdir()
    (metrics,) = folder.glob("evaluation/*/metrics.json")
    return folder, TrainingRecord.read(folder / "training.json"), Metrics.read(metrics).scores


def test_students_of_prompts_and_responses_need_no_teacher(fresh: Place) -> None:
    texts = [
        json.loads(x)["text"] for x in (fresh.path / "documents.jsonl").read_text().splitlines()
    ]
    rows = [{"prompt": f"{text[:20]}?", "response": text[20:] or "Yes."} for text in texts]
    (fresh.path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = {"prompt_column": "prompt", "response_column": "response", "tokenizer": "teacher"}
    fresh.write_config(
        tiny(
            dataset={"data_files": "pairs.jsonl", **pairs},
            teacher={"model_path": None},
            cache=None,
            training={
                "distillation_type": "output",
                "max_steps": None,
                "num_epochs": 1.0,
                "save_dtype": "bfloat16",
            },
            runs=None,
        )
    )
    fresh.snakemake()
    folder, training, metrics = find_run(fresh, "student")
    index = IndexRecord.read(next(fresh.results.glob("tokens/*/index.json")))
    assert not (fresh.results / "logits").exists() and training.teacher is None
    # One epoch, filled up to whole batches; of the prompts' tokens none is learned.
    assert training.summary.trained_positions >= index.train.positions
    assert index.train.positions < index.train.tokens - index.train.sequences
    assert 0 < metrics.student.metrics["loss"].value < 6
    assert AutoModelForCausalLM.from_pretrained(folder / "final").dtype == torch.bfloat16
    # The evaluation completed the card, which nothing depends on.
    card = (folder / "final" / "README.md").read_text()
    assert "learned from text, by Retort" in card and str(fresh.path) not in card
    assert f"| held-out loss, nats/token | {metrics.student.metrics['loss'].value:.3f}" in card
    assert fresh.plan() == {}


@pytest.fixture(scope="session")
def trained(finished: Place, once: Once) -> Place:
    """The finished workflow, asked for more students."""
    return once("ways", lambda path: train_more(finished.copy_to(path)))


def train_more(place: Place) -> None:
    """Train a student in every way."""
    several = {
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "use_gradient_checkpointing": True,
    }
    schedule = {
        "max_steps": None,
        "num_epochs": 0.5,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
    }
    best = {"eval_steps": 5, "load_best_model_at_end": True, "metric_for_best_model": "eval_kl"}
    runs = {
        "both": {"training": {"distillation_type": "hybrid", "alpha": 0.5}},
        "best": {"training": {"distillation_type": "logit", **best}},
        "cut": {"training": {"distillation_type": "hybrid", "alpha": 0.5, **several}},
        "ranks": {
            "training": {
                "distillation_type": "hybrid",
                "alpha": 0.5,
                "seed": 1,
                "gpus": 2,
                "device": "cpu",
            }
        },
        "alone": {
            "training": {"distillation_type": "hybrid", "alpha": 0.5, "seed": 1, "device": "cpu"}
        },
        **{
            name: {
                "teacher": {"mix": [{"weight": 3}, {"model_path": "other"}]},
                "student": {"config": "student_308.json"},
                "training": {"distillation_type": "logit", "gpus": ranks, "device": "cpu"},
            }
            for name, ranks in (("mixed", 1), ("mixed_ranks", 2))
        },
        "live": {"training": {"distillation_type": "logit", "use_cached_logits": False}},
        "continued": {
            "student": {"config": None, "model_path": "teacher"},
            "training": {"distillation_type": "logit", **schedule},
        },
        **{
            name: {
                "student": {"config": None, "model_path": "teacher"},
                "training": {
                    "distillation_type": "hybrid",
                    "alpha": 0.5,
                    "lora": {"rank": 4},
                    "gpus": ranks,
                    "device": "cpu",
                },
            }
            for name, ranks in (("lora", 1), ("lora_ranks", 2))
        },
        "narrow": {"student": {"config": "student_308.json"}},
        "narrow_live": {
            "student": {"config": "student_308.json"},
            "training": {"distillation_type": "logit", "use_cached_logits": False},
        },
        "wide": {"student": {"config": "student_352.json"}},
        "foreign": {
            "dataset": {"tokenizer": "foreign"},
            "training": {"distillation_type": "output"},
        },
    }
    own = AutoTokenizer.from_pretrained(place.path / "teacher")
    own.add_tokens([f"word{i}" for i in range(200)] + ["e", "a"])  # ids beyond the teacher's layer
    own.save_pretrained(place.path / "foreign")
    student = json.loads((place.path / "student.json").read_text())
    for width in (308, 352):  # the teacher's layer has 320 ids, the tokenizer 300
        text = json.dumps(student | {"vocab_size": width})
        (place.path / f"student_{width}.json").write_text(text)
    shift_weights(place.path / "teacher", place.path / "other")
    place.write_config(tiny(runs=runs))
    place.snakemake()


def shift_weights(teacher: Path, folder: Path) -> None:
    """Write another teacher with the same tokenizer."""
    shutil.copytree(teacher, folder)
    model = AutoModelForCausalLM.from_pretrained(teacher)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.05)
    model.save_pretrained(folder)


def test_accumulation_and_recomputed_activations_train_the_same_student(trained: Place) -> None:
    whole, cut = find_run(trained, "both")[2], find_run(trained, "cut")[2]
    assert cut.student.metrics["loss"].value == pytest.approx(
        whole.student.metrics["loss"].value, abs=1e-4
    )


def test_two_ranks_of_a_rule_train_the_same_student(trained: Place) -> None:
    folder, _training, two = find_run(trained, "ranks")
    assert (folder / "checkpoint-12" / "rng_state_1.pth").exists(), "there were two"
    one = find_run(trained, "alone")[2]
    assert two.student.metrics["loss"].value == pytest.approx(
        one.student.metrics["loss"].value, abs=1e-5
    )


def test_adapters_of_one_rank_and_of_two_are_the_same_and_merged(trained: Place) -> None:
    (folder, training, one), (other, _, two) = (
        find_run(trained, name) for name in ("lora", "lora_ranks")
    )
    assert folder.name == other.name, "one id"
    assert (other / "checkpoint-12" / "rng_state_1.pth").exists(), "there were two"
    assert two.student.metrics["loss"].value == pytest.approx(
        one.student.metrics["loss"].value, abs=1e-5
    )
    teacher = AutoModelForCausalLM.from_pretrained(trained.path / "teacher")
    for path in (folder, other):
        student = AutoModelForCausalLM.from_pretrained(path / "final")
        for name, weight in student.named_parameters():
            assert weight.equal(teacher.get_parameter(name)) == ("_proj" not in name), name
        assert (path / "final/adapter/adapter_model.safetensors").exists()
    summary = training.summary
    assert summary.trained_parameters == 2 * 4 * (4 * (16 + 16) + 3 * (16 + 32))
    assert summary.student_parameters == teacher.num_parameters()
    page = (trained.results / "report.html").read_text()
    assert f"LoRA rank 4: {summary.trained_parameters:,}" in page


def test_several_teachers_of_one_rank_and_of_two_make_the_same_student(trained: Place) -> None:
    (folder, training, one), (other, _, two) = (
        find_run(trained, name) for name in ("mixed", "mixed_ranks")
    )
    assert folder.name == other.name, "one id"
    assert (other / "checkpoint-12" / "rng_state_1.pth").exists(), "there were two"
    found, expected = (s.student.metrics["kl_to_teacher"].value for s in (two, one))
    assert found == pytest.approx(expected, abs=1e-5)
    # The cache of the first is that of all other runs; the second has one more, and no run alone.
    caches = {path.name for path in (trained.results / "logits").iterdir()}
    assert len(caches) == 2
    whole = find_run(trained, "narrow")[2].teacher
    assert one.teacher is not None and whole is not None
    assert one.teacher.metrics["loss"].value != whole.metrics["loss"].value
    metrics = Metrics.read(next(folder.glob("evaluation/*/metrics.json")))
    assert metrics.teacher == "0.75 teacher + 0.25 other" and len(metrics.other_caches) == 1
    assert str(training.teacher).startswith("0.75 ")
    card = (folder / "final" / "README.md").read_text()
    assert "learned from several teachers' distributions" in card
    assert "| teacher | a mixture of 0.75 `teacher` (local) and 0.25 `other` (local) |" in card
    page = (trained.results / "report.html").read_text()
    assert "0.75 teacher + 0.25 other" in page and "mixture has written no text" in page


def test_a_live_teacher_leaves_no_cache_behind(trained: Place) -> None:
    _, training, metrics = find_run(trained, "live")
    assert training.alpha == 0.0 and metrics.student.metrics["kl_to_teacher"].value < 1.0
    assert len(list((trained.results / "logits").iterdir())) == 2  # of the two other teachers


def test_a_student_that_starts_from_the_teacher_stays_near_it(trained: Place) -> None:
    _, training, metrics = find_run(trained, "continued")
    folder = find_run(trained, "continued")[0]
    log = read_log(folder)
    indices = (IndexRecord.read(path) for path in trained.results.glob("tokens/*/index.json"))
    index = min(indices, key=lambda index: index.tokenizer.size)  # the foreign one's is larger
    assert training.summary.steps == -(-index.train.sequences // 8)  # half an epoch in fours
    rates = [float(row["learning_rate"]) for row in log]
    assert rates[0] < max(rates) > rates[-1], "a warm-up and a decay"
    others = find_run(trained, "both")[2].student.metrics["kl_to_teacher"].value
    assert metrics.student.metrics["kl_to_teacher"].value < others / 2


def test_the_best_of_the_measured_steps_is_the_student(trained: Place) -> None:
    folder, training, metrics = find_run(trained, "best")
    rows = [row for row in read_log(folder) if row["eval_kl"]]
    assert [row["step"] for row in rows] == ["5", "10", "12"]
    best = min(rows, key=lambda row: float(row["eval_kl"]))
    assert training.summary.best_step == int(best["step"])
    found = metrics.student.metrics["kl_to_teacher"].value
    # Of a sample of 64 sequences, where there are no more it is the same number.
    assert float(best["eval_kl"]) == pytest.approx(found, rel=0.1)
    page = (trained.results / "report.html").read_text()
    assert "held-out loss during training" in page


def test_students_narrower_and_wider_than_their_teacher_are_trained_measured_and_reported(
    trained: Place,
) -> None:
    expected = find_run(trained, "both")[2].student.metrics["kl_to_teacher"].value
    for name, width in (("narrow", 308), ("narrow_live", 308), ("wide", 352)):
        folder, training, metrics = find_run(trained, name)
        student = AutoModelForCausalLM.from_pretrained(folder / "final")
        assert student.config.vocab_size == width == student.get_output_embeddings().weight.shape[0]
        assert training.summary.steps == 12 and not metrics.not_defined
        assert metrics.student.metrics["kl_to_teacher"].value == pytest.approx(expected, rel=0.5)
        assert metrics.teacher is not None and metrics.teacher.metrics["loss"].value > 0
    page = (trained.results / "report.html").read_text()
    assert all(name in page for name in ("narrow", "narrow_live", "wide"))


def test_a_student_with_a_tokenizer_of_its_own_is_measured_without_its_teacher(
    trained: Place,
) -> None:
    folder, _, metrics = find_run(trained, "foreign")
    assert metrics.student.metrics["bits_per_byte"].value > 0 and metrics.teacher is None
    reasons = metrics.not_defined
    assert set(reasons) == {"kl_to_teacher", "reverse_kl", "agreement", "overlap", "acceptance"}
    assert all("different tokenizers" in why for why in reasons.values())
    page = (trained.results / "report.html").read_text()
    assert "foreign: no KL(teacher || student), " in page
    samples = SamplesRecord.read(next(folder.glob("evaluation/*/samples.json"))).models
    assert "different tokenizers" in str(samples["teacher"].missing)
    assert len(samples["student"].continued) == 4
