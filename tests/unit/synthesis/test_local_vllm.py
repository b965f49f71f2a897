"""The real vLLM, when it is installed: its responses against transformers, kills, and the error without it.

Its CPU build will do: `make test-vllm` installs it into a separate environment, because it needs other versions of some
packages than requirements.lock.
"""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from retort.artifacts.responses import RESPONSES_FILE, SynthesisRecord
from retort.config.sections import Synthesis, Teacher
from retort.synthesis.local_vllm import require_vllm, uses_vllm
from retort.synthesis.run import JOURNAL_FILE
from support.jobs import config_words
from support.sections import replace
from support.synthesis import PROMPTS, SCRIPT, synthesis_section, write_file

needs_vllm = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vllm is not installed here (make test-vllm)"
)


def teacher_section(**values: Any) -> Teacher:
    section: Teacher = Teacher.model_validate(values)
    return section


def configure(**over: Any) -> Synthesis:
    values = {"provider": "local", "model": None, "check_language": False, "decontaminate": False}
    unfiltered = {"keep_truncated": True, "keep_duplicates": True, "near_duplicates": None}
    return synthesis_section(**values, **unfiltered, **over)


def widen_heads(model: LlamaForCausalLM, head_dim: int) -> LlamaForCausalLM:
    """Return an equivalent Llama with wider heads: vLLM's CPU kernels do not support heads of width 8.

    The heads of width d are padded with zeros to width e. Rotary pairs (i, i + d/2) move to the same frequency:
    theta^(-2i/d) equals theta^(-2j/e) at j = i * e/d. Attention divides scores by the square root of the width, so
    queries are multiplied by the square root of e/d.
    """
    config = type(model.config).from_dict(model.config.to_dict() | {"head_dim": head_dim})
    wide = LlamaForCausalLM(config).to(model.dtype)
    narrow = model.config.head_dim
    step = head_dim // narrow
    pairs = torch.arange(narrow // 2) * step
    positions = torch.cat([pairs, pairs + head_dim // 2])
    weights = {}
    for name, weight in model.state_dict().items():
        if name.endswith("o_proj.weight"):
            weights[name] = _spread(weight.t(), narrow, head_dim, positions).t()
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            scaled = weight * step**0.5 if "q_proj" in name else weight
            weights[name] = _spread(scaled, narrow, head_dim, positions)
        else:
            weights[name] = weight
    wide.load_state_dict(weights)
    wide.generation_config = model.generation_config
    return wide.eval()


def _spread(rows: torch.Tensor, narrow: int, width: int, positions: torch.Tensor) -> torch.Tensor:
    heads = rows.shape[0] // narrow
    spread = torch.zeros(heads, width, rows.shape[1])
    spread[:, positions] = rows.reshape(heads, narrow, -1)
    return spread.reshape(heads * width, -1)


@pytest.fixture(scope="module")
def stories(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model of 260 thousand parameters, with heads of 32."""
    source, folder = shared_data / "models" / "stories260K", tmp_path_factory.mktemp("stories")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    wide = widen_heads(model, 32)
    ids = torch.randint(model.config.vocab_size, (2, 64))
    torch.testing.assert_close(wide(ids).logits, model(ids).logits, atol=1e-4, rtol=0)
    wide.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def start(section: Synthesis, model: Path, folder: Path) -> "subprocess.Popen[bytes]":
    folder.mkdir(exist_ok=True)
    log = (folder / "log").open("ab")
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    record = folder / "answers" / "mine" / "synthesis.json"
    section = replace(section, model=str(model))
    words = [sys.executable, str(SCRIPT), "--output", str(record)]
    words += config_words("synthesis", synthesis=section, teacher=teacher_section(device="cpu"))
    return subprocess.Popen(words, stdout=log, stderr=log, env=environment)


def start_until(
    section: Synthesis, model: Path, folder: Path, *, lines: int
) -> "subprocess.Popen[bytes]":
    """Start the script; return its running process when the journal has this many lines."""
    process = start(section, model, folder)
    journal = folder / "answers" / JOURNAL_FILE
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= lines):
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
        time.sleep(0.02)
    return process


def finish(section: Synthesis, model: Path, folder: Path) -> list[str]:
    """Run the script to its end; return the responses."""
    process = start(section, model, folder)
    assert process.wait(600) == 0, (folder / "log").read_text()[-3000:]
    return read_responses(folder)


def read_responses(folder: Path) -> list[str]:
    text = (folder / "answers" / "mine" / RESPONSES_FILE).read_text()
    return [json.loads(line)["response"] for line in text.splitlines()]


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    return write_file(tmp_path, "prompts.txt", "\n".join(PROMPTS))


@needs_vllm
@pytest.mark.slow
def test_greedy_responses_are_those_of_transformers(
    tmp_path: Path, prompts: str, stories: Path
) -> None:
    section = configure(prompts=prompts, temperature=0.0, max_tokens=60)
    by_vllm = finish(replace(section, engine="vllm"), stories, tmp_path / "vllm")
    by_transformers = finish(replace(section, engine="transformers"), stories, tmp_path / "other")
    assert by_vllm == by_transformers and len(set(by_vllm)) > len(PROMPTS) / 2
    record = SynthesisRecord.read(tmp_path / "vllm/answers/mine/synthesis.json")
    assert record.made.device.startswith("vLLM ")
    assert record.paid.requests == len(PROMPTS)


@needs_vllm
@pytest.mark.slow
def test_sampled_responses_have_a_seed_each_and_a_kill_keeps_the_answers(
    tmp_path: Path, prompts: str, stories: Path
) -> None:
    section = configure(prompts=prompts, temperature=1.0, max_tokens=300, engine="vllm")
    whole = finish(section, stories, tmp_path / "whole")
    assert len(set(whole)) == len(PROMPTS)
    killed = tmp_path / "killed"
    journal = killed / "answers" / JOURNAL_FILE
    process = start_until(section, stories, killed, lines=4)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before the kill"
    kept = journal.read_bytes()
    assert 0 < kept.count(b"\n") < len(PROMPTS)
    responses = finish(section, stories, killed)
    assert journal.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    assert journal.read_bytes().count(b"\n") == len(PROMPTS), "nothing is generated twice"
    assert responses == whole


@needs_vllm
@pytest.mark.slow
def test_sigterm_ends_it_at_once_and_an_unsupported_model_is_refused(
    tmp_path: Path, prompts: str, stories: Path
) -> None:
    section = configure(prompts=prompts, temperature=1.0, max_tokens=300, engine="vllm")
    process = start_until(section, stories, tmp_path / "ended", lines=1)
    assert process.poll() is None, "it ended before the signal"
    process.terminate()
    assert process.wait(60) == 143
    config = json.loads((stories / "config.json").read_text())
    (stories / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 3}))
    try:
        process = start(section, stories, tmp_path / "wrong")
        assert process.wait(600) == 1
    finally:
        (stories / "config.json").write_text(json.dumps(config))
    log = (tmp_path / "wrong" / "log").read_text()
    assert "error: vLLM cannot run" in log and "synthesis.engine: transformers" in log


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed here")
def test_without_vllm_the_engine_vllm_is_refused_and_auto_does_not_use_it() -> None:
    with pytest.raises(ValueError, match=r"engine is vllm, but .* -m pip install 'vllm"):
        require_vllm(configure(engine="vllm"))
    assert not uses_vllm(configure(), teacher_section())


def test_on_a_cpu_vllm_runs_only_when_required() -> None:
    teacher = teacher_section(device="cpu")
    chosen = {
        name: uses_vllm(configure(engine=name), teacher)
        for name in ("auto", "transformers", "vllm")
    }
    assert chosen == {"auto": False, "transformers": False, "vllm": True}
