"""`retort export`: finds the converter (a stand-in for llama.cpp's), runs it, and leaves a whole file or none."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from retort.io.digests import digest_folder
from retort.pipeline.gguf import CONVERTER, export_gguf, find_converter
from support.records import make_training_record

# Takes the arguments of llama.cpp's converter, and writes them into the file.
STAND_IN = """
import argparse, pathlib, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--outfile", required=True)
parser.add_argument("--outtype", choices=["f32", "f16", "bf16", "q8_0", "auto"])
args = parser.parse_args()
out = pathlib.Path(args.outfile)
weights = (pathlib.Path(args.model) / "model.safetensors").read_bytes()
out.write_bytes(b"GGUF" + args.outtype.encode())
if weights == b"odd":
    print("Model FooForCausalLM is not supported")
    sys.exit(1)
if weights == b"slow":
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", b"fine")


@pytest.fixture
def converter(tmp_path: Path) -> Path:
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp" / CONVERTER).write_text(STAND_IN)
    return tmp_path / "llama.cpp"


def write_run(run: Path, weights: bytes) -> Path:
    (run / "final").mkdir(parents=True)
    (run / "final" / "model.safetensors").write_bytes(weights)
    record = make_training_record("soft", "hybrid", final=digest_folder(run / "final"))
    record.write(run / "training.json")
    return run


def test_a_run_its_final_folder_and_its_record_are_converted(run: Path, converter: Path) -> None:
    made = export_gguf(run, outtype="q8_0", out=None, converter=converter)
    assert made == run / "soft.q8_0.gguf" and made.read_bytes() == b"GGUFq8_0"
    for path in (run / "final", run / "training.json"):
        out = run / "elsewhere" / "mine.gguf"
        assert export_gguf(path, outtype="f16", out=out, converter=converter / CONVERTER) == out
        assert out.read_bytes() == b"GGUFf16"
        out.unlink()


def test_what_the_converter_says_is_shown_and_no_file_is_left(
    tmp_path: Path, converter: Path
) -> None:
    run = write_run(tmp_path / "odd", b"odd")
    with pytest.raises(ValueError, match=r"status 1\):\nModel FooForCausalLM is not supported"):
        export_gguf(run, outtype="f16", out=None, converter=converter)
    assert sorted(p.name for p in run.iterdir()) == ["final", "training.json"]


def test_a_kill_leaves_no_half_file_and_the_next_export_cleans_up(
    tmp_path: Path, converter: Path
) -> None:
    run = write_run(tmp_path / "slow", b"slow")
    command = [sys.executable, "-m", "retort", "export", str(run), "--to", "gguf"]
    process = subprocess.Popen(
        [*command, "--converter", str(converter)], start_new_session=True, cwd=tmp_path
    )
    deadline = time.monotonic() + 90
    while not [*run.glob(".soft.f16.gguf.*.tmp")]:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run / "soft.f16.gguf").exists()
    shutil.rmtree(run / "final")
    (run / "training.json").unlink()
    write_run(run, b"fine")
    export_gguf(run, outtype="f16", out=None, converter=converter)
    assert sorted(p.name for p in run.iterdir()) == ["final", "soft.f16.gguf", "training.json"]


def test_the_converter_is_found_and_without_one_the_command_that_gets_it_is_told(
    run: Path, converter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for name in ("HOME", "PATH"):
        monkeypatch.setenv(name, str(empty))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.chdir(empty)
    with pytest.raises(ValueError, match=r"is not here .*\n  git clone .*llama\.cpp"):
        export_gguf(run, outtype="f16", out=None, converter=None)
    with pytest.raises(ValueError, match=r"--converter is .*empty'"):
        find_converter(empty)
    monkeypatch.setenv("LLAMA_CPP", str(converter))
    assert find_converter(None) == converter / CONVERTER
    monkeypatch.setenv("LLAMA_CPP", str(empty))
    with pytest.raises(ValueError, match="the variable LLAMA_CPP is"):
        find_converter(None)
    monkeypatch.delenv("LLAMA_CPP")
    monkeypatch.chdir(converter.parent)
    assert find_converter(None).resolve() == converter / CONVERTER
    monkeypatch.chdir(empty)
    (converter / "build" / "bin").mkdir(parents=True)
    tool = converter / "build" / "bin" / "llama-quantize"
    tool.touch(0o755)
    monkeypatch.setenv("PATH", str(tool.parent))
    assert find_converter(None) == converter / CONVERTER


def test_a_converter_that_lacks_a_package_is_told_with_the_command_that_installs_it(
    run: Path, converter: Path
) -> None:
    (converter / CONVERTER).write_text("import gguf_that_nobody_has")
    with pytest.raises(
        ValueError, match=r"No module named 'gguf_that_nobody_has'(.|\n)*pip install"
    ):
        export_gguf(run, outtype="f16", out=None, converter=converter)


def test_a_python_beside_the_converter_comes_first(run: Path, converter: Path) -> None:
    python = converter / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\ntouch {converter}/used\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    export_gguf(run, outtype="f16", out=None, converter=converter)
    assert (converter / "used").exists()


def test_only_finished_students_that_are_as_written_are_converted(
    run: Path, converter: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        export_gguf(tmp_path / "none", outtype="f16", out=None, converter=converter)
    with pytest.raises(ValueError, match="is a folder"):
        export_gguf(run, outtype="f16", out=tmp_path, converter=converter)
    (run / "final" / "model.safetensors").write_bytes(b"edited")
    with pytest.raises(ValueError, match=r"final is not what .*training\.json records"):
        export_gguf(run, outtype="f16", out=None, converter=converter)
    (run / "training.json").unlink()
    with pytest.raises(ValueError, match="Its training has not ended"):
        export_gguf(run, outtype="f16", out=None, converter=converter)
