"""A synthesis from prompts to responses.jsonl, which `dataset` reads: answers are journaled, filtered and written.

Prompts are asked in rounds: first as many as the wanted examples, then as many as were dropped, until enough are kept
or no prompt is left. A round depends only on the answers before it, so an interrupted synthesis continues with exactly
the missing prompts.
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

from retort.artifacts.responses import (
    RESPONSES_FILE,
    Paid,
    PromptCounts,
    ResponsesFile,
    SynthesisRecord,
    digest_request,
    list_prompt_files,
    local_model,
)
from retort.config.handoff import Job
from retort.config.load import identity
from retort.config.sections import Config, Synthesis
from retort.io.digests import digest_file, digest_file_states
from retort.io.files import file_lock, write_atomically
from retort.io.run_record import describe_run
from retort.synthesis.client import Client, describe_estimate, describe_usage
from retort.synthesis.contamination import ProblemNgrams, read_benchmarks
from retort.synthesis.filters import AnswerFilter, list_grammars, require_filters
from retort.synthesis.journal import Journal
from retort.synthesis.prompts import LabeledPrompt, PromptList, read_prompts
from retort.synthesis.providers import Answer, open_provider

logger = logging.getLogger(__name__)

JOURNAL_FILE = "journal.jsonl"
_LOCK_TIMEOUT_S = 3.0  # before the wait for another process is logged


@dataclass(frozen=True)
class Examples:
    """The rows that passed the filters, the number of prompts asked for them, and the dropped answers by reason."""

    rows: list[dict[str, Any]]
    num_asked: int
    num_dropped: dict[str, int]


def check_synthesis_inputs(config: Config) -> list[str]:
    """Check what a synthesis needs before it starts; return notes.

    Raises ValueError when prompts, packages or the API key are missing, when the output cannot be written, or when the
    server does not serve the model.
    """
    section = config.synthesis
    require_filters(section)
    _prepare_output(section)
    found = read_prompts(section)
    notes = [
        f"synthesis: {len(found.prompts):,} prompts; {found.num_duplicates:,} duplicates are left out"
    ]
    if section.num_examples is not None and len(found.prompts) < section.num_examples:
        raise ValueError(
            f"synthesis.num_examples is {section.num_examples:,}, but there are {len(found.prompts):,} different "
            "prompts. Lower it, or give more prompts."
        )
    if section.decontaminate:
        _, missing = read_benchmarks(config.evaluation)
        notes += [f"synthesis: NOT compared with the problems of {name}" for name in missing]
    if section.provider == "local":
        _check_local(config)
    else:
        notes.append(f"synthesis: {asyncio.run(_check_provider(section))}")
    return notes


def _prepare_output(section: Synthesis) -> None:
    """Create the folder of `output`. Raises ValueError when that fails, or `output` is a folder or a prompt file."""
    if section.output is None:
        return
    path = Path(section.output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"the folder of synthesis.output {section.output!r} cannot be created ({error.strerror}: "
            f"{error.filename}). Set another path."
        ) from None
    if path.is_dir():
        raise ValueError(
            f"synthesis.output {section.output!r} is a folder, but must be a file: add a name, such as "
            f"{path / RESPONSES_FILE}."
        )
    if path.exists() and any(path.samefile(file) for file in list_prompt_files(section)):
        raise ValueError(
            f"synthesis.output {section.output!r} is a prompt file, which would be overwritten. Name another file."
        )


def _check_local(config: Config) -> None:
    """Raise ValueError when the config or tokenizer of a local model cannot be read, or its engine is missing."""
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


def synthesize(record_path: Path, job: Job) -> str:
    """Write responses.jsonl beside the record, then the record; return a summary line.

    The journal is one folder up, shared by all syntheses with the same answers. Raises ValueError when prompt files are
    not those that the job expects, the budget is used up, the server refuses, or too few answers pass the filters.
    """
    started = time.monotonic()
    section = job.config.synthesis
    require_filters(section)
    _prepare_output(section)
    folder = record_path.parent
    folder.mkdir(parents=True, exist_ok=True)
    prompts = _read_prompts(section, job.expected.get("prompts"))
    answer_filter, missing = _build_filter(job.config)
    busy = f"another process writes the answers in {folder.parent}: waiting for it"
    lock = file_lock(folder.parent / ".journal.lock", busy=busy, notify_after_s=_LOCK_TIMEOUT_S)
    model, revision = local_model(job.config) if section.provider == "local" else (None, None)
    settings = digest_request(section, local_model=model, revision=revision)
    with lock, Journal(folder.parent / JOURNAL_FILE, prompts.prompts, settings) as journal:
        if journal.answers:
            usage = describe_usage(section, journal.usage)
            logger.info(f"{len(journal.answers):,} answers are in the journal: {usage}")
        examples, device, dtype = _answer_prompts(
            job.config, prompts.prompts, journal, answer_filter
        )
    _check_enough(section, examples)
    _write_responses(section, folder / RESPONSES_FILE, examples.rows)
    made = describe_run(
        section={"synthesis": identity(section)},
        seed=section.seed,
        dtype=dtype,
        device=device,
        seconds=time.monotonic() - started,
    )
    prices = section.price_per_million_input, section.price_per_million_output
    record = SynthesisRecord(
        provider=str(section.provider),
        model=model or section.model,
        responses=ResponsesFile(
            file=RESPONSES_FILE,
            rows=len(examples.rows),
            digest=digest_file(folder / RESPONSES_FILE),
        ),
        prompts=PromptCounts(
            different=len(prompts.prompts),
            empty=prompts.num_empty,
            duplicates=prompts.num_duplicates,
            asked=examples.num_asked,
        ),
        dropped=examples.num_dropped,
        paid=Paid(**asdict(journal.usage), cost=journal.usage.cost(*prices)),
        code_parsed_in=tuple(list_grammars()) if section.check_code else (),
        not_compared_with=tuple(missing),
        made=made,
    )
    record.write(record_path)
    return _describe_line(record)


def _read_prompts(section: Synthesis, expected: str | None) -> PromptList:
    """Return the prompts. Raises ValueError when their files are not the expected ones, by `digest_file_states`."""
    prompts = read_prompts(section)
    # After reading: a write before or during it changes the digest.
    if expected not in (None, digest_file_states(list_prompt_files(section))):
        raise ValueError(
            "the prompt files changed since the plan was made: rerun the same command."
        )
    return prompts


def _build_filter(config: Config) -> tuple[AnswerFilter, list[str]]:
    """Return the filter of answers, and the benchmarks whose problems could not be read for it."""
    problems, missing = list[str](), list[str]()
    if config.synthesis.decontaminate:
        problems, missing = read_benchmarks(config.evaluation)
    ngrams = ProblemNgrams(problems, length=config.synthesis.decontamination_words)
    return AnswerFilter(config.synthesis, ngrams), missing


def _answer_prompts(
    config: Config,
    prompts: Sequence[LabeledPrompt],
    journal: Journal,
    answer_filter: AnswerFilter,
) -> tuple[Examples, str, str | None]:
    """Return the examples of a server or of a local model, and the device and dtype that generated them."""
    section = config.synthesis
    if section.provider != "local":
        return _ask_server(section, prompts, journal, answer_filter), "server", None
    path, revision = local_model(config)
    loading = config.teacher.model_copy(update={"revision": revision})
    from retort.synthesis.local import TransformersGenerator  # loads torch
    from retort.synthesis.local_vllm import VllmGenerator, uses_vllm

    kind = VllmGenerator if uses_vllm(section, loading) else TransformersGenerator
    generator = kind(section, prompts, journal, model_path=path, loading=loading)
    examples = collect_examples(section, prompts, journal, answer_filter, generator.generate)
    return examples, generator.device, generator.dtype


def _ask_server(
    section: Synthesis,
    prompts: Sequence[LabeledPrompt],
    journal: Journal,
    answer_filter: AnswerFilter,
) -> Examples:
    """Collect examples from a server, all rounds in one event loop, which the clients' connections belong to.

    The loop runs in this thread: another thread that waits for a loop that a signal has ended would wait for ever.
    """
    provider = open_provider(section)
    client = Client(section, prompts, journal, provider)
    with asyncio.Runner() as runner:

        def ask(indices: Sequence[int]) -> None:
            logger.info(describe_estimate(section, [prompts[i] for i in indices]))
            _run_until_sigterm(runner, client.request_answers(indices))

        try:
            return collect_examples(section, prompts, journal, answer_filter, ask)
        finally:
            runner.run(provider.close())


def _run_until_sigterm(runner: asyncio.Runner, work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine to its end, or cancel it on SIGTERM, then pass the signal to the previous handler.

    The handler of scripts raises within a step, which would leave tasks behind whose tracebacks asyncio prints.
    (The runner itself handles SIGINT.)
    """
    handler = signal.getsignal(signal.SIGTERM)

    async def cancel_on_sigterm() -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        await work

    try:
        runner.run(cancel_on_sigterm())
    except asyncio.CancelledError:
        signal.signal(signal.SIGTERM, handler)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)


def collect_examples(
    section: Synthesis,
    prompts: Sequence[LabeledPrompt],
    journal: Journal,
    answer_filter: AnswerFilter,
    ask: Callable[[Sequence[int]], None],
) -> Examples:
    """Ask prompts in rounds until enough answers pass the filters; the result depends only on the answers.

    `ask` writes the answers to the prompts of these indices into the journal, except for rejected prompts.
    """
    num_wanted = section.num_examples or len(prompts)
    rows: list[dict[str, Any]] = []
    num_asked = 0
    while len(rows) < num_wanted and num_asked < len(prompts):
        first, num_asked = num_asked, min(len(prompts), num_asked + num_wanted - len(rows))
        missing = [index for index in range(first, num_asked) if index not in journal.answers]
        if missing:
            ask(missing)
        for index in range(first, num_asked):
            answer = journal.answers.get(index)
            if answer_filter.check(index, prompts[index], answer) is None:
                assert answer is not None
                rows.append(_to_row(section, index, prompts[index], answer))
    return Examples(rows, num_asked, answer_filter.counts)


def _to_row(
    section: Synthesis, index: int, prompt: LabeledPrompt, answer: Answer
) -> dict[str, Any]:
    return {
        "prompt": prompt.text,
        "response": answer.text,
        "category": prompt.category,
        "language": prompt.language,
        "provider": section.provider,
        "model": answer.model,
        "finish": answer.finish,
        "number": index,
    }


def _write_responses(section: Synthesis, path: Path, rows: Sequence[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    content = lines.encode("utf-8", "replace")  # a lone surrogate, cut at max_tokens
    write_atomically(path, content)
    if section.output is not None:
        write_atomically(Path(section.output), content)


def _describe_line(record: SynthesisRecord) -> str:
    paid = record.paid
    cost = f", {paid.cost:,.4f} paid" if paid.cost else ""
    return (
        f"synthesis: {record.responses.rows:,} responses to {record.prompts.asked:,} prompts; dropped: "
        f"{_list_dropped(record.dropped)}; {paid.input_tokens + paid.output_tokens:,} tokens{cost}"
    )


def _list_dropped(counts: dict[str, int]) -> str:
    dropped = [f"{number:,} {reason}" for reason, number in counts.items() if number]
    return ", ".join(dropped) or "none"


def _check_enough(section: Synthesis, examples: Examples) -> None:
    """Raise ValueError when all prompts are asked and too few responses are kept."""
    if not examples.rows or len(examples.rows) < (section.num_examples or 0):
        wanted = f" of the {section.num_examples:,} wanted" if section.num_examples else ""
        raise ValueError(
            f"all {examples.num_asked:,} prompts are asked, and {len(examples.rows):,} responses{wanted} are kept "
            f"(dropped: {_list_dropped(examples.num_dropped)}). The answers stay in the journal: lower "
            "synthesis.num_examples, relax a filter of synthesis, or give more prompts."
        )
