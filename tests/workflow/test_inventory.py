"""Results of two configs in one folder: listed, and removed without harm to what is needed or held."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from retort.cache.reader import LogitCache
from retort.inventory import removal
from retort.inventory.differing import explain
from retort.inventory.holders import Holders
from retort.inventory.layout import Artifact
from retort.inventory.showing import Choice, show_path
from retort.teacher.claims import Claims
from support.place import Finished, Once, Place, snapshot, tiny

HARD = {"training": {"distillation_type": "output"}}
OTHER = tiny(
    cache={"top_k": 4},
    runs={"both": {"training": {"distillation_type": "hybrid", "alpha": 0.7}}},
)


@pytest.fixture(scope="session")
def two_finished(finished: Place, once: Once) -> Place:
    """The finished workflow, and in the same folder another config's: another cache, another run."""

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


def gc(place: Place, *, keep: Sequence[str] = ("tiny.yaml",), journals: Sequence[str] = ()) -> str:
    """Remove what some configs do not need, as `retort gc --yes` in this process; return its words, without breaks."""
    with contextlib.chdir(place.path):
        plan = removal.plan_removal([Path(name) for name in keep], None, journals=journals)
        said = removal.render_plan(plan, is_done=True, stayed=removal.remove(plan))
    return " ".join(said.split())


def find_cache(place: Place, top_k: int) -> Path:
    """Return the folder of the cache with so many tokens a position."""
    manifests = place.results.glob("logits/*/manifest.json")
    (found,) = (path for path in manifests if json.loads(path.read_text())["top_k"] == top_k)
    return found.parent


def find_run(place: Place, alpha: float) -> Path:
    """Return the folder of the run with this alpha."""
    records = place.results.glob("runs/*/*/training.json")
    (found,) = (path for path in records if json.loads(path.read_text())["alpha"] == alpha)
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
    whole = json.loads(retort(two, "ls", "--json").output)
    unknown = {a["path"]: a["unknown"] for a in whole["artifacts"] if a["unknown"]}
    assert unknown == {} and whole["strangers"] == whole["leftovers"] == [], (
        "a file that Retort writes has its pattern in retort.inventory.kinds"
    )
    text = retort(two, "ls").output
    assert max(map(len, text.splitlines())) <= 100
    (tokens,) = (path.name for path in two.results.glob("tokens/*"))
    assert re.search(rf"^  {tokens} .* finished +other.yaml, tiny.yaml$", text, re.MULTILINE), text
    needed = list_runs(two, "other.yaml")
    assert (
        needed["other.yaml", "both"]["is_needed"] and not needed["tiny.yaml", "both"]["is_needed"]
    )
    assert needed["tiny.yaml", "both"]["differs"] == {"training.alpha": 0.5, "cache.top_k": 8}


@pytest.mark.slow
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
    before, kept, gone = snapshot(two.results), find_cache(two, 8), find_cache(two, 4)
    said = retort(two, "gc", "--keep", "tiny.yaml").output
    assert gone.name in said and kept.name not in said
    assert said.endswith("Nothing was removed: add --yes to remove this.\n")
    after = snapshot(two.results)
    assert {name for name in before if after.get(name) != before[name]} <= {".digests.json"}
    said = retort(two, "gc", "--keep", "tiny.yaml", "--yes").output
    assert "\nremoved: 4 artifacts, " in said and not gone.exists() and kept.exists()
    assert two.plan() == {}, "what the config needs is all there"
    assert gc(two).startswith("removed: 0 artifacts, 0 B")
    manifest = str((gone / "manifest.json").relative_to(two.path))
    again = two.plan(config="other.yaml")
    assert again["generate_logits"] == 2 and again["merge_h5"] == again["train"] == 1
    assert "tokenize_shard" not in again
    two.snakemake(manifest, config="other.yaml")
    cache = str((gone / "teacher_logits.h5").relative_to(two.results))
    assert snapshot(gone)["teacher_logits.h5"][0] == before[cache][0], "the same cache"


HOLDER = """
import sys, time
from pathlib import Path
from retort.cluster.leases import lease
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


@contextlib.contextmanager
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


@pytest.mark.slow
def test_gc_touches_nothing_that_is_held(two: Place, tmp_path: Path) -> None:
    """By a job that has a GPU, by one that has locked its folder, by a worker, by a Snakemake on some node."""
    cache, run = find_cache(two, 4), find_run(two, 0.7)
    manifest = str((cache / "manifest.json").relative_to(two.path))
    with running(two, HOLDER, str(tmp_path), "--signal", manifest) as process:
        with running(two, LOCKER, told=str(run / ".lock")):
            said = gc(two)
        assert f"(process {process}) uses it" in said and said.count("uses it") == 2
    assert cache.exists() and run.exists()
    locks = two.path / ".snakemake" / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    (locks / "0.output.lock").write_text(f"{manifest}\n")
    (cache / "parts").mkdir()
    with Claims(cache / "parts") as claims, claims.claim("0" * 32):
        said = gc(two)
        assert "Snakemake runs in" in said and cache.exists() and not run.exists()
        (locks / "0.output.lock").unlink()
        assert f"a worker claims parts/{'0' * 32}.claim" in gc(two) and cache.exists()
    (cache / "manifest.json").unlink()
    (cache / "teacher_logits.h5").touch()
    assert "it is unfinished, and was written to" in gc(two) and cache.exists()
    for path in cache.rglob("*"):
        os.utime(path, (0, 0))
    gc(two)
    assert not cache.exists()


@pytest.mark.slow
def test_a_job_that_begins_while_gc_renames_keeps_its_folder(
    two: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, cache = find_run(two, 0.7), find_cache(two, 4)
    before, started = snapshot(run), contextlib.ExitStack()
    looked: list[Holders] = []

    class Late(Holders):
        def __init__(self, roots: Sequence[Path]) -> None:
            super().__init__(roots)
            looked.append(self)

        def find(self, artifact: Artifact, *, now: float) -> str | None:
            if len(looked) != 2:
                return super().find(artifact, now=now)
            if (
                artifact.path.resolve() == run.resolve()
            ):  # it begins after the last look before the renaming
                started.enter_context(running(two, LOCKER, told=str(run / ".lock")))
            return None

    monkeypatch.setattr(removal, "Holders", Late)
    with started:
        said = gc(two)
    assert "uses it" in said and len(looked) == 3
    assert snapshot(run) | {".lock": 0} == before | {".lock": 0}, "as it was"
    assert not cache.exists()


@pytest.mark.slow
def test_a_killed_gc_leaves_whole_artifacts_or_none(two: Place) -> None:
    with contextlib.chdir(two.path):
        plan = removal.plan_removal([Path("tiny.yaml")], None)
        process = os.fork()
        if process == 0:
            delete = removal._delete
            done: list[Path] = []

            def delete_one(path: Path) -> str | None:
                if done:
                    os.kill(os.getpid(), signal.SIGKILL)
                done.append(path)
                return delete(path)

            removal._delete = delete_one
            removal.remove(plan)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    left = {str(path.relative_to(two.path)) for path in two.results.rglob(".removed-*")}
    assert len(left) == len(plan.free) - 1, "killed in the midst"
    assert not any((two.path / one.path).exists() for one in plan.free)
    listed = retort(two, "ls").output
    assert "left by a removal that was killed" in listed and all(name in listed for name in left)
    assert two.plan() == {}
    said = gc(two)
    assert not list(two.results.rglob(".removed-*")) and "removed: 0" in said
    assert not list(two.path.glob(".snakemake/locks/*"))


@pytest.mark.slow
def test_snakemake_does_not_start_with_what_gc_removes(two: Place) -> None:
    with contextlib.chdir(two.path):
        plan = removal.plan_removal([Path("tiny.yaml")], None)
        with removal._lock_out_snakemake(plan.free):
            refused = two.try_snakemake("--forceall", "--until", "plan", config="other.yaml")
    assert refused.returncode and "Directory cannot be locked" in refused.output
    assert not list(two.path.glob(".snakemake/locks/*"))


@pytest.mark.slow
def test_links_and_unknown_files_are_left_and_said(two: Place, tmp_path: Path) -> None:
    cache, run = find_cache(two, 4), find_run(two, 0.7)
    outside, moved = tmp_path / "elsewhere", tmp_path / "cache"
    shutil.move(two.results / "validation", outside)
    (two.results / "validation").symlink_to(outside)
    shutil.move(cache, moved)
    cache.symlink_to(moved)
    (run / "final" / "notes.md").write_text("mine")
    (two.results / "notes").mkdir()
    (two.results / "notes" / "all.md").write_text("mine")
    before = snapshot(outside) | snapshot(moved)
    said = gc(two)
    assert "it holds final/notes.md, which Retort did not write" in said and run.exists()
    strangers = said.partition("not Retort's, not touched: ")[2].split()
    links = [str(path.relative_to(two.path)) for path in (cache, two.results / "validation")]
    assert sorted(strangers) == sorted([*links, "results/notes"])
    assert snapshot(outside) | snapshot(moved) == before
    (run / "final" / "notes.md").unlink()
    gc(two)
    assert not run.exists() and (two.results / "notes" / "all.md").exists()


@pytest.mark.slow
def test_results_that_a_kept_config_names_stay(two: Place) -> None:
    run = find_run(two, 0.7).relative_to(two.path)
    (two.path / "mine").symlink_to(run / "final")
    student = {"config": None, "model_path": "mine"}
    two.write_config(tiny(student=student, runs={"hard": HARD}), "mine.yaml")
    gc(two, keep=["mine.yaml", "tiny.yaml"])
    assert (two.path / run / "final").exists()
    assert len(list(two.results.glob("logits/*"))) == 1


@pytest.mark.slow
def test_answers_that_were_paid_for_go_only_when_they_are_named(two: Place) -> None:
    prompts = "".join(json.dumps({"prompt": f"The {i} old"}) + "\n" for i in range(8))
    (two.path / "prompts.jsonl").write_text(prompts)
    section = {"provider": "local", "model": "teacher", "prompts": "prompts.jsonl"}
    mine = tiny(
        dataset={"name": "synthesis", "data_files": None, "validation_fraction": 0.2},
        synthesis=section | {"max_tokens": 8, "keep_truncated": True, "keep_duplicates": True},
        runs={"hard": HARD},
    )
    two.write_config(mine, "mine.yaml")
    target = two.find_output(r"synthesis\.json$", config="mine.yaml")
    two.snakemake(target, config="mine.yaml")
    synthesis = (two.path / target).parent
    journal = synthesis.parent / "journal.jsonl"
    paid = journal.read_bytes()
    assert "--journal removes them" in gc(two)
    assert journal.read_bytes() == paid and not synthesis.exists()
    with pytest.raises(ValueError, match="needs it"):
        gc(two, keep=["mine.yaml", "tiny.yaml"], journals=[journal.parent.name])
    assert journal.read_bytes() == paid
    two.snakemake(target, config="mine.yaml")
    assert journal.read_bytes() == paid, "nothing was asked again"
    gc(two, journals=[journal.parent.name])
    assert not (two.results / "syntheses").exists()


@pytest.mark.slow
def test_a_config_whose_results_are_not_there_removes_nothing(two: Place) -> None:
    two.write_config(tiny(dataset={"max_length": 32}), "mine.yaml")
    before = {path for path in two.results.rglob("*") if path.name != ".digests.json"}
    refused = retort(two, "gc", "--keep", "mine.yaml", "--yes").output
    assert refused.startswith("error: Nothing that mine.yaml makes is in results, so all results")
    assert refused.count("\n") == 1
    with pytest.raises(ValueError, match=r"The config 'none.yaml' does not exist"):
        gc(two, keep=["none.yaml"])
    with pytest.raises(ValueError, match="there is no such folder in syntheses/"):
        gc(two, journals=["0" * 12])
    with contextlib.chdir(two.path), pytest.raises(ValueError, match="'none', which is no folder"):
        removal.plan_removal([Path("tiny.yaml")], Path("none"))
    assert {path for path in two.results.rglob("*") if path.name != ".digests.json"} == before


@pytest.mark.slow
def test_a_cache_folder_of_its_own_is_cleaned_too(two: Place) -> None:
    (two.path / "scratch").mkdir()
    for kind in ("tokens", "teachers", "validation", "logits"):
        shutil.move(two.results / kind, two.path / "scratch" / kind)
    output = {"output": {"cache_dir": "scratch"}}
    two.write_config(tiny() | output)
    two.write_config(OTHER | output, "other.yaml")
    gc(two)
    assert len(list(two.path.glob("scratch/logits/*"))) == 1
    assert len(list(two.results.glob("runs/both/*"))) == 1
    assert two.plan() == {}


@pytest.mark.slow
def test_a_cache_is_shown_as_its_teacher_computes_it(
    two: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(two.path)
    cache = find_cache(two, 8)
    model = AutoModelForCausalLM.from_pretrained("teacher").eval()
    row = LogitCache(cache / "teacher_logits.h5").table[3]
    with torch.inference_mode():
        logits = model(torch.tensor(row.ids[None].astype(int))).logits[0].double()
    tokenizer = AutoTokenizer.from_pretrained("teacher")
    probabilities = logits[:, : len(tokenizer)].softmax(-1).numpy()  # the layer is wider
    said = show_path(cache, Choice(sequence=3, position=5, top=3))
    ids = np.argsort(-probabilities[5])[:3]
    shown = [float(p) for p in re.findall(r"^ +\d+  '.*?'  +(0\.\d{4})", said, re.MULTILINE)]
    assert shown == pytest.approx(probabilities[5, ids].tolist(), abs=1e-3)
    tail = 1 - np.sort(probabilities[5])[-8:].sum()
    assert float(re.findall(r"tail +(\S+) in", said)[0]) == pytest.approx(tail, rel=1e-2)
    ((following, bound, p),) = re.findall(r"the text +(.+), probability (at most )?(\S+)", said)
    assert following
    real = probabilities[5, row.ids[6]]
    assert real <= float(p) * 1.01 if bound else float(p) == pytest.approx(real, rel=1e-2)
    page = two.path / "page.html"
    text = show_path(cache / "manifest.json", Choice(sequence=3, page=page))
    plain = re.sub(r"[\[\]]", "", text.partition("\n\n")[2])
    assert plain.split() == tokenizer.decode(row.ids).split()
    assert page.read_text().count("<span title=") == len(row.ids)
    for choice, message in {
        Choice(sequence=10**6): r"--sequence is 1000000, but .* has sequences 0 to \d+",
        Choice(sequence=3, position=-1): r"--position is -1, but sequence 3 has positions 0 to \d+",
        Choice(position=1): "give --sequence too",
    }.items():
        with pytest.raises(ValueError, match=message):
            show_path(cache, choice)


@pytest.mark.slow
def test_every_result_is_shown_and_two_are_told_apart(
    two: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(two.path)
    first, second = (find_run(two, alpha).relative_to(two.path) for alpha in (0.5, 0.7))
    assert "KL(live teacher || cache)" in show_path(find_cache(two, 4), Choice())
    for path in sorted(p for p in Path("results").glob("*/*") if p.parent.name != "runs"):
        for one in [path, *path.glob("*.json"), *path.glob("*/*.json")]:
            assert len(show_path(one, Choice()).splitlines()) > 1, one
    shown = show_path(second / "training.json", Choice())
    assert "run both of other.yaml" in shown and re.search(r"training\.alpha +0\.7\n", shown)
    assert f"logits/{find_cache(two, 4).name}" in shown
    said = explain(str(first), str(second))
    assert re.search(r"^ +training\.alpha +0\.5 +0\.7$", said, re.MULTILINE)
    assert re.search(r"^ +cache\.top_k +8 +4$", said, re.MULTILINE)
    assert len(said.splitlines()) == 5, said
    planned = explain("tiny.yaml", "other.yaml")
    assert said.split()[2:] == planned.split()[4:], "the same of configs"
    assert "have one id" in explain(str(second), "other.yaml")
