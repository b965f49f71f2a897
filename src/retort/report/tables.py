"""Tables of the summary and the page: rows of a data frame, and the columns that `columns.yaml` declares.

What is not defined is a dash.
"""

import textwrap
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml

from retort.evaluation.formatting import format_number, format_signed, name_metric
from retort.evaluation.scores import MAX_PERPLEXITY, METRICS
from retort.io.units import format_duration
from retort.report.comparisons import Comparisons, find_best, is_gain, read_config
from retort.report.runs import ENDS, find_teachers, get_estimate
from retort.report.starts import list_starts
from retort.report.templates import write_kl

NO_BASELINE = "no match"
_NAME_ROOM = 24  # characters of a terminal's line


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


_WRITERS: dict[str, Callable[[float], str]]
_WRITERS = {"signed": format_signed, "kl": write_kl, "size": _write_size}
_WRITERS |= {"perplexity": _write_perplexity, "duration": format_duration}


class Cell(NamedTuple):
    """A cell: its text, a smaller text below it, what it is sorted by, and whether it stands out."""

    text: str
    below: str = ""
    key: str = ""
    is_bold: bool = False


@dataclass(frozen=True)
class Column:
    """How a column of a frame is shown: its head, in a terminal `short`, else its key.

    write: one of `_WRITERS` or a format, of shares in percent such as .1%; "" for texts. is_beside: a brief table shows
    the interval of its number. rank: the order in which a narrow terminal leaves columns out; never those of 0.
    note: the column of the frame with a text that is shown below. term, meaning: what the page explains, in HTML.
    """

    key: str
    head: str = ""
    write: str = ""
    short: str = ""
    rank: int = 0
    is_beside: bool = False
    note: str = ""
    term: str = ""
    meaning: str = ""

    def make_cell(self, row: pd.Series, *, is_brief: bool = False, is_bold: bool = False) -> Cell:
        """Return the cell of a row; its interval is below it, or, if brief, beside it or nowhere."""
        value, low, high = (row.get(f"{self.key}{end}", np.nan) for end in ENDS)
        if pd.isna(value):
            return Cell("-")
        if isinstance(value, str):
            return Cell(value, key="" if self.write else value)
        text, below = self._write(value), row.get(self.note)
        if pd.notna(low) and not is_brief:
            below = f"{self._write(low)} to {self._write(high)}"
        elif pd.notna(low) and self.is_beside:
            text += f"\N{PLUS-MINUS SIGN}{max(high - value, value - low):.3f}"
        return Cell(text, "" if pd.isna(below) else below, repr(float(value)), is_bold)

    def _write(self, value: float) -> str:
        if writer := _WRITERS.get(self.write):
            return writer(float(value))
        return format(float(value), self.write).rstrip("%")


def _declare() -> tuple[list[Column], dict[str, list[Column]], dict[str, str]]:
    """Read the columns, those of each table by its name, and the titles of the tables by class."""
    text = resources.files("retort.report").joinpath("columns.yaml").read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    known = {key: {"head": key, "key": key} | about for key, about in content["columns"].items()}
    tables = {}
    for name, entries in content["tables"].items():
        given = [entry if isinstance(entry, dict) else {"key": entry} for entry in entries]
        tables[name] = [Column(**({"head": g["key"]} | known.get(g["key"], {}) | g)) for g in given]
    return [Column(**about) for about in known.values()], tables, content["classes"]


COLUMNS, TABLES, _CLASSES = _declare()


@dataclass(frozen=True)
class Table:
    """The rows of a frame by name, and the columns that are shown of them; `is_teacher` in the frame marks teachers.

    names: the head of the rows' names. bold: the cells that stand out, by row and key. is_brief: see `Column`.
    """

    frame: pd.DataFrame
    columns: Sequence[Column]
    names: str = "setting"
    title: str = ""
    bold: Collection[tuple[str | None, str]] = ()
    is_brief: bool = False

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
                [self._fill(c, row) for c in self.columns],
            )
            for name, row in self.frame.iterrows()
        ]

    def _fill(self, column: Column, row: pd.Series) -> Cell:
        return column.make_cell(
            row, is_brief=self.is_brief, is_bold=(row.name, column.key) in self.bold
        )


def _with_teachers(group: pd.DataFrame) -> pd.DataFrame:
    teachers = find_teachers(group).assign(is_teacher=True)
    return pd.concat([teachers, group.assign(is_teacher=False)])


def _find_bold(
    found: Comparisons, group: pd.DataFrame, metrics: Sequence[str]
) -> set[tuple[str | None, str]]:
    """Return the cells of clear gains, and those of the settings that are clearly best."""
    gains = {n for n, row in group.iterrows() if is_gain(get_estimate(row, "margin"))}
    best = {(find_best(found, group, metric), metric) for metric in metrics}
    return best | {(name, "margin") for name in gains}


def build_main_table(found: Comparisons, group: pd.DataFrame) -> Table:
    """Return the main table of one group of settings: its teachers, then the settings."""
    is_distilled = group.distillation_type != "output"
    is_lacking = is_distilled & group.margin.isna()
    frame = group.assign(
        temperature=group.temperature.where(is_distilled),
        margin=group.margin.astype(object).mask(is_lacking, NO_BASELINE),
        trained=[_describe_trained(row) for _, row in group.iterrows()],
    )
    known = group.columns[group.notna().any()]
    columns = [c for c in TABLES["main"] if c.key != "distance_closed" or c.key in known]
    bold = _find_bold(found, group, ["loss"])
    return Table(_with_teachers(frame), columns, bold=bold, is_brief=True)


def _describe_trained(row: pd.Series) -> str | None:
    """Return which of a student's parameters are trained, None where all are."""
    trained, rank = row.trained_parameters, row.lora_rank
    size = None if pd.isna(trained) else _write_size(trained)
    if pd.notna(rank):
        return f"LoRA rank {rank}" + (f": {size}" if size else "")
    return f"{size} trained" if size and trained != row.student_parameters else None


def build_metric_table(found: Comparisons, group: pd.DataFrame, *, of: str = "setting") -> Table:
    """Return all metrics of one group with their intervals, teachers first; shares in percent.

    of: whether the group's rows are settings, of which the clearly best are bold, or a "run" each, with its baseline.
    """
    columns = [
        replace(column, head=name_metric(column.key)) if column.key in METRICS else column
        for column in TABLES["metrics"]
        if group[column.key].notna().any()
    ]
    if of == "run":
        bold = _find_bold(found, group, [])
        return Table(group, [*columns, *TABLES["runs"]], of, bold=bold)
    shown = [column.key for column in columns if column.key in METRICS]
    return Table(_with_teachers(group), columns, bold=_find_bold(found, group, shown))


def build_breakdowns(found: Comparisons, group: pd.DataFrame) -> list[Table]:
    """Return a table for each partition of the positions: the loss of each setting, and its KL below, by class."""
    rows: list[dict[str, Any]] = [
        {"setting": setting, "kind": kind, "class": row.name, "teacher_loss": np.nan}
        | {"kl_to_teacher": np.nan, "positions": row.positions, "documents": row.documents}
        | {metric: estimate.value for metric, estimate in row.metrics.items()}
        for name, setting in found.runs.setting.items()
        if setting in group.index
        for kind, classes in found.results.metrics[name].scores.breakdown.items()
        for row in classes
    ]
    kinds = dict(list(pd.DataFrame(rows).groupby("kind"))) if rows else {}
    return [
        _build_breakdown(kinds[kind], list(group.index), title)
        for kind, title in _CLASSES.items()
        if kind in kinds
    ]


def _build_breakdown(long: pd.DataFrame, settings: list[str], title: str) -> Table:
    frame = long.groupby("class", sort=False).first()  # of the values that are defined
    means = long.groupby(["class", "setting"])[["loss", "kl_to_teacher"]].mean().unstack()
    frame["documents"] = frame.documents.map("{:,.0f} documents".format)
    frame["documents"] = frame.documents.replace("1 documents", "1 document")
    columns = [Column("positions", "positions", ",.0f", note="documents")]
    if frame.teacher_loss.notna().any():
        columns.append(Column("teacher_loss", "teacher", ".3f"))
    for number, setting in enumerate(settings):
        if setting in means.loss:
            frame[f"loss {number}"] = means.loss[setting]
            kl = means.kl_to_teacher[setting]
            frame[f"kl {number}"] = kl.map("KL {:.3f}".format, na_action="ignore")
        columns.append(Column(f"loss {number}", setting, ".3f", note=f"kl {number}"))
    return Table(frame, columns, "class", title)


def build_task_table(board: pd.DataFrame) -> Table:
    """Return the table of every model's score in every task, with its interval."""
    values = {"value": "", "value_low": "_low", "value_high": "_high"}
    frame = board.pivot(index="model", columns="metric", values=list(values))
    frame.columns = [f"{metric}{values[value]}" for value, metric in frame.columns]
    models = board.drop_duplicates("model").set_index("model")
    columns = [Column(m, m, ",.3f") for m in board.sort_index().metric.unique()]
    return Table(models[["is_teacher"]].join(frame), columns, "model")


def describe_settings(found: Comparisons) -> tuple[dict[str, str], Table]:
    """Return what all runs share, by name, and a table of what differs: settings, code, packages and device.

    Keys of the config that all runs share are left out.
    """
    counts = ["steps", "trained_positions", "student_parameters"]
    rows = []
    for name, metrics in found.results.metrics.items():
        row = {"device": found.runs.device[name]}
        if made := metrics.trained:
            of_code = ("source", "commit", "uncommitted_changes", "dtype", "python")
            row |= {k: getattr(made, k) for k in of_code} | made.versions | read_config(metrics)
        rows.append({k if "." in k else k.replace("_", " "): v for k, v in row.items()})
    facts = found.runs[counts].map("{:,}".format).rename(columns=lambda key: key.replace("_", " "))
    facts = facts.join(pd.DataFrame(rows, index=facts.index, dtype=object)).join(list_starts(found))
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
    optional = sorted((c for c in table.columns if c.rank), key=lambda c: c.rank)
    for head in ("", *(column.short for column in optional)):
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
