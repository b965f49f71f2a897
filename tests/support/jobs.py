"""Jobs for tests: their sections at the defaults but for those given, as a record or as a script's `--config`."""

import json
from typing import Any

from retort.config.handoff import SECTIONS, Job
from retort.config.sections import Config


def make_job(
    *, run: str | None = None, expected: dict[str, str] | None = None, **sections: Any
) -> Job:
    """Return a job with these sections."""
    return Job(run=run, expected=expected or {}, config=Config().model_copy(update=sections))


def config_words(kind: str, **sections: Any) -> list[str]:
    """Return the words of a command line that give a script a job of its kind."""
    return ["--config", json.dumps(make_job(**sections).to_json(SECTIONS[kind]))]
