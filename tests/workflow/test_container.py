"""The Dockerfile makes an image in which the demo's command runs: in a container engine, or step by step without one.

Without an engine, the steps of the image's own user run here, in a folder that holds what COPY puts there and in an
environment that sees the packages of this one: so pip finds requirements.lock satisfied and downloads nothing. What
root does before is not run; the tools that it installs must be here.
"""

import fnmatch
import json
import os
import re
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

from support.place import REPOSITORY, Finished, Place, tiny

pytestmark = pytest.mark.slow
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
_PATIENCE_S = 3600


def find_engine() -> str | None:
    """The container engine that answers, if any."""
    for engine in ("docker", "podman"):
        if shutil.which(engine):
            asked = [engine, "info", "--format", "{{.ID}}" if engine == "docker" else "json"]
            if subprocess.run(asked, capture_output=True, check=False, timeout=60).returncode == 0:
                return engine
    return None


def read_steps() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, continued lines joined."""
    lines = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.M)).splitlines()
    steps = [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]
    return [(name, rest) for name, rest in steps]


def ignore(folder: str, names: list[str]) -> set[str]:
    """What .dockerignore keeps out of COPY: a name in the top folder, or **/name in any."""
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert not [p for p in patterns if "/" in p.removeprefix("**/")], "read them as docker does"
    anywhere = [p.removeprefix("**/") for p in patterns if p.startswith("**/")]
    here = anywhere + (patterns if Path(folder) == REPOSITORY else [])
    return {name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in here)}


def copy(words: list[str], project: Path) -> None:
    """COPY [--chown=USER] NAME ./, or all of the checkout."""
    *names, target = [word for word in words if not word.startswith("--")]
    assert target == "./", words
    for name in names:
        if name == ".":
            shutil.copytree(REPOSITORY, project, ignore=ignore, dirs_exist_ok=True)
        else:
            shutil.copy2(REPOSITORY / name, project)


def share_packages(venv: Path) -> None:
    """Make an environment that sees the packages of this one; not an editable library, which pip installs itself."""
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    (found,) = venv.glob("lib/python*/site-packages")
    (found / "shared.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    tools = Path(sys.executable).parent
    for tool in ("snakemake", "pytest"):  # commands that `make` calls there
        text = (tools / tool).read_text().split("\n", maxsplit=1)[1]
        (venv / "bin" / tool).write_text(f"#!{venv}/bin/python\n{text}")
        (venv / "bin" / tool).chmod(0o755)


@pytest.fixture
def project(inputs: Place, tmp_path: Path) -> Place:
    """An empty folder in the place of the image's WORKDIR, with an environment that needs no download."""
    path = tmp_path / "project"
    path.mkdir()
    share_packages(path / ".venv")
    without = ("PYTHONPATH", "PIP_EXTRA_INDEX_URL", "VIRTUAL_ENV")
    return Place(path, path, {"PIP_NO_BUILD_ISOLATION": "1"}, without)


def run(place: Place, command: str) -> Finished:
    done = place.execute(["/bin/sh", "-ec", command], patience_s=_PATIENCE_S)
    assert done.returncode == 0, f"{command}\n{done.output}"
    return done


@pytest.mark.skipif(find_engine() is not None, reason="there is an engine: the image is built")
def test_the_steps_of_the_dockerfile_make_a_project_in_which_the_command_runs(
    project: Place, inputs: Place
) -> None:
    user, ran, tools = "root", [], set()
    for name, rest in read_steps():
        if name == "USER":
            user = rest
        elif name == "COPY":
            copy(rest.split(), project.path)
        elif name == "RUN" and user == "root":
            installed = re.findall(r"apt-get install (?:--\S+ )*([\w ]+?) (?:&&|$)", rest)
            tools |= set(" ".join(installed).split())
        elif name == "RUN":
            run(project, rest)
            ran.append(rest)
    assert user not in ("root", "0"), "the demo needs no rights"
    assert len(ran) == 2
    assert tools and all(map(shutil.which, tools)), tools
    assert not (project.path / "tests").exists() and not (project.path / ".git").exists()
    editable = run(project, ".venv/bin/python -c 'import retort; print(retort.__file__)'").output
    assert Path(editable.strip()).is_relative_to(project.path), editable

    # The demo's own sizes take minutes: its command, on tiny parts.
    for part in inputs.path.iterdir():
        target = project.path / part.name
        if part.is_dir():
            shutil.copytree(part, target)
        else:
            shutil.copy2(part, target)
    runs = {"both": {"training": {"distillation_type": "hybrid", "alpha": 0.5}}}
    one = {"dataset": {"num_shards": 1}, "teacher": {"generation": {"num_workers": 1}}}
    project.write_config(tiny(**one, runs=runs), "config/config.yaml")
    (command,) = [json.loads(rest) for name, rest in read_steps() if name == "CMD"]
    said = run(project, " ".join(command)).output
    assert re.search(r"^both .* hybrid ", said, re.MULTILINE), said
    assert (project.path / "results" / "report.html").exists()


@pytest.mark.skipif(find_engine() is None, reason="no container engine answers")
def test_the_image_is_built_and_the_demo_runs_in_it() -> None:
    engine = find_engine()
    assert engine is not None
    tag = f"retort-test-{os.getpid()}"
    subprocess.run(
        [engine, "build", "--tag", tag, str(REPOSITORY)], check=True, timeout=_PATIENCE_S
    )
    try:
        done = subprocess.run(
            [engine, "run", "--rm", tag],
            capture_output=True,
            text=True,
            check=True,
            timeout=_PATIENCE_S,
        )
        assert re.search(r"^hybrid .* hybrid ", done.stdout, re.MULTILINE), done.stdout
    finally:
        subprocess.run([engine, "image", "rm", tag], check=False, timeout=600)
