"""Documents become sequences of token ids: splitting, the loss mask, content keys.

A *sequence* is one row of token ids fed to a model. Position t predicts the token at t + 1; `loss_mask[t]`
says whether that prediction counts (the response's tokens of a prompt + response; everything of plain text;
never the last position). A long document becomes consecutive sequences that overlap by one token, so that
each of its tokens is predicted exactly once.

Every sequence carries a *content key* over its ids, its segment starts and its loss mask: whoever pairs
something with a sequence later (a teacher's distributions, say) compares keys first.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import ArrayLike, NDArray

from retort.cli import first_line
from retort.config.sections import Dataset
from retort.corpus.documents import Document
from retort.io.files import digest, fingerprint_tokenizer, is_path

SPLITS = ("train", "val")
KEY_BYTES = 16
# A tokenizer takes about 100 bytes a token while it is at a batch.
_DOCUMENTS_PER_BATCH = 256
_CHARACTERS_PER_BATCH = 1 << 20


@dataclass(frozen=True)
class Sequence:
    """One row: `ids` int32 [T], `loss_mask` bool [T], `segment_starts` int32 [G] (0 first), its key."""

    ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    segment_starts: NDArray[np.int32]
    key: bytes

    @property
    def num_positions(self) -> int:
        """How many predictions count."""
        return int(self.loss_mask.sum())


def content_key(
    ids: NDArray[np.int32], loss_mask: NDArray[np.bool_], segment_starts: NDArray[np.int32]
) -> bytes:
    """Return the 16 bytes that name a sequence: the same tokens packed or masked otherwise are another one."""
    state = xxhash.xxh3_128()
    for array, dtype in ((ids, "<i4"), (segment_starts, "<i4"), (loss_mask, "u1")):
        state.update(len(array).to_bytes(8, "little"))
        state.update(np.ascontiguousarray(array, dtype=dtype).tobytes())
    return state.digest()


@dataclass(frozen=True)
class SequenceTable:
    """S sequences as flat columns: N tokens, G segments in all."""

    ids: NDArray[np.int32]  # [N]
    loss_mask: NDArray[np.bool_]  # [N]
    offsets: NDArray[np.int64]  # [S + 1], where each sequence's tokens start
    segment_starts: NDArray[np.int32]  # [G], within the sequence
    segment_offsets: NDArray[np.int64]  # [S + 1]
    keys: NDArray[np.uint8]  # [S, 16]
    documents: NDArray[np.int64]  # [S], place of the document in the corpus
    labels: NDArray[np.int32]  # [S], index into label_names
    label_names: tuple[tuple[str, str], ...] = (("", ""),)  # (category, language)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Sequence:
        tokens = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        segments = slice(int(self.segment_offsets[index]), int(self.segment_offsets[index + 1]))
        key = self.keys[index].tobytes()
        return Sequence(
            self.ids[tokens], self.loss_mask[tokens], self.segment_starts[segments], key
        )

    @property
    def num_positions(self) -> int:
        """How many predictions count."""
        return int(self.loss_mask.sum())

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sequence, [S]."""
        return np.diff(self.offsets)

    @property
    def position_offsets(self) -> NDArray[np.int64]:
        """Where each sequence's counted positions start among all counted positions, [S + 1]."""
        if len(self) == 0:
            return np.zeros(1, dtype=np.int64)
        counts = np.add.reduceat(self.loss_mask, self.offsets[:-1], dtype=np.int64)
        return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts, dtype=np.int64)])

    def verify_keys(self, *, source: str, first: int = 0) -> None:
        """Raise ValueError when a stored key is not its sequence's; `first`: the place of sequence 0 in `source`."""
        for index in range(len(self)):
            row = self[index]
            if content_key(row.ids, row.loss_mask, row.segment_starts) != row.key:
                raise ValueError(
                    f"{source}: sequence {first + index} does not hold the tokens that its content key names; the file "
                    "was damaged or edited. Delete it and run the same command again."
                )

    def slice(self, first: int, stop: int) -> "SequenceTable":
        """Return sequences first..stop-1 as a table of their own."""
        tokens = slice(int(self.offsets[first]), int(self.offsets[stop]))
        segments = slice(int(self.segment_offsets[first]), int(self.segment_offsets[stop]))
        return SequenceTable(
            ids=self.ids[tokens],
            loss_mask=self.loss_mask[tokens],
            offsets=self.offsets[first : stop + 1] - self.offsets[first],
            segment_starts=self.segment_starts[segments],
            segment_offsets=self.segment_offsets[first : stop + 1] - self.segment_offsets[first],
            keys=self.keys[first:stop],
            documents=self.documents[first:stop],
            labels=self.labels[first:stop],
            label_names=self.label_names,
        )


TABLE_COLUMNS = tuple(f.name for f in fields(SequenceTable) if f.name != "label_names")


def concatenate_tables(tables: Iterable[SequenceTable]) -> SequenceTable:
    """Return one table of all sequences, in order."""
    tables = list(tables)
    names = sorted({name for t in tables for name in t.label_names} | {("", "")})
    places = {name: place for place, name in enumerate(names)}
    relabel = [np.array([places[n] for n in t.label_names], dtype=np.int32) for t in tables]

    def join_offsets(name: str) -> NDArray[np.int64]:
        counts = [np.diff(getattr(t, name)) for t in tables]
        return np.concatenate(
            [[0], np.cumsum(np.concatenate([[], *counts]), dtype=np.int64)]
        ).astype(np.int64)

    def join(name: str, empty: NDArray[Any]) -> NDArray[Any]:
        return np.concatenate([empty, *(getattr(t, name) for t in tables)])

    return SequenceTable(
        ids=join("ids", np.empty(0, np.int32)),
        loss_mask=join("loss_mask", np.empty(0, np.bool_)),
        offsets=join_offsets("offsets"),
        segment_starts=join("segment_starts", np.empty(0, np.int32)),
        segment_offsets=join_offsets("segment_offsets"),
        keys=join("keys", np.empty((0, KEY_BYTES), np.uint8)),
        documents=join("documents", np.empty(0, np.int64)),
        labels=np.concatenate(
            [np.empty(0, np.int32), *(r[t.labels] for r, t in zip(relabel, tables, strict=True))]
        ),
        label_names=tuple(names),
    )


# (ids, loss mask, document, (category, language)) of a sequence of one segment
_Row = tuple[ArrayLike, ArrayLike, int, tuple[str, str]]


def build_table(rows: Iterable[_Row]) -> SequenceTable:
    """Build a table from (ids, loss mask, document, (category, language)) rows of one segment each."""
    rows = list(rows)
    names = sorted({name for *_, name in rows} | {("", "")})
    places = {name: place for place, name in enumerate(names)}
    ids = [np.array(row[0], dtype=np.int32) for row in rows]
    masks = [np.array(row[1], dtype=np.bool_) for row in rows]
    start = np.zeros(1, dtype=np.int32)
    keys = [
        np.frombuffer(content_key(i, m, start), dtype=np.uint8)
        for i, m in zip(ids, masks, strict=True)
    ]
    return SequenceTable(
        ids=np.concatenate([np.empty(0, np.int32), *ids]),
        loss_mask=np.concatenate([np.empty(0, np.bool_), *masks]),
        offsets=np.concatenate([[0], np.cumsum([len(i) for i in ids], dtype=np.int64)]).astype(
            np.int64
        ),
        segment_starts=np.zeros(len(rows), dtype=np.int32),
        segment_offsets=np.arange(len(rows) + 1, dtype=np.int64),
        keys=np.stack(keys) if keys else np.empty((0, KEY_BYTES), np.uint8),
        documents=np.array([row[2] for row in rows], dtype=np.int64),
        labels=np.array([places[row[3]] for row in rows], dtype=np.int32),
        label_names=tuple(names),
    )


@dataclass
class TokenCounts:
    """Where the tokens went: `read` = `stored` + `truncated` + `without_loss` + `too_short`.

    A token that two consecutive sequences share is stored once for this count.
    """

    documents: int = 0
    documents_split: int = 0
    documents_truncated: int = 0
    read: int = 0
    stored: int = 0
    truncated: int = 0  # cut off by long_documents: truncate
    without_loss: int = 0  # sequences that hold nothing but prompt
    too_short: int = 0  # documents of fewer than two tokens: nothing to predict

    def reconcile(self) -> None:
        """Assert that no token is unaccounted for."""
        assert self.read == self.stored + self.truncated + self.without_loss + self.too_short, self

    def __add__(self, other: "TokenCounts") -> "TokenCounts":
        return TokenCounts(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )


def tokenize_documents(
    documents: Iterable[Document], tokenizer: Any, dataset: Dataset, *, counts: TokenCounts
) -> SequenceTable:
    """Turn documents of one split into sequences, all in memory, and count every token."""
    batches = tokenize_batches(documents, tokenizer, dataset, counts=counts)
    return concatenate_tables(table for tables in batches for table in tables.values())


def tokenize_batches(
    documents: Iterable[Document], tokenizer: Any, dataset: Dataset, *, counts: TokenCounts
) -> Iterator[dict[str, SequenceTable]]:
    """Turn documents into sequences of at most `dataset.max_length` tokens, and count every token.

    Yields the sequences of a batch of documents by split, each split's in the documents' order.
    """
    for batch in _cut_batches(documents):
        rows: dict[str, list[_Row]] = {split: [] for split in SPLITS}
        for document, ids, first_loss in _encode(batch, tokenizer, dataset):
            counts.documents += 1
            counts.read += len(ids)
            if len(ids) < 2:
                counts.too_short += len(ids)
                continue
            label = (document.category or "", document.language or "")
            for piece, mask in _split(np.array(ids, np.int32), first_loss, dataset, counts):
                rows[document.split].append((piece, mask, document.index, label))
        yield {split: build_table(rows[split]) for split in SPLITS}
    counts.reconcile()


def _cut_batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield batches; one that holds much text is full before it has its number of documents."""
    batch: list[Document] = []
    num_characters = 0
    for document in documents:
        batch.append(document)
        num_characters += len(document.text) + len(document.prompt or "")
        if len(batch) == _DOCUMENTS_PER_BATCH or num_characters >= _CHARACTERS_PER_BATCH:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _split(
    ids: NDArray[np.int32], first_loss: int, dataset: Dataset, counts: TokenCounts
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
    """Yield (ids, loss mask) pieces of one document; `first_loss` is the first token worth predicting."""
    length = dataset.max_length
    if len(ids) > length and dataset.long_documents == "truncate":
        counts.documents_truncated += 1
        counts.truncated += len(ids) - length
        ids = ids[:length]
    counts.documents_split += len(ids) > length
    for start in range(0, len(ids) - 1, length - 1):
        piece = ids[start : start + length]
        fresh = len(piece) - (start > 0)  # the first token was stored by the piece before
        mask = np.arange(start + 1, start + len(piece) + 1) >= first_loss
        mask[-1] = False
        if mask.any():
            counts.stored += fresh
            yield piece, mask
        else:
            counts.without_loss += fresh


def _encode(
    batch: list[Document], tokenizer: Any, dataset: Dataset
) -> Iterator[tuple[Document, list[int], int]]:
    """Yield each document with its ids and the place of the first token that is to be predicted."""
    if dataset.prompt_column is not None and getattr(tokenizer, "chat_template", None):
        for document in batch:
            yield (document, *_apply_chat_template(document, tokenizer))
        return
    has_end = dataset.append_eos and tokenizer.eos_token_id is not None
    end = [tokenizer.eos_token_id] if has_end else []
    plain = dataset.prompt_column is None
    bodies = tokenizer([d.text for d in batch], add_special_tokens=plain)["input_ids"]
    for document, body in zip(batch, bodies, strict=True):
        head = encode_prompt(document.prompt, tokenizer) if document.prompt is not None else []
        if end and body[-1:] == end:  # some tokenizers add the end themselves
            body = body[:-1]
        yield document, [*head, *body, *end], len(head)


def encode_prompt(prompt: str, tokenizer: Any) -> list[int]:
    """Return the ids after which a response begins: through the chat template, or, where there is none, a line."""
    if getattr(tokenizer, "chat_template", None):
        return encode_chat([{"role": "user", "content": prompt}], tokenizer)
    return encode_beginning(f"{prompt}\n", tokenizer)


def encode_chat(messages: list[dict[str, Any]], tokenizer: Any) -> list[int]:
    """Return the ids of messages through the chat template, up to where the response begins."""
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    return list(tokenizer.apply_chat_template(messages, **options))


def encode_beginning(text: str, tokenizer: Any) -> list[int]:
    """Return the ids of a text that goes on: with the special tokens that a text begins with, not with its end."""
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _apply_chat_template(document: Document, tokenizer: Any) -> tuple[list[int], int]:
    """Return (ids, first response token) of one prompt + response through the tokenizer's chat template."""
    assert document.prompt is not None
    prompt = [{"role": "user", "content": document.prompt}]
    both = [*prompt, {"role": "assistant", "content": document.text}]
    head = encode_prompt(document.prompt, tokenizer)
    ids = tokenizer.apply_chat_template(both, tokenize=True, return_dict=False)
    if ids[: len(head)] == head:
        return list(ids), len(head)
    # A token may span the end of the prompt and the response's first letters: then the two are tokenized apart, as
    # they are when a response is generated.
    head_text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    text = tokenizer.apply_chat_template(both, tokenize=False)
    if not text.startswith(head_text):
        raise ValueError(
            f"the tokenizer's chat template rewrites the prompt of document {document.index} once the response "
            "follows, so it cannot be told which tokens are the response's. Use a tokenizer whose template "
            "keeps the prompt as it is, or one without a template."
        )
    rest = tokenizer(text[len(head_text) :], add_special_tokens=False)["input_ids"]
    return [*head, *rest], len(head)


# ---------------------------------------------------------------------------------------------------------
# Tokenizers


@contextmanager
def hidden_torch() -> Iterator[None]:
    """Let transformers be imported, and a tokenizer loaded, as where there is no PyTorch, which neither needs.

    None in `sys.modules` is how Python marks a module as not to be found. It is taken away at the end: a library that
    looks for "torch" in `sys.modules`, as `datasets` does, would import it and fail. From then on anyone may import
    PyTorch; transformers keeps to its tokenizers in this process, so this is not for one that runs a user's code.
    """
    assert not {"torch", "transformers"} & sys.modules.keys(), "too late to hide it"
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


def load_tokenizer(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Load a tokenizer from a folder or a Hub id. Raises ValueError with the next step when it cannot."""
    from transformers import AutoTokenizer  # seconds, and nothing else in this room needs it

    try:
        return AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code
        )
    except (
        Exception
    ) as error:  # transformers raises OSError, ValueError, KeyError, and tokenizers' own
        raise ValueError(cannot_load("tokenizer", path, error)) from error


def fingerprint_of_tokenizer(path: str, tokenizer: Any) -> dict[str, Any]:
    """Return {"fingerprint", "size"} of a tokenizer: of its files where it is local, else of its vocabulary."""
    folder = Path(path)
    if folder.is_dir():
        fingerprint = fingerprint_tokenizer(folder)
    else:
        fingerprint = digest([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template])
    return {"fingerprint": fingerprint, "size": len(tokenizer)}


def refuse_other_tokenizer(found: dict[str, Any], *, expected: str | None, path: str) -> None:
    """Raise ValueError when a tokenizer's fingerprint is not the one that the tokens are named by."""
    if expected not in (None, found["fingerprint"]):
        raise ValueError(
            f"the tokenizer in {path!r} changed since the command began (fingerprint {found['fingerprint']}, then "
            f"{expected}), and the tokens are named by what it was. Run the same command again: it makes others."
        )


def cannot_load(what: str, path: str, error: Exception) -> str:
    """Return the sentence for a model or a tokenizer that transformers cannot load."""
    if Path(path).is_dir():
        advice = "the folder must hold what save_pretrained() writes (config.json, weights, tokenizer.json)"
    elif is_path(path):
        advice = f"there is no such folder (looked from {Path.cwd()})"
    else:
        advice = (
            f"there is no such folder in {Path.cwd()}, and for a Hub id this machine must reach huggingface.co (or "
            "have it in its cache, with HF_HUB_OFFLINE=1); "
            "for a gated one, log in with `hf auth login`"
        )
    return f"cannot load the {what} {path!r}: {advice}. transformers says: {first_line(error)}"
