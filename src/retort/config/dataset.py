"""The section `dataset`: the corpus, and how its documents become sequences."""

import re
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from retort.config.schema import Found, show
from retort.config.section import (
    Count,
    Positive,
    Section,
    Seed,
    Text,
    Texts,
    is_default,
    setting,
)

if TYPE_CHECKING:
    from retort.config.sections import Config


LOADERS = ("text", "json", "parquet", "csv")
SYNTHESIS = "synthesis"  # the name of a corpus that a model writes


class TextSource(Section):
    """Where text is, and in which columns."""

    name: Text = setting("demo", is_model=True)
    """A Hub id such as wikitext, a loader (text, json, parquet or csv) used with data_files, demo (text found on this
    machine, no download), or synthesis (responses that a model writes to your prompts)."""
    config_name: Text | None = None
    """The configuration of a Hub dataset, such as wikitext-103-raw-v1."""
    split: Text = "train"
    """The split to train on."""
    data_files: Text | Texts | None = setting(None, is_path=True)
    """Path or glob, or a list of them, of local files for the loaders text, json, parquet and csv. Ids depend on their
    content, not on their paths."""
    text_column: Text = "text"
    """The column with a document's text."""
    prompt_column: Text | None = None
    """Column of the prompts, set together with response_column instead of text_column. Only the response has a loss;
    the tokenizer's chat template is used if it has one."""
    response_column: Text | None = None
    """Column of the responses; see prompt_column."""
    messages_column: Text | None = None
    """Column of chats, lists of messages with role and content (or from and value). Columns messages and conversations,
    and lists in prompt and completion, are found without it if there is no column text."""
    system_column: Text | None = None
    """Column of a system prompt, put before chats that have none, and before prompts."""
    category_column: Text | None = "category"
    """Column for breakdowns by category, if present; null ignores it."""
    language_column: Text | None = "language"
    """Column for breakdowns by language, if present; null ignores it."""
    revision: Text | None = None
    """Commit, tag or branch of the Hub dataset; null means its newest."""
    validation_split: Text | None = None
    """A split of a Hub dataset to evaluate on, instead of holding out validation_fraction."""
    validation_files: Text | Texts | None = setting(None, is_path=True)
    """Path or glob, or a list of them, of local files to evaluate on, instead of holding out validation_fraction; read
    as data_files are."""


class MixedSource(TextSource):
    """One source of a mixture: local files or a dataset on the Hub, with the keys of the section dataset for one."""

    weight: Positive = 1.0
    """Its share of the documents to train on is its weight, divided by the sum of all weights."""
    label: Text | None = None
    """Its name in counts and in the report; null means the Hub id, or the name of the first of its data_files."""

    @property
    def title(self) -> str:
        """Its name in counts and in the report."""
        files = (self.data_files,) if isinstance(self.data_files, str) else self.data_files
        local = Path(files[0]).name if files and self.name in LOADERS else self.name
        return self.label or local


class Dataset(TextSource):
    """The corpus, and how its documents are split into sequences of tokens."""

    mix: tuple[MixedSource, ...] = ()
    """A list of sources that are mixed into one corpus, instead of one: each has a weight, and the keys of the section
    that say where text is and in which columns."""
    stopping_strategy: Literal[
        "first_exhausted", "all_exhausted", "all_exhausted_without_replacement"
    ] = "first_exhausted"
    """When a mixture ends, as in datasets.interleave_datasets: with its first source that ends; once all have ended,
    while those that end are repeated; or the same, each document once."""
    supervised_turns: Literal["all", "last"] = "all"
    """Which of the assistant's turns in a chat have a loss: all, or the last."""
    chat_date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")] = setting(
        "2026-01-01", accepts="a date such as 2026-01-01"
    )
    """The date that chat templates print where they print today's, so that tokens are the same on every day."""
    tokenizer: Text | None = setting(None, is_model=True)
    """Hub id or folder of the tokenizer. null means the teacher's; required without a teacher."""
    control_tokens: Literal["text", "tokens"] = "text"
    """What control tokens written out in a document are, such as <|im_start|>: text like any other, or the tokens
    themselves (for documents that were rendered by a chat template before)."""
    append_eos: bool = True
    """End every document with the tokenizer's end-of-text token; a chat, if the chat template ends it with nothing."""
    streaming: bool = False
    """Read the dataset as a stream in bounded memory, without downloading all of it. Requires max_samples."""
    max_samples: Count | None = None
    """Use only this many documents, the first ones; null means all."""
    max_length: Annotated[int, Field(ge=2)] = 2048
    """Tokens in one sequence, for teacher and student alike."""
    long_documents: Literal["split", "truncate"] = "split"
    """A document longer than max_length becomes consecutive sequences (split), or its end is dropped and counted
    (truncate). The sequences of a long response each begin with the end of its prompt."""
    shuffle: bool = False
    """Shuffle documents (by seed); false keeps the source's order."""
    streaming_buffer_size: Count = 10000
    """Documents in a window of a stream, which is held in memory and shuffled by itself; used only with shuffle."""
    streaming_chunk_size: Count = 1000
    """Documents in one part, the unit of resumable teacher work: an interrupted worker loses at most one."""
    num_proc: Count = setting(4, changes_id=False)
    """Processes that read and tokenize the corpus."""
    num_shards: Count = 8
    """Slices of the corpus that are tokenized independently."""
    sharding: Annotated[
        str,
        Field(
            pattern=r"^(interleaved|contiguous|files|[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*)$"
        ),
    ] = setting("interleaved", accepts="interleaved, contiguous, files or module:function")
    """How documents are assigned to shards. interleaved puts document i into shard i mod num_shards; contiguous divides
    a corpus of known size into runs; files assigns whole source files, which are read in parallel; module:function is
    your own function(document_index, num_shards) -> shard, imported from the folder in which snakemake is started."""
    seed: Seed = 0
    """Seed of the shuffle and of the choice of held-out documents."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Fraction of the documents that is held out: never trained on, never in the training cache. 0 requires
    validation_split or validation_files."""

    @property
    def sources(self) -> tuple["Dataset", ...]:
        """The section of each source of a mixture, or this one alone."""
        if not self.mix:
            return (self,)
        found = [{k: getattr(source, k) for k in TextSource.model_fields} for source in self.mix]
        return tuple(self.model_copy(update={**keys, "mix": ()}) for keys in found)

    @property
    def labels(self) -> tuple[str | None, ...]:
        """The label of each source of a mixture; None for a corpus that is none."""
        return tuple(source.title for source in self.mix) or (None,)

    @property
    def title(self) -> str:
        """Its name, or the labels of its sources."""
        return " + ".join(source.title for source in self.mix) or self.name


def check_streaming(c: "Config") -> Found:
    if c.dataset.streaming and c.dataset.max_samples is None:
        yield (
            "dataset.streaming is true and dataset.max_samples is null, so the stream and the teacher's work would "
            "never end. Set dataset.max_samples to the number of documents to use, for instance 100000."
        )
    if c.dataset.streaming and c.dataset.sharding == "contiguous":
        yield (
            "dataset.sharding is contiguous and dataset.streaming is true, but a stream has no known size to divide. "
            "Use dataset.sharding: interleaved, or dataset.streaming: false."
        )


def check_sharding_by_files(c: "Config") -> Found:
    """Refuse sharding by files for a dataset that is not a list of files."""
    name = c.dataset.name
    if c.dataset.sharding != "files" or c.dataset.mix or name in (*LOADERS, SYNTHESIS):
        return
    if name == "demo":
        yield (
            "dataset.sharding is files, but dataset.name is 'demo', which is not a list of files. Use "
            "dataset.sharding: interleaved."
        )
    elif not c.dataset.streaming:
        yield (
            f"dataset.sharding is files and dataset.name is {show(name)}, a Hub dataset that is downloaded "
            "(dataset.streaming is false) and has no files any more. Set dataset.streaming: true, or use "
            "dataset.sharding: interleaved."
        )


def _check_files(c: "Config") -> Found:
    name, files = c.dataset.name, c.dataset.data_files
    if name in LOADERS and files is None:
        yield (
            f"dataset.name is {show(name)}, a loader of local files, but dataset.data_files is "
            "null. Set dataset.data_files to a path or glob, for instance data/train.jsonl."
        )
    if name == "demo" and files is not None:
        yield (
            f"dataset.data_files is {show(files)}, but dataset.name is 'demo', which reads no local files. Set "
            f"dataset.name to the loader of your files: one of {', '.join(LOADERS)}."
        )


def _check_columns(c: "Config") -> Found:
    prompt, response = c.dataset.prompt_column, c.dataset.response_column
    if (prompt is None) != (response is None):
        given, missing = ("prompt", "response") if response is None else ("response", "prompt")
        yield (
            f"dataset.{given}_column is {show(prompt or response)}, but dataset.{missing}_column is null; the two go "
            f"together. Set dataset.{missing}_column too, or use dataset.text_column alone for plain text."
        )
    elif prompt is not None and c.dataset.text_column != Dataset().text_column:
        yield (
            f"dataset.text_column is {show(c.dataset.text_column)} and dataset.prompt_column is {show(prompt)}: a "
            "document is either text, or prompt and response. Remove one of the two."
        )
    messages, text = c.dataset.messages_column, c.dataset.text_column
    other = "prompt_column" if prompt is not None else "text_column"
    if messages is not None and (prompt is not None or text != Dataset().text_column):
        yield (
            f"dataset.messages_column is {show(messages)} and dataset.{other} is {show(prompt or text)}: a document "
            "is a chat, or text, or prompt and response. Remove one of the two."
        )
    if messages is not None and c.dataset.name == SYNTHESIS:
        yield (
            f"dataset.messages_column is {show(messages)}, but dataset.name is 'synthesis', whose responses have no "
            "such column. Remove it."
        )


def check_chat_date(c: "Config") -> Found:
    try:
        date.fromisoformat(c.dataset.chat_date)
    except ValueError:
        yield (
            f"dataset.chat_date is {show(c.dataset.chat_date)}, which is no date: write year-month-day, for instance "
            "2026-01-01."
        )


def check_held_out(c: "Config") -> Found:
    fraction = c.dataset.validation_fraction
    named = [s.validation_split or s.validation_files for s in c.dataset.sources]
    if fraction == 0 and not any(named):
        yield (
            "dataset.validation_fraction is 0, and neither dataset.validation_split nor dataset.validation_files "
            "is set, so no documents would be held out to evaluate students on. Set dataset.validation_fraction "
            "above 0, for instance 0.01, or name what to hold out."
        )
    if all(named) and fraction not in (0, Dataset().validation_fraction):
        key = "validation_split" if c.dataset.sources[0].validation_split else "validation_files"
        where = "dataset.mix[0]" if c.dataset.mix else "dataset"
        yield (
            f"dataset.validation_fraction is {show(fraction)} and {where}.{key} is {show(named[0])}, but only one of "
            f"them can set what is held out. Remove dataset.validation_fraction to use {where}.{key}, or {where}.{key} "
            "to use the fraction."
        )


def _check_validation(c: "Config") -> Found:
    split, files = c.dataset.validation_split, c.dataset.validation_files
    if split == c.dataset.split:
        yield (
            f"dataset.validation_split is {show(split)}, the same as dataset.split: students would be evaluated on "
            "their training data. Name another split, or set dataset.validation_split: null to hold out "
            "dataset.validation_fraction of the documents."
        )
    if files is not None and c.dataset.name not in LOADERS:
        is_hub = c.dataset.name not in ("demo", SYNTHESIS)
        of_hub = ", or name a dataset.validation_split" if is_hub else ""
        yield (
            f"dataset.validation_files is {show(files)}, but dataset.name is {show(c.dataset.name)}, and they are read "
            f"by the loaders of local files ({', '.join(LOADERS)}). Remove it{of_hub}."
        )


def check_mixture(c: "Config") -> Found:
    mix = c.dataset.mix
    if not mix:
        if c.dataset.stopping_strategy != Dataset().stopping_strategy:
            yield (
                f"dataset.stopping_strategy is {c.dataset.stopping_strategy}, but dataset.mix has no sources to mix. "
                "Remove it, or list them."
            )
        return
    for key in TextSource.model_fields:
        if not is_default(c.dataset, key):
            yield (
                f"dataset.{key} is {show(getattr(c.dataset, key))}, but dataset.mix lists sources, each with its own "
                "keys. Move it to the source that it is of."
            )
    if c.dataset.sharding == "files":
        yield (
            "dataset.sharding is files, but a mixture (dataset.mix) is one order of the documents of all sources. "
            "Use dataset.sharding: interleaved."
        )
    for number, source in enumerate(mix):
        here = f"dataset.mix[{number}]"
        if source.name in ("demo", SYNTHESIS) and source.data_files is None:
            of = "responses.jsonl of a finished synthesis" if source.name == SYNTHESIS else "files"
            yield (
                f"{here}.name is {show(source.name)}, which cannot be mixed. Name a Hub id, or a loader "
                f"({', '.join(LOADERS)}) and, as {here}.data_files, your {of}."
            )
        first = c.dataset.labels.index(source.title)
        if first < number:
            yield (
                f"{here}.label is {show(source.title)}, and so is that of dataset.mix[{first}], so their documents "
                f"could not be told apart. Set {here}.label to another name."
            )


def check_sources(c: "Config") -> Found:
    """Check what each source of a mixture is by itself, or the corpus that is none."""
    for number, source in enumerate(c.dataset.sources):
        alone = c.model_copy(update={"dataset": source})
        for check in (_check_files, _check_columns, _check_validation):
            for message in check(alone):
                yield name_source(message, number) if c.dataset.mix else message


def name_source(message: str, number: int) -> str:
    """Return a message about the section `dataset` of a source as one about that source in the list."""
    keys = "|".join(TextSource.model_fields)
    return re.sub(rf"\bdataset\.(?=({keys})\b)", f"dataset.mix[{number}].", message)
