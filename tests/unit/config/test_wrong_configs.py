"""Files with two mistakes: both are told, each with its line, in words that say what to do."""

from pathlib import Path

import pytest

from retort.config.config_files import load_source
from retort.config.yaml_source import parse_yaml

FILE = Path(__file__).with_name("wrong_configs.txt")
CASES = [case.split("\n", 1) for case in FILE.read_text(encoding="utf-8").split("=== ")[1:]]


def refusal(text: str) -> list[str]:
    """Return the lines of the error that refuses a file."""
    with pytest.raises(ValueError) as caught:
        load_source(parse_yaml(text, "mine.yaml"))
    return str(caught.value).splitlines()


@pytest.mark.parametrize("case", [text for _, text in CASES], ids=[name for name, _ in CASES])
def test_both_mistakes_are_told_with_their_lines(case: str) -> None:
    text, expected = case.split("---\n")
    said = refusal(text)
    wanted = [line.split(": ", 1) for line in expected.strip().splitlines()]
    if len(wanted) > 1 and said[0].startswith("The config has"):
        assert said.pop(0) == f"The config has {len(wanted)} mistakes:"
    for (number, words), line in zip(wanted, said, strict=True):
        place = "mine.yaml" if number == "0" else f"mine.yaml:{number}"
        assert line.startswith(f"{place}: ") and words in line, line


def test_there_are_forty() -> None:
    assert len(CASES) >= 40
