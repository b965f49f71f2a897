"""The real vLLM, where it is installed: what it writes beside transformers, what a kill costs, what is said without it.

Its CPU build runs too: `make test-vllm` installs it into an environment of its own, as it wants other versions of some
packages than requirements.lock.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from retort.artifacts.syntheses import RESPONSES_FILE
from retort.config.flags import section_flags
from retort.config.schema import fill_defaults, section_schema
from retort.config.sections import Synthesis, Teacher, build_section
from retort.synthesis.local_vllm import require_vllm, takes_vllm
from retort.synthesis.run import JOURNAL_FILE

needs_vllm = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vllm is not installed here (make test-vllm)"
)
SCRIPT = Path(__file__).resolve().parents[3] / "workflow" / "scripts" / "synthesize.py"
STARTS = ("Once upon a time there was a", "One day a little", "Lily and Tom saw a", "A small")
ENDS = ("girl", "boy", "frog", "bear", "duck", "cat")
PROMPTS = [f"{start} {end}" for end in ENDS for start in STARTS]


def build(name: str, **values: Any) -> Any:
    return build_section(name, fill_defaults(values, section_schema(name)))


def configure(**over: Any) -> Synthesis:
    unsifted = {"keep_truncated": True, "keep_duplicates": True, "near_duplicates": None}
    values = {"provider": "local", "check_language": False, "decontaminate": False}
    section: Synthesis = build("synthesis", **values, **unsifted, **over)
    return section


def widen_heads(model: LlamaForCausalLM, head_dim: int) -> LlamaForCausalLM:
    """Return a Llama of wider heads that computes the same: vLLM's CPU kernels know no heads as narrow as 8.

    Zeros fill the heads up. Rotary pairs (i, i + d/2) go where their frequency is the same: theta^(-2i/d) is
    theta^(-2j/e) at j = i * e/d. Scores are divided by the root of the width, so queries are multiplied by that of e/d.
    """
    config = type(model.config).from_dict(model.config.to_dict() | {"head_dim": head_dim})
    wide = LlamaForCausalLM(config).to(model.dtype)
    narrow = model.config.head_dim
    step = head_dim // narrow
    pairs = torch.arange(narrow // 2) * step
    places = torch.cat([pairs, pairs + head_dim // 2])
    weights = {}
    for name, weight in model.state_dict().items():
        if name.endswith("o_proj.weight"):
            weights[name] = _spread(weight.t(), narrow, head_dim, places).t()
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            scaled = weight * step**0.5 if "q_proj" in name else weight
            weights[name] = _spread(scaled, narrow, head_dim, places)
        else:
            weights[name] = weight
    wide.load_state_dict(weights)
    wide.generation_config = model.generation_config
    return wide.eval()


def _spread(rows: torch.Tensor, narrow: int, width: int, places: torch.Tensor) -> torch.Tensor:
    heads = rows.shape[0] // narrow
    spread = torch.zeros(heads, width, rows.shape[1])
    spread[:, places] = rows.reshape(heads, narrow, -1)
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
    words = [sys.executable, str(SCRIPT), "--output", str(record), "--local-model", str(model)]
    words += [*section_flags(section), *section_flags(build("teacher", device="cpu"))]
    return subprocess.Popen(words, stdout=log, stderr=log, env=environment)


def start_until(
    section: Synthesis, model: Path, folder: Path, *, lines: int
) -> "subprocess.Popen[bytes]":
    """Start the script; return its process, at work, when so many answers are in the journal."""
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
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return str(path)


@needs_vllm
@pytest.mark.slow
def test_greedy_responses_are_those_of_transformers(
    tmp_path: Path, prompts: str, stories: Path
) -> None:
    asked = configure(prompts=prompts, temperature=0.0, max_tokens=60)
    by_vllm = finish(replace(asked, engine="vllm"), stories, tmp_path / "vllm")
    by_transformers = finish(replace(asked, engine="transformers"), stories, tmp_path / "other")
    assert by_vllm == by_transformers and len(set(by_vllm)) > len(PROMPTS) / 2
    record = json.loads((tmp_path / "vllm/answers/mine/synthesis.json").read_text())
    assert record["made"]["device"].startswith("vLLM ")
    assert record["paid"]["requests"] == len(PROMPTS)


@needs_vllm
@pytest.mark.slow
def test_drawn_responses_have_a_seed_each_and_a_kill_leaves_what_was_written(
    tmp_path: Path, prompts: str, stories: Path
) -> None:
    asked = configure(prompts=prompts, temperature=1.0, max_tokens=300, engine="vllm")
    whole = finish(asked, stories, tmp_path / "whole")
    assert len(set(whole)) == len(PROMPTS)
    killed = tmp_path / "killed"
    journal = killed / "answers" / JOURNAL_FILE
    process = start_until(asked, stories, killed, lines=4)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was to be killed at work"
    kept = journal.read_bytes()
    assert 0 < kept.count(b"\n") < len(PROMPTS)
    responses = finish(asked, stories, killed)
    assert journal.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    assert journal.read_bytes().count(b"\n") == len(PROMPTS), "nothing is written twice"
    assert responses == whole


@needs_vllm
@pytest.mark.slow
def test_sigterm_ends_it_at_once_and_a_model_it_cannot_run_is_said(
    tmp_path: Path, prompts: str, stories: Path
) -> None:
    asked = configure(prompts=prompts, temperature=1.0, max_tokens=300, engine="vllm")
    process = start_until(asked, stories, tmp_path / "ended", lines=1)
    assert process.poll() is None, "it was to be ended at work"
    process.terminate()
    assert process.wait(60) == 143
    config = json.loads((stories / "config.json").read_text())
    (stories / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 3}))
    try:
        process = start(asked, stories, tmp_path / "wrong")
        assert process.wait(600) == 1
    finally:
        (stories / "config.json").write_text(json.dumps(config))
    said = (tmp_path / "wrong" / "log").read_text()
    assert "error: vLLM cannot run" in said and "synthesis.engine: transformers" in said


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed here")
def test_without_vllm_it_is_refused_by_name_and_left_out_by_itself() -> None:
    teacher: Teacher = build("teacher")
    with pytest.raises(ValueError, match=r"engine is vllm, but .* -m pip install 'vllm"):
        require_vllm(configure(engine="vllm"))
    assert not takes_vllm(configure(), teacher)


def test_on_a_cpu_it_is_taken_only_by_name() -> None:
    teacher: Teacher = build("teacher", device="cpu")
    chosen = {
        name: takes_vllm(configure(engine=name), teacher)
        for name in ("auto", "transformers", "vllm")
    }
    assert chosen == {"auto": False, "transformers": False, "vllm": True}
