"""Tables of the summary and the page: rows of a data frame, and columns that say how they are shown.

What is not defined is a dash.
"""

import textwrap
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from retort.evaluation.formatting import format_number, format_signed, name_metric
from retort.evaluation.scores import MAX_PERPLEXITY, METRICS
from retort.report.comparisons import Comparisons, find_best, is_gain, read_config
from retort.report.runs import ENDS, find_teachers, get_estimate
from retort.report.templates import write_kl

NO_BASELINE = "no match"


class Cell(NamedTuple):
    """A cell: its text, a smaller text below it, what it is sorted by, and whether it stands out."""

    text: str
    below: str = ""
    key: str = ""
    is_bold: bool = False


@dataclass(frozen=True)
class Column:
    """How a column of a frame is shown, in HTML and, if it has a `short` head, in a terminal.

    write: the format of its numbers times `scale`, or a function; "" for texts. interval: where that of a number is
    shown. note: the column of the frame with a text that is shown below.
    """

    key: str
    head: str
    write: str | Callable[[float], str] = ""
    short: str = ""
    scale: float = 1.0
    interval: Literal["none", "beside", "below"] = "none"
    note: str = ""

    def make_cell(self, row: pd.Series, *, is_bold: bool = False) -> Cell:
        """Return the cell of a row."""
        value, low, high = (row.get(f"{self.key}{end}", np.nan) for end in ENDS)
        if pd.isna(value):
            return Cell("-")
        if isinstance(value, str):
            return Cell(value, key="" if self.write else value)
        text, below = self._write(value), row.get(self.note)
        below = "" if pd.isna(below) else below
        if self.interval == "beside" and pd.notna(low):
            text += f"\N{PLUS-MINUS SIGN}{max(high - value, value - low):.3f}"
        elif self.interval == "below" and pd.notna(low):
            below = f"{self._write(low)} to {self._write(high)}"
        return Cell(text, below, repr(float(value)), is_bold)

    def _write(self, value: float) -> str:
        scaled = float(self.scale * value)
        return format(scaled, self.write) if isinstance(self.write, str) else self.write(scaled)


@dataclass(frozen=True)
class Table:
    """The rows of a frame by name, and the columns that are shown of them; `is_teacher` in the frame marks teachers.

    names: the head of the rows' names. bold: the cells that stand out, by row and key.
    """

    frame: pd.DataFrame
    columns: Sequence[Column]
    names: str = "setting"
    title: str = ""
    bold: Collection[tuple[str | None, str]] = ()

    @property
    def heads(self) -> list[str]:
        """The heads on the page."""
        return [self.names, *(column.head for column in self.columns)]

    @property
    def rows(self) -> list[tuple[str, bool, list[Cell]]]:
        """Of each row its name, whether it is a teacher, and its cells."""
        return [
            (
                str(name),
                bool(row.get("is_teacher", False)),
                [c.make_cell(row, is_bold=(name, c.key) in self.bold) for c in self.columns],
            )
            for name, row in self.frame.iterrows()
        ]


# The columns --------------------------------------------------------------------------------------


def _write_size(count: float) -> str:
    """Return a count in at most 7 characters: 54,272 as it is, 1,234,567 as 1.235M."""
    for bound, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count >= bound:
            return f"{count / bound:.4g}{unit}"
    return f"{count:,.0f}"


def _write_perplexity(value: float) -> str:
    if value >= MAX_PERPLEXITY:
        return format_number(value, 2)
    return format(value, ",.2f" if value < 99_999 else ".2e")


def _write_duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


MAIN = (
    Column("loss", "held-out loss", ".3f", "loss", interval="beside"),
    Column("margin", "margin vs cross-entropy", format_signed, "margin", interval="beside"),
    Column("seeds", "seeds", ".0f", "seeds"),
    Column("distance_closed", "distance to teacher closed, %", ".0f", "closed %", scale=100),
    Column("perplexity", "perplexity", _write_perplexity, "perplexity"),
    Column("kl_to_teacher", "KL to teacher", ".3f", "KL"),
    Column("agreement", "agreement, %", ".1f", "agree %", scale=100),
    Column("distillation_type", "type", short="type"),
    Column("alpha", "alpha", ".3g", "alpha"),
    Column("temperature", "T", ".3g", "T"),
    Column("student_parameters", "parameters", _write_size, "params"),
)
# Left out of a terminal's table, in this order, until names have room.
_OPTIONAL = ("params", "perplexity", "agree %", "T", "alpha", "type", "KL", "closed %")
_NAME_ROOM = 24  # characters
_ALL_METRICS = (
    *("loss", "bits_per_byte", "kl_to_teacher", "reverse_kl", "agreement", "overlap"),
    *("acceptance", "accuracy", "calibration_error"),
)
_METRICS = [
    Column(name, name_metric(name), ",.3f", interval="below")
    if METRICS[name].unit
    else Column(name, name_metric(name), ".1f", scale=100, interval="below")
    for name in _ALL_METRICS
]
_SHARES = (
    Column("distance_closed", "distance closed, %", ".0f", scale=100, interval="below"),
    Column("gap_closed", "gap closed, %", ".0f", scale=100, interval="below"),
)
_OF_RUN = (
    Column("margin", "margin, nats/token", ".3f", interval="below"),
    Column("baseline", "baseline"),
)
_CACHE = (
    Column("cache_method", "method"),
    Column("cache_dial", "keeps"),
    Column("cache_positions", "positions", ",.0f"),
    Column("cache_bytes_per_position", "bytes per token", ",.1f"),
    Column("cache_tail_mass", "tail mass", ".4f"),
    Column("cache_fidelity_kl", "fidelity KL, nats", write_kl),
    Column("cache_fidelity_agreement", "same top token, %", ".1f", scale=100),
)
_PROVENANCE = (
    Column("id", "id"),
    Column("seed", "seed", ".0f"),
    Column("steps", "steps", ",.0f"),
    Column("trained_positions", "positions trained on", ",.0f"),
    Column("epochs", "epochs", ".2f"),
    Column("last_change", "change of loss at the end", format_signed, interval="below"),
    Column("training_seconds", "training time", _write_duration),
    Column("device", "device"),
    Column("folder", "folder"),
)
_CLASSES = {
    "frequency": "By frequency of the next token: its rank in the training text",
    "place": "By place in the document: number of tokens before the next one",
    "entropy": "By entropy of the teacher's distribution, nats",
    "source": "By source of the document",
    "category": "By category of the document",
    "language": "By language of the document",
}

# Tables -------------------------------------------------------------------------------------------


def _with_teachers(group: pd.DataFrame) -> pd.DataFrame:
    teachers = find_teachers(group).assign(is_teacher=True)
    return pd.concat([teachers, group.assign(is_teacher=False)])


def _find_bold(
    found: Comparisons, group: pd.DataFrame, metrics: Sequence[str]
) -> set[tuple[str | None, str]]:
    """Return the cells of clear gains, and those of the settings that are clearly best."""
    gains = [name for name, row in group.iterrows() if is_gain(get_estimate(row, "margin"))]
    best = {(find_best(found, group, metric), metric) for metric in metrics}
    return best | {(name, "margin") for name in gains}


def build_main_table(found: Comparisons, group: pd.DataFrame) -> Table:
    """Return the main table of one group of settings: its teachers, then the settings."""
    is_distilled = group.distillation_type != "output"
    is_lacking = is_distilled & group.margin.isna()
    frame = group.assign(
        temperature=group.temperature.where(is_distilled),
        margin=group.margin.astype(object).mask(is_lacking, NO_BASELINE),
    )
    columns = [c for c in MAIN if c.key != "distance_closed" or group[c.key].notna().any()]
    return Table(_with_teachers(frame), columns, bold=_find_bold(found, group, ["loss"]))


def build_metric_table(found: Comparisons, group: pd.DataFrame, *, of: str = "setting") -> Table:
    """Return all metrics of one group with their intervals, teachers first; shares in percent.

    of: whether the group's rows are settings, of which the clearly best are bold, or a "run" each, with its baseline.
    """
    columns = [column for column in (*_METRICS, *_SHARES) if group[column.key].notna().any()]
    if of == "run":
        return Table(group, [*columns, *_OF_RUN], of, bold=_find_bold(found, group, []))
    shown = [column.key for column in columns if column.key in METRICS]
    return Table(_with_teachers(group), columns, bold=_find_bold(found, group, shown))


def build_breakdowns(found: Comparisons, group: pd.DataFrame) -> list[Table]:
    """Return a table for each partition of the positions: the loss of each setting, and its KL below, by class."""
    rows: list[dict[str, Any]] = [
        {"setting": setting, "kind": kind, "class": row.name}
        | {"positions": row.positions, "documents": row.documents}
        | {metric: estimate.value for metric, estimate in row.metrics.items()}
        for name, setting in found.runs.setting.items()
        if setting in group.index
        for kind, classes in found.results.metrics[name].scores.breakdown.items()
        for row in classes
    ]
    if not rows:
        return []
    long = pd.DataFrame(rows)
    long = long.reindex(columns=long.columns.union(["teacher_loss", "kl_to_teacher"], sort=False))
    return [
        _build_breakdown(long[long.kind == kind], list(group.index), title)
        for kind, title in _CLASSES.items()
        if (long.kind == kind).any()
    ]


def _build_breakdown(long: pd.DataFrame, settings: list[str], title: str) -> Table:
    frame = long.groupby("class", sort=False).first()  # of the values that are defined
    means = long.groupby(["class", "setting"])[["loss", "kl_to_teacher"]].mean().unstack()
    documents = frame.documents.map("{:,.0f} document".format)
    frame["documents"] = documents.where(frame.documents == 1, documents + "s")
    columns = [Column("positions", "positions", ",.0f", note="documents")]
    if frame.teacher_loss.notna().any():
        columns.append(Column("teacher_loss", "teacher", ".3f"))
    for number, setting in enumerate(settings):
        loss, kl = f"loss {number}", f"kl {number}"
        frame[loss] = means["loss"].get(setting)
        known = means["kl_to_teacher"].get(setting)
        frame[kl] = None if known is None else known.map("KL {:.3f}".format, na_action="ignore")
        columns.append(Column(loss, setting, ".3f", note=kl))
    return Table(frame, columns, "class", title)


def build_task_table(board: pd.DataFrame) -> Table:
    """Return the table of every model's score in every task, with its interval."""
    values = {"value": "", "value_low": "_low", "value_high": "_high"}
    frame = board.pivot(index="model", columns="metric", values=list(values))
    frame.columns = [f"{metric}{values[value]}" for value, metric in frame.columns]
    models = board.drop_duplicates("model").set_index("model")
    columns = [Column(m, m, ",.3f", interval="below") for m in board.sort_index().metric.unique()]
    return Table(models[["is_teacher"]].join(frame), columns, "model")


def build_cache_table(caches: pd.DataFrame) -> Table:
    """Return the table of the caches that runs learned from: size and quality."""
    return Table(caches, _CACHE, "runs")


def build_provenance_table(runs: pd.DataFrame) -> Table:
    """Return the table of the runs' ids, lengths of training, devices and folders."""
    return Table(runs, _PROVENANCE, "run")


def describe_settings(found: Comparisons) -> tuple[dict[str, str], Table]:
    """Return what all runs share, by name, and a table of what differs: settings, code, packages and device.

    Keys of the config that all runs share are left out.
    """
    rows = []
    for name, run in found.runs.iterrows():
        row = {key: f"{run[key]:,}" for key in ("steps", "trained_positions", "student_parameters")}
        row |= {"device": run.device}
        if made := found.results.metrics[name].trained:
            of_code = ("source", "commit", "uncommitted_changes", "dtype", "python")
            row |= {k: getattr(made, k) for k in of_code} | made.versions
            row |= read_config(found.results.metrics[name])
        rows.append({k.replace("_", " ") if "." not in k else k: v for k, v in row.items()})
    facts = pd.DataFrame(rows, index=found.runs.index, dtype=object)
    facts = found.learning.join(facts[facts.columns.difference(found.learning.columns, sort=False)])
    # A key that some runs do not use differs if it does between those that use it.
    used = facts.mask(facts.isna() | (facts == "-")).map(str, na_action="ignore")
    differing = used.loc[:, used.nunique() > 1]
    shared = used.drop(columns=differing.columns).bfill().iloc[0].dropna()
    shared = shared[[k in found.learning or "." not in k for k in shared.index]]
    return dict(shared), Table(differing, [Column(k, k) for k in differing], "run")


def render_table(table: Table, width: int) -> list[str]:
    """Return a table as lines of at most `width` characters: wrapped names, and fewer columns."""
    cells = [[name, *(cell.text for cell in cells)] for name, _, cells in table.rows]
    frame = pd.DataFrame(cells, columns=["setting", *(c.short for c in table.columns)])
    longest = max(map(len, frame.setting))
    for head in ("", *_OPTIONAL):
        frame = frame.drop(columns=head) if head else frame
        rest = frame.drop(columns="setting").to_string(index=False).partition("\n")[0]
        room = width - len(rest) - 2
        if room >= min(longest, _NAME_ROOM):
            break
    parts = [textwrap.wrap(name, max(room, 8), subsequent_indent="  ") for name in frame.setting]
    room = max(len(part) for lines in parts for part in lines)
    frame = frame.assign(setting=parts).explode("setting")
    frame.loc[frame.index.duplicated(), frame.columns[1:]] = ""
    for head in {"setting", "type"} & set(frame.columns):  # left-aligned
        size = room if head == "setting" else 6
        frame[head] = frame[head].str.ljust(size)
        frame = frame.rename(columns={head: head.ljust(size)})
    lines = [line.rstrip() for line in frame.to_string(index=False).splitlines()]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
