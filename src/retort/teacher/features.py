"""What a teacher says of held-out text, exactly, in one file: its last hidden states and its head.

A full distribution over V tokens is head(hidden state): keeping D numbers a position and the head once keeps the
whole distribution, at full precision, for D / V of its size. Ten students are compared with one teacher without
loading it again. The same file holds the hidden states at a sample of *training* positions, re-scored in other
batches than the cache's were: against them `merge_h5` measures the fidelity of the cache.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from retort.io.files import replacing
from retort.models.heads import Head
from retort.tokens.sequences import SequenceTable

FEATURES_FORMAT = "retort-features"
FEATURES_VERSION = 2
OTHER_TOKENIZER = "student and teacher have different tokenizers, so their distributions are over different tokens"


@dataclass(frozen=True)
class TeacherFeatures:
    """What one teacher says of two tables of sequences.

    features: {"val": [P, D], "train": [P, D]} at the tables' counted positions, in order; `train_sequences`: the
    places of the "train" table's sequences among all training sequences; ids >= num_tokens have probability 0.
    """

    features: dict[str, Tensor]
    train_sequences: NDArray[np.int64]
    head: Head
    num_tokens: int
    teacher: str  # fingerprint of the weights
    name: str  # the path or Hub id that it was loaded from
    num_parameters: int
    keys: dict[str, str]

    def logprobs(self, split: str, rows: slice) -> Tensor:
        """Return the teacher's float32 logprobs [P, V] at some of the counted positions of a split."""
        logits_PV = self.head.logits(self.features[split][rows])
        if self.num_tokens < logits_PV.shape[1]:
            logits_PV[:, self.num_tokens :] = -torch.inf
        return logits_PV.log_softmax(dim=-1)

    def to(self, device: torch.device) -> "TeacherFeatures":
        """Return the same with the head on a device, where the logprobs are then made."""
        head = self.head
        moved = [
            tensor if tensor is None else tensor.to(device) for tensor in (head.weight, head.bias)
        ]
        return replace(self, head=replace(head, weight=moved[0], bias=moved[1]))

    def require_teacher(self, weights: str, *, source: Path, made_from: Path) -> None:
        """Raise ValueError unless the teacher with these weights' fingerprint scored them."""
        if self.teacher != weights:
            raise ValueError(
                f"{source} was scored by teacher {self.teacher}, but {made_from} records {weights}: the teacher's "
                f"files were changed in between. Delete {source} and run the same command again; to learn from the new "
                "teacher instead, set teacher.generation.force_regenerate to a new value (a date, say)."
            )

    def require(self, split: str, table: SequenceTable, *, source: Path) -> None:
        """Raise ValueError unless `table` holds the very sequences that were scored."""
        found = digest_keys(table)
        if found != self.keys[split]:
            raise ValueError(
                f"{source} was scored on other {split} sequences (content {self.keys[split]}) than these "
                f"({found}). Delete it and run the same command again."
            )


def digest_keys(table: SequenceTable) -> str:
    """Return a digest of a table's content keys, in order."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(table.keys).tobytes())


def write_features(path: Path, found: TeacherFeatures) -> None:
    """Write the file atomically."""
    tensors = {f"features.{split}": value.contiguous() for split, value in found.features.items()}
    tensors["train_sequences"] = torch.from_numpy(found.train_sequences)
    head = found.head
    if head.weight is not None:
        tensors["head.weight"] = head.weight.detach().cpu().contiguous()
    if head.bias is not None:
        tensors["head.bias"] = head.bias.detach().cpu().contiguous()
    about = {
        "format": FEATURES_FORMAT,
        "version": FEATURES_VERSION,
        "scale": head.scale,
        "softcap": head.softcap,
        "num_tokens": found.num_tokens,
        "teacher": found.teacher,
        "name": found.name,
        "num_parameters": found.num_parameters,
        "keys": found.keys,
        "checksums": _checksum_tensors(tensors),
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"retort": json.dumps(about, sort_keys=True)})


def _checksum_tensors(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Return the xxh3-128 of each tensor's bytes."""
    empty = torch.zeros(0, dtype=torch.uint8)  # a view of nothing is refused
    return {
        name: xxhash.xxh3_128_hexdigest(
            (tensor.contiguous().view(torch.uint8) if tensor.numel() else empty).numpy().data
        )
        for name, tensor in tensors.items()
    }


def read_features(path: Path) -> TeacherFeatures:
    """Read the file. Raises ValueError when it is damaged, foreign or newer."""
    try:
        with safe_open(path, framework="pt") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {}).get("retort", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read ({error}): delete it and run the same command again."
        ) from error
    if (about.get("format"), about.get("version")) != (FEATURES_FORMAT, FEATURES_VERSION):
        raise ValueError(
            f"{path} is {about.get('format')!r} version {about.get('version')!r}; this Retort reads "
            f"{FEATURES_FORMAT!r} version {FEATURES_VERSION}."
        )
    for name, found in _checksum_tensors(tensors).items():
        if found != about["checksums"].get(name):
            raise ValueError(
                f"{path}: tensor {name} has checksum {found}, expected {about['checksums'].get(name)}: the file is "
                "damaged. Delete it and run the same command again."
            )
    return TeacherFeatures(
        features={split: tensors[f"features.{split}"] for split in ("val", "train")},
        train_sequences=tensors["train_sequences"].numpy(),
        head=Head(
            tensors.get("head.weight"),
            tensors.get("head.bias"),
            float(about["scale"]),
            about["softcap"],
        ),
        num_tokens=about["num_tokens"],
        teacher=about["teacher"],
        name=about["name"],
        num_parameters=about["num_parameters"],
        keys=about["keys"],
    )


def iterate_rows(count: int, *, rows: int) -> Iterator[slice]:
    """Yield slices of at most `rows` that cover range(count)."""
    for start in range(0, count, rows):
        yield slice(start, min(start + rows, count))
