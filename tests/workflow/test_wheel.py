"""A wheel, installed into a clean environment, runs the workflow in an empty folder."""

import email
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from support.place import REPOSITORY, Place
from workflow.test_module import SHORT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built as pip builds it; its backend comes from the package index."""
    return build_wheel(REPOSITORY, tmp_path_factory.mktemp("dist"))


def build_wheel(checkout: Path, folder: Path) -> Path:
    """Return the wheel of a checkout, in `folder`."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder)]
    subprocess.run([*command, str(checkout)], check=True)
    (built,) = folder.glob("retort-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin/ of an environment with the wheel; its dependencies are those of this environment, by a path."""
    folder = tmp_path_factory.mktemp("env")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Behind the environment's own packages; .pth files of that folder, such as an editable retort's, are not read.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def files_of(*names: str) -> set[str]:
    """Return the files of the checkout's folders, as they are to lie in the wheel."""
    found = set()
    for name in names:
        top = REPOSITORY / name
        files = [top] if top.is_file() else [p for p in top.rglob("*") if p.is_file()]
        found |= {str(p.relative_to(REPOSITORY)) for p in files if "__pycache__" not in p.parts}
    return found


def test_the_wheel_holds_the_library_and_the_workflow_and_nothing_else(wheel: Path) -> None:
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    library = {name.removeprefix("src/") for name in files_of("src") if ".egg-info/" not in name}
    workflow = files_of("Snakefile", "workflow", "config", "profiles")
    assert names == library | {f"retort/_workflow/{name}" for name in workflow}
    assert {
        "retort/py.typed",
        "retort/_workflow/workflow/schemas/config.schema.json",
        *(f"retort/report/{name}.j2" for name in ("page.html", "summary.txt", "warnings.txt")),
        "retort/report/columns.yaml",
    } <= names


@pytest.mark.parametrize(
    "remote",
    [
        "https://user:secret@code.example.org/team/retort.git",
        "git@code.example.org:team/retort.git",
    ],
)
def test_a_wheel_has_the_urls_of_the_repository_that_it_is_built_from(
    remote: str, tmp_path: Path
) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(REPOSITORY), str(clone)], check=True)
    shutil.copy(REPOSITORY / "hatch_build.py", clone)  # as it is, committed or not
    shutil.copy(REPOSITORY / "pyproject.toml", clone)
    subprocess.run(["git", "-C", str(clone), "remote", "set-url", "origin", remote], check=True)
    urls = read_urls(build_wheel(clone, tmp_path))
    assert "Homepage, https://code.example.org/team/retort" in urls
    assert "Issues, https://code.example.org/team/retort/issues" in urls
    for file in (url.partition("/blob/HEAD/")[2] for url in urls if "/blob/" in url):
        assert (REPOSITORY / file).is_file()


def test_a_wheel_of_a_clone_without_a_web_address_has_no_urls(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(REPOSITORY), str(clone)], check=True)
    assert read_urls(build_wheel(clone, tmp_path)) == []


def read_urls(wheel: Path) -> list[str]:
    """Return the project URLs of a wheel as its metadata has them: "label, address"."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    return metadata.get_all("Project-URL") or []


def test_an_installed_retort_runs_a_workflow_to_its_report(fresh: Place, installed: Path) -> None:
    place = Place(fresh.path, without=("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"))

    def run(*words: str) -> str:
        done = place.execute([str(installed / words[0]), *words[1:]])
        assert done.returncode == 0, done.output
        return done.output

    where = run("python", "-c", "import retort; print(retort.__file__)")
    assert where.startswith(str(installed.parent)), where
    assert run("retort", "--version") == "retort 0.2.0\n"
    assert "usage: retort train" in run("retort", "train", "--help")
    run("retort", "init", "--examples")
    assert "demo_teacher" in run("retort", "run", "config/config.yaml", "-n")
    place.write_config(SHORT)
    said = run("retort", "run", "tiny.yaml", "--cores", "2")
    assert (place.results / "summary.txt").read_text().rstrip() in said
    train = next((place.path / "logs" / "train").glob("*.log")).read_text()
    assert "train hard  12 steps" in train
    (record,) = place.results.glob("runs/hard/*/run.json")
    assert str(REPOSITORY) not in record.read_text()
