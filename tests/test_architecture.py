"""Rules, scripts and logs share names; docstrings and imports follow rules that no linter has."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SOURCE = REPOSITORY / "src" / "retort"
RULE_FILES = sorted((REPOSITORY / "workflow" / "rules").glob("*.smk"))
SCRIPTS = sorted((REPOSITORY / "workflow" / "scripts").glob("*.py"))

# Every job parses the Snakefile again, which must not load these.
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
    """Return the dotted names of all modules that a file imports, also inside functions."""
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
    """Return the text of every rule in workflow/rules, by name."""
    rules: dict[str, str] = {}
    for path in RULE_FILES:
        pieces = re.split(r"^(?:rule|checkpoint) (\w+):$", path.read_text(), flags=re.MULTILINE)
        rules |= dict(zip(pieces[1::2], pieces[2::2], strict=True))
    return rules


RULES = find_rules()
PAGES = [
    *(p for p in sorted((REPOSITORY / "docs").glob("*.md")) if p.name != "LOG.md"),  # a history
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
]


def test_hdf5_is_written_and_read_in_four_modules() -> None:
    modules = {
        str(p.relative_to(SOURCE)) for p in SOURCE.rglob("*.py") if "h5py" in find_imports(p)
    }
    assert modules == {"io/hdf5.py", "cache/reader.py", "cache/parts.py", "cache/merged.py"}


def test_there_is_one_script_per_rule_and_one_rule_per_script() -> None:
    assert set(RULES) == {path.stem for path in SCRIPTS} - {
        "compare",
        "export",
        "export_parquet",
        "import",
        "publish",
        "ls",
        "gc",
        "show",
        "diff",
    }  # by hand


@pytest.mark.parametrize("rule", RULES)
def test_rule_script_and_log_folder_have_one_name(rule: str) -> None:
    assert set(re.findall(r'\*\*command\("(\w+)"', RULES[rule])) == {rule}
    assert set(re.findall(r"\blogs/(\w+)/", RULES[rule])) == {rule}


@pytest.mark.parametrize("rule", RULES)
def test_no_rule_looks_at_dates_of_its_inputs(rule: str) -> None:
    block = re.search(r"^    input:\n((?: {8}.*\n)+)", RULES[rule], flags=re.MULTILINE)
    entries = re.findall(r"^ {8}(?:\w+=)?([^\s)].*)$", block[1], re.MULTILINE) if block else []
    # Of the function, all values are ancient.
    allowed = ("ancient(", "check_unless(", "unpack(get_tokenize_inputs)")
    assert all(entry.startswith(allowed) for entry in entries), entries


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_has_its_command_in_its_docstring(script: Path) -> None:
    docstring = ast.get_docstring(ast.parse(script.read_text())) or ""
    assert f"python workflow/scripts/{script.name}" in docstring


def test_the_snakefile_loads_nothing_heavy() -> None:
    texts = [path.read_text() for path in (REPOSITORY / "Snakefile", *RULE_FILES)]
    statement = r"^((?:from|import) retort\b(?:[^(\n]*\([^)]*\)|.*))$"
    lines = re.findall(statement, "\n".join(texts), flags=re.MULTILINE)
    assert len(lines) >= 3
    code = "\n".join([*lines, "import sys", f"print([m for m in {HEAVY!r} if m in sys.modules])"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_page_of_modules_is_made_of_their_docstrings() -> None:
    script = REPOSITORY / "docs" / "architecture.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert done.stdout == page, "run: make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_paths_that_a_page_names_exist(page: Path) -> None:
    """Also globs. NAME in a path stands for any name."""
    path = r"(?<![\w./-])(?:src|tests|workflow|benchmarks|config)/[\w./*-]*"
    named = {name.rstrip(".") for name in re.findall(path, page.read_text(encoding="utf-8"))}
    missing = [n for n in named if not any(REPOSITORY.glob(n.replace("NAME", "*").rstrip("/")))]
    assert sorted(missing) == []


def find_raisers(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    """Yield public functions and methods that raise ValueError themselves, uncaught and not in a nested function."""
    nodes = list(ast.iter_child_nodes(tree))
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.ClassDef):
            nodes.extend(node.body)
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        inner: list[ast.AST] = [*node.body]
        while inner:
            found = inner.pop()
            if isinstance(found, ast.Raise) and "ValueError(" in ast.unparse(found):
                yield node
                break
            caught = isinstance(found, ast.Try) and any(
                "ValueError" in ast.unparse(handler.type or ast.Constant(None))
                for handler in found.handlers
            )
            if not caught and not isinstance(found, ast.FunctionDef | ast.Lambda | ast.ClassDef):
                inner.extend(ast.iter_child_nodes(found))


def test_public_functions_that_raise_value_error_say_so() -> None:
    silent = [
        f"{path.relative_to(SOURCE)}:{function.lineno} {function.name}"
        for path in sorted(SOURCE.rglob("*.py"))
        for function in find_raisers(ast.parse(path.read_text()))
        if "ValueError" not in (ast.get_docstring(function) or "")
    ]
    assert silent == []
