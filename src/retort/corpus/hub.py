"""Datasets on the Hub, through `datasets`: downloaded, or streamed file by file with retries.

After a connection error or a minute without data, a stream is reopened at the same row, with exponential backoff.
`datasets` is imported only when a dataset is opened.
"""

import inspect
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import tenacity

from retort.cli import first_line
from retort.config.sections import Dataset
from retort.corpus.readers import LOADERS, Row, choose_columns, require_columns

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Waits of 2, 4, 8, 16, 32 and 60 s, plus random jitter of up to 25 %, so that readers do not retry all at once.
_max_retries = ContextVar("max_retries", default=6)
FIRST_WAIT_S = 2.0
MAX_WAIT_S = 60.0
MAX_RETRY_AFTER_S = 600.0  # limit of a Retry-After header
READ_TIMEOUT_S = 60

_TRANSIENT_STATUSES = (408, 429, 500, 502, 503, 504)
# Packages whose exceptions are connection errors; they share no base class.
_HTTP_CLIENTS = ("httpx", "httpx2", "httpcore", "httpcore2", "aiohttp", "requests", "urllib3")


def open_table(dataset: Dataset, split: str) -> Any:
    """Return one split, downloaded, as an indexable table. Raises ValueError when it cannot be loaded."""
    try:
        table = _load(dataset, split)
    except Exception as error:  # of a cache, a file format or the HTTP client
        raise explain_hub_error(dataset, error) from error
    return _select_columns(table, dataset, split)


def open_stream(dataset: Dataset, split: str) -> tuple[int, Callable[[int, int], Iterator[Row]]]:
    """Return a stream's number of files and a function (file, row) -> the file's rows from number `row` on.

    Raises ValueError, here or while rows are read, for errors that are not transient or persist after all retries.
    """
    columns = choose_columns(dataset)
    where = f"{dataset.name}, split {split!r}"
    table = _with_retries(partial(_load, dataset, split), dataset, where="the list of files")
    table = _select_columns(table, dataset, split)

    def read(file: int, row: int) -> Iterator[Row]:
        name = f"file {file + 1} of {table.num_shards}"

        def open_at(row: int) -> Iterator[Any]:
            return iter(table.shard(table.num_shards, file).skip(row))

        for number, values in enumerate(read_with_retries(open_at, row, dataset, where=name)):
            if number == 0:
                require_columns(columns, values, where=where)
            yield partial(dict, values)

    return table.num_shards, read


def count_split_rows(dataset: Dataset) -> dict[str, int]:
    """Return the number of rows of each split of a Hub dataset; nothing where the Hub does not know."""
    import datasets

    try:
        found = datasets.load_dataset_builder(
            dataset.name, dataset.config_name, revision=dataset.revision
        ).info.splits
    except Exception:  # of a cache, a file format or the HTTP client
        return {}
    return {name: split.num_examples for name, split in (found or {}).items() if split.num_examples}


def pin_revision(dataset: Dataset) -> Dataset:
    """Return the section with `revision` resolved to a commit, so that a whole snapshot reads one version.

    A local folder has no commits: its section is returned unchanged. Raises ValueError as `open_stream` does.
    """
    if Path(dataset.name).is_dir():
        return dataset
    from huggingface_hub import HfApi

    api = HfApi()
    found = _with_retries(
        lambda: api.dataset_info(dataset.name, revision=dataset.revision).sha,
        dataset,
        where="its name",
    )
    return dataset.model_copy(update={"revision": found})


def read_with_retries(
    open_at: Callable[[int], Iterator[T]], start: int, dataset: Dataset, *, where: str
) -> Iterator[T]:
    """Yield the values of `open_at(start)`; after a transient error, reopen with `open_at` at the value reached.

    Raises ValueError for an error that is not transient or persists after all retries.
    """
    reached = start
    rows: Iterator[T] | None = None

    def advance() -> list[T]:
        """Return the next value in a list, or an empty list at the end."""
        nonlocal rows
        try:
            rows = open_at(reached) if rows is None else rows
            return list(islice(rows, 1))
        except Exception:
            rows = None
            raise

    retrying = _retrying(lambda: f"row {reached:,} of {where}")
    while True:
        try:
            found = retrying(advance)
        except Exception as error:  # of the HTTP client or a file format
            raise explain_hub_error(dataset, error) from error
        if not found:
            return
        reached += 1
        yield found[0]


@contextmanager
def without_retries() -> Iterator[None]:
    """Give up at the first error in this block of this thread: the caller can read a local copy instead."""
    token = _max_retries.set(0)
    try:
        yield
    finally:
        _max_retries.reset(token)


def _with_retries(action: Callable[[], T], dataset: Dataset, *, where: str) -> T:
    """Return the result of `action`, retried after transient errors. Raises ValueError when it fails for good."""
    try:
        return _retrying(lambda: where)(action)
    except Exception as error:
        raise explain_hub_error(dataset, error) from error


def _retrying(where: Callable[[], str]) -> tenacity.Retrying:
    max_retries = _max_retries.get()

    def announce(state: tenacity.RetryCallState) -> None:
        assert state.outcome is not None and state.next_action is not None
        outcome = state.outcome.exception()
        assert outcome is not None
        error = _chain(outcome)[-1]
        logger.info(
            f"connection lost at {where()} ({type(error).__name__}: {first_line(error)}): retrying in "
            f"{state.next_action.sleep:.0f} s, {state.attempt_number} of {max_retries}"
        )

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_transient),
        stop=tenacity.stop_after_attempt(max_retries + 1),
        wait=_choose_wait,
        before_sleep=announce,
        reraise=True,
    )


def _choose_wait(state: tenacity.RetryCallState) -> float:
    """Return the seconds to wait: exponential backoff with jitter, at least the server's Retry-After."""
    assert state.outcome is not None
    grown = tenacity.wait_exponential(multiplier=FIRST_WAIT_S, max=MAX_WAIT_S)(state)
    wait = grown + tenacity.wait_random(0, grown / 4)(state)
    error = state.outcome.exception()
    retry_after = [
        float(response.headers["retry-after"])
        for found in (_chain(error) if error else [])
        if (response := getattr(found, "response", None)) is not None
        and str(response.headers.get("retry-after", "")).isdigit()
    ]
    return max([wait, *(min(seconds, MAX_RETRY_AFTER_S) for seconds in retry_after)])


def is_transient(error: BaseException) -> bool:
    """Return whether an error is a connection error or a busy server, and so may pass.

    A refused login, a missing dataset and `HF_HUB_OFFLINE` are not.
    """
    chain = _chain(error)
    statuses = [
        response.status_code
        for found in chain
        if (response := getattr(found, "response", None)) is not None
    ]
    if statuses:
        return all(status in _TRANSIENT_STATUSES for status in statuses)
    if any("OfflineMode" in type(found).__name__ + str(found) for found in chain):
        return False
    return any(
        isinstance(found, ConnectionError | TimeoutError)
        or type(found).__module__.partition(".")[0] in _HTTP_CLIENTS
        for found in chain
    )


def _chain(error: BaseException) -> list[BaseException]:
    """Return an exception and its causes, outermost first."""
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

    _disable_client_retries(dataset.streaming)
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
    if table.column_names is None:  # a stream may know them only from its first row
        return table
    columns = choose_columns(dataset)
    require_columns(columns, table.column_names, where=f"{dataset.name}, split {split!r}")
    return table.select_columns(columns.select(table.column_names))


def _disable_client_retries(is_stream: bool) -> None:
    """Turn off the retries of a stream's clients (in `datasets`, 20 of 5 to 60 s each), which are not logged."""
    import datasets
    from huggingface_hub import constants
    from huggingface_hub.utils._http import http_backoff, http_stream_backoff

    if not is_stream:
        return
    for client in ("datasets", "huggingface_hub"):
        # Their warnings would repeat our own log lines.
        logging.getLogger(client).setLevel(logging.ERROR)
    for action in ("READ", "OPEN"):
        setattr(datasets.config, f"STREAMING_{action}_MAX_RETRIES", 1)
    for kind in ("READ", "READ_SERVER_UNAVAILABLE", "READ_RATE_LIMIT", "OPEN"):
        setattr(datasets.config, f"STREAMING_{kind}_RETRY_INTERVAL", 0)
    for request in (http_backoff, http_stream_backoff):
        inspect.unwrap(request).__kwdefaults__["max_retries"] = 0
    if "HF_HUB_DOWNLOAD_TIMEOUT" not in os.environ:
        constants.HF_HUB_DOWNLOAD_TIMEOUT = READ_TIMEOUT_S


def explain_hub_error(dataset: Dataset, error: BaseException) -> ValueError:
    """Return a ValueError that says whether the network, the login or the name is wrong, and what to do."""
    message = str(error).strip().partition("\n")[0]
    if re.search(r"\b(gated|authenticated|401|403)\b", message):
        advice = (
            "is gated or private: accept its terms at "
            f"https://huggingface.co/datasets/{dataset.name}, then run `hf auth login` (or set "
            "HF_TOKEN)"
        )
    elif is_transient(error) or isinstance(error, ConnectionError) or "Couldn't reach" in message:
        advice = (
            "could not be reached: check the network (and HF_HUB_OFFLINE, HTTPS_PROXY), or "
            "download the dataset where there is one (`hf download --repo-type dataset "
            f"{dataset.name}`)"
        )
        if dataset.streaming:
            advice += "; what was read is kept: rerun the same command to resume"
    elif isinstance(error, FileNotFoundError):
        advice = (
            "was not found, neither on the Hub nor as a local folder: check its spelling; for local "
            f"files set dataset.name to one of {', '.join(LOADERS)}, and dataset.data_files; a private "
            "dataset needs `hf auth login`"
        )
    else:
        advice = "could not be opened: check dataset.config_name, split, revision and data_files"
    cause = _chain(error)[-1] if is_transient(error) else error
    found = f"{type(cause).__name__}: {first_line(cause)}"
    return ValueError(f"dataset.name {dataset.name!r} {advice}. Found: {found}")
