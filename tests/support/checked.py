"""A config for the checks before any expensive job, of which tests change one value."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from retort.config.load import load_runs
from retort.io.files import read_json, write_json
from retort.pipeline.preflight import check_project


class Setting:
    """A config that passes; tests change one value."""

    def __init__(self, folder: Path, corpus: Path, teacher: Path, student: Path) -> None:
        self.folder = folder
        self.config: dict[str, dict[str, Any]] = {
            "output": {"results_dir": str(folder / "results")},
            "dataset": {"name": "json", "data_files": str(corpus), "max_length": 48},
            "teacher": {"model_path": str(teacher)},
            "student": {"config": str(student)},
        }

    def check(self, **sections: Any) -> list[str]:
        """Check the config with some keys of some sections changed; return the notes."""
        raw: dict[str, Any] = {k: dict(v) for k, v in self.config.items()}
        for name, values in sections.items():
            raw[name] = raw.get(name, {}) | values
        return list(check_project(load_runs(raw)).notes)

    def refuse(self, pattern: str, **sections: Any) -> str:
        """Check as above, and return the error message, which must be one line."""
        with pytest.raises(ValueError, match=pattern) as caught:
            self.check(**sections)
        message = str(caught.value)
        assert len(message.splitlines()) == 1
        return message


def copy_teacher(folder: Path, teacher: Path, **changes: Any) -> Path:
    """Copy a teacher with some of its config's values changed."""
    shutil.copytree(teacher, folder)
    write_json(folder / "config.json", read_json(folder / "config.json") | changes)
    return folder
