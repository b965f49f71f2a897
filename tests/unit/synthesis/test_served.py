"""A synthesis by a real server, through a proxy with faults: what is paid, kept, retried, and never shown."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from retort.artifacts.responses import RESPONSES_FILE, SynthesisRecord
from retort.config.sections import Synthesis
from retort.synthesis.client import BudgetError
from retort.synthesis.run import JOURNAL_FILE, synthesize
from support.jobs import config_words, make_job
from support.sections import replace
from support.served import Proxy, copy_with_template, run_server
from support.synthesis import (
    PROMPTS,
    SCRIPT,
    compute_spent,
    list_answered,
    synthesis_section,
    write_rows,
)

# Found, not imported: the import would be the slowest of the suite, even when these tests are not selected.
MISSING = [name for name in ("openai", "anthropic", "uvicorn") if find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]
KEY = "marked-key-a1b2c3d4e5f6"


@pytest.fixture(scope="module")
def model(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    return copy_with_template(shared_data / "models" / "stories260K", folder / "stories")


@pytest.fixture(scope="module")
def running(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with run_server(model, tmp_path_factory.mktemp("hub")) as url, Proxy(url) as proxy:
        yield proxy


@pytest.fixture
def proxy(running: Proxy, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    running.reset()
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    return running


def write_prompts(folder: Path, prompts: list[str]) -> str:
    return write_rows(folder, [{"prompt": prompt, "language": "en"} for prompt in prompts])


def configure(proxy: Proxy, model: Path, prompts: str, **over: Any) -> Synthesis:
    values = {
        "model": str(model),
        "base_url": proxy.url,
        "prompts": prompts,
        "temperature": 0.0,
        "max_tokens": 12,
        "keep_truncated": True,
        "keep_duplicates": True,  # greedy answers of a small model are similar
        "near_duplicates": None,
        "timeout_s": 120.0,
    }
    return synthesis_section(**values | over)


def run(folder: Path, section: Synthesis) -> tuple[bytes, SynthesisRecord]:
    """Synthesize into a folder; return the responses and the record."""
    record = folder / "answers" / "mine" / "synthesis.json"
    synthesize(record, make_job(synthesis=section))
    return record.with_name(RESPONSES_FILE).read_bytes(), SynthesisRecord.read(record)


def write_command(record: Path, section: Synthesis) -> list[str]:
    words = config_words("synthesis", synthesis=section)
    return [sys.executable, str(SCRIPT), "--output", str(record), *words]


FAULTS = {
    # fault: can it be charged?
    "429": False,
    "500": False,
    "503": False,
    "hang": True,
    "cut connection": True,
    "reset": True,
    "malformed JSON": True,
    "no answer in the JSON": True,
    "HTML": True,
    "slow stream": True,
    "no UTF-8": True,
    "list for a text": True,
    "an error in the JSON": True,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_retried_and_leaves_no_trace_in_the_responses(
    proxy: Proxy,
    model: Path,
    tmp_path: Path,
    fault: str,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    prompts = write_prompts(tmp_path, PROMPTS[:4])
    section = configure(proxy, model, prompts, concurrency=1)
    if fault in ("hang", "slow stream"):
        section = replace(section, timeout_s=20.0)  # an answer takes a fraction of it
    expected, *_ = run(tmp_path / "undisturbed", section)
    proxy.reset()
    proxy.faults.extend(["none", fault])
    started = time.monotonic()
    found, record = run(tmp_path / "disturbed", section)
    assert found == expected
    assert Counter(proxy.asked) == Counter([*PROMPTS[:4], PROMPTS[1]])
    paid = record.paid
    assert (paid.requests, paid.lost_requests) == (4, int(FAULTS[fault]))
    (line,) = [line for line in caplog.messages if line.startswith("attempt 1 failed")]
    with capsys.disabled():
        seconds = time.monotonic() - started
        print(f"\n| {fault} | 5 | {paid.lost_requests} | {seconds:.1f} s | {line} |")
    if fault in ("429", "503"):
        assert "retrying in 1." in line  # Retry-After: 1, plus jitter


@pytest.mark.parametrize("fault", ["no usage", "negative usage", "endless usage"])
def test_an_answer_without_its_count_is_kept_and_counted_at_its_upper_bound(
    proxy: Proxy, model: Path, tmp_path: Path, fault: str
) -> None:
    section = configure(proxy, model, write_prompts(tmp_path, PROMPTS[:4]), concurrency=1)
    expected, usual = run(tmp_path / "undisturbed", section)
    proxy.reset()
    proxy.faults.extend(["none", fault])
    found, record = run(tmp_path / "disturbed", section)
    assert found == expected and len(proxy.asked) == 4
    bound = len(PROMPTS[1].encode()) + 64
    assert record.paid.input_tokens > usual.paid.input_tokens + bound / 2
    assert record.paid.output_tokens == usual.paid.output_tokens  # cut at max_tokens


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_the_key_does_not_follow_a_redirect(
    proxy: Proxy, model: Path, tmp_path: Path, provider: str
) -> None:
    base_url = proxy.url if provider == "openai" else proxy.url.removesuffix("/v1")
    prompts = write_prompts(tmp_path, PROMPTS[:3])
    section = configure(proxy, model, prompts, concurrency=1, provider=provider, base_url=base_url)
    proxy.redirect_url = proxy.url.replace("127.0.0.1", "localhost").removesuffix("/v1")
    proxy.faults.extend(["none", "307"])
    with pytest.raises(ValueError, match=r"redirects to http://localhost.*base_url"):
        run(tmp_path, section)
    assert len(proxy.asked) == 2


def test_a_short_key_is_not_removed_from_responses(
    proxy: Proxy, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = configure(proxy, model, write_prompts(tmp_path, PROMPTS[:2]))
    expected, *_ = run(tmp_path / "secret", section)
    words = json.loads(expected.splitlines()[0])["response"].split()
    monkeypatch.setenv("OPENAI_API_KEY", max(words, key=len))
    assert run(tmp_path / "word", section)[0] == expected


@pytest.mark.parametrize("fault", ["401", "403", "404", "quota"])
def test_a_fatal_refusal_ends_the_job_at_once_in_one_sentence(
    proxy: Proxy, model: Path, tmp_path: Path, fault: str
) -> None:
    section = configure(proxy, model, write_prompts(tmp_path, PROMPTS[:6]), concurrency=1)
    proxy.faults.extend(["none", fault])
    with pytest.raises(ValueError, match="openai refused the request") as raised:
        run(tmp_path, section)
    assert len(proxy.asked) == 2 and KEY not in str(raised.value)
    run(tmp_path, section)
    assert len(proxy.asked) == 2 + 5  # the first answer is not asked for again


def test_a_prompt_that_the_server_rejects_is_counted_and_the_others_arelist_answered(
    proxy: Proxy, model: Path, tmp_path: Path
) -> None:
    section = configure(proxy, model, write_prompts(tmp_path, PROMPTS[:5]), concurrency=1)
    proxy.faults.extend(["none", "400"])
    found, record = run(tmp_path, section)
    rows = [json.loads(line) for line in found.splitlines()]
    assert [row["number"] for row in rows] == [0, 2, 3, 4]
    assert record.dropped["rejected"] == 1 and len(proxy.asked) == 5


def test_a_server_that_keeps_failing_ends_the_job_and_answers_are_kept(
    proxy: Proxy, model: Path, tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path, PROMPTS[:4])
    section = configure(proxy, model, prompts, concurrency=1, max_attempts=2)
    proxy.faults.extend(["none", "none", "500", "500"])
    with pytest.raises(ValueError, match="no answer after 2 attempts"):
        run(tmp_path, section)
    asked = len(proxy.asked)
    _, record = run(tmp_path, section)
    assert proxy.asked[asked:] == PROMPTS[2:4] and record.paid.requests == 4


def test_the_order_in_which_answers_come_changes_no_byte(
    proxy: Proxy, model: Path, tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path, PROMPTS)
    section = configure(proxy, model, prompts, num_examples=18)
    one_by_one, first = run(tmp_path / "one", replace(section, concurrency=1))
    proxy.reset()
    proxy.delay_s = 0.05
    proxy.faults.extend(["none", "429", "none", "500", "none"])
    together, second = run(tmp_path / "many", replace(section, concurrency=12))
    assert together == one_by_one and first.dropped == second.dropped
    assert 8 <= proxy.max_open <= 12


def test_repeated_kills_pay_twice_only_for_requests_in_flight(
    proxy: Proxy, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_prompts(tmp_path, PROMPTS)
    section = configure(proxy, model, prompts)
    expected, *_ = run(tmp_path / "undisturbed", section)
    proxy.reset()
    proxy.delay_s, width = 0.3, 3
    record = tmp_path / "killed" / "answers" / "mine" / "synthesis.json"
    journal = record.parents[1] / JOURNAL_FILE
    command = write_command(record, replace(section, concurrency=width))
    log = (tmp_path / "killed.log").open("ab")
    kills, lines = 0, []
    while True:
        before, asked = list_answered(journal), len(proxy.asked)
        with subprocess.Popen(command, stdout=log, stderr=log) as process:
            if kills < 5:
                while process.poll() is None and len(list_answered(journal)) < len(before) + 4:
                    time.sleep(0.005)
                os.kill(process.pid, signal.SIGKILL)
        again = [p for p in proxy.asked[asked:] if PROMPTS.index(p) in before]
        assert again == []
        lines.append(f"{len(proxy.asked) - asked} asked, {len(list_answered(journal))} answered")
        if record.exists():
            break
        kills += 1
        if kills == 2:
            with journal.open("ab") as file:
                file.write(b'{"event":"answer","index":23,"ans')  # torn by the kill
    assert kills == 5
    num_repeated = len(proxy.asked) - len(PROMPTS)
    assert 0 <= num_repeated <= kills * width
    assert (record.parent / RESPONSES_FILE).read_bytes() == expected
    paid = SynthesisRecord.read(record).paid
    # A recorded request that was not sent yet also counts as lost: the budget is on the safe side.
    assert paid.requests == len(PROMPTS) and num_repeated <= paid.lost_requests <= kills * width
    with capsys.disabled():
        print(f"\n{kills} kills, {width} at a time: {len(proxy.asked)} requests")
        print("\n".join(lines), f"\nlost: {paid.lost_requests}")


def test_another_filter_or_more_examples_ask_only_for_what_is_missing(
    proxy: Proxy, model: Path, tmp_path: Path
) -> None:
    section = configure(proxy, model, write_prompts(tmp_path, PROMPTS), num_examples=6)
    run(tmp_path, section)
    assert sorted(proxy.asked) == sorted(PROMPTS[:6])
    proxy.reset()
    run(tmp_path, replace(section, num_examples=6, max_characters=10_000))
    assert proxy.asked == []
    run(tmp_path, replace(section, num_examples=10))
    assert sorted(proxy.asked) == sorted(PROMPTS[6:10])


@pytest.mark.parametrize("limit", ["cost", "tokens"])
def test_the_budget_is_never_exceeded_and_a_larger_one_resumes(
    proxy: Proxy, model: Path, tmp_path: Path, limit: str, caplog: pytest.LogCaptureFixture
) -> None:
    prices = {"price_per_million_input": 1000.0, "price_per_million_output": 2000.0}
    section = configure(proxy, model, write_prompts(tmp_path, PROMPTS[:12]), **prices)
    limited = (
        replace(section, max_cost=0.4)
        if limit == "cost"
        else replace(section, max_total_tokens=300)
    )
    proxy.faults.extend(["none", "malformed JSON"])  # counted at its upper bound
    with pytest.raises(BudgetError, match="the budget is used up") as raised:
        run(tmp_path, limited)
    assert "rerun the same command" in str(raised.value)
    sent = len(proxy.asked)
    assert 1 < sent < 12 and proxy.num_open == 0
    spent = compute_spent(tmp_path / "answers" / JOURNAL_FILE)
    assert spent["cost"] <= 0.4 if limit == "cost" else spent["tokens"] <= 300
    with pytest.raises(BudgetError):
        run(tmp_path, limited)
    assert len(proxy.asked) == sent, "nothing more is sent by the same command"
    more, record = run(tmp_path, section)
    assert len(more.splitlines()) + sum(record.dropped.values()) == 12
    assert len(proxy.asked) == 12 + 1
    assert "prompts to ask: about" in caplog.text
    spent = compute_spent(tmp_path / "answers" / JOURNAL_FILE)
    assert record.paid.cost == pytest.approx(spent["cost"])


def test_a_server_that_counts_more_than_the_bound_stays_within_the_budget(
    proxy: Proxy, model: Path, tmp_path: Path
) -> None:
    """For example, a server whose chat template adds a long system prompt."""
    prompts = write_prompts(tmp_path, PROMPTS)
    section = configure(proxy, model, prompts, concurrency=1, max_total_tokens=700)
    proxy.faults.extend(["long frame"] * len(PROMPTS))
    for _ in range(2):
        with pytest.raises(BudgetError, match="the budget is used up"):
            run(tmp_path, section)
        assert compute_spent(tmp_path / "answers" / JOURNAL_FILE)["tokens"] <= 700
        assert len(proxy.asked) == 2  # of about 310 tokens each, where the bound was 100


def test_requests_are_no_faster_than_the_rate(proxy: Proxy, model: Path, tmp_path: Path) -> None:
    section = configure(proxy, model, write_prompts(tmp_path, PROMPTS[:6]), requests_per_minute=240)
    run(tmp_path, section)
    gaps = [b - a for a, b in zip(proxy.times, proxy.times[1:], strict=False)]
    assert proxy.times[-1] - proxy.times[0] >= 5 * 0.25 - 0.1, gaps


def test_anthropics_client_is_asked_the_same_way(proxy: Proxy, model: Path, tmp_path: Path) -> None:
    section = configure(proxy, model, write_prompts(tmp_path, PROMPTS[:5]), concurrency=1)
    from_openai, *_ = run(tmp_path / "openai", section)
    proxy.reset()
    url = proxy.url.removesuffix("/v1")
    proxy.faults.extend(["429", "none", "529", "malformed JSON", "hang", "none", "401"])
    other = replace(section, provider="anthropic", base_url=url, timeout_s=20.0)
    with pytest.raises(ValueError, match="anthropic refused") as raised:
        run(tmp_path / "anthropic", other)
    assert KEY not in str(raised.value)
    found, record = run(tmp_path / "anthropic", other)
    expected = [json.loads(line)["response"] for line in from_openai.splitlines()]
    assert [json.loads(line)["response"] for line in found.splitlines()] == expected
    assert record.paid.lost_requests == 2


def test_the_key_is_in_no_file_log_or_error(
    proxy: Proxy,
    model: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The proxy repeats the header in each refusal, as some servers do."""
    errors = []
    for fault in ("401", "400", "500", "429", "malformed JSON", "cut connection", "HTML"):
        prompts = write_prompts(tmp_path / fault, PROMPTS[:12])
        max_attempts = 2 if fault == "500" else 1  # a retry logs the refusal
        section = configure(proxy, model, prompts, concurrency=1, max_attempts=max_attempts)
        proxy.faults.extend([fault] * 12)
        with pytest.raises(ValueError) as raised:
            run(tmp_path / fault, section)
        errors.append(str(raised.value))
        proxy.reset()
    out, err = capfd.readouterr()
    assert KEY not in "".join([*errors, out, err, caplog.text])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10 and not [p for p in files if KEY.encode() in p.read_bytes()]
    assert any("***" in error for error in errors), "the key was repeated, and redacted"


@pytest.mark.parametrize("kind, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_job_that_waits_for_a_server(
    tmp_path: Path, kind: signal.Signals, status: int
) -> None:
    prompts = write_prompts(tmp_path, PROMPTS[:3])
    record = tmp_path / "answers" / "mine" / "synthesis.json"
    journal = record.parents[1] / JOURNAL_FILE
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        command = write_command(record, synthesis_section(base_url=url, prompts=prompts))
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            while not journal.exists() or journal.read_text().count("sent") < 3:
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(kind)
            output = process.communicate()[1]
    assert process.returncode == status and "Traceback" not in output, output
