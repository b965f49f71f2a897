"""Datasets on the Hub, through `datasets`: opened, streamed file by file, and read with patience.

A stream that drops or stalls is opened again where it stood, after a pause that doubles from try to try. A stall is a
connection on which no byte comes for a minute. `datasets` is imported only where a dataset is opened.
"""

import inspect
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import tenacity

from retort.cli import first_line
from retort.config.sections import Dataset
from retort.corpus.readers import LOADERS, Row, choose_columns, require

logger = logging.getLogger(__name__)

T = TypeVar("T")

# 2 + 4 + 8 + 16 + 32 + 60 s, and up to a quarter more by chance, so that readers do not come back all at once.
RETRIES = 6
FIRST_WAIT_S = 2.0
LONGEST_WAIT_S = 60.0
LONGEST_WAIT_ASKED_S = 600.0  # what a server may ask for by Retry-After
STALL_S = 60

_PASSING_STATUS = (408, 429, 500, 502, 503, 504)
# Where the exceptions of HTTP clients come from; they share no base class.
_CLIENTS = ("httpx", "httpx2", "httpcore", "httpcore2", "aiohttp", "requests", "urllib3")
_END = object()


def open_table(dataset: Dataset, split: str) -> Any:
    """Return one split, downloaded, as an indexable table; raises a one-sentence ValueError if it cannot."""
    try:
        table = _load(dataset, split)
    except Exception as error:  # whatever a cache, a reader or the HTTP client raises
        raise explain_hub_error(dataset, error) from error
    return _select_columns(table, dataset, split)


def open_stream(dataset: Dataset, split: str) -> tuple[int, Callable[[int, int], Iterator[Row]]]:
    """Return a stream's number of files, and a function (file, row) -> the file's rows from that one on.

    Raises a one-sentence ValueError, at once or while rows are read, for what patience does not mend.
    """
    columns = choose_columns(dataset)
    where = f"{dataset.name}, split {split!r}"
    table = _patiently(partial(_load, dataset, split), dataset, where="the list of files")
    table = _select_columns(table, dataset, split)

    def read(file: int, row: int) -> Iterator[Row]:
        name = f"file {file + 1} of {table.num_shards}"

        def open_at(place: int) -> Iterator[Any]:
            return iter(table.shard(table.num_shards, file).skip(place))

        for number, values in enumerate(keep_reading(open_at, row, dataset, where=name)):
            if number == 0:
                require(columns, values, where=where)
            yield partial(dict, values)

    return table.num_shards, read


def pin(dataset: Dataset) -> Dataset:
    """Return the section with the commit that `revision` stands for now, so that all of a draw reads one version.

    A folder that is laid out as a Hub dataset has no commits: its section is returned as it is.
    """
    if Path(dataset.name).is_dir():
        return dataset
    from huggingface_hub import HfApi

    api = HfApi()
    found = _patiently(
        lambda: api.dataset_info(dataset.name, revision=dataset.revision).sha,
        dataset,
        where="its name",
    )
    return replace(dataset, revision=found)


def keep_reading(
    open_at: Callable[[int], Iterator[T]], start: int, dataset: Dataset, *, where: str
) -> Iterator[T]:
    """Yield what `open_at(start)` yields; after a drop go on with `open_at` of the place that was reached."""
    place = start
    rows: Iterator[T] | None = None

    def advance() -> T | object:
        nonlocal rows
        try:
            rows = open_at(place) if rows is None else rows
            return next(rows, _END)
        except Exception:
            rows = None
            raise

    retrying = _retrying(lambda: f"row {place:,} of {where}")
    while True:
        try:
            value = retrying(advance)
        except Exception as error:  # whatever the HTTP client or a file format's reader raises
            raise explain_hub_error(dataset, error) from error
        if value is _END:
            return
        place += 1
        yield value  # type: ignore[misc]


@contextmanager
def impatiently() -> Iterator[None]:
    """Give up at the first drop: for a look at what may as well be read from a copy on this machine."""
    global RETRIES
    patience, RETRIES = RETRIES, 0
    try:
        yield
    finally:
        RETRIES = patience


def _patiently(action: Callable[[], T], dataset: Dataset, *, where: str) -> T:
    """Return what `action` returns, trying again after a drop; raises ValueError in one sentence."""
    try:
        return _retrying(lambda: where)(action)
    except Exception as error:
        raise explain_hub_error(dataset, error) from error


def _retrying(where: Callable[[], str]) -> tenacity.Retrying:
    def announce(state: tenacity.RetryCallState) -> None:
        assert state.outcome is not None and state.next_action is not None
        outcome = state.outcome.exception()
        assert outcome is not None
        error = _chain(outcome)[-1]
        logger.warning(
            f"the stream dropped at {where()} ({type(error).__name__}: {first_line(error)}): trying again in "
            f"{state.next_action.sleep:.0f} s, {state.attempt_number} of {RETRIES}"
        )

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_drop),
        stop=tenacity.stop_after_attempt(RETRIES + 1),
        wait=_choose_wait,
        before_sleep=announce,
        reraise=True,
    )


def _choose_wait(state: tenacity.RetryCallState) -> float:
    """Return the seconds to wait: twice as long each time, and at least what the server asked for."""
    assert state.outcome is not None
    grown = tenacity.wait_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S)(state)
    wait = grown + tenacity.wait_random(0, grown / 4)(state)
    error = state.outcome.exception()
    asked = [
        float(response.headers["retry-after"])
        for found in (_chain(error) if error else [])
        if (response := getattr(found, "response", None)) is not None
        and str(response.headers.get("retry-after", "")).isdigit()
    ]
    return max([wait, *(min(seconds, LONGEST_WAIT_ASKED_S) for seconds in asked)])


def is_drop(error: BaseException) -> bool:
    """Say whether an error is of the connection or a busy server, which may be over in a minute.

    A refused login, a dataset that is not there and `HF_HUB_OFFLINE` are none.
    """
    chain = _chain(error)
    statuses = [
        response.status_code
        for found in chain
        if (response := getattr(found, "response", None)) is not None
    ]
    if statuses:
        return all(status in _PASSING_STATUS for status in statuses)
    if any("OfflineMode" in type(found).__name__ + str(found) for found in chain):
        return False
    return any(
        isinstance(found, ConnectionError | TimeoutError)
        or type(found).__module__.partition(".")[0] in _CLIENTS
        for found in chain
    )


def _chain(error: BaseException) -> list[BaseException]:
    """Return an exception and what it was raised from, outermost first."""
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__ or (
            None if current.__suppress_context__ else current.__context__
        )
    return found


def _load(dataset: Dataset, split: str) -> Any:
    import datasets

    _leave_waiting_to_us(dataset.streaming)
    files = dataset.data_files
    return datasets.load_dataset(
        dataset.name,
        dataset.config_name,
        data_files=files if files is None or isinstance(files, str) else list(files),
        split=split,
        revision=dataset.revision,
        streaming=dataset.streaming,
        num_proc=None if dataset.streaming else dataset.num_proc,
    )


def _select_columns(table: Any, dataset: Dataset, split: str) -> Any:
    if table.column_names is None:  # of a stream, sometimes known with the first row only
        return table
    columns = choose_columns(dataset)
    require(columns, table.column_names, where=f"{dataset.name}, split {split!r}")
    return table.select_columns([c for c in columns.both if c in table.column_names])


def _leave_waiting_to_us(is_stream: bool) -> None:
    """Keep a stream's clients from waiting on their own: 20 times 5 to 60 s in `datasets`, unsaid in our lines."""
    import datasets
    from huggingface_hub import constants
    from huggingface_hub.utils._http import http_backoff, http_stream_backoff

    if not is_stream:
        return
    for client in ("datasets", "huggingface_hub"):
        logging.getLogger(client).setLevel(
            logging.ERROR
        )  # our lines say of each drop what they would
    for action in ("READ", "OPEN"):
        setattr(datasets.config, f"STREAMING_{action}_MAX_RETRIES", 1)
    for kind in ("READ", "READ_SERVER_UNAVAILABLE", "READ_RATE_LIMIT", "OPEN"):
        setattr(datasets.config, f"STREAMING_{kind}_RETRY_INTERVAL", 0)
    for request in (http_backoff, http_stream_backoff):
        inspect.unwrap(request).__kwdefaults__["max_retries"] = 0
    if "HF_HUB_DOWNLOAD_TIMEOUT" not in os.environ:
        constants.HF_HUB_DOWNLOAD_TIMEOUT = STALL_S


def explain_hub_error(dataset: Dataset, error: BaseException) -> ValueError:
    """Return a sentence that says if it is the network, the login or the name, and what to do."""
    said = str(error).strip().partition("\n")[0]
    if re.search(r"\b(gated|authenticated|401|403)\b", said):
        advice = (
            "is gated or private: accept its terms at "
            f"https://huggingface.co/datasets/{dataset.name}, then type `hf auth login` (or set "
            "HF_TOKEN)"
        )
    elif is_drop(error) or isinstance(error, ConnectionError) or "Couldn't reach" in said:
        advice = (
            "could not be reached: check the network (and HF_HUB_OFFLINE, HTTPS_PROXY), or "
            "download the dataset where there is one (`hf download --repo-type dataset "
            f"{dataset.name}`)"
        )
        if dataset.streaming:
            advice += "; what was drawn is kept, and the same command goes on from there"
    elif isinstance(error, FileNotFoundError):
        advice = (
            "was not found on the Hub nor as a folder here: check its spelling; local files are "
            f"read by {', '.join(LOADERS)} with dataset.data_files; a private dataset needs `hf "
            "auth login`"
        )
    else:
        advice = "could not be opened: check dataset.config_name, split, revision and data_files"
    cause = _chain(error)[-1] if is_drop(error) else error
    found = f"{type(cause).__name__}: {first_line(cause)}"
    return ValueError(f"dataset.name {dataset.name!r} {advice}. Found: {found}")
