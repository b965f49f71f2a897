"""The house stays in order: rooms import only what stands before them, and things that belong together share a name."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SOURCE = REPOSITORY / "src" / "retort"
RULE_FILES = sorted((REPOSITORY / "workflow" / "rules").glob("*.smk"))
SCRIPTS = sorted((REPOSITORY / "workflow" / "scripts").glob("*.py"))

# The order of the data flow. A room may import those before it.
ROOMS = (
    "commands",
    "config_schema",
    "sweeps",
    "synthesis_checks",
    "config_checks",
    "config_sections",
    "config",
    "provenance",
    "gpus",
    "leases",
    "progress",
    "deadlines",
    "failures",
    "stuck_jobs",
    "ranks",
    "documents",
    "demo_text",
    "readers",
    "hub",
    "sources",
    "sharding",
    "corpus",
    "drawing",
    "benchmark_plans",
    "synthesis_plans",
    "artefacts",
    "tokens",
    "vocabularies",
    "h5files",
    "shards",
    "index",
    "entropy",
    "sparse_streams",
    "codec",
    "sparse_codec",
    "cache",
    "parts",
    "samples",
    "heads",
    "features",
    "models",
    "students",
    "completions",
    "selection",
    "teacher",
    "claims",
    "workers",
    "validation",
    "merging",
    "losses",
    "fused_loss",
    "batches",
    "student_loss",
    "checkpoints",
    "trainer",
    "model_card",
    "training",
    "runs",
    "intervals",
    "text_bytes",
    "metrics",
    "breakdowns",
    "scores",
    "evaluation",
    "sandbox",
    "humaneval",
    "harness",
    "benchmarks",
    "prompts",
    "providers",
    "journal",
    "asking",
    "writing",
    "vllm_writing",
    "contamination",
    "filters",
    "synthesis",
    "demo",
    "checks",
    "staging",
    "planning",
    "scorecards",
    "records",
    "comparisons",
    "seeds",
    "scoreboard",
    "figures",
    "tables",
    "findings",
    "report",
    "by_hand",
    "workflow_files",
    "run_display",
    "run_command",
    "console",
    "__main__",
)
# Every job on every node parses the Snakefile again: these must not be loaded for it.
HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "numpy",
    "h5py",
    "pyarrow",
    "pandas",
    "matplotlib",
    "openai",
    "anthropic",
)


def find_imports(path: Path) -> set[str]:
    """The dotted names of all modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively in line {node.lineno}"
            assert node.module is not None
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module == "retort" else {node.module}
    return found


def find_rules() -> dict[str, str]:
    """The text of every rule in workflow/rules."""
    rules = {}
    for path in RULE_FILES:
        pieces = re.split(r"^(?:rule|checkpoint) (\w+):$", path.read_text(), flags=re.MULTILINE)
        rules |= dict(zip(pieces[1::2], pieces[2::2], strict=True))
    return rules


RULES = find_rules()


def test_every_room_has_its_place_in_the_order() -> None:
    on_disk = {path.stem for path in SOURCE.glob("*.py")} - {"__init__"}
    assert on_disk == set(ROOMS)
    assert len(ROOMS) == len(set(ROOMS))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_before_it(room: str) -> None:
    imported = {
        name.split(".")[1] for name in find_imports(SOURCE / f"{room}.py") if "retort." in name
    }
    assert imported <= set(ROOMS[: ROOMS.index(room)])


def test_hdf5_lives_in_three_rooms() -> None:
    rooms = {p.stem for p in SOURCE.glob("*.py") if "h5py" in find_imports(p)}
    assert rooms == {"h5files", "cache", "parts"}


def test_there_is_one_script_per_rule_and_one_rule_per_script() -> None:
    assert set(RULES) == {path.stem for path in SCRIPTS}


@pytest.mark.parametrize("rule", RULES)
def test_rule_script_and_log_folder_share_one_name(rule: str) -> None:
    assert set(re.findall(r'SCRIPTS\.format\("(\w+)"\)', RULES[rule])) == {rule}
    assert set(re.findall(r"\blogs/(\w+)/", RULES[rule])) == {rule}


@pytest.mark.parametrize("rule", RULES)
def test_no_rule_looks_at_dates_of_its_inputs(rule: str) -> None:
    block = re.search(r"^    input:\n((?: {8}.*\n)+)", RULES[rule], flags=re.MULTILINE)
    entries = re.findall(r"^ {8}(?:\w+=)?([^\s)].*)$", block[1], re.MULTILINE) if block else []
    assert all(entry.startswith(("ancient(", "check_unless(")) for entry in entries), entries


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_says_the_command_that_runs_it(script: Path) -> None:
    docstring = ast.get_docstring(ast.parse(script.read_text())) or ""
    assert f"python workflow/scripts/{script.name}" in docstring


def test_the_snakefile_loads_nothing_heavy() -> None:
    texts = [path.read_text() for path in (REPOSITORY / "Snakefile", *RULE_FILES)]
    lines = re.findall(r"^\s*((?:from|import) retort\b.*)$", "\n".join(texts), flags=re.MULTILINE)
    assert len(lines) >= 3
    code = "\n".join([*lines, "import sys", f"print([m for m in {HEAVY!r} if m in sys.modules])"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_readme_names_every_file_and_no_other() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"[\w./-]*\w\.(?:py|smk)\b", readme))
    basenames = {Path(name).name for name in named}
    files = [*SOURCE.glob("*.py"), *RULE_FILES, *SCRIPTS]
    assert {path.name for path in files} - {"__init__.py"} - basenames == set()
    folders = ("src", "workflow", "tests", "benchmarks", "docs")
    on_disk = [p.relative_to(REPOSITORY) for folder in folders for p in _walk(REPOSITORY / folder)]
    ends = {"/".join(path.parts[-n:]) for path in on_disk for n in range(1, len(path.parts) + 1)}
    assert {name.removeprefix("./") for name in named} - ends == set()


def _walk(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix in (".py", ".smk")]
