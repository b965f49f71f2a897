"""`retort export`: a finished student as GGUF, by llama.cpp's converter, which is not a part of Retort."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from retort.io.files import remove_stale_temporaries, replacing, require_writable
from retort.pipeline.finished import find_student

CONVERTER = "convert_hf_to_gguf.py"
_GET = (
    "git clone --depth 1 https://github.com/ggml-org/llama.cpp && python3 -m venv llama.cpp/.venv && "
    "llama.cpp/.venv/bin/pip install -r llama.cpp/requirements/requirements-convert_hf_to_gguf.txt"
)


def export_gguf(path: Path, *, outtype: str, out: Path | None, converter: Path | None) -> Path:
    """Convert the student of a run's folder or final/, and return the file: complete, or not there.

    `out`: by default <run>.<outtype>.gguf beside final/. `converter`: see `find_converter`.
    Raises ValueError when the student is not finished, there is no converter or no Python that it runs in, and, with
    what it said, when it fails.
    """
    student = find_student(path)
    script = find_converter(converter)
    target = out or student.folder.with_name(f"{student.record.run}.{outtype}.gguf")
    if target.is_dir():
        raise ValueError(
            f"--out {target} is a folder. Give the path of a file, such as {target / 'student.gguf'}."
        )
    require_writable(target.parent)
    python = find_python(script)
    remove_stale_temporaries(target.parent)
    with replacing(target) as temporary:
        command = [python, str(script), str(student.folder.resolve())]
        command += ["--outfile", str(temporary.resolve()), "--outtype", outtype]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode or not _is_gguf(temporary):
            said = "\n".join(done.stdout.strip().splitlines()[-15:])
            raise ValueError(
                f"{script} did not convert {student.folder} (status {done.returncode}):\n{said}"
            )
    return target


def find_converter(given: Path | None) -> Path:
    """Return llama.cpp's converter: `given`, a file or llama.cpp's folder, else that of the variable LLAMA_CPP, of
    PATH, or of a folder llama.cpp here, in the home or in /opt.

    Raises ValueError, with the command that gets it, where there is none.
    """
    named = given or Path(os.environ.get("LLAMA_CPP", ""))
    if given or os.environ.get("LLAMA_CPP"):
        script = named / CONVERTER if named.is_dir() else named
        if not script.is_file():
            how = "--converter" if given else "the variable LLAMA_CPP"
            raise ValueError(
                f"{how} is {str(named)!r}, where there is no {CONVERTER}. Give llama.cpp's folder."
            )
        return script
    found = next((place for place in _list_places() if place.is_file()), None)
    if found is None:
        raise ValueError(
            f"llama.cpp's {CONVERTER} is not here (looked at --converter, LLAMA_CPP, PATH, and for a folder "
            f"llama.cpp here, in your home and in /opt). Get it with:\n  {_GET}"
        )
    return found


def find_python(script: Path) -> str:
    """Return the Python that the converter runs in: of an environment in its folder, this one, or that of PATH.

    Raises ValueError, with what the converter lacks and the command that installs it, where it runs in none.
    """
    beside = [script.parent / name / "bin" / "python" for name in (".venv", "venv")]
    pythons = [*(str(path) for path in beside if path.exists()), sys.executable]
    pythons += [found for found in [shutil.which("python3")] if found and found not in pythons]
    said = ""
    for python in pythons:
        done = subprocess.run([python, str(script), "--help"], capture_output=True, text=True)
        if done.returncode == 0:
            return python
        said = said or (done.stderr.strip().splitlines() or ["no message"])[-1]
    folder = script.parent
    raise ValueError(
        f"{script} does not run in {', '.join(pythons)} ({said}). Make an environment for it, which is found there:\n"
        f"  python3 -m venv {folder}/.venv && {folder}/.venv/bin/pip install -r "
        f"{folder}/requirements/requirements-convert_hf_to_gguf.txt"
    )


def _list_places() -> Iterator[Path]:
    for name in (CONVERTER, "llama-quantize", "llama-cli"):
        if found := shutil.which(name):
            yield from (folder / CONVERTER for folder in list(Path(found).resolve().parents)[:3])
    for folder in (Path(), Path(os.path.expanduser("~")), Path("/opt")):  # noqa: PTH111 - never raises
        yield folder / "llama.cpp" / CONVERTER


def _is_gguf(path: Path) -> bool:
    if not path.exists():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"
