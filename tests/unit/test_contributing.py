"""What people who join are told is true: files and commands exist, and what GitHub reads is well formed."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = ("CONTRIBUTING.md", "SECURITY.md", ".github/PULL_REQUEST_TEMPLATE.md")
WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))


def read(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def read_yaml(name: str) -> Any:
    return yaml.safe_load(read(name))


def find_code(text: str) -> list[str]:
    """What stands in backticks, and the lines of code blocks without their comments."""
    blocks = "\n".join(re.findall(r"```\w*\n(.*?)```", text, re.DOTALL))
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return spans + re.sub(r" +#.*", "", blocks).splitlines()


def find_make_targets(code: list[str]) -> set[str]:
    return {target for line in code for target in re.findall(r"\bmake ([a-z][\w-]*)", line)}


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page: str) -> None:
    text = read(page)
    code = "\n".join(find_code(text))
    named = set(re.findall(r"(?<![\w.<>/-])(?:[\w.-]+/)+[\w.-]*(?![\w*<])", code))
    links = set(re.findall(r"\]\(((?!https:)[^)#]+)", text))
    folders = ("src", "workflow", "tests", "docs", "config", "profiles", "benchmarks")
    ours = links | {n.rstrip(".") for n in named if n.split("/")[0] in folders and "NAME" not in n}
    assert len(ours) >= {"CONTRIBUTING.md": 30, "SECURITY.md": 0}.get(page, 1)
    assert [name for name in sorted(ours) if not (REPOSITORY / name).exists()] == []


def test_names_that_contributors_are_sent_to_are_in_the_files_beside_them() -> None:
    """`src/retort/x.py`: `NAME` in the same item of a list, for names in capitals or with an underscore."""
    items = re.findall(r"^\d\. (.*?)(?=^\d\. |^$)", read("CONTRIBUTING.md"), re.M | re.S)
    missing = []
    for item in items:
        paths = re.findall(r"`(src/retort/[\w/]+\.py)`", item)
        names = re.findall(r"`(_?[A-Z][A-Z_]+|[a-z]+_[a-z_]+)(?:\[\"\w+\"\]|\(\))?`", item)
        sources = "\n".join(read(path) for path in paths)
        missing += [name for name in names if paths and not re.search(rf"\b{name}\b", sources)]
    assert len(items) >= 15
    assert missing == []


def test_make_targets_that_are_named_exist() -> None:
    code = [line for page in PAGES for line in find_code(read(page))]
    runs = [step.get("run", "") for path in WORKFLOWS for step in _steps(path)]
    named = find_make_targets([*code, *runs, read("Dockerfile"), read(".pre-commit-config.yaml")])
    named |= set(re.findall(r'"make", "([\w-]+)"', read("Dockerfile")))
    assert named >= {"test", "test-all", "test-slurm", "lint", "demo", "environment"}
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE))
    assert named - targets == set()


def _jobs(path: Path) -> dict[str, Any]:
    jobs: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    return jobs


def _steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in _jobs(path).values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_job_of_a_workflow_ends_and_every_step_does_one_thing(path: Path) -> None:
    for name, job in _jobs(path).items():
        assert 0 < job["timeout-minutes"] <= 180, name
    assert all(("run" in step) != ("uses" in step) for step in _steps(path))
    scripts = [w for s in _steps(path) for w in re.findall(r"tests/[\w/]+\.sh", s.get("run", ""))]
    assert scripts and all((REPOSITORY / script).exists() for script in scripts)


def test_pythons_that_are_tested_begin_with_the_oldest_that_is_allowed() -> None:
    (path,) = WORKFLOWS
    tested = _jobs(path)["test"]["strategy"]["matrix"]["python"]
    project = tomllib.loads(read("pyproject.toml"))["project"]
    assert f">={tested[0]}" == project["requires-python"]
    assert f"FROM python:{tested[0]}-slim" in read("Dockerfile")


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_have_what_github_wants(path: Path) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert form["name"] and form["description"]
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids))
    assert all("label" in field["attributes"] for field in form["body"])


def test_the_citation_is_of_this_version_and_license() -> None:
    citation = read_yaml("CITATION.cff")
    project = tomllib.loads(read("pyproject.toml"))["project"]
    assert {k: citation[k] for k in ("version", "license")} == {
        k: project[k] for k in ("version", "license")
    }
    assert citation["abstract"] == f"{project['description']}."


def test_pre_commit_hooks_use_the_tools_of_the_environment() -> None:
    (local,) = read_yaml(".pre-commit-config.yaml")["repos"]
    dev = " ".join(tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]["dev"])
    entries = [hook["entry"] for hook in local["hooks"] if hook["language"] == "system"]
    tools = {re.match(r"\.venv/bin/([\w-]+)", entry)[1] for entry in entries}  # type: ignore[index]
    assert tools == {"ruff", "mypy", "snakefmt"}
    assert all(tool in dev for tool in tools)
