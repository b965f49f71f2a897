"""The benchmarks: every command that is named exists, and an opponent that is missing is told apart from an error."""

import argparse
import re
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def from_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Import `benchmarks` as `python -m benchmarks.cache` does."""
    monkeypatch.syspath_prepend(str(REPOSITORY))


def test_every_command_that_is_named_exists() -> None:
    files = [
        REPOSITORY / "Makefile",
        *REPOSITORY.glob("docs/*.md"),
        *REPOSITORY.rglob("benchmarks/**/*.py"),
    ]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    named = set(re.findall(r"python -m (benchmarks(?:\.\w+)+)", text))
    assert len(named) == 19
    for name in named:
        path = REPOSITORY / name.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), name


def test_an_opponent_without_its_checkout_says_how_to_get_it() -> None:
    from benchmarks.cache.opponents import run_opponents
    from benchmarks.cache.stored import Stored

    logits_PV = np.random.default_rng(0).normal(size=(4, 300))
    logprobs_PV = (logits_PV - np.log(np.exp(logits_PV).sum(axis=1, keepdims=True))).astype(
        np.float32
    )
    results = dict(
        run_opponents(
            logprobs_PV,
            np.ones(300, np.int64),
            distillkit_checkout=None,
            megatron_checkout=None,
        )
    )
    not_run = {name: str(r) for name, r in results.items() if not isinstance(r, Stored)}
    assert not_run == {
        "Megatron-LM top-64": "git clone https://github.com/NVIDIA/Megatron-LM and give --megatron PATH",
        "DistillKit": "git clone https://github.com/arcee-ai/DistillKit and give --distillkit PATH",
    }
    assert len(results) == 8


def test_a_folder_that_is_not_the_checkout_is_refused_before_the_run(tmp_path: Path) -> None:
    from benchmarks.common import checkout_of

    read = checkout_of("arcee-ai/DistillKit", holds="distillkit/compression")
    with pytest.raises(argparse.ArgumentTypeError, match="has no folder distillkit/compression"):
        read(str(tmp_path))
    (tmp_path / "distillkit" / "compression").mkdir(parents=True)
    assert read(str(tmp_path)) == tmp_path


def test_an_opponent_that_is_not_installed_says_how_to_install_it() -> None:
    from benchmarks.common import UnavailableError, import_opponent

    with pytest.raises(
        UnavailableError, match=r"^no_such_kernel cannot be imported; pip install no-such"
    ):
        import_opponent("no_such_kernel.losses", install="pip install no-such-kernel")
