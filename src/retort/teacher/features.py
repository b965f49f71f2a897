"""A teacher's exact distributions on held-out text, in one file: its last hidden states and its head.

A full distribution over V tokens is head(hidden state), so D numbers per position and the head once are the whole
distribution, at full precision, in D / V of its size. Any number of students are compared with a teacher that is never
loaded again. The same file holds the hidden states at a sample of *training* positions, scored again in other batches
than those of the cache: against them `merge_h5` measures the cache's fidelity.
"""

import json
import math
from collections.abc import Iterator, Sequence
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
from torch.nn import functional as F

from retort.io.files import apply_umask, replacing
from retort.models.heads import Head
from retort.tokens.sequences import SequenceTable

FEATURES_FORMAT = "retort-features"
FEATURES_VERSION = 2
OTHER_TOKENIZER = "student and teacher have different tokenizers, so their distributions are over different tokens"


@dataclass(frozen=True)
class TeacherFeatures:
    """One teacher's features of two tables of sequences: held-out ones ("val") and a sample for training ("train").

    features: by split, [P, D] at the table's counted positions, in order (logits [P, V] of a model without a known
    head). train_sequences int64 [S]: indices of the "train" table's sequences among all training sequences. Ids from
    num_tokens on have probability 0. keys: by split, `digest_keys` of the table.
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
        """Return the same with the head on a device, where `logprobs` then computes."""
        head = self.head
        moved = [
            tensor if tensor is None else tensor.to(device) for tensor in (head.weight, head.bias)
        ]
        return replace(self, head=replace(head, weight=moved[0], bias=moved[1]))

    def require_teacher(self, weights: str, *, source: Path, made_from: Path) -> None:
        """Raise ValueError unless the weights of the teacher that scored them have this fingerprint."""
        if self.teacher != weights:
            raise ValueError(
                f"{source} was scored by teacher {self.teacher}, but {made_from} records {weights}: the teacher's "
                f"files have changed in between. Delete {source} and rerun the same command; to learn from the new "
                "teacher instead, set teacher.generation.force_regenerate to a new value (for example a date)."
            )

    def require(self, split: str, table: SequenceTable, *, source: Path) -> None:
        """Raise ValueError unless `table` holds exactly the sequences of that split that were scored."""
        found = digest_keys(table)
        if found != self.keys[split]:
            raise ValueError(
                f"{source} was scored on other {split} sequences (content {self.keys[split]}) than these "
                f"({found}). Delete it and rerun the same command."
            )


@dataclass(frozen=True)
class MixedFeatures:
    """Features of several teachers of the same sequences, whose distributions are mixed by weights that sum to 1."""

    members: tuple[TeacherFeatures, ...]
    weights: tuple[float, ...]

    @property
    def name(self) -> str:
        """The names of all, with their weights."""
        return name_mixture([member.name for member in self.members], self.weights)

    @property
    def num_parameters(self) -> int:
        """Of all together."""
        return sum(member.num_parameters for member in self.members)

    def logprobs(self, split: str, rows: slice) -> Tensor:
        """Return the mixture's float32 logprobs [P, V] at some of the counted positions of a split."""
        return mix_logprobs([m.logprobs(split, rows) for m in self.members], self.weights)

    def to(self, device: torch.device) -> "MixedFeatures":
        """Return the same with the heads on a device, where `logprobs` then computes."""
        return replace(self, members=tuple(member.to(device) for member in self.members))


def mix_logprobs(logprobs: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the logs of the weighted mean of distributions [P, V]; ids that one does not have get 0 from it."""
    width = max(found.shape[-1] for found in logprobs)
    padded = [F.pad(x, (0, width - x.shape[-1]), value=-torch.inf) for x in logprobs]
    shares = [math.log(weight) for weight in weights]
    return torch.stack([x + s for x, s in zip(padded, shares, strict=True)]).logsumexp(dim=0)


def name_mixture(names: Sequence[str], weights: Sequence[float]) -> str:
    """Return what several teachers are called: their names, or digests, with their weights; one's own name alone."""
    if len(names) == 1:
        return names[0]
    return " + ".join(f"{w:.3g} {name}" for name, w in zip(names, weights, strict=True))


def digest_keys(table: SequenceTable) -> str:
    """Return the xxh3-128, 32 hex digits, of a table's content keys in order."""
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
        apply_umask([temporary])


def _checksum_tensors(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Return the xxh3-128 of each tensor's bytes."""
    empty = torch.zeros(0, dtype=torch.uint8)  # torch refuses a view of an empty tensor
    return {
        name: xxhash.xxh3_128_hexdigest(
            (tensor.contiguous().view(torch.uint8) if tensor.numel() else empty).numpy().data
        )
        for name, tensor in tensors.items()
    }


def read_features(path: Path) -> TeacherFeatures:
    """Read the file, tensors on the CPU. Raises ValueError when it is missing, damaged, foreign or newer."""
    try:
        with safe_open(path, framework="pt") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {}).get("retort", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read ({error}): delete it and rerun the same command."
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
                "damaged. Delete it and rerun the same command."
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
