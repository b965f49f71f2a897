"""Results of two configs in one folder: listed, and removed without harm to what is needed or held."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from retort.inventory import removal
from retort.teacher.claims import Claims
from support.place import Finished, Once, Place, snapshot, tiny

OTHER = tiny(
    cache={"top_k": 4},
    runs={"both": {"training": {"distillation_type": "hybrid", "alpha": 0.7}}},
)


@pytest.fixture(scope="session")
def two_finished(finished: Place, once: Once) -> Place:
    """The finished workflow, and in the same folder another config's: another cache, another run; and its trial."""

    def make(path: Path) -> None:
        place = finished.copy_to(path)
        place.write_config(OTHER, "other.yaml")
        place.snakemake(config="other.yaml")

    return once("two", make)


@pytest.fixture
def two(two_finished: Place, tmp_path: Path) -> Place:
    """A copy of both."""
    return two_finished.copy_to(tmp_path / "project")


def retort(place: Place, *words: str) -> Finished:
    """Type a subcommand of `retort`."""
    return place.execute([sys.executable, "-m", "retort", *words])


def gc(place: Place, *words: str, keep: str = "tiny.yaml") -> str:
    """Remove what one config does not need; return what was said."""
    done = retort(place, "gc", "--keep", keep, *words)
    assert done.returncode == 0, done.output
    return done.output


def find_cache(place: Place, top_k: int) -> Path:
    """Return the folder of the cache with so many tokens a position."""
    manifests = place.results.glob("logits/*/manifest.json")
    (found,) = (path for path in manifests if json.loads(path.read_text())["top_k"] == top_k)
    return found.parent


def list_runs(place: Place, *words: str) -> dict[tuple[str, str], dict[str, object]]:
    """Return what `retort ls --json` says of runs, by config file and name."""
    done = retort(place, "ls", "--json", *words)
    found = json.loads(done.output)["artifacts"]
    return {(a["source"], a["run"]): a for a in found if a["kind"] == "run"}


def test_a_list_says_whose_everything_is_and_in_what_it_differs(two: Place) -> None:
    runs = list_runs(two)
    assert runs.keys() == {
        ("tiny.yaml", "hard"),
        ("tiny.yaml", "both"),
        ("other.yaml", "both"),
    }
    other = runs["other.yaml", "both"]
    assert other["differs"] == {"training.alpha": 0.7, "cache.top_k": 4}
    assert other["state"] == "finished" and not other["unknown"] and other["is_needed"] is None
    files = [path for path in (two.path / str(other["path"])).rglob("*") if path.is_file()]
    assert other["bytes"] == sum(path.stat().st_size for path in files)
    text = retort(two, "ls").output
    assert max(map(len, text.splitlines())) <= 100
    (tokens,) = (path.name for path in two.results.glob("tokens/*"))
    assert re.search(rf"^  {tokens} .* finished +other.yaml, tiny.yaml$", text, re.MULTILINE), text
    needed = list_runs(two, "other.yaml")
    assert (
        needed["other.yaml", "both"]["is_needed"] and not needed["tiny.yaml", "both"]["is_needed"]
    )
    assert needed["tiny.yaml", "both"]["differs"] == {"training.alpha": 0.5, "cache.top_k": 8}


def test_a_list_shows_trials_unfinished_results_and_what_is_not_retorts(two: Place) -> None:
    two.snakemake(*("--config", "training={max_steps: 1}", "--until", "train"), config="other.yaml")
    (two.results / "notes.txt").write_text("mine")
    cache = find_cache(two, 4)
    (cache / "teacher_logits.h5").unlink()
    (index,) = two.results.glob("tokens/*/index.json")
    index.unlink()
    text = retort(two, "ls").output
    assert text.splitlines()[0].startswith("results/: ")
    (trial,) = (line for line in text.splitlines() if "finished, trial" in line)
    assert trial.split()[0].startswith("both/")
    assert "training.max_steps=1" in text
    assert "without teacher_logits.h5" in text and "not Retort's: results/notes.txt" in text
    (tokens,) = (line for line in text.splitlines() if line.split()[:1] == [index.parent.name])
    assert "unfinished" in tokens


def test_gc_says_what_it_would_remove_and_removes_it_when_told(two: Place) -> None:
    before, kept = snapshot(two.results), find_cache(two, 8)
    said = gc(two)
    gone = find_cache(two, 4)
    assert gone.name in said and kept.name not in said and "add --yes" in said
    after = snapshot(two.results)
    after.pop(".digests.json", None)
    assert after == {name: before[name] for name in after} and len(after) >= len(before) - 1
    said = gc(two, "--yes")
    assert "removed: " in said and not gone.exists() and kept.exists()
    assert two.plan() == {}, "what the config needs is all there"
    assert gc(two, "--yes").startswith("removed: 0 artifacts, 0 B")
    again = two.plan(config="other.yaml")
    assert again["generate_logits"] and again["merge_h5"] == again["train"] == 1
    assert "tokenize_shard" not in again
    two.snakemake(config="other.yaml")
    made = snapshot(two.results)
    cache = str((gone / "teacher_logits.h5").relative_to(two.results))
    assert made[cache][0] == before[cache][0], "the same cache"


HOLDER = """
import sys, time
from pathlib import Path
from retort.cluster.leases import lease
from retort.io.files import file_lock
with lease([["0"]], folder=Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""
LOCKER = """
import sys, time
from pathlib import Path
from retort.io.files import file_lock
with file_lock(Path(sys.stdin.readline().strip()), busy=""):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def running(place: Place, code: str, *words: str, told: str = "") -> Iterator[int]:
    """Run a program in a place until it says that it holds something; yield its process."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        cwd=place.path,
        env=place.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stdout
    process.stdin.write(f"{told}\n")
    process.stdin.flush()
    assert process.stdout.readline() == "held\n"
    try:
        yield process.pid
    finally:
        process.kill()
        process.communicate()


def test_gc_touches_nothing_that_is_held(two: Place, tmp_path: Path) -> None:
    cache = find_cache(two, 4)
    (run,) = {path.parent for path in two.results.glob("runs/both/*/training.json")} - {
        Path(two.path / str(list_runs(two)["tiny.yaml", "both"]["path"]))
    }
    signal_path = str((cache / "manifest.json").relative_to(two.path))
    with running(two, HOLDER, str(tmp_path), "--signal", signal_path) as process:
        said = gc(two, "--yes")
        assert f"(process {process}) uses it" in said and cache.exists() and not run.exists()
    shutil.rmtree(two.path)


def test_gc_waits_for_locks_claims_and_snakemake(two: Place) -> None:
    cache, made = find_cache(two, 4), list_runs(two)["other.yaml", "both"]
    run = two.path / str(made["path"])
    parts = cache / "parts"
    parts.mkdir()
    locks = two.path / ".snakemake" / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    evaluation = next(run.glob("evaluation/*/metrics.json"))
    (report,) = (path for path in two.results.glob("reports/*") if path.name in gc(two))
    lock = locks / "0.output.lock"
    lock.write_text(f"{(report / 'report.html').relative_to(two.path)}\n")
    (run / "training.json").rename(run / "elsewhere.tmp")
    with running(two, LOCKER, told=str(run / ".lock")), Claims(parts) as claims:
        (run / "elsewhere.tmp").rename(run / "training.json")
        with claims.claim("0" * 32):
            said = gc(two, "--yes")
        assert "a worker claims" in said and "a job holds .lock" in said
        assert "Snakemake runs in" in said
    assert cache.exists() and evaluation.exists() and report.exists()
    lock.unlink()
    parts.rmdir()
    gc(two, "--yes")
    assert not (cache.exists() or run.exists() or report.exists())


def test_a_killed_gc_leaves_whole_artifacts_or_none(
    two: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(two.path)
    plan = removal.plan_removal([Path("tiny.yaml")], None)
    process = os.fork()
    if process == 0:
        left = iter([removal._delete])

        def delete(path: Path) -> str | None:
            for real in left:
                return real(path)
            os.kill(os.getpid(), signal.SIGKILL)
            return None

        removal._delete = delete
        removal.remove(plan)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    found = {str(path.relative_to(two.results)) for path in two.results.rglob(".removed-*")}
    assert found, "killed in the midst"
    assert all(not one.path.exists() for one in plan.free)
    listed = retort(two, "ls").output
    assert all(name in listed.replace("\n  ", " ") for name in found)
    refused = two.try_snakemake(config="other.yaml")
    assert refused.returncode and "cannot be locked" in refused.output
    said = gc(two, "--yes")
    assert not list(two.results.rglob(".removed-*")) and "removed: 0" in said
    assert two.plan() == {}
    assert not list(two.path.glob(".snakemake/locks/*"))


def test_links_and_unknown_files_are_left_and_said(two: Place, tmp_path: Path) -> None:
    cache, run = find_cache(two, 4), two.path / str(list_runs(two)["other.yaml", "both"]["path"])
    outside = tmp_path / "elsewhere"
    shutil.move(two.results / "validation", outside)
    (two.results / "validation").symlink_to(outside)
    moved = tmp_path / "cache"
    shutil.move(cache, moved)
    cache.symlink_to(moved)
    (run / "final" / "notes.md").write_text("mine")
    before = snapshot(outside) | snapshot(moved)
    said = gc(two, "--yes")
    assert "final/notes.md, which Retort did not write" in said and run.exists()
    assert "  results/validation\n" in said and f"  {cache.relative_to(two.path)}\n" in said
    assert snapshot(outside) | snapshot(moved) == before
    (run / "final" / "notes.md").unlink()
    assert not gc(two, "--yes").count(run.name) == 0 and not run.exists()


def test_results_that_a_kept_config_names_stay(two: Place) -> None:
    run = Path(str(list_runs(two)["other.yaml", "both"]["path"]))
    mine = tiny(
        student={"config": None, "model_path": str(run / "final")},
        runs={"hard": {"training": {"distillation_type": "output"}}},
    )
    two.write_config(mine, "mine.yaml")
    gc(two, "--keep", "mine.yaml", "tiny.yaml", "--yes")
    assert (two.path / run / "final").exists() and not find_caches(two, 4)


def find_caches(place: Place, top_k: int) -> list[Path]:
    """Return the manifests of caches with so many tokens a position."""
    manifests = place.results.glob("logits/*/manifest.json")
    return [path for path in manifests if json.loads(path.read_text())["top_k"] == top_k]


def test_answers_that_were_paid_for_go_only_when_they_are_named(two: Place) -> None:
    prompts = "".join(json.dumps({"prompt": f"The {i} old"}) + "\n" for i in range(8))
    (two.path / "prompts.jsonl").write_text(prompts)
    section = {"provider": "local", "model": "teacher", "prompts": "prompts.jsonl"}
    mine = tiny(
        dataset={"name": "synthesis", "data_files": None, "validation_fraction": 0.2},
        synthesis=section | {"max_tokens": 8, "min_characters": 0, "drop_duplicates": False},
        runs={"hard": {"training": {"distillation_type": "output"}}},
    )
    two.write_config(mine, "mine.yaml")
    target = two.find_output(r"synthesis\.json$", config="mine.yaml")
    two.snakemake(target, config="mine.yaml")
    synthesis = (two.path / target).parent
    journal = synthesis.parent / "journal.jsonl"
    paid = journal.read_bytes()
    assert "--journal removes them" in gc(two, "--yes")
    assert journal.read_bytes() == paid and not synthesis.exists()
    two.snakemake(target, config="mine.yaml")
    assert journal.read_bytes() == paid, "asked nothing again"
    needed = retort(two, "gc", "--keep", "mine.yaml", "tiny.yaml", "--journal", journal.parent.name)
    assert needed.returncode == 1 and "needs it" in needed.output
    gc(two, "--yes", "--journal", journal.parent.name)
    assert not (two.results / "syntheses").exists()


def test_a_config_whose_results_are_not_there_removes_nothing(two: Place) -> None:
    two.write_config(tiny(dataset={"max_length": 32}), "mine.yaml")
    before = snapshot(two.results)
    refused = retort(two, "gc", "--keep", "mine.yaml", "--yes")
    assert (
        refused.returncode == 1 and "Nothing that mine.yaml makes is in results" in refused.output
    )
    assert refused.output.count("\n") == 1
    wrong = retort(two, "gc", "--keep", "none.yaml", "--yes")
    assert wrong.returncode == 1 and "'none.yaml' does not exist" in wrong.output
    nowhere = retort(two, "gc", "--keep", "tiny.yaml", "--results", "none", "--yes")
    assert nowhere.returncode == 1 and "'none'" in nowhere.output
    assert {**snapshot(two.results), ".digests.json": 0} == {**before, ".digests.json": 0}


def test_a_cache_folder_of_its_own_is_cleaned_too(two: Place) -> None:
    for kind in ("tokens", "teachers", "validation", "logits"):
        shutil.move(two.results / kind, two.path / "scratch" / kind)
    output = {"output": {"cache_dir": "scratch"}}
    two.write_config(tiny() | output)
    two.write_config(OTHER | output, "other.yaml")
    assert two.plan() == {} == two.plan(config="other.yaml")
    gc(two, "--yes")
    assert len(list(two.path.glob("scratch/logits/*"))) == 1
    assert len(list(two.results.glob("runs/both/*"))) == 1
    assert two.plan() == {}
