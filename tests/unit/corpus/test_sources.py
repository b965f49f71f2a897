"""The files that a glob means: links must lead somewhere, hidden files and Retort's own results are no corpus."""

from pathlib import Path
from typing import Any

import pytest

from retort.corpus.sources import list_files
from support.corpora import DEFAULTS
from support.sections import replace


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"text": "a"}\n')
    return path


def names(folder: Path, pattern: str) -> list[str]:
    files = list_files(replace(DEFAULTS, name="json", data_files=str(folder / pattern)))
    return [path.relative_to(folder).as_posix() for path in files]


def test_a_glob_leaves_out_hidden_files_and_what_retort_made(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl")
    write(tmp_path / "runs" / "2024" / "a.jsonl")  # a user's folder that is only named so
    made = (
        "results/corpora/0123456789ab/documents_00000.jsonl",
        "results/syntheses/api-0123456789ab/0123456789ab/responses.jsonl",
        "results/teachers/demo-0123456789ab/model/config.jsonl",
        "results/runs/first/0123456789ab/training.jsonl",
        "results/checks/0123456789ab.jsonl",
        "runs/second/abcdefabcdef/x.jsonl",
        ".snakemake/metadata/x.jsonl",
        "results/.digests.jsonl",
    )
    for name in made:
        write(tmp_path / name)
    report = write(tmp_path / "results" / "reports" / "0123456789ab" / "summary.jsonl")
    (tmp_path / "results" / "summary.jsonl").symlink_to("reports/0123456789ab/summary.jsonl")
    assert names(tmp_path, "**/*.jsonl") == ["b.jsonl", "runs/2024/a.jsonl"]
    report.unlink()
    assert names(tmp_path, "**/*.jsonl") == ["b.jsonl", "runs/2024/a.jsonl"]
    # Named by the user, it is a corpus like any other.
    assert names(tmp_path, "results/corpora/0123456789ab/*.jsonl") == [made[0]]
    assert names(tmp_path, made[1]) == [made[1]]


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    link = tmp_path / "b.jsonl"
    link.symlink_to(tmp_path / "gone.jsonl")
    cases: tuple[dict[str, Any], ...] = (
        {"name": "json", "data_files": str(tmp_path / "*.jsonl")},
        {"name": str(tmp_path)},
    )
    for keys in cases:
        with pytest.raises(
            ValueError, match=r"b.jsonl is a link to '.*gone.jsonl', which does not exist"
        ):
            list_files(replace(DEFAULTS, **keys))
    write(tmp_path / "gone.jsonl")
    assert names(tmp_path, "[ab]*.jsonl") == ["a.jsonl", "b.jsonl"]
