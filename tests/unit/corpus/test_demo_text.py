"""The demo corpus: the docstrings that ast finds, each once, in the same order everywhere."""

import ast
import importlib.util
import inspect
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from retort.corpus.demo_text import extract_documentation, read_demo_text


def test_documentation_is_found_as_ast_finds_it() -> None:
    spec = importlib.util.find_spec("numpy")
    assert spec is not None and spec.origin is not None
    missed, found = [], 0
    for path in sorted(Path(spec.origin).parent.glob("lib/*.py")):
        source = path.read_text(encoding="utf-8")
        strings = set(extract_documentation(source))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node, clean=False)
                if text is None or "\\" in text or len(inspect.cleandoc(text)) < 80:
                    continue
                if f'"""{text}"""' in source:  # as written, without escapes
                    found += 1
                    wanted = inspect.cleandoc(text).split()
                    missed += [] if any(s.split() == wanted for s in strings) else [text]
    assert found > 200
    assert len(missed) <= found // 200, missed[:3]


def test_only_strings_that_open_a_block_are_documentation() -> None:
    words = "word " * 20
    source = f'''# comment with a quote "
"""Module: {words}"""
text = "a # b"
def f(x: str = "\\"'") -> None:  # comment: with """ inside
    r"""Function f.

        Indented {words}
    """
    return """Not documentation {words}"""
x = """
class Inner:
    'no' {words}"""
'''
    found = extract_documentation(source)
    assert [t.split()[0] for t in found] == ["Module:", "Function"]
    assert found[1] == f"Function f.\n\nIndented {words.strip()}"


def test_the_demo_is_the_same_each_time_and_any_prefix_mixes_the_packages() -> None:
    first = list(islice(read_demo_text(seed=0), 60))
    assert first == list(islice(read_demo_text(seed=0), 60))
    assert first != list(islice(read_demo_text(seed=1), 60))
    assert len(set(first)) == 60
    assert min(map(len, first)) >= 200
    assert any("torch" in text for text in first)
    assert any("matplotlib" in text or "axes" in text.lower() for text in first)


def test_repeated_strings_and_tests_are_left_out_of_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, own = "shared words " * 20, "other words " * 20
    package = tmp_path / "documented"
    (package / "tests").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text(f'"""{shared}"""\n')
    (package / "b.py").write_text(f'"""{shared}"""\ndef f():\n    """{own}"""\n')
    (package / "tests" / "c.py").write_text(f'"""{"of a test " * 30}"""\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("retort.corpus.demo_text.PACKAGES", ("documented",))
    for seed in range(8):
        texts = list(read_demo_text(seed=seed))
        assert sorted("\n\n".join(texts).split("\n\n")) == [own.strip(), shared.strip()]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retort.corpus.demo_text.PACKAGES", ("numpy", "no_such_package"))
    with pytest.raises(ValueError, match="'no_such_package' is not installed: install it"):
        next(read_demo_text(seed=0))


def test_reading_the_demo_loads_neither_torch_nor_the_packages_read() -> None:
    code = (
        "import sys; from retort.corpus.demo_text import read_demo_text; import retort.corpus.reading; "
        "next(read_demo_text(seed=0)); "
        "assert not {'torch', 'transformers', 'datasets', 'numpy', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
