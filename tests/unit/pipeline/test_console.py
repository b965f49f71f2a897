"""The command `retort`: its help, its subcommands, and what `retort run` gives Snakemake."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from retort.pipeline import console, run_command
from retort.pipeline.workflow_files import find_script, find_workflow, list_scripts

REPOSITORY = Path(__file__).resolve().parents[3]


def test_help_lists_every_script_once_with_its_first_sentence() -> None:
    text = console.describe_commands()
    for name in list_scripts():
        rows = [r for r in text.splitlines() if r.startswith(f"  {name.replace('_', '-')} ")]
        assert len(rows) == 1 and rows[0].endswith(console.summarize(find_script(name))), name
    assert "\nOthers" not in text, "a new script needs a place in GROUPS"
    assert set(list_scripts()) == {name for names in console.GROUPS.values() for name in names}


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from retort.pipeline.console import main; main(['--help']); main(['--version']);"
        "print([m for m in ('torch', 'numpy', 'snakemake', 'yaml') if m in sys.modules])"
    )
    started = time.process_time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stdout.splitlines()[-2].startswith("retort 0.")
    assert time.process_time() - started < 10


def test_a_subcommand_is_the_script_with_its_flags() -> None:
    typed = subprocess.run(
        [sys.executable, "-m", "retort", "merge-h5", "--help"], capture_output=True, text=True
    )
    script = find_script("merge_h5")
    file = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert typed.returncode == file.returncode == 0
    assert "usage: retort merge-h5 [-h]" in typed.stdout
    assert (
        "    retort merge-h5 --config mine.yaml" in typed.stdout
        and "workflow/scripts" not in typed.stdout
    )
    options = file.stdout[file.stdout.index("\noptions:") :]
    assert typed.stdout.endswith(options)


def test_a_subcommand_ends_with_the_scripts_status(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "retort", "plan", "--index", "none.json"]
    command += ["--fingerprint", "none.json", "--output", "plan.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "none.json" in done.stderr, done.stderr


def test_an_unknown_command_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        console.main(["generate-logit"])
    assert ended.value.code == 2
    assert "no command 'generate-logit'. Did you mean generate-logits?" in capsys.readouterr().err


def test_init_copies_the_configs_and_overwrites_none(tmp_path: Path) -> None:
    mine = tmp_path / "config" / "config.yaml"
    mine.parent.mkdir()
    mine.write_text("mine")
    written = console.copy_configs(tmp_path)
    assert mine.read_text() == "mine" and mine not in written
    student = tmp_path / "config" / "students" / "llama_demo.json"
    assert {student, tmp_path / "profiles" / "slurm" / "config.yaml"} <= set(written)
    assert (
        student.read_bytes() == (find_workflow() / "config/students/llama_demo.json").read_bytes()
    )
    assert console.copy_configs(tmp_path) == []


def test_in_a_checkout_the_workflow_is_the_checkouts() -> None:
    assert find_workflow() == REPOSITORY
    with pytest.raises(ValueError, match=r"no script 'none'.*train"):
        find_script("none")


def test_the_shipped_profile_is_found_by_name_unless_there_is_one_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = str(find_workflow() / "profiles" / "slurm")
    assert run_command.resolve_profiles(["--profile", "slurm", "-n"]) == [
        "--profile",
        shipped,
        "-n",
    ]
    assert run_command.resolve_profiles(["--profile=slurm"]) == [f"--profile={shipped}"]
    assert run_command.resolve_profiles(["--profile", "mine"]) == ["--profile", "mine"]
    assert run_command.resolve_profiles(["slurm"]) == ["slurm"], "a target"
    (tmp_path / "profiles" / "slurm").mkdir(parents=True)
    assert run_command.resolve_profiles(["--profile", "slurm"]) == ["--profile", "profiles/slurm"]


@pytest.mark.parametrize(
    ("options", "gpus", "added"),
    [
        ([], 0, ["--cores", "all"]),
        ([], 4, ["--cores", "all", "--resources", "gpu=4"]),
        (["--cores", "3"], 4, ["--resources", "gpu=4"]),
        (["-j2", "--resources", "gpu=1"], 4, []),
        (["-n"], 4, []),
        (["--profile", "slurm"], 4, []),
    ],
)
def test_cores_and_gpus_of_this_machine_are_used_unless_said_otherwise(
    options: list[str],
    gpus: int,
    added: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus))))
    command = run_command.build_command(Path("mine.yaml"), options, is_verbose=False)
    _, args = run_command._parse(command, is_verbose=False)
    assert run_command.choose_machine(args) == added
    assert args.rerun_incomplete and args.keep_going, "the default profile"
    assert [str(path) for path in args.configfile] == ["mine.yaml"]


def test_more_config_files_are_laid_over_the_first() -> None:
    options = ["--configfile", "more.yaml", "-n"]
    command = run_command.build_command(Path("mine.yaml"), options, is_verbose=True)
    assert "--logger" not in command
    place = command.index("--configfile")
    assert command[place : place + 3] == ["--configfile", "mine.yaml", "more.yaml"]
