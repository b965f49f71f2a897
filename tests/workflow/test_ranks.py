"""Several ranks train one student: the same one as a single process does, and nobody is left behind."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from retort.training.stopping import STOPPING
from support.batches import read_order
from support.place import REPOSITORY, Place, tiny, wait_until
from workflow.test_by_hand import read_commands, with_output

INSTEAD = REPOSITORY / "tests" / "support" / "instead_of_train.py"
# A step is two forward passes of one process; the first epoch, of 284 sequences, ends within the 24th step.
STEPS = 26
KEYS = (
    *("device=cpu", "batch_size=6", "gradient_accumulation_steps=2", f"max_steps={STEPS}"),
    *("logging_steps=1", "save_steps=6", "eval_steps=12", "eval_sequences=7"),
)


class Student:
    """One student's training, typed by hand in the folder of a finished workflow."""

    def __init__(self, place: Place, command: list[str]) -> None:
        config = command.index("--config") + 1
        job = json.loads(command[config])
        del job["expected"]  # other students are given by hand
        self.place = place
        self.rule_command = [*command[:config], json.dumps(job), *command[config + 1 :]]

    def command(self, name: str, *keys: str, how: str | None = None) -> list[str]:
        """Return the command that trains into a folder, with keys of `training` that differ from those of the rule.

        `how`: see instead_of_train.py, by torchrun.
        """
        command = with_output(self.rule_command, f"{name}/training.json")
        for key in (*KEYS, *keys):
            command += ["--set", key if "." in key.partition("=")[0] else f"training.{key}"]
        if how is None:
            return command
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [*torchrun, "--nproc-per-node=2", "--", str(INSTEAD), how, *command[2:]]

    def train(self, name: str, *keys: str, how: str | None = None) -> None:
        """Train to the end."""
        done = self.place.execute(self.command(name, *keys, how=how))
        assert done.returncode == 0, done.output

    def start(self, name: str, *keys: str) -> "subprocess.Popen[str]":
        """Start the training, to be stopped; it is a real one."""
        place = self.place
        return subprocess.Popen(
            self.command(name, *keys),
            cwd=place.path,
            env=place.environment(),
            stderr=subprocess.PIPE,
            text=True,
        )

    def losses(self, name: str) -> list[float]:
        """Return the total loss of each logged step."""
        log = self.place.path / name / "training_log.csv"
        with log.open(newline="") as file:
            return [float(row["total_loss"]) for row in csv.DictReader(file) if row["total_loss"]]

    def weights(self, name: str) -> dict[str, Tensor]:
        """Return the finished student's."""
        return load_file(self.place.path / name / "final" / "model.safetensors")

    def curve(self, name: str) -> list[dict[str, str]]:
        """Return the finished training's log."""
        with (self.place.path / name / "training_log.csv").open() as file:
            return list(csv.DictReader(file))


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], *, atol: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=atol)


def find_processes(words: str) -> list[int]:
    """Return the processes whose command line holds some words."""
    found = subprocess.run(
        ["pgrep", "-f", "--", words], capture_output=True, text=True, check=False
    )
    return [int(pid) for pid in found.stdout.split() if int(pid) != os.getpid()]


@pytest.fixture(scope="module")
def student(finished: Place, tmp_path_factory: pytest.TempPathFactory) -> Student:
    place = finished.copy_to(tmp_path_factory.mktemp("ranks") / "project")
    one = Student(place, read_commands(place.as_it_is)["train both"])  # what is killed is real
    one.train("one", "gpus=1")
    one.train("two", "gpus=2")
    return one


def test_two_ranks_train_the_student_of_one(student: Student) -> None:
    assert_close(student.weights("two"), student.weights("one"), atol=1e-6)
    for mine, theirs in zip(student.curve("two"), student.curve("one"), strict=True):
        for name in ("step", "total_loss", "hard_loss", "soft_loss", "learning_rate"):
            assert float(mine[name]) == pytest.approx(float(theirs[name]), abs=1e-5)
    losses = [[r["eval_loss"] for r in student.curve(n) if r["eval_loss"]] for n in ("one", "two")]
    assert [len(found) for found in losses] == [3, 3]
    assert list(map(float, losses[1])) == pytest.approx(list(map(float, losses[0])), abs=1e-6)
    moved = student.place.path / "one" / "checkpoint-18" / "model.safetensors"
    with pytest.raises(AssertionError):  # the steps between are no rounding
        assert_close(student.weights("one"), load_file(moved), atol=1e-4)


def test_fsdp_trains_it_too_and_goes_on_where_it_stopped(student: Student) -> None:
    student.train("fsdp", "strategy=fsdp", how="fsdp")
    assert_close(student.weights("fsdp"), student.weights("one"), atol=1e-6)
    for mine, theirs in zip(student.curve("fsdp"), student.curve("one"), strict=True):
        assert bool(mine["eval_loss"]) == bool(theirs["eval_loss"])
        if mine["eval_loss"]:
            assert float(mine["eval_loss"]) == pytest.approx(float(theirs["eval_loss"]), abs=1e-6)
    folder = student.place.path / "fsdp"
    whole = student.weights("fsdp")
    shutil.rmtree(folder / "final")
    shutil.rmtree(folder / f"checkpoint-{STEPS}")
    student.train("fsdp", "strategy=fsdp", how="fsdp")
    assert_close(student.weights("fsdp"), whole, atol=0)
    done = student.place.execute(student.command("two", "strategy=fsdp", how="fsdp"))
    assert done.returncode != 0 and "was saved with training.strategy 'ddp'" in done.output


def test_a_tied_student_is_the_same_by_ddp_and_by_fsdp(student: Student) -> None:
    tied = json.loads((student.place.path / "student.json").read_text())
    (student.place.path / "tied.json").write_text(json.dumps(tied | {"tie_word_embeddings": True}))
    keys = ("student.config=tied.json", "max_steps=4")
    student.train("tied 1", *keys)
    student.train("tied 2", *keys, "gpus=2")
    student.train("tied fsdp", *keys, "strategy=fsdp", how="fsdp")
    assert "lm_head.weight" not in student.weights("tied 1")
    assert_close(student.weights("tied 2"), student.weights("tied 1"), atol=1e-6)
    assert_close(student.weights("tied fsdp"), student.weights("tied 1"), atol=1e-6)


@pytest.mark.slow
def test_in_half_precision_ddp_and_fsdp_have_losses_in_float32(student: Student) -> None:
    """And learn what float32 does."""
    keys = ("max_steps=4", "logging_steps=1")
    student.train("whole", *keys, "gpus=2")
    expected = student.losses("whole")
    assert len(expected) == 4
    for how in ("bf16", "fp16", "fsdp-bf16", "fsdp-fp16"):
        strategy = ["strategy=fsdp"] if how.startswith("fsdp") else []
        student.train(how, *keys, *strategy, how=how)
        losses = student.losses(how)
        assert losses != expected
        assert losses == pytest.approx(expected, rel=1e-2)


def test_each_rank_reads_its_share_of_every_step(student: Student) -> None:
    student.train("counted", "dataloader_num_workers=0", how="counted")
    assert_close(student.weights("counted"), student.weights("two"), atol=0)
    reads = [
        [int(line) for line in (student.place.path / f"reads_{r}.txt").read_text().split()]
        for r in (0, 1)
    ]
    assert [len(found) for found in reads] == [6 * STEPS] * 2
    number = max(max(found) for found in reads) + 1
    assert number < 12 * STEPS and number % 12, "an epoch ends within a step"
    order = read_order(number, seed=0, count=12 * STEPS)
    for step in range(STEPS):
        mine = [found[6 * step : 6 * step + 6] for found in reads]
        assert sorted(mine[0] + mine[1]) == sorted(order[12 * step : 12 * step + 12])


@pytest.mark.slow
def test_stopped_or_killed_ranks_leave_nobody_behind_and_lose_no_step(student: Student) -> None:
    folder = student.place.path / "killed"
    training = "--output killed/training.json"
    for step in (6, 18):
        launcher = student.start("killed", "gpus=2")
        mark = folder / f"checkpoint-{step}" / "complete.json"
        wait_until(mark.exists, process=launcher)
        processes = find_processes(training)
        assert len(processes) >= 3
        if step == 6:
            for process in processes:  # as SLURM does; a rank hears of it from the launcher too
                os.kill(process, signal.SIGTERM)
        else:
            launcher.send_signal(signal.SIGKILL)
        _, said = launcher.communicate()
        wait_until(lambda: not find_processes(training))
        if step == 6:
            assert launcher.returncode == 128 + signal.SIGTERM
            assert said.count(STOPPING) == 1 and "Traceback" not in said
            assert "interrupted by SIGTERM: all ranks ended" in said
            steps = {int(path.parent.name[11:]) for path in folder.glob("*/complete.json")}
            assert max(steps) > 6, "it saved where it stopped"
    assert not (folder / "final").exists()
    student.train("killed", "gpus=2")
    assert_close(student.weights("killed"), student.weights("two"), atol=0)
    for mine, theirs in zip(student.curve("killed"), student.curve("two"), strict=True):
        assert mine | {"tokens_per_second": ""} == theirs | {"tokens_per_second": ""}


def test_a_second_ctrl_c_ends_all_ranks_at_once(student: Student) -> None:
    # On a busy machine, a short training would end before the signal comes.
    launcher = student.start("ended", "gpus=2", "max_steps=100000")
    training = "--output ended/training.json"
    mark = student.place.path / "ended" / "checkpoint-6" / "complete.json"
    wait_until(mark.exists, process=launcher)
    found = subprocess.run(["pgrep", "-P", str(launcher.pid), "-f", "train.py"], stdout=-1)
    for process in found.stdout.split():
        os.kill(int(process), signal.SIGSTOP)  # or it would have ended before the second one
    while launcher.poll() is None:
        launcher.send_signal(signal.SIGINT)
        time.sleep(0.5)
    _, said = launcher.communicate()
    assert launcher.returncode == 128 + signal.SIGINT
    assert "interrupted again: all ranks ended" in said and "Traceback" not in said
    wait_until(lambda: not find_processes(training))


def test_a_student_with_parts_that_never_learn_trains_on_two_ranks_too(student: Student) -> None:
    bart = {"model_type": "bart", "d_model": 8, "decoder_layers": 1, "decoder_ffn_dim": 8}
    bart |= {"decoder_attention_heads": 2, "dropout": 0.0, "max_position_embeddings": 64}
    (student.place.path / "bart.json").write_text(json.dumps(bart))
    keys = ("student.config=bart.json", "max_steps=3")
    student.train("bart 1", *keys)
    student.train("bart 2", *keys, "gpus=2")
    assert_close(student.weights("bart 2"), student.weights("bart 1"), atol=1e-6)


def test_ranks_that_do_not_share_their_gradients_are_found_out(student: Student) -> None:
    done = student.place.execute(student.command("alone", how="alone"))
    assert done.returncode != 0 and "2 ranks hold different weights" in done.output


def test_a_loss_that_is_no_number_ends_all_ranks(student: Student) -> None:
    command = student.command("wild", "gpus=2", "learning_rate=1e30")
    done = student.place.execute(command)
    assert done.returncode == 1
    assert re.search(
        r"error: the loss is (nan|inf) from sequences \[.*\] .* at step 2\b", done.output
    )
    assert "Traceback" not in done.output
    assert not find_processes("--output wild/training.json")


def test_ranks_need_a_batch_that_they_can_share(student: Student) -> None:
    done = student.place.execute(student.command("odd", "gpus=5"))
    assert done.returncode == 1
    assert "12 sequences a step, which 5 GPUs cannot share evenly" in done.output
    assert "Traceback" not in done.output


def test_several_nodes_without_slurm_are_refused_before_anything_starts(fresh: Place) -> None:
    fresh.write_config(tiny(training={"nodes": 2}))
    refused = fresh.try_snakemake()
    assert refused.returncode != 0
    assert "In run 'hard', training.nodes is 2, but without SLURM" in refused.output
    assert "Traceback" not in refused.output
    assert not list(fresh.results.glob("*/*")), "nothing was made"


def test_several_nodes_by_hand_need_srun(student: Student) -> None:
    done = student.place.execute(student.command("nodes", "nodes=2"))
    assert done.returncode == 1
    assert "srun has not started this command once on each of 2 nodes" in done.output
    assert "Traceback" not in done.output
