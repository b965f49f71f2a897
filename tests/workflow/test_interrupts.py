"""Killed anywhere, in any way: the same command finishes, and nobody can tell from the results."""

import os
import platform
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from retort.evaluation.records import Metrics
from retort.teacher.records import CacheRun
from retort.tokens.index import TokenIndex
from support.place import Place, sha256, tiny, wait_until

Process = subprocess.Popen[bytes]


def press_ctrl_c(process: Process) -> None:
    """Interrupt Snakemake and its jobs, as a terminal does."""
    os.killpg(process.pid, signal.SIGINT)


def press_ctrl_c_twice(process: Process) -> None:
    """Interrupt Snakemake and its jobs, and again before a training has answered."""
    found = subprocess.run(["pgrep", "-g", str(process.pid), "-f", "train.py"], stdout=-1)
    trainings = [int(pid) for pid in found.stdout.split()]
    for training in trainings:
        os.kill(training, signal.SIGSTOP)
    log = Path(f"/proc/{process.pid}/fd/2").resolve()
    before = len(log.read_text())
    for answer in ("Terminating processes on user request", "Interrupted again"):
        os.killpg(process.pid, signal.SIGINT)
        wait_until(partial(says, log, answer, start=before), process=process)
    for training in trainings:
        os.kill(training, signal.SIGCONT)
    process.wait()
    assert trainings and "Traceback" not in log.read_text()


def says(log: Path, words: str, *, start: int) -> bool:
    """Say whether words are in a log, from its `start`-th character."""
    return words in log.read_text()[start:]


def terminate(process: Process) -> None:
    """Ask Snakemake and its jobs to end, as a scheduler does at the end of its patience."""
    os.killpg(process.pid, signal.SIGTERM)


def kill_snakemake(process: Process) -> None:
    """Kill Snakemake alone; its jobs go on, beside those of the next Snakemake."""
    process.kill()


def kill_snakemake_and_wait(process: Process) -> None:
    """Kill Snakemake alone, and wait until its jobs have finished without it."""
    process.kill()
    wait_until(lambda: not is_alive(group=process.pid))


def is_alive(*, group: int) -> bool:
    """Say whether a process of the group still runs; a zombie does not."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, process_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(process_group) == group and state != "Z":
                return True
    return False


def cut_the_power(process: Process) -> None:
    """Kill Snakemake and all of its jobs at once."""
    os.killpg(process.pid, signal.SIGKILL)


Stop = Callable[[Process], None]
WAYS: list[Stop] = [
    press_ctrl_c,
    terminate,
    kill_snakemake,
    kill_snakemake_and_wait,
    cut_the_power,
]


def stop_at(place: Place, mark: str, stop: Stop) -> None:
    """Run Snakemake until a file matches, stop it, and unlock the folder if it could not do so itself."""
    process = place.start()
    wait_until(lambda: any(place.path.glob(mark)), process=process)
    stop(process)
    assert process.wait(timeout=120) != 0
    if stop not in (press_ctrl_c, press_ctrl_c_twice, terminate):
        refused = place.try_snakemake()
        assert refused.returncode != 0
        assert "--unlock" in refused.output
        place.snakemake("--unlock")


def finishes_within(seconds: float, place: Place, stop: Stop) -> bool:
    """Run Snakemake for so long at most, then stop it; say whether it had finished."""
    process = place.start()
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        stop(process)
        process.wait(timeout=120)
        return False
    assert process.returncode == 0, (place.path / "started.log").read_text()
    return True


def results_of(place: Place) -> dict[str, object]:
    """Return what must not depend on anyone's history: the cache, the students, what was measured."""
    found: dict[str, object] = {"cache": sha256(place.cache / "teacher_logits.h5")}
    for weights in sorted(place.results.glob("runs/*/*/final/model.safetensors")):
        found[str(weights.relative_to(place.results))] = sha256(weights)
    for path in sorted(place.results.glob("runs/*/*/evaluation/*/metrics.json")):
        metrics = Metrics.read(path)
        training = metrics.training.summary
        measured = (training.steps, training.trained_positions, metrics.scores, metrics.cache)
        found[str(path.relative_to(place.results))] = measured
    return found


def plant_claim(place: Place, process_id: int) -> None:
    """Leave what a worker that was killed here leaves: a fresh claim on a part."""
    (index,) = place.results.glob("tokens/*/index.json")
    part = TokenIndex.read(index).parts[0].name
    claim = place.cache / "parts" / f"{part}.claim"
    claim.parent.mkdir(exist_ok=True)
    claim.write_text(f"{platform.node()} {process_id}\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    "ways",
    [
        (press_ctrl_c, kill_snakemake_and_wait, terminate, press_ctrl_c_twice),
        (terminate, press_ctrl_c, cut_the_power, kill_snakemake),
    ],
    ids=["gently", "roughly"],
)
def test_stopped_at_every_stage_the_same_command_finishes(
    finished: Place, fresh: Place, ways: tuple[Stop, ...]
) -> None:
    at_tokens, at_teacher, at_merge, at_training = ways
    stop_at(fresh, "logs/tokenize_shard/*", at_tokens)
    stop_at(fresh, "results/logits/*/parts/*.h5", at_teacher)
    stop_at(fresh, "logs/merge_h5/*", at_merge)
    stop_at(fresh, "results/runs/both/*/checkpoint-4/complete.json", at_training)
    fresh.snakemake()
    assert results_of(fresh) == results_of(finished)
    assert not (fresh.cache / "parts").exists()
    assert fresh.plan() == {}


def test_a_dead_workers_claim_delays_nobody(done: Place) -> None:
    target = str((done.cache / "manifest.json").relative_to(done.path))
    undisturbed = sha256(done.cache / "teacher_logits.h5")
    for name in ("manifest.json", "teacher_logits.h5"):
        (done.cache / name).unlink()
    gone = subprocess.Popen(["true"])
    gone.wait()
    plant_claim(done, gone.pid)
    done.snakemake(target)
    workers = CacheRun.read(done.cache / "run.json").workers
    assert max(worker.made.seconds for worker in workers) < 30, "a claim grows old after 60 s"
    assert sha256(done.cache / "teacher_logits.h5") == undisturbed


@pytest.mark.campaign
@pytest.mark.parametrize("seed", [0])
def test_twenty_stops_at_random(finished: Place, inputs: Place, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    expected = results_of(finished)
    stops = histories = 0
    while stops < 20:
        histories += 1
        place = inputs.copy_to(tmp_path / f"history{histories}")
        while not finishes_within(chance.uniform(2.0, 25.0), place, chance.choice(WAYS)):
            stops += 1
            place.snakemake("--unlock")
        assert results_of(place) == expected, f"history {histories} of seed {seed}"
        assert place.plan() == {}


@pytest.mark.campaign
@pytest.mark.parametrize("num_workers", [1, 3])
def test_any_number_of_workers_makes_the_same_cache(
    finished: Place, done: Place, num_workers: int
) -> None:
    target = str((done.cache / "manifest.json").relative_to(done.path))
    shutil.rmtree(done.cache)
    done.write_config(tiny(teacher={"generation": {"num_workers": num_workers}}))
    done.snakemake(target, cores=3)
    for name in ("teacher_logits.h5", "manifest.json"):
        assert sha256(done.cache / name) == sha256(finished.cache / name)
