"""Only missing results run again: after touched files, edited settings, dead workers, lost files."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from retort.teacher.records import CacheRun, Manifest
from retort.tokens.index import TokenIndex
from retort.training.record import TrainingRecord
from support.place import TINY, Place, merge, sha256, snapshot, tiny, wait_until

ONE_RUN_AGAIN = {"check_inputs": 1, "train": 1, "evaluate": 1, "report": 1}


def test_a_second_run_does_nothing(done: Place) -> None:
    before = snapshot(done.results)
    assert "Nothing to be done" in done.snakemake()
    assert snapshot(done.results) == before


def test_a_virtual_merge_trains_the_same_student(finished: Place, done: Place) -> None:
    for folder in ("logits", "runs", "reports"):
        shutil.rmtree(done.results / folder)
    done.write_config(tiny(merge={"mode": "virtual"}))
    done.snakemake()
    (mine,), (theirs,) = (list(p.results.glob("logits/*/manifest.json")) for p in (done, finished))
    virtual, copied = Manifest.read(mine), Manifest.read(theirs)
    assert (virtual.mode, copied.mode) == ("virtual", "copy")
    assert virtual.sha256 == copied.sha256
    assert list(mine.parent.glob("parts/*.h5")) and not list(theirs.parent.glob("parts/*.h5"))
    weights = [
        {
            path.relative_to(p.results): sha256(path)
            for path in p.results.rglob("final/*.safetensors")
        }
        for p in (done, finished)
    ]
    assert len(weights[0]) == 2 and weights[0] == weights[1]
    assert done.plan() == {}
    done.write_config(tiny())  # copied or not: the same cache
    assert done.plan() == {}


def test_touching_every_source_and_input_re_runs_nothing(done: Place, checkout: Path) -> None:
    for path in [*checkout.rglob("*"), *done.path.glob("teacher/*"), *done.path.glob("*.*")]:
        path.touch()
    touched = Place(done.path, repository=checkout)
    assert touched.plan() == {}
    # Ids depend on the content of the student's config and of the corpus, not on their paths.
    student = done.path / "student.json"
    student.write_text(json.dumps(json.loads(student.read_text()), indent=7, sort_keys=True))
    (done.path / "documents.jsonl").rename(done.path / "elsewhere.jsonl")
    done.write_config(tiny(dataset={"data_files": "else*.jsonl"}))
    assert touched.plan() == {}


@pytest.mark.parametrize("seed", [0, 1])
def test_a_fresh_checkout_over_existing_results_re_runs_nothing(
    done: Place, checkout: Path, seed: int
) -> None:
    shutil.rmtree(done.path / ".snakemake")
    rng = random.Random(seed)
    now = time.time()
    for path in [*checkout.rglob("*"), *done.path.rglob("*")]:
        when = now - rng.random() * 1e6
        os.utime(path, (when, when), follow_symlinks=False)
    assert Place(done.path, repository=checkout).plan() == {}


def test_inputs_with_future_dates_can_be_used(done: Place) -> None:
    tomorrow = time.time() + 86_400
    for path in done.results.rglob("*"):
        os.utime(path, (tomorrow, tomorrow), follow_symlinks=False)
    assert done.plan() == {}
    done.write_config(tiny(cache={"top_k": 5}))
    said = done.snakemake("--until", "plan")
    assert "clock skew" not in said and len(list(done.results.glob("logits/*/plan.json"))) == 2


def test_a_comment_in_every_source_re_runs_nothing(done: Place, checkout: Path) -> None:
    sources = [*checkout.rglob("*.py"), *checkout.rglob("*.smk"), *checkout.rglob("*.yaml")]
    for path in [*sources, checkout / "Snakefile"]:
        path.write_text(path.read_text() + "\n# a comment\n")
    assert Place(done.path, repository=checkout).plan() == {}


def test_another_alpha_trains_only_that_run_from_step_0(done: Place) -> None:
    before = snapshot(done.results / "runs")
    done.write_config(tiny(runs=_with_alpha(0.25)))
    assert done.plan() == ONE_RUN_AGAIN

    done.snakemake()
    after = snapshot(done.results / "runs")
    assert {path: after[path] for path in before} == before
    (made,) = {Path(path).parts[1] for path in after.keys() - before.keys()}
    folder = done.results / "runs" / "both" / made
    training = TrainingRecord.read(folder / "training.json")
    (old,) = (path for path in folder.parent.iterdir() if path != folder)
    assert training.alpha == 0.25
    before_it = TrainingRecord.read(old / "training.json").summary
    assert training.summary.trained_positions == before_it.trained_positions
    log = (done.path / "logs" / "train" / f"both_{made}.log").read_text()
    assert "resuming from" not in log
    assert sha256(folder / "final/model.safetensors") != sha256(old / "final/model.safetensors")
    assert str(folder.relative_to(done.path)) in _report_text(done)

    done.write_config(tiny())
    assert done.plan() == {}


def test_an_added_run_adds_only_its_own_jobs(done: Place) -> None:
    runs = tiny()["runs"] | {"soft": {"training": {"distillation_type": "logit"}}}
    done.write_config(tiny(runs=runs))
    assert done.plan() == ONE_RUN_AGAIN


def test_other_spellings_of_the_same_paths_re_run_nothing(done: Place) -> None:
    sections = {
        "output": {"results_dir": "./results/"},
        "dataset": {"data_files": "x/../documents.jsonl"},
        "teacher": {"model_path": "./teacher/"},
        "student": {"config": "$HERE/student.json"},
    }
    done.write_config(tiny(**sections))
    done.env["HERE"] = "."
    assert done.plan() == {}


def test_the_command_line_wins_over_the_runs(done: Place) -> None:
    swept = {"training": {"max_steps": [20, 30]}}
    done.write_config(tiny(runs={name: merge(run, swept) for name, run in TINY["runs"].items()}))
    assert done.plan()["train"] == 4
    assert done.plan("--config", "training={max_steps: 12}") == {}


def test_another_evaluation_trains_nothing(done: Place) -> None:
    done.write_config(tiny(evaluation={"max_positions": 500}))
    # Other held-out positions are scored by the teacher; its cache stays.
    expected = {"check_inputs": 1, "score_validation": 1, "evaluate": 2, "report": 1}
    assert done.plan() == expected


def test_keys_that_change_no_ids_re_run_nothing(done: Place) -> None:
    done.write_config(
        tiny(
            dataset={"num_proc": 2},
            teacher={"device": "cpu", "generation": {"num_workers": 1}},
            training={"save_steps": 100, "logging_steps": 1, "save_total_limit": 9},
            tracking={"wandb_project": "mine"},
        )
    )
    assert done.plan() == {}


def test_another_top_k_keeps_the_tokens_and_the_old_one_re_runs_nothing(done: Place) -> None:
    old = done.cache
    before = snapshot(old)
    other = tiny(cache={"top_k": 4}, teacher={"generation": {"num_workers": 1}})
    done.write_config(other)
    assert done.plan() == ONE_RUN_AGAIN | {"plan": 1, "generate_logits": 1, "merge_h5": 1}

    manifest = done.find_output(r"^results/logits/\w+/manifest\.json$")
    done.snakemake(manifest)
    assert Manifest.read(done.path / manifest).top_k == 4
    assert snapshot(old) == before
    done.write_config(tiny())
    assert done.plan() == {}


@pytest.mark.parametrize("num_workers", [1, 4, None])
def test_another_number_of_workers_re_runs_nothing(done: Place, num_workers: int | None) -> None:
    done.write_config(tiny(teacher={"generation": {"num_workers": num_workers}}))
    assert done.plan() == {}
    shutil.rmtree(done.path / ".snakemake")
    assert done.plan() == {}


def test_a_dead_worker_re_runs_that_worker_and_later_jobs(done: Place) -> None:
    cache = done.cache
    undisturbed = sha256(cache / "teacher_logits.h5")
    target = str((cache / "manifest.json").relative_to(done.path))
    shutil.rmtree(cache)
    process = done.start(target)
    wait_until(lambda: list(_find_workers(done, worker=1)), process=process)
    for pid in _find_workers(done, worker=1):
        os.kill(pid, signal.SIGKILL)
    assert process.wait() != 0
    assert (cache / "metadata_worker0.json").exists(), "the other worker finished"
    assert not (cache / "metadata_worker1.json").exists()
    parts = len(list((cache / "parts").glob("*.h5")))
    assert parts == len(_parts(done)), "the other worker did the dead one's parts too"

    assert done.plan(target) == {"generate_logits": 1, "merge_h5": 1}
    done.snakemake(target)
    workers = CacheRun.read(cache / "run.json").workers
    assert [len(worker.parts_done) for worker in workers] == [parts, 0]
    assert sha256(cache / "teacher_logits.h5") == undisturbed
    assert done.plan() == {}


def test_a_lost_manifest_costs_no_pass_of_the_teacher(done: Place) -> None:
    cache = done.cache
    merged, manifest = cache / "teacher_logits.h5", cache / "manifest.json"
    before, said = (merged.stat().st_mtime_ns, sha256(merged)), manifest.read_text()
    manifest.unlink()
    done.snakemake(str(manifest.relative_to(done.path)))
    assert (merged.stat().st_mtime_ns, sha256(merged)) == before
    assert manifest.read_text() == said
    workers = CacheRun.read(cache / "run.json").workers
    assert [(worker.tokens, worker.parts_done) for worker in workers] == [(0, ()), (0, ())]
    assert done.plan() == {}


def test_other_weights_under_the_same_path_are_refused(done: Place) -> None:
    weights = done.path / "teacher" / "model.safetensors"
    old = weights.read_bytes()
    weights.write_bytes(old[:-1] + bytes([old[-1] ^ 1]))
    refused = done.try_snakemake("-n")
    assert refused.returncode != 0
    assert "'teacher' holds other weights than before" in refused.output
    assert "teacher.generation.force_regenerate" in refused.output
    assert "Traceback" not in refused.output

    again = {"generation": {"force_regenerate": "2026-01-01"}}
    done.write_config(tiny(teacher=again))
    planned = done.plan()
    assert planned["resolve_teacher"] == 1
    assert planned["generate_logits"] == 2
    made = done.find_output(r"^results/logits/\w+/manifest\.json$")
    assert (done.path / made).parent != done.cache, "beside the old cache, not over it"

    weights.write_bytes(old)
    done.write_config(tiny())
    assert done.plan() == {}


def test_results_report_html_links_to_the_current_configs_report(done: Place) -> None:
    link = done.results / "report.html"
    of_all = link.resolve()
    assert of_all.exists()
    hard = tiny()["runs"]["hard"]
    done.write_config(tiny(runs={"hard": hard}))
    assert done.plan() == {"report": 1}
    done.snakemake()
    assert link.resolve() != of_all
    assert link.resolve().exists()
    done.write_config(tiny())
    done.snakemake()
    assert link.resolve() == of_all, "even if there was nothing to do"
    assert not link.readlink().is_absolute(), "the folder can be moved"


def test_snakemakes_own_report_can_be_made(done: Place) -> None:
    done.snakemake("--report", "workflow.html")
    page = (done.path / "workflow.html").read_text()
    assert "generate_logits" in page and "<html" in page


def _with_alpha(alpha: float) -> dict[str, Any]:
    runs: dict[str, Any] = tiny()["runs"]
    both = runs["both"]["training"] | {"alpha": alpha}
    return runs | {"both": {"training": both}}


def _report_text(place: Place) -> str:
    return (place.results / "report.html").resolve().with_name("summary.txt").read_text()


def _parts(place: Place) -> list[object]:
    (index,) = place.results.glob("tokens/*/index.json")
    return list(TokenIndex.read(index).parts)


def _find_workers(place: Place, *, worker: int) -> Iterator[int]:
    """Yield the process ids of a worker in this folder, without the shell that started it."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            is_here = (folder / "cwd").readlink() == place.path
        except OSError:
            continue
        is_script = len(words) > 1 and words[1].endswith(b"/generate_logits.py")
        if is_here and is_script and words[words.index(b"--worker") + 1] == str(worker).encode():
            yield int(folder.name)
