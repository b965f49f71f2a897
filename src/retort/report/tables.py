"""Rows and cells of the tables in the summary and on the page. Undefined values are a dash."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from retort.evaluation.formatting import format_estimate, format_metric, name_metric
from retort.evaluation.intervals import Estimate
from retort.evaluation.records import ClassRow
from retort.models.samples import SamplePrompt, Samples
from retort.report.comparisons import compare_with_baseline, find_best
from retort.report.records import CacheFacts, Record, find_teachers, name_teacher
from retort.report.scoreboard import Scoreboard
from retort.report.seeds import SeedMean

# First and second line of a column's head, and its width in characters; the first column is the name.
COLUMNS = (
    ("type", "", 6),
    ("alpha", "", 5),
    ("T", "", 4),
    ("params", "", 7),
    ("held-out", "loss", 13),
    ("perplexity", "", 10),
    ("KL to", "teacher", 7),
    ("agreement", "%", 9),
    ("margin vs", "cross-ent.", 12),
)


@dataclass(frozen=True)
class Row:
    """A row of the comparison: the name, and a text for each of COLUMNS."""

    name: str
    is_teacher: bool
    cells: tuple[str, ...]
    is_better: bool = False  # clearly better than cross-entropy


def build_rows(group: Sequence[Record], *, baseline: str | None = None) -> list[Row]:
    """Return the rows of one group's table: its teachers, then its runs."""
    teachers = find_teachers(group)
    rows = []
    for teacher in teachers:
        name = name_teacher(teacher, teachers)
        known = teacher.teacher_card.metrics if teacher.teacher_card else {}
        loss, ppl = _format_estimate(known.get("loss")), _perplexity(teacher.teacher_perplexity)
        size = _size(teacher.teacher_parameters)
        rows.append(Row(name, True, ("-", "-", "-", size, loss, ppl, "-", "-", "-")))
    for run in group:
        found = compare_with_baseline(run, group, baseline=baseline)
        cells = (
            run.distillation_type,
            _compact(run.alpha),
            _compact(run.temperature) if run.is_distilled else "-",
            _size(run.student_parameters),
            _format_estimate(run.card.metrics["loss"]),
            _perplexity(run.perplexity),
            _fixed(run.kl_to_teacher),
            "-" if run.agreement is None else f"{100 * run.agreement:.1f}",
            "-" if found is None else _format_estimate(found.margin, is_signed=True),
        )
        is_better = found is not None and is_gain(found.margin)
        rows.append(Row(run.name, False, cells, is_better))
    return rows


def is_clear(margin: Estimate) -> bool:
    """Whether a difference is clear: its interval excludes zero; without one, it is not zero to three digits."""
    if margin.ends is None:
        return round(margin.value, 3) != 0
    low, high = margin.ends
    return low > 0 or high < 0


def is_gain(margin: Estimate) -> bool:
    """Whether a margin is clearly negative, that is, better."""
    return is_clear(margin) and margin.value < 0


def _format_estimate(found: Estimate | None, *, is_signed: bool = False) -> str:
    """Return 3.213 or 3.213±0.020, with the distance to the farther end of the interval."""
    if found is None:
        return "-"
    text = format_signed(found.value) if is_signed else _fixed(found.value)
    if found.ends is None:
        return text
    low, high = found.ends
    return f"{text}±{max(high - found.value, found.value - low):.3f}"


def _fixed(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _compact(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def format_signed(value: float) -> str:
    """Return a difference with three digits and its sign; zero has no sign."""
    return "0.000" if round(value, 3) == 0 else f"{value:+.3f}"


def _perplexity(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.2f}" if value < 99_999 else f"{value:.2e}"


def sort_key(text: str) -> str:
    """Return what a cell is sorted by: its number without separators and interval; "" for a dash; else its text."""
    found = re.match(r"([+-]?[0-9][0-9,]*(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)([TBM]?)", text)
    if not found:
        return "" if text == "-" else text
    factor = {"": 1.0, "M": 1e6, "B": 1e9, "T": 1e12}[found[2]]
    return repr(float(found[1].replace(",", "")) * factor)


def _size(count: int | None) -> str:
    """Return a count in at most 7 characters: 54,272 as it is, 1,234,567 as 1.235M."""
    if count is None:
        return "-"
    for bound, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count >= bound:
            return f"{count / bound:.4g}{unit}"
    return f"{count:,}"


def format_seconds(value: float) -> str:
    """Return a duration in seconds, minutes or hours."""
    if value < 100:
        return f"{value:.1f} s"
    minutes, hours = value / 60, value / 3600
    return f"{minutes:.1f} min" if minutes < 100 else f"{hours:.1f} h"


def format_kl(value: float) -> str:
    """Return a KL with four digits, or in scientific notation below 0.001."""
    return f"{value:.4f}" if value == 0 or value >= 1e-3 else f"{value:.1e}"


def _name_tail(cache: CacheFacts) -> str:
    return "sampled mass" if cache.method == "sampled" else "tail mass"


def format_cache(cache: CacheFacts) -> str:
    """Return a cache's size and quality in one line."""
    return (
        f"{cache.method}, {cache.setting}: {cache.bytes_per_position:.1f} bytes/token, {_name_tail(cache)} "
        f"{cache.tail_mass:.4f}, fidelity KL {format_kl(cache.fidelity_kl)} nats, same top token "
        f"{100 * cache.fidelity_agreement:.1f} %, {cache.positions:,} positions"
    )


# The page's tables -------------------------------------------------------------------------------

_PAGE_METRICS = (
    *("loss", "bits_per_byte", "kl_to_teacher", "reverse_kl", "agreement", "overlap"),
    *("acceptance", "accuracy", "calibration_error"),
)


_KINDS = {
    "frequency": "By frequency of the next token: its rank in the training text",
    "place": "By place in the document: number of tokens before the next one",
    "entropy": "By entropy of the teacher's distribution, nats",
    "category": "By category of the document",
    "language": "By language of the document",
}


@dataclass(frozen=True)
class Cell:
    """A cell of the page: its text, a smaller text below it (the interval), and whether it is clearly the best."""

    text: str
    below: str = ""
    is_best: bool = False


@dataclass(frozen=True)
class Table:
    """A table of the page. The first of `heads` is that of the rows' names."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, bool, tuple[Cell, ...]], ...]  # name, is it a teacher, cells


def build_metric_table(group: Sequence[Record]) -> Table:
    """Return all metrics of one group with their intervals, teachers first; shares in percent."""
    teachers = find_teachers(group)
    shown = [n for n in _PAGE_METRICS if any(n in r.card.metrics for r in group)]
    best = {name: find_best(group, name) for name in shown}
    rows: list[tuple[str, bool, tuple[Cell, ...]]] = []
    for record in teachers:
        card = record.teacher_card.metrics if record.teacher_card else {}
        name = name_teacher(record, teachers)
        rows.append((name, True, (*(_cell(n, card.get(n)) for n in shown), Cell("-"))))
    gaps = [_gap(record, group) for record in group]
    for record, gap in zip(group, gaps, strict=True):
        known = record.card.metrics
        cells = [_cell(n, known.get(n), is_best=best[n] is record) for n in shown]
        rows.append((record.name, False, (*cells, gap)))
    if all(gap.text == "-" for gap in gaps):
        rows = [(name, is_teacher, cells[:-1]) for name, is_teacher, cells in rows]
        return Table("", ("run", *map(name_metric, shown)), tuple(rows))
    return Table("", ("run", *map(name_metric, shown), "gap closed, %"), tuple(rows))


def _cell(name: str, found: Estimate | None, *, is_best: bool = False) -> Cell:
    return Cell("-") if found is None else Cell(*format_metric(name, found), is_best)


def _gap(record: Record, group: Sequence[Record]) -> Cell:
    found = compare_with_baseline(record, group)
    if found is None or found.gap_closed is None:
        return Cell("-")
    return Cell(*format_estimate(found.gap_closed, 100.0, 0))


def build_seed_table(means: Sequence[SeedMean]) -> Table:
    """Return the table of means over seeds with their intervals; shares in percent."""
    names = [n for n in _PAGE_METRICS if any(n in mean.means for mean in means)]
    heads = ("runs", "seeds", *map(name_metric, names), "margin, nats/token")
    rows = []
    for mean in means:
        cells = [Cell(str(mean.num_seeds)), *(_cell(n, mean.means.get(n)) for n in names)]
        margin = mean.means.get("margin")
        clear = margin is not None and is_gain(margin)
        cells.append(Cell(*format_estimate(margin, 1.0, 3), clear) if margin else Cell("-"))
        rows.append((mean.name, False, tuple(cells)))
    return Table("Means over seeds", heads, tuple(rows))


def describe_seeds(mean: SeedMean) -> str:
    """Return the means over seeds of one kind of run in one line."""
    loss, margin = mean.means["loss"], mean.means.get("margin")
    text = f"{mean.name}, mean of {mean.num_seeds} seeds: held-out loss {_format_estimate(loss)}"
    return text + (f", margin {_format_estimate(margin, is_signed=True)}" if margin else "")


def build_breakdowns(group: Sequence[Record]) -> list[Table]:
    """Return a table for each partition of the positions: each run's loss, and its KL below, in every class."""
    tables = []
    for kind, title in _KINDS.items():
        rows_of = {r.name: {row.name: row for row in r.breakdown.get(kind, ())} for r in group}
        names = list(dict.fromkeys(name for rows in rows_of.values() for name in rows))
        if not names:
            continue
        heads = ("class", "positions", "teacher", *rows_of)
        rows = tuple((name, False, _class_cells(name, rows_of)) for name in names)
        if all(cells[1].text == "-" for _, _, cells in rows):  # no teacher
            heads = ("class", "positions", *rows_of)
            rows = tuple((name, b, (cells[0], *cells[2:])) for name, b, cells in rows)
        tables.append(Table(title, heads, rows))
    return tables


def _class_cells(name: str, rows_of: Mapping[str, Mapping[str, ClassRow]]) -> tuple[Cell, ...]:
    found = [rows.get(name) for rows in rows_of.values()]
    first = next(row for row in found if row is not None)
    teachers = [
        row.metrics["teacher_loss"] for row in found if row and "teacher_loss" in row.metrics
    ]
    size = Cell(
        f"{first.positions:,}", f"{first.documents:,} document{'' if first.documents == 1 else 's'}"
    )
    teacher = Cell(_fixed(teachers[0].value if teachers else None))
    return (size, teacher, *map(_class_cell, found))


def _class_cell(row: ClassRow | None) -> Cell:
    if row is None:
        return Cell("-")
    kl = row.metrics.get("kl_to_teacher")
    return Cell(_fixed(row.metrics["loss"].value), f"KL {kl.value:.3f}" if kl else "")


def build_task_table(board: Scoreboard) -> Table:
    """Return the table of every model's score in every task, with its interval."""
    rows = ((name, is_t, tuple(map(_score_cell, scores))) for name, is_t, scores in board.rows)
    return Table("", ("model", *(column.title for column in board.columns)), tuple(rows))


def _score_cell(score: Estimate | None) -> Cell:
    if score is None:
        return Cell("-")
    return Cell(*format_estimate(score, 1.0, 3))


# Samples -------------------------------------------------------------------------------------------

REFERENCE = "held-out text"


@dataclass(frozen=True)
class Continuation:
    """A model's continuations of a prompt, greedy and sampled; `missing` is the reason if it has none."""

    name: str
    greedy: str = ""
    sampled: str | None = None
    missing: str | None = None


@dataclass(frozen=True)
class SampleBlock:
    """A prompt and its continuations: of the held-out text, the teachers and the students."""

    prompt: str
    lines: tuple[Continuation, ...]


def build_samples(
    records: Sequence[Record], found: Sequence[Mapping[str, Samples]]
) -> list[SampleBlock]:
    """Return a block for each prompt, in the order given: the held-out text first, then teachers, then runs."""
    has_several = len({record.teacher for record in records if record.teacher}) > 1
    prompts: dict[tuple[int, ...], SamplePrompt] = {}
    lines: dict[tuple[int, ...], list[tuple[int, Continuation]]] = {}
    for record, samples in zip(records, found, strict=True):
        teacher = f"teacher {record.teacher}" if has_several else "teacher"
        for rank, (whose, name) in enumerate((("teacher", teacher), ("student", record.name))):
            for prompt, continuation in _pair(samples.get(whose), name):
                prompts.setdefault(prompt.ids, prompt)
                known = lines.setdefault(prompt.ids, [])
                if (rank, continuation) not in known:  # a teacher that several runs share
                    known.append((rank, continuation))
    blocks = []
    for ids, prompt in prompts.items():
        text = [] if prompt.reference is None else [Continuation(REFERENCE, prompt.reference)]
        ranked = sorted(lines[ids], key=lambda line: line[0])
        blocks.append(SampleBlock(prompt.text, (*text, *(line for _, line in ranked))))
    return blocks


def mark_lines(text: str) -> str:
    """Return a generated text with a sign for every empty line, of which small models write dozens."""
    if not text:
        return "(nothing)"
    whole = re.sub(r"\n\n+", lambda run: _mark_run(len(run[0]) - 1) + "\n", text)
    return whole.removesuffix("\n") + ("\N{RETURN SYMBOL}" if text.endswith("\n") else "")


def _mark_run(count: int) -> str:
    sign = "\N{RETURN SYMBOL}"
    return sign * count if count <= 3 else f"{sign}\N{MULTIPLICATION SIGN}{count}"


def _pair(samples: Samples | None, name: str) -> list[tuple[SamplePrompt, Continuation]]:
    if samples is None:
        return []
    if samples.missing is not None:
        return [(prompt, Continuation(name, missing=samples.missing)) for prompt in samples.prompts]
    pairs = zip(samples.prompts, samples.continued, strict=True)
    return [(prompt, Continuation(name, found.greedy, found.drawn)) for prompt, found in pairs]
