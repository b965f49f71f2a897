"""A synthesis asks a real server, through a proxy with faults: what it pays, keeps, asks again, and never says."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from retort.artifacts.syntheses import RESPONSES_FILE
from retort.config.schema import fill_defaults, section_schema
from retort.config.sections import Evaluation, Synthesis, build_section
from retort.synthesis.client import Stopped
from retort.synthesis.run import JOURNAL_FILE, Task, synthesize
from support.served import Proxy, copy_with_template, serve

# Found, not imported: where these tests are not asked for, their import would be the longest of the suite.
MISSING = [name for name in ("openai", "anthropic", "uvicorn") if find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]
SCRIPT = Path(__file__).resolve().parents[3] / "workflow" / "scripts" / "synthesize.py"
KEY = "marked-key-a1b2c3d4e5f6"
STARTS = ("Once upon a time there was a", "One day a little", "Lily and Tom saw a", "A small")
ENDS = ("girl", "boy", "frog", "bear", "duck", "cat")
PROMPTS = [f"{start} {end}" for end in ENDS for start in STARTS]


@pytest.fixture(scope="module")
def model(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    return copy_with_template(shared_data / "models" / "stories260K", folder / "stories")


@pytest.fixture(scope="module")
def running(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with serve(model, tmp_path_factory.mktemp("hub")) as url, Proxy(url) as proxy:
        yield proxy


@pytest.fixture
def proxy(running: Proxy, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    running.forget()
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    return running


def write_prompts(folder: Path, prompts: list[str]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "language": "en"}) + "\n" for p in prompts))
    return str(path)


def configure(proxy: Proxy, model: Path, prompts: str, **over: Any) -> Synthesis:
    values = {
        "provider": "openai",
        "model": str(model),
        "base_url": proxy.url,
        "prompts": prompts,
        "temperature": 0.0,
        "max_tokens": 12,
        "keep_truncated": True,
        "keep_duplicates": True,  # greedy answers of a small model are much alike
        "near_duplicates": None,
        "timeout_s": 120.0,
    }
    section: Synthesis = build_section(
        "synthesis", fill_defaults(values | over, section_schema("synthesis"))
    )
    return section


def evaluation() -> Evaluation:
    section: Evaluation = build_section(
        "evaluation", fill_defaults({}, section_schema("evaluation"))
    )
    return section


def run(folder: Path, section: Synthesis) -> tuple[bytes, dict[str, Any]]:
    """Synthesize into a folder; return the responses and the record."""
    record = folder / "answers" / "mine" / "synthesis.json"
    synthesize(record, Task(section, evaluation()))
    return record.with_name(RESPONSES_FILE).read_bytes(), json.loads(record.read_text())


FAULTS = {
    # fault: may it have been paid?
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
def test_a_fault_is_asked_again_and_leaves_no_trace_in_the_responses(
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
        section = replace(section, timeout_s=20.0)  # many times what an answer takes
    expected, *_ = run(tmp_path / "undisturbed", section)
    proxy.forget()
    proxy.faults.extend(["none", fault])
    started = time.monotonic()
    found, record = run(tmp_path / "disturbed", section)
    assert found == expected
    assert Counter(proxy.asked) == Counter([*PROMPTS[:4], PROMPTS[1]])
    paid = record["paid"]
    assert (paid["requests"], paid["lost_requests"]) == (4, int(FAULTS[fault]))
    (line,) = [line for line in caplog.messages if line.startswith("attempt 1 in vain")]
    with capsys.disabled():
        seconds = time.monotonic() - started
        print(f"\n| {fault} | 5 | {paid['lost_requests']} | {seconds:.1f} s | {line} |")
    if fault in ("429", "503"):
        assert "again in 1." in line  # Retry-After: 1, and the jitter above it


@pytest.mark.parametrize("fault", ["no usage", "negative usage", "endless usage"])
def test_an_answer_without_its_count_is_kept_and_counted_at_its_most(
    proxy: Proxy, model: Path, tmp_path: Path, fault: str
) -> None:
    section = configure(proxy, model, write_prompts(tmp_path, PROMPTS[:4]), concurrency=1)
    expected, usual = run(tmp_path / "undisturbed", section)
    proxy.forget()
    proxy.faults.extend(["none", fault])
    found, record = run(tmp_path / "disturbed", section)
    assert found == expected and len(proxy.asked) == 4
    most = len(PROMPTS[1].encode()) + 64
    assert record["paid"]["input_tokens"] > usual["paid"]["input_tokens"] + most / 2
    assert record["paid"]["output_tokens"] == usual["paid"]["output_tokens"]  # cut at max_tokens


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_the_key_does_not_follow_where_a_server_sends_on_to(
    proxy: Proxy, model: Path, tmp_path: Path, provider: str
) -> None:
    base_url = proxy.url if provider == "openai" else proxy.url.removesuffix("/v1")
    prompts = write_prompts(tmp_path, PROMPTS[:3])
    section = configure(proxy, model, prompts, concurrency=1, provider=provider, base_url=base_url)
    proxy.sends_on_to = proxy.url.replace("127.0.0.1", "localhost").removesuffix("/v1")
    proxy.faults.extend(["none", "307"])
    with pytest.raises(ValueError, match=r"sends on to http://localhost.*base_url"):
        run(tmp_path, section)
    assert len(proxy.asked) == 2


def test_a_key_that_is_a_mere_word_is_not_cut_out_of_responses(
    proxy: Proxy, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = configure(proxy, model, write_prompts(tmp_path, PROMPTS[:2]))
    expected, *_ = run(tmp_path / "secret", section)
    words = json.loads(expected.splitlines()[0])["response"].split()
    monkeypatch.setenv("OPENAI_API_KEY", max(words, key=len))
    assert run(tmp_path / "word", section)[0] == expected


@pytest.mark.parametrize("fault", ["401", "403", "404", "quota"])
def test_a_refusal_for_good_ends_the_job_at_once_in_one_sentence(
    proxy: Proxy, model: Path, tmp_path: Path, fault: str
) -> None:
    section = configure(proxy, model, write_prompts(tmp_path, PROMPTS[:6]), concurrency=1)
    proxy.faults.extend(["none", fault])
    with pytest.raises(ValueError, match="openai refused the request") as raised:
        run(tmp_path, section)
    assert len(proxy.asked) == 2 and KEY not in str(raised.value)
    run(tmp_path, section)
    assert len(proxy.asked) == 2 + 5  # the first answer is not asked for again


def test_a_prompt_that_the_server_rejects_is_counted_and_the_others_are_answered(
    proxy: Proxy, model: Path, tmp_path: Path
) -> None:
    section = configure(proxy, model, write_prompts(tmp_path, PROMPTS[:5]), concurrency=1)
    proxy.faults.extend(["none", "400"])
    found, record = run(tmp_path, section)
    rows = [json.loads(line) for line in found.splitlines()]
    assert [row["number"] for row in rows] == [0, 2, 3, 4]
    assert record["fell"]["rejected"] == 1 and len(proxy.asked) == 5


def test_a_server_that_stays_ill_ends_the_job_and_what_was_answered_is_kept(
    proxy: Proxy, model: Path, tmp_path: Path
) -> None:
    section = configure(
        proxy, model, write_prompts(tmp_path, PROMPTS[:4]), concurrency=1, max_attempts=2
    )
    proxy.faults.extend(["none", "none", "500", "500"])
    with pytest.raises(ValueError, match="no answer after 2 attempts"):
        run(tmp_path, section)
    asked = len(proxy.asked)
    _, record = run(tmp_path, section)
    assert proxy.asked[asked:] == PROMPTS[2:4] and record["paid"]["requests"] == 4


def test_the_order_in_which_answers_come_changes_no_byte(
    proxy: Proxy, model: Path, tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path, PROMPTS)
    section = configure(proxy, model, prompts, num_examples=18)
    one_by_one, first = run(tmp_path / "one", replace(section, concurrency=1))
    proxy.forget()
    proxy.delay_s = 0.05
    proxy.faults.extend(["none", "429", "none", "500", "none"])
    together, second = run(tmp_path / "many", replace(section, concurrency=12))
    assert together == one_by_one and first["fell"] == second["fell"]
    assert 8 <= proxy.most_at_once <= 12


def test_a_synthesis_killed_again_and_again_pays_for_nothing_twice_but_what_was_in_flight(
    proxy: Proxy, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_prompts(tmp_path, PROMPTS)
    section = configure(proxy, model, prompts)
    expected, *_ = run(tmp_path / "undisturbed", section)
    proxy.forget()
    proxy.delay_s, width = 0.3, 3
    record = tmp_path / "killed" / "answers" / "mine" / "synthesis.json"
    journal = record.parents[1] / JOURNAL_FILE
    command = [sys.executable, str(SCRIPT), "--output", str(record)]
    command += ["--synthesis-provider", "openai", "--synthesis-model", str(model)]
    command += ["--synthesis-base-url", proxy.url, "--synthesis-prompts", prompts]
    command += ["--synthesis-temperature", "0", "--synthesis-max-tokens", "12"]
    command += ["--synthesis-keep-truncated", "--synthesis-keep-duplicates"]
    command += ["--synthesis-near-duplicates", "null", "--synthesis-concurrency", str(width)]
    log = (tmp_path / "killed.log").open("ab")
    kills, lines = 0, []
    while True:
        before, asked = _answered(journal), len(proxy.asked)
        with subprocess.Popen(command, stdout=log, stderr=log) as process:
            if kills < 5:
                while process.poll() is None and len(_answered(journal)) < len(before) + 4:
                    time.sleep(0.005)
                os.kill(process.pid, signal.SIGKILL)
        again = [p for p in proxy.asked[asked:] if PROMPTS.index(p) in before]
        assert again == []
        lines.append(f"{len(proxy.asked) - asked} asked, {len(_answered(journal))} answered")
        if record.exists():
            break
        kills += 1
        if kills == 2:
            with journal.open("ab") as file:
                file.write(b'{"event":"answer","place":23,"ans')  # torn by the kill
    assert kills == 5
    twice = len(proxy.asked) - len(PROMPTS)
    assert 0 <= twice <= kills * width
    assert (record.parent / RESPONSES_FILE).read_bytes() == expected
    paid = json.loads(record.read_text())["paid"]
    # A request that was noted and not sent yet counts as lost too: the budget errs on the safe side.
    assert paid["requests"] == len(PROMPTS) and twice <= paid["lost_requests"] <= kills * width
    with capsys.disabled():
        print(
            f"\n{kills} kills, {width} at a time: {len(proxy.asked)} requests for {len(PROMPTS)} prompts"
        )
        print("\n".join(lines), f"\nlost: {paid['lost_requests']}")


def _answered(journal: Path) -> set[int]:
    if not journal.exists():
        return set()
    lines = [line for line in journal.read_bytes().split(b"\n")[:-1] if b'"event":"answer"' in line]
    return {json.loads(line)["place"] for line in lines}


def test_another_filter_or_more_examples_ask_only_for_what_is_missing(
    proxy: Proxy, model: Path, tmp_path: Path
) -> None:
    section = configure(proxy, model, write_prompts(tmp_path, PROMPTS), num_examples=6)
    run(tmp_path, section)
    assert sorted(proxy.asked) == sorted(PROMPTS[:6])
    proxy.forget()
    run(tmp_path, replace(section, num_examples=6, max_characters=10_000))
    assert proxy.asked == []
    run(tmp_path, replace(section, num_examples=10))
    assert sorted(proxy.asked) == sorted(PROMPTS[6:10])


@pytest.mark.parametrize("limit", ["cost", "tokens"])
def test_the_budget_is_never_passed_and_more_of_it_goes_on(
    proxy: Proxy, model: Path, tmp_path: Path, limit: str, caplog: pytest.LogCaptureFixture
) -> None:
    prices = {"price_per_million_input": 1000.0, "price_per_million_output": 2000.0}
    section = configure(proxy, model, write_prompts(tmp_path, PROMPTS[:12]), **prices)
    budget = {"cost": {"max_cost": 0.4}, "tokens": {"max_total_tokens": 300}}[limit]
    proxy.faults.extend(["none", "malformed JSON"])  # counted at its most
    with pytest.raises(Stopped, match="the budget is used up") as raised:
        run(tmp_path, replace(section, **budget))
    assert "run the same command again" in str(raised.value)
    sent = len(proxy.asked)
    assert 1 < sent < 12 and proxy.at_once == 0
    spent = _spent(tmp_path / "answers" / JOURNAL_FILE)
    assert spent["cost"] <= 0.4 if limit == "cost" else spent["tokens"] <= 300
    with pytest.raises(Stopped):
        run(tmp_path, replace(section, **budget))
    assert len(proxy.asked) == sent, "nothing more is sent by the same command"
    more, record = run(tmp_path, section)
    assert len(more.splitlines()) + sum(record["fell"].values()) == 12
    assert len(proxy.asked) == 12 + 1
    assert "prompts to ask: about" in caplog.text
    assert record["paid"]["cost"] == pytest.approx(
        _spent(tmp_path / "answers" / JOURNAL_FILE)["cost"]
    )


def test_a_server_that_counts_more_than_was_asked_passes_the_budget_once_at_most(
    proxy: Proxy, model: Path, tmp_path: Path
) -> None:
    """As one whose chat template puts a long system prompt before each prompt."""
    section = configure(
        proxy, model, write_prompts(tmp_path, PROMPTS), concurrency=1, max_total_tokens=700
    )
    proxy.faults.extend(["long frame"] * len(PROMPTS))
    for _ in range(2):
        with pytest.raises(Stopped, match="the budget is used up"):
            run(tmp_path, section)
        assert _spent(tmp_path / "answers" / JOURNAL_FILE)["tokens"] <= 700
        assert len(proxy.asked) == 2  # of about 310 tokens, where 100 were foreseen


def _spent(journal: Path) -> dict[str, float]:
    """Add up a journal by itself: answers, and at their most the requests that were lost."""
    read = written = 0
    sent: dict[int, tuple[int, int]] = {}
    for line in journal.read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "sent":
            sent[event["place"]] = event["input"], event["output"]
        elif event["event"] == "lost":
            read, written = read + sent[event["place"]][0], written + sent[event["place"]][1]
        elif event["event"] == "answer":
            answer = event["answer"]
            read, written = read + answer["input_tokens"], written + answer["output_tokens"]
    return {"tokens": read + written, "cost": (read * 1000 + written * 2000) / 1e6}


def test_requests_are_no_faster_than_the_rate(proxy: Proxy, model: Path, tmp_path: Path) -> None:
    section = configure(proxy, model, write_prompts(tmp_path, PROMPTS[:6]), requests_per_minute=240)
    run(tmp_path, section)
    gaps = [b - a for a, b in zip(proxy.times, proxy.times[1:], strict=False)]
    assert proxy.times[-1] - proxy.times[0] >= 5 * 0.25 - 0.1, gaps


def test_anthropics_client_is_asked_the_same_way(proxy: Proxy, model: Path, tmp_path: Path) -> None:
    section = configure(proxy, model, write_prompts(tmp_path, PROMPTS[:5]), concurrency=1)
    of_openai, *_ = run(tmp_path / "openai", section)
    proxy.forget()
    url = proxy.url.removesuffix("/v1")
    proxy.faults.extend(["429", "none", "529", "malformed JSON", "hang", "none", "401"])
    other = replace(section, provider="anthropic", base_url=url, timeout_s=20.0)
    with pytest.raises(ValueError, match="anthropic refused") as raised:
        run(tmp_path / "anthropic", other)
    assert KEY not in str(raised.value)
    found, record = run(tmp_path / "anthropic", other)
    expected = [json.loads(line)["response"] for line in of_openai.splitlines()]
    assert [json.loads(line)["response"] for line in found.splitlines()] == expected
    assert record["paid"]["lost_requests"] == 2


def test_the_key_is_in_no_file_log_or_error(
    proxy: Proxy,
    model: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The proxy echoes the header in each refusal, as some servers do."""
    errors = []
    for fault in ("401", "400", "500", "429", "malformed JSON", "cut connection", "HTML"):
        section = configure(
            proxy,
            model,
            write_prompts(tmp_path / fault, PROMPTS[:12]),
            concurrency=1,
            max_attempts=1 if fault != "400" else 3,
        )
        proxy.faults.extend([fault] * 12)
        with pytest.raises(ValueError) as raised:
            run(tmp_path / fault, section)
        errors.append(str(raised.value))
        proxy.forget()
    out, err = capfd.readouterr()
    assert KEY not in "".join([*errors, out, err, caplog.text])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10 and not [p for p in files if KEY.encode() in p.read_bytes()]
    assert any("***" in error for error in errors), "the key was echoed, and hidden"


@pytest.mark.parametrize("kind, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_job_that_is_told_to_end_while_it_waits_for_a_server_ends(
    tmp_path: Path, kind: signal.Signals, status: int
) -> None:
    prompts = write_prompts(tmp_path, PROMPTS[:3])
    record = tmp_path / "answers" / "mine" / "synthesis.json"
    journal = record.parents[1] / JOURNAL_FILE
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        command = [sys.executable, str(SCRIPT), "--output", str(record)]
        command += ["--synthesis-provider", "openai", "--synthesis-model", "m"]
        command += ["--synthesis-base-url", url, "--synthesis-prompts", prompts]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            while not journal.exists() or journal.read_text().count("sent") < 3:
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(kind)
            said = process.communicate()[1]
    assert process.returncode == status and "Traceback" not in said, said
