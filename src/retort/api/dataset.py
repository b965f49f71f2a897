"""A logit cache as a PyTorch dataset: `retort.open_cache`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from retort.cache.finished import find_cache
from retort.cache.reader import CACHE_FILE, LogitCache
from retort.config.handoff import CONFIG_FILE, Job
from retort.io.files import read_json
from retort.tokens.tokenizer import identify_tokenizer, load_tokenizer
from retort.tokens.vocabularies import find_difference
from retort.training.batches import label_tokens


class CacheDataset(Dataset[dict[str, Any]]):
    """The S sequences of a logit cache with the teacher's distributions, in the order of the corpus.

    Safe to fork and to pickle; nothing is read before it is asked for. `cache` is the reader behind it.
    """

    def __init__(self, cache: LogitCache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one sequence of T tokens, P of whose predictions count.

        input_ids int64 [T]; loss_mask bool [T]: whether the prediction of the token after this one counts; labels int64
        [T]: the token here where its prediction counts, else -100 (as transformers' models take them); targets: the
        teacher's SparseTargets at the P counted positions; index; document: its index in the corpus; segment_starts
        int32 [G]: where documents begin in the sequence; category, language, source: of its document, "" for none.
        Raises ValueError when the file is damaged, IndexError where there is no such sequence.
        """
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"there is no sequence {index}: {self.path} has {len(self)}")
        table, row = self.cache.table, self.cache.table[number]
        names = (*table.label_names[int(table.labels[number])], "")
        return {
            "input_ids": torch.tensor(row.ids, dtype=torch.int64),
            "loss_mask": torch.tensor(row.loss_mask, dtype=torch.bool),
            "labels": label_tokens(row),
            "targets": self.cache.read_targets(number),
            "index": number,
            "document": int(table.documents[number]),
            "segment_starts": torch.tensor(row.segment_starts),
            "category": names[0],
            "language": names[1],
            "source": names[2],
        }

    def __getitems__(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        """Return several sequences; those of a cache in an object store are asked for at the same time."""
        numbers = [index + len(self) if index < 0 else index for index in indices]
        self.cache.prefetch(number for number in numbers if 0 <= number < len(self))
        return [self[number] for number in numbers]

    @property
    def path(self) -> Path:
        """The file."""
        return self.cache.path

    @property
    def vocabulary(self) -> int:
        """Width of the teacher's output layer, in tokens."""
        return self.cache.header.codec.vocabulary

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The temperatures at which a loss can be computed (any, if the whole vocabulary is kept)."""
        return self.cache.header.codec.temperatures

    @property
    def num_positions(self) -> int:
        """Number of counted positions of all sequences."""
        return self.cache.table.num_positions


def open_cache(path: str | Path, *, tokenizer: Any = None) -> CacheDataset:
    """Open a cache: results/logits/<id>, its manifest.json or its teacher_logits.h5.

    tokenizer: the student's, as transformers loads it, or its folder or Hub id; compared with the teacher's where it is
    given. Raises ValueError when there is no finished cache, the file is damaged or of another version of the format,
    or an id means another token in the student's tokenizer.
    """
    path = Path(path).expanduser()
    if path.suffix == ".h5":
        file = path
    else:
        folder = find_cache(path)
        if folder is None:
            raise ValueError(
                f"{str(path)!r} is not a logit cache (looked in {Path.cwd()}): give results/logits/<id>, which has "
                f"{CACHE_FILE}."
            )
        file = folder / CACHE_FILE
    cache = LogitCache(file)
    if tokenizer is not None:
        _require_tokenizer(cache, tokenizer)
    return CacheDataset(cache)


def _require_tokenizer(cache: LogitCache, tokenizer: Any) -> None:
    """Raise ValueError unless every id of the cache's text means the same token in a student's tokenizer."""
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(str(tokenizer))
    name, made_by = str(tokenizer.name_or_path), cache.header.tokenizer
    if identify_tokenizer(name, tokenizer).fingerprint == made_by:
        return
    teachers = _load_teachers(cache)
    if teachers is None:
        raise ValueError(
            f"the tokenizer {name!r} is not the one that {cache.path} was made with (fingerprint {made_by}), and that "
            "one is not here to compare their tokens: give the teacher's own."
        )
    difference = find_difference(teachers, tokenizer, may_lack=True)
    if difference:
        raise ValueError(
            f"the tokenizers of {cache.path} and of the student, {name!r}, give different ids: {difference}. Use a "
            "student with the teacher's tokenizer."
        )


def _load_teachers(cache: LogitCache) -> Any:
    """Return the tokenizer that the config beside a cache names, if it is the one that made it, else None."""
    config = cache.path.with_name(CONFIG_FILE)
    try:
        path, revision = Job.model_validate(read_json(config)).tokenizer
        found = load_tokenizer(path, revision=revision)
    except (OSError, ValueError):
        return None
    is_same = identify_tokenizer(path, found).fingerprint == cache.header.tokenizer
    return found if is_same else None
