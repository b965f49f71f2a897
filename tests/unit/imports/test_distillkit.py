"""DistillKit's format: decoded as its description says, whichever settings it was written with."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from retort.imports.distillkit import (
    ByteCompression,
    LegacyCompression,
    read_compression,
    unpack_bits,
)
from support.distillkit import QUICK_START, RECOMMENDED, compress, pack

BINS = [
    {"scale_dtype": "float16", "element_bits": 7, "num_elements": 11},
    {"scale_dtype": "float32", "element_bits": 12, "num_elements": 20},
]


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"d": 5000, "k": 40, "exact_k": 8} | RECOMMENDED, 0.1),
        ({"d": 151936, "k": 40, "exact_k": 16} | QUICK_START, 0.2),
        ({"d": 5000, "k": 40, "exact_k": 40} | RECOMMENDED | {"polynomial_terms": []}, 0.05),
        ({"d": 300, "k": 40, "exact_k": 9} | QUICK_START | {"residual_bins": BINS}, 0.005),
        ({"d": 300, "k": 40, "exact_k": 1, "exact_dtype": "float16", "polynomial_terms": None}
         | {"term_dtype": "float64", "residual_bins": [BINS[1] | {"num_elements": 39}],
            "delta_encoding": False}, 0.01),
        ({"vocab_size": 40000, "k": 40, "exact_k": 9, "polynomial_degree": 6}, 0.4),
        ({"vocab_size": 300, "k": 40, "exact_k": 40, "polynomial_degree": 0}, 0.01),
    ],
)  # fmt: skip
def test_ids_are_exact_and_values_are_those_of_the_fit(
    config: dict[str, Any], error: float
) -> None:
    rng = np.random.default_rng(0)
    vocabulary = config.get("d") or config["vocab_size"]
    ids = np.stack([rng.permutation(vocabulary)[: config["k"]] for _ in range(200)])
    # A power law, as of a real teacher.
    slopes = rng.uniform(0.8, 1.5, (200, 1))
    values = (-0.5 - slopes * np.log(np.arange(1, config["k"] + 1))).astype(np.float32)
    columns = {name: np.stack(found) for name, found in compress(ids, values, config).items()}
    kind = LegacyCompression if "vocab_size" in config else ByteCompression
    found_ids, found = kind(**config).decode(columns)
    assert np.array_equal(found_ids, ids)
    assert np.abs(found - values).max() < error
    exact = found[:, : config["exact_k"]]
    assert np.abs(exact - values[:, : config["exact_k"]]).max() < 0.02


@pytest.mark.parametrize("bits", [1, 3, 8, 17, 18, 31, 48])
def test_bits_are_unpacked(bits: int) -> None:
    numbers = np.random.default_rng(bits).integers(0, 1 << bits, (20, 13))
    assert np.array_equal(unpack_bits(pack(numbers, bits), bits, 13), numbers)


def test_columns_of_another_compression_are_refused() -> None:
    config = {"d": 5000, "k": 40, "exact_k": 8} | RECOMMENDED
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(5000)[:40] for _ in range(3)])
    values = -np.sort(rng.uniform(0, 9, (3, 40))).astype(np.float32)
    columns = {name: np.stack(found) for name, found in compress(ids, values, config).items()}
    for changes in ({"k": 41}, {"d": 40000}, {"exact_k": 7}, {"term_dtype": "float64"}):
        with pytest.raises(ValueError, match=r"has .* values, but by the compression's config"):
            ByteCompression(**config | changes).decode(columns)


def test_the_config_is_found_in_a_trainings_config(tmp_path: Path) -> None:
    mine = {"d": 5000, "k": 40, "exact_k": 8} | RECOMMENDED
    path = tmp_path / "config.yaml"
    for content in (mine, {"logprob_compressor": mine}, {"teacher": {"logprob_compressor": mine}}):
        path.write_text(yaml.safe_dump(content))
        assert read_compression(path) == ByteCompression(**mine)
    legacy: dict[str, Any] = {"vocab_size": 300, "k": 40, "exact_k": 9, "polynomial_degree": 6}
    path.write_text(yaml.safe_dump({"teacher": {"legacy_logit_compression": legacy}}))
    assert read_compression(path) == LegacyCompression(**legacy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("k: 4", "exact_k: Field required; d: Field required"),
        ("{d: 300, k: 4, exact_k: 5}", "exact_k 5, k 4 and vocabulary 300 are not in ascending"),
        ("{d: 300, k: 4, exact_k: 1, other: 1}", "other: Extra inputs are not permitted"),
        ("{d: 300, k: 4, exact_k: 1, term_dtype: float8}", "term_dtype: Input should be"),
        ("- 1", "is not a compression's config"),
        ("{", "cannot be read"),
    ],
)
def test_what_is_not_a_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_compression(tmp_path / "config.yaml")
