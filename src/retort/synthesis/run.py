"""Responses from a model: asked, journaled, filtered, and written as JSONL that `dataset` reads.

Prompts are asked in rounds. The first asks as many as are to be kept; each further one as many as fell, until enough
are kept or no prompt is left. A round is a function of the answers before it, so an interrupted synthesis goes on with
the very prompts that were missing.
"""

import asyncio
import json
import logging
import signal
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from retort.artifacts.syntheses import RESPONSES_FILE, list_prompt_files, local_model, name_asking
from retort.config.load import identity
from retort.config.sections import Config, Evaluation, Synthesis, Teacher
from retort.io.digests import digest_file, stamp_files
from retort.io.files import held, write_atomically, write_json
from retort.io.run_record import describe_run
from retort.synthesis.client import Asker, describe_estimate, describe_paid
from retort.synthesis.contamination import Runs, read_benchmarks
from retort.synthesis.filters import Sieve, list_grammars, require_filters
from retort.synthesis.journal import Journal
from retort.synthesis.prompts import Prompt, Prompts, read_prompts
from retort.synthesis.providers import Answer, open_provider

logger = logging.getLogger(__name__)

FORMAT = {"format": "retort synthesis", "version": 1}
JOURNAL_FILE = "journal.jsonl"
_PATIENCE_S = 3.0


@dataclass(frozen=True)
class Kept:
    """The rows that passed, and what became of all that were looked at."""

    rows: list[dict[str, Any]]
    asked: int
    counts: dict[str, int]


def check_synthesis(config: Config) -> list[str]:
    """Look at what a synthesis needs, before it begins; return notes.

    Raises ValueError where prompts, libraries or the key are missing, or the server does not serve the model.
    """
    section = config.synthesis
    require_filters(section)
    _make_room(section)
    found = read_prompts(section)
    notes = [f"synthesis: {len(found.prompts):,} prompts; {found.twice:,} copies are left out"]
    if section.num_examples is not None and len(found.prompts) < section.num_examples:
        raise ValueError(
            f"synthesis.num_examples is {section.num_examples:,}, but there are {len(found.prompts):,} different "
            "prompts. Lower it, or give more."
        )
    if section.decontaminate:
        _, missing = read_benchmarks(config.evaluation)
        notes += [f"synthesis: NOT compared with the problems of {name}" for name in missing]
    if section.provider == "local":
        _check_local(config)
    else:
        notes.append(f"synthesis: {asyncio.run(_check_provider(section))}")
    return notes


def _make_room(section: Synthesis) -> None:
    """Make the folder of `output`. Raises ValueError where it cannot be written, or would overwrite the prompts."""
    if section.output is None:
        return
    path = Path(section.output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"the folder of synthesis.output {section.output!r} cannot be made ({error.strerror}: {error.filename})."
        ) from None
    if path.is_dir():
        raise ValueError(
            f"synthesis.output {section.output!r} is a folder, but a file is written: add its name, such as "
            f"{path / RESPONSES_FILE}."
        )
    if path.exists() and any(path.samefile(file) for file in list_prompt_files(section)):
        raise ValueError(
            f"synthesis.output {section.output!r} is a file of prompts, and would overwrite it. Name another file."
        )


def _check_local(config: Config) -> None:
    """Raise ValueError where the config or the tokenizer of a local model cannot be read, or its engine is missing."""
    from retort.models.load import load_model_config
    from retort.synthesis.local_vllm import require_vllm
    from retort.tokens.tokenizer import load_tokenizer

    require_vllm(config.synthesis)

    path, revision = local_model(config)
    trust = config.teacher.trust_remote_code
    load_model_config(path, revision=revision, trust_remote_code=trust)
    load_tokenizer(path, revision=revision, trust_remote_code=trust)


async def _check_provider(section: Synthesis) -> str:
    provider = open_provider(section)
    try:
        return await provider.check()
    finally:
        await provider.close()


@dataclass(frozen=True)
class Task:
    """What is to be made, and how it is shown."""

    section: Synthesis
    evaluation: Evaluation  # whose benchmarks' problems must not be in it
    local_model: str | None = None  # folder or Hub id
    loading: Teacher | None = None  # how that is loaded
    stamp: str | None = None  # of the files of prompts, as they were when they were named


def synthesize(record_path: Path, task: Task) -> str:
    """Write responses.jsonl beside the record, then the record; return a line.

    The journal lies one folder up, where all syntheses of the same answers share it. Raises ValueError where prompts
    changed since the stamp was taken, the budget is used up, the server refuses, or too little passes the filters.
    """
    started = time.monotonic()
    section = task.section
    require_filters(section)
    _make_room(section)
    folder = record_path.parent
    folder.mkdir(parents=True, exist_ok=True)
    found = read_prompts(section)
    # After reading: whatever was written before or meanwhile, the stamp is another.
    if task.stamp not in (None, stamp_files(list_prompt_files(section))):
        raise ValueError("the files of prompts changed meanwhile: run the same command again.")
    problems, missing = list[str](), list[str]()
    if section.decontaminate:
        problems, missing = read_benchmarks(task.evaluation)
    sieve = Sieve(section, Runs(problems, length=section.decontamination_words))
    busy = f"{folder.parent} is being asked by another process: waiting for it"
    lock = held(folder.parent / ".journal.lock", busy=busy, patience_s=_PATIENCE_S)
    revision = task.loading.revision if task.loading else None
    asked = name_asking(section, local_model=task.local_model, revision=revision)
    with lock, Journal(folder.parent / JOURNAL_FILE, found.prompts, asked) as journal:
        if journal.answers:
            paid = describe_paid(section, journal.paid)
            logger.info(f"{len(journal.answers):,} answers are in the journal: {paid}")
        kept, device = _answer(task, found.prompts, journal, sieve)
    _refuse_too_few(section, kept)
    _write_responses(section, folder / RESPONSES_FILE, kept.rows)
    record = _describe(task, found, kept, journal, folder / RESPONSES_FILE)
    made = describe_run(
        section={"synthesis": identity(section)},
        seed=section.seed,
        device=device,
        seconds=time.monotonic() - started,
    )
    write_json(record_path, record | {"not_compared_with": missing, "made": made})
    return _describe_line(record)


def _answer(
    task: Task, prompts: Sequence[Prompt], journal: Journal, sieve: Sieve
) -> tuple[Kept, str]:
    """Return what is kept of the answers of a server, or of a model that is loaded here, and where they were made."""
    if task.section.provider != "local":
        return _ask_server(task, prompts, journal, sieve), "server"
    assert task.local_model is not None and task.loading is not None
    from retort.synthesis.local import BatchWriter
    from retort.synthesis.local_vllm import VllmWriter, takes_vllm  # loads torch

    kind = VllmWriter if takes_vllm(task.section, task.loading) else BatchWriter
    writer = kind(
        task.section,
        prompts,
        journal,
        model_path=task.local_model,
        loading=task.loading,
    )
    kept = keep_examples(task.section, prompts, journal, sieve, writer.write)
    return kept, writer.device


def _ask_server(task: Task, prompts: Sequence[Prompt], journal: Journal, sieve: Sieve) -> Kept:
    """Keep examples, whose rounds are asked in one event loop: the clients' connections live in it.

    No thread beside it: one that waits for a loop that a signal ended waits for ever, and the process with it.
    """
    section = task.section
    provider = open_provider(section)
    asker = Asker(section, prompts, journal, provider)
    with asyncio.Runner() as loop:

        def ask(places: Sequence[int]) -> None:
            logger.info(describe_estimate(section, [prompts[p] for p in places]))
            _run(loop, asker.ask(places))

        try:
            return keep_examples(section, prompts, journal, sieve, ask)
        finally:
            loop.run(provider.close())


def _run(loop: asyncio.Runner, work: Coroutine[Any, Any, None]) -> None:
    """Run to the end, or until SIGTERM, which then does what it does elsewhere.

    It cancels the work between two steps. Raised within one, as the scripts' handler does, it would leave tasks behind
    whose tracebacks asyncio prints. (Of SIGINT the runner takes care.)
    """
    handler = signal.getsignal(signal.SIGTERM)

    async def until_told() -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        await work

    try:
        loop.run(until_told())
    except asyncio.CancelledError:
        signal.signal(signal.SIGTERM, handler)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)


def keep_examples(
    section: Synthesis,
    prompts: Sequence[Prompt],
    journal: Journal,
    sieve: Sieve,
    ask: Callable[[Sequence[int]], None],
) -> Kept:
    """Ask in rounds until enough answers pass the filters; what stays depends on the answers alone.

    `ask` answers the prompts of these places into the journal, but for those that are rejected for good.
    """
    wanted = section.num_examples or len(prompts)
    rows: list[dict[str, Any]] = []
    asked = 0
    while len(rows) < wanted and asked < len(prompts):
        first, asked = asked, min(len(prompts), asked + wanted - len(rows))
        missing = [place for place in range(first, asked) if place not in journal.answers]
        if missing:
            ask(missing)
        for place in range(first, asked):
            answer = journal.answers.get(place)
            if sieve.sift(place, prompts[place], answer) is None:
                assert answer is not None
                rows.append(_to_row(section, place, prompts[place], answer))
    return Kept(rows, asked, sieve.counts)


def _to_row(section: Synthesis, place: int, prompt: Prompt, answer: Answer) -> dict[str, Any]:
    return {
        "prompt": prompt.text,
        "response": answer.text,
        "category": prompt.category,
        "language": prompt.language,
        "provider": section.provider,
        "model": answer.model,
        "finish": answer.finish,
        "number": place,
    }


def _write_responses(section: Synthesis, path: Path, rows: Sequence[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    content = lines.encode("utf-8", "replace")  # half a character, cut at max_tokens, is none
    write_atomically(path, content)
    if section.output is not None:
        write_atomically(Path(section.output), content)


def _describe(
    task: Task, found: Prompts, kept: Kept, journal: Journal, responses: Path
) -> dict[str, Any]:
    section = task.section
    prices = section.price_per_million_input, section.price_per_million_output
    return {
        **FORMAT,
        "provider": section.provider,
        "model": task.local_model or section.model,
        "responses": {
            "file": responses.name,
            "rows": len(kept.rows),
            "digest": digest_file(responses),
        },
        "prompts": {
            "there": len(found.prompts),
            "empty": found.empty,
            "copies": found.twice,
            "asked": kept.asked,
        },
        "fell": kept.counts,
        "paid": asdict(journal.paid) | {"cost": journal.paid.cost(*prices)},
        "code_parsed_in": list_grammars() if section.check_code else [],
    }


def _describe_line(record: dict[str, Any]) -> str:
    paid = record["paid"]
    cost = f", {paid['cost']:,.4f} paid" if paid["cost"] else ""
    return (
        f"synthesis: {record['responses']['rows']:,} responses of {record['prompts']['asked']:,} prompts; fell: "
        f"{_list_fallen(record['fell'])}; {paid['input_tokens'] + paid['output_tokens']:,} tokens{cost}"
    )


def _list_fallen(counts: dict[str, int]) -> str:
    return (
        ", ".join(f"{number:,} {reason}" for reason, number in counts.items() if number) or "none"
    )


def _refuse_too_few(section: Synthesis, kept: Kept) -> None:
    """Raise ValueError where the prompts are used up before enough responses are kept."""
    if not kept.rows or len(kept.rows) < (section.num_examples or 0):
        wanted = f" of the {section.num_examples:,} wanted" if section.num_examples else ""
        raise ValueError(
            f"all {kept.asked:,} prompts are asked, and {len(kept.rows):,} responses{wanted} are kept (fell: "
            f"{_list_fallen(kept.counts)}). The answers stay in the journal: lower synthesis.num_examples, loosen a "
            "filter of synthesis, or give more prompts."
        )
