"""The format of arcee-ai/DistillKit's logit datasets: bit-packed ids, and values fitted by a polynomial.

A row of its parquet files is a text: `input_ids` [T], and for each position the k most probable next tokens, in
descending order. `bytepacked_indices`: their ids, ceil(log2 d) bits each, the highest bit first. `compressed_logprobs`:
the first `exact_k` log-probabilities as they are; coefficients of a least-squares fit of the others over t = 0, 1, ...
(`polynomial_terms`: powers of t, or functions); bins of quantized residuals, each a scale and packed integers. With
`delta_encoding` all of these are differences, each from the value before. The older format has columns of numbers:
`packed_indices` (uint64, each with 64 // bits ids, the lowest bits first), `exact_values`, and `coeffs` of powers of
1 / (t + 1) or of t + 1. Written from distillkit/compression of a61c2e7; values are decoded in float64 here.

Legend: P positions, K tokens of each, C coefficients.
"""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from retort.imports.kernels import unpack_rows

CONFIG_FILE = "compression_config.yaml"
_DTYPES = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4", "float64": "<f8"}
Dtype = Literal["float16", "bfloat16", "float32", "float64"]
Decoded = tuple[NDArray[np.int64], NDArray[np.float64]]


class Compression(BaseModel):
    """How a dataset was compressed: what every position of it is decoded with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    k: Annotated[int, Field(gt=0)]
    exact_k: Annotated[int, Field(ge=0)]

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """Width of the teacher's output layer."""

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """The columns of a file with a list for each position, ids first."""

    @abstractmethod
    def decode(self, columns: Mapping[str, NDArray[Any]]) -> Decoded:
        """Return ids int64 and values float64 [P, K] from columns [P, ...].

        Raises ValueError when their width is not that of this compression.
        """

    @property
    def id_bits(self) -> int:
        """Bits of an id."""
        return max(1, int(np.ceil(np.log2(np.float32(self.vocabulary)))))

    @model_validator(mode="after")
    def _check_sizes(self) -> "Compression":
        if not self.exact_k <= self.k <= self.vocabulary:
            raise ValueError(
                f"exact_k {self.exact_k}, k {self.k} and vocabulary {self.vocabulary} are not in ascending order"
            )
        return self


class ResidualBin(BaseModel):
    """Quantized residuals of some consecutive tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scale_dtype: Dtype
    element_bits: Annotated[int, Field(gt=0, le=48)]
    num_elements: Annotated[int, Field(gt=0)]


class ByteCompression(Compression):
    """The format of today: two columns of bytes."""

    d: Annotated[int, Field(gt=1, lt=1 << 31)]
    exact_dtype: Dtype = "float32"
    polynomial_terms: tuple[int | Literal["sqrt", "exp"], ...] | None = None
    term_dtype: Dtype = "float32"
    residual_bins: tuple[ResidualBin, ...] = ()
    delta_encoding: bool = True
    error_diffusion: bool = False  # of the encoder alone
    normalize_t: bool = False

    @property
    def vocabulary(self) -> int:
        """Width of the teacher's output layer."""
        return self.d

    @property
    def columns(self) -> tuple[str, ...]:
        """Packed ids, and packed values."""
        return "bytepacked_indices", "compressed_logprobs"

    def decode(self, columns: Mapping[str, NDArray[Any]]) -> Decoded:
        """Return ids and log-probabilities."""
        packed, values = (columns[name] for name in self.columns)
        _require_width(self.columns[0], packed, -(-self.k * self.id_bits // 8))
        reader = _Bytes(values)
        pieces = [reader.take_numbers(self.exact_k, self.exact_dtype)]
        num_fitted = self.k - self.exact_k
        fitted = np.zeros((len(values), num_fitted))
        if self.polynomial_terms:
            coefficients = reader.take_numbers(len(self.polynomial_terms), self.term_dtype)
            fitted += coefficients @ self._find_terms(num_fitted).T
        first = 0
        for bin in self.residual_bins:
            stop = first + bin.num_elements
            fitted[:, first:stop] += reader.take_residuals(bin)
            first = stop
        _require_width(self.columns[1], values, reader.place)
        logprobs = np.concatenate([*pieces, fitted], axis=1)
        if self.delta_encoding:
            np.cumsum(logprobs, axis=1, out=logprobs)
        return unpack_bits(packed, self.id_bits, self.k), logprobs

    def _find_terms(self, number: int) -> NDArray[np.float64]:
        """Return the terms [number, C], in the precision that they were fitted in."""
        t = np.linspace(0, 1, number) if self.normalize_t else np.arange(number, dtype=np.float64)
        functions = {"sqrt": np.sqrt, "exp": np.exp}
        terms = [
            functions[term](t) if isinstance(term, str) else t**term
            for term in self.polynomial_terms or ()
        ]
        return _round(np.stack(terms, axis=1), self.term_dtype)

    @model_validator(mode="after")
    def _check_bins(self) -> "ByteCompression":
        if sum(bin.num_elements for bin in self.residual_bins) > self.k - self.exact_k:
            raise ValueError("residual_bins have more elements than k - exact_k")
        return self


class LegacyCompression(Compression):
    """The older format: columns of numbers. Its values are log-probabilities, or logits less their mean."""

    vocab_size: Annotated[int, Field(gt=1, lt=1 << 31)]
    polynomial_degree: Annotated[int, Field(ge=0)]
    invert_polynomial: bool = True
    with_sqrt_term: bool = False
    term_dtype: Dtype = "float32"

    @property
    def vocabulary(self) -> int:
        """Width of the teacher's output layer."""
        return self.vocab_size

    @property
    def columns(self) -> tuple[str, ...]:
        """Packed ids, first values, and coefficients of the others."""
        return "packed_indices", "exact_values", "coeffs"

    def decode(self, columns: Mapping[str, NDArray[Any]]) -> Decoded:
        """Return ids and values."""
        packed, exact, coefficients = (columns[name] for name in self.columns)
        at_once = 64 // self.id_bits
        _require_width(self.columns[0], packed, -(-self.k // at_once))
        _require_width(self.columns[1], exact, self.exact_k)
        t = np.arange(1, self.k - self.exact_k + 1, dtype=np.float64)
        powers = [
            t ** (-i if self.invert_polynomial else i) for i in range(self.polynomial_degree + 1)
        ]
        terms = np.stack([*powers, np.sqrt(t)] if self.with_sqrt_term else powers, axis=1)
        _require_width(self.columns[2], coefficients, terms.shape[1] if len(t) else 0)
        shifts = np.arange(at_once, dtype=np.uint64) * np.uint64(self.id_bits)
        ids = packed.astype(np.uint64)[:, :, None] >> shifts & np.uint64((1 << self.id_bits) - 1)
        found = ids.reshape(len(packed), -1)[:, : self.k].astype(np.int64)
        values = exact.astype(np.float64)
        if len(t):
            values = np.concatenate([values, coefficients.astype(np.float64) @ terms.T], axis=1)
        return found, values


class _Bytes:
    """Reads the bytes [P, B] of P positions from left to right; `place`: of the next column."""

    def __init__(self, values: NDArray[np.uint8]) -> None:
        self.values, self.place = values, 0

    def take_numbers(self, count: int, dtype: str) -> NDArray[np.float64]:
        """Return floating-point numbers [P, count]."""
        kind = np.dtype(_DTYPES[dtype])
        raw = np.ascontiguousarray(self._take(count * kind.itemsize)).view(kind)
        if dtype == "bfloat16":
            raw = (raw.astype("<u4") << 16).view("<f4")
        return raw.astype(np.float64)

    def take_residuals(self, bin: ResidualBin) -> NDArray[np.float64]:
        """Return the residuals [P, num_elements] of a bin."""
        scales = self.take_numbers(1, bin.scale_dtype)
        packed = self._take(-(-bin.num_elements * bin.element_bits // 8))
        levels = unpack_bits(packed, bin.element_bits, bin.num_elements).astype(np.float64)
        half = 1 << (bin.element_bits - 1)
        residuals: NDArray[np.float64] = levels - half if half > 1 else 2 * levels - 1
        residuals *= scales
        return residuals

    def _take(self, count: int) -> NDArray[np.uint8]:
        first, self.place = self.place, self.place + count
        taken = self.values[:, first : self.place]
        _require_width("compressed_logprobs", taken, count)
        return taken


def unpack_bits(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int64]:
    """Return `count` integers of each row [P, count] from bytes [P, B], the highest bit first; bits: 48 at most."""
    found = np.empty((len(packed), count), np.int64)
    unpack_rows(np.ascontiguousarray(packed), bits, found)
    return found


def _round(values: NDArray[np.float64], dtype: str) -> NDArray[np.float64]:
    """Return values rounded to a type's precision."""
    if dtype != "bfloat16":
        return values.astype(_DTYPES[dtype]).astype(np.float64)
    raw = values.astype("<f4").view("<u4").astype(np.uint64)
    raw = raw + 0x7FFF + (raw >> np.uint64(16) & np.uint64(1)) & np.uint64(0xFFFF0000)
    return raw.astype("<u4").view("<f4").astype(np.float64)


def _require_width(column: str, found: NDArray[Any], expected: int) -> None:
    if found.shape[1] != expected:
        raise ValueError(
            f"a position of {column} has {found.shape[1]} values, but by the compression's config it has {expected}: "
            "the config is of another dataset."
        )


def read_compression(path: Path) -> Compression:
    """Read a compression's config: the file beside a dataset, or a config of a training, which has it in `teacher`.

    Raises ValueError when there is none, or it is not one.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from None
    if isinstance(content, dict) and isinstance(content.get("teacher"), dict):
        content = content["teacher"]
    for key in ("logprob_compressor", "legacy_logit_compression"):
        if isinstance(content, dict) and content.get(key):
            content = content[key]
    is_legacy = isinstance(content, dict) and "polynomial_degree" in content
    kind = LegacyCompression if is_legacy else ByteCompression
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'it'}: {e['msg']}" for e in error.errors()
        )
        raise ValueError(f"{path} is not a compression's config of DistillKit: {faults}.") from None
