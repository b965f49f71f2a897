"""Configs with random damage plan, or are refused in sentences: no traceback, no sentence that is not one."""

import random
import re
from pathlib import Path

import pytest

from retort.artifacts.build import build_project
from retort.config.config_files import load_source, locate, read_files
from retort.config.yaml_source import Source

REPOSITORY = Path(__file__).resolve().parents[3]
FILES = [
    REPOSITORY / "config" / "config.yaml",
    *sorted((REPOSITORY / "config" / "examples").glob("*.yaml")),
]
ODD = [
    *(
        "no",
        "~",
        "",
        "''",
        "[]",
        "{}",
        "{a: 1}",
        "[1, [2]]",
        "[[1], [2]]",
        "- 1",
        ".inf",
        "-.nan",
        "1e999",
        "010",
        "0x1F",
    ),
    *(
        "1_0",
        "1:30",
        "2026-01-01",
        "2026-13-45",
        "9" * 5000,
        "-1",
        "0",
        "1e-320",
        "é",
        "\u202e",
        "日本語",
        "\U0001f600",
        "\x07",
    ),
    *(
        "*x",
        "&x y",
        "!!int 3",
        "!t",
        "@a",
        "%b",
        "`c`",
        "|",
        ">",
        "'",
        '"',
        "a: b",
        "a:b",
        "#",
        "--",
        "-",
        "<<",
        "=",
        "null",
        "NaN",
    ),
    *(
        '"\\ud83d"',
        '"\\q"',
        "[",
        "}",
        "true",
        "False",
        "sk-0123456789",
        "x" * 300,
        "{{ a }}",
        "\xa0",
        "\t",
        "[no, on]",
    ),
]


def mutate(text: str, rng: random.Random) -> str:
    """Return a text with one to three random mutations."""
    lines = text.splitlines()
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(lines))
        line = lines[at]
        key, colon, _ = line.partition(":")
        match rng.randrange(13):
            case 0:
                lines[at] = f"{key}{colon} {rng.choice(ODD)}"
            case 1:
                del lines[at]
            case 2:
                lines.insert(rng.randrange(len(lines)), line)
            case 3:
                lines[at] = " " * rng.randrange(6) + line.lstrip()
            case 4:
                lines[at] = line[:-1] if line else "x"
            case 5:
                other = rng.randrange(len(lines))
                lines[at], lines[other] = lines[other], line
            case 6:
                names = re.findall(r"\w+", line)
                if names:
                    name = rng.choice(names)
                    changed = rng.choice(
                        (
                            name[:-1],
                            name + "s",
                            name.upper(),
                            name[::-1],
                            rng.choice(ODD),
                            name + "é",
                        )
                    )
                    lines[at] = line.replace(name, changed, 1)
            case 7:
                lines[at] = line.replace(":", rng.choice((";", " :", ":  ", ":", "::", "=")))
            case 8:
                lines[at] = line.replace("  ", "\t")
            case 9:
                where = rng.randrange(len(line) + 1)
                lines[at] = line[:where] + rng.choice(ODD) + line[where:]
            case 10:
                begin, end = sorted((at, rng.randrange(len(lines))))
                block = lines[begin:end]
                del lines[begin:end]
                where = rng.randrange(len(lines) + 1)
                lines[where:where] = block
            case 11:
                lines[at] = (
                    f"{key}{colon} {rng.choice((7, 0.5, -3, 10**30, 'text', 'true', '[a, b]'))}"
                )
            case 12:
                lines[at] = re.sub(r"\S+$", rng.choice(ODD).replace("\\", ""), line)
        lines = lines or [""]
    return "\n".join(lines) + "\n"


def plan_or_refuse(path: Path) -> str | None:
    """Return the message that refuses a config, None if it plans."""
    source: Source | None = Source({})
    try:
        source = read_files([path], {})
        assert source is not None
        build_project(load_source(source))
    except ValueError as error:
        assert source is not None
        return locate(error, source)
    return None


def campaign(folder: Path, seeds: range) -> tuple[int, int]:
    """Return how many mutated configs were planned, and how many refused."""
    path = folder / "mine.yaml"
    counts = [0, 0]
    for seed in seeds:
        rng = random.Random(seed)
        text = mutate(rng.choice(FILES).read_text(encoding="utf-8"), rng)
        path.write_text(text, encoding="utf-8")
        try:
            message = plan_or_refuse(path)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error!r}\n{text}") from error
        counts[message is not None] += 1
        for line in (message or "").splitlines():
            assert re.match(
                r"mine\.yaml(:\d+: |: | )|The (config|file) |[a-z_]+\.[a-z_.]+ ", line
            ), (
                seed,
                line,
            )
            assert len(line) < 1500, (seed, line)
            assert "Traceback" not in line and "pydantic" not in line and "yaml.org" not in line, (
                seed,
                line,
            )
            line.encode("utf-8")
    return counts[0], counts[1]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with Retort's config folder, as the current one."""
    (tmp_path / "config").symlink_to(REPOSITORY / "config")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_thousand_mutated_configs_plan_or_are_refused(folder: Path) -> None:
    planned, refused = campaign(folder, range(1000))
    assert planned > 100 and refused > 300, (planned, refused)


@pytest.mark.campaign
def test_ten_thousand_mutated_configs_plan_or_are_refused(folder: Path) -> None:
    campaign(folder, range(1000, 11000))
