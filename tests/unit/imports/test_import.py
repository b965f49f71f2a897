"""`retort import`: the cache has the dataset's distributions at the right tokens, however often it was interrupted."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM

from retort.cache.reader import CACHE_FILE, LogitCache
from retort.imports import run
from retort.imports.run import ImportSettings, import_logits
from retort.teacher.records import Manifest
from retort.tokens.index import TokenIndex
from retort.tokens.tokenizer import load_tokenizer
from support.distillkit import RECOMMENDED, sample_texts, score, write_dataset, write_rows
from support.hub import NAME, serve
from support.tiny import NUM_TOKENS, WIDTH, swap_tokens

CONFIG: dict[str, Any] = {"d": WIDTH, "k": 64, "exact_k": 56} | RECOMMENDED
CONFIG |= {"exact_dtype": "float32"}


def describe(source: Path, tokenizer: Path, **changes: Any) -> ImportSettings:
    """Return the settings of an import."""
    fields = {"source": str(source), "tokenizer": str(tokenizer), "min_probability": 0.002}
    return ImportSettings(**fields | {"validation_fraction": 0.2} | changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def texts(tiny_teacher: Path) -> list[list[int]]:
    return sample_texts(tiny_teacher, 70, num_tokens=NUM_TOKENS, length=60)


@pytest.fixture(scope="module")
def dataset(
    tmp_path_factory: pytest.TempPathFactory, texts: list[list[int]], tiny_teacher: Path
) -> Path:
    folder = tmp_path_factory.mktemp("published") / "logits"
    write_dataset(folder, texts, tiny_teacher, CONFIG, num_tokens=NUM_TOKENS)
    return folder


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory, dataset: Path, tiny_teacher: Path) -> Path:
    out = tmp_path_factory.mktemp("imported") / "out"
    import_logits(out, describe(dataset, tiny_teacher))
    return out


def test_the_cache_has_the_teachers_distributions(
    imported: Path, texts: list[list[int]], tiny_teacher: Path
) -> None:
    cache, index = (
        LogitCache(imported / CACHE_FILE),
        TokenIndex.read(imported / "tokens/index.json"),
    )
    held_out = index.read_split("val")
    documents = [*cache.table.documents.tolist(), *held_out.documents.tolist()]
    assert sorted(documents) == list(range(len(texts))) and 5 < len(held_out) < 30
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    for number in range(0, len(cache), 9):
        row, document = cache.table[number], int(cache.table.documents[number])
        assert row.ids.tolist() == texts[document]
        targets, logprobs = cache.read_targets(number), score(model, texts[document])
        assert len(targets) == len(logprobs) == len(row.ids) - 1
        for position, expected in enumerate(logprobs):
            expected[NUM_TOKENS:] = -1e4
            tokens = slice(*targets.offsets[position : position + 2])
            ids = targets.ids[tokens]
            p = np.exp(expected)
            # Those of the 64 that the dataset has; where a fit is near the threshold, either may be right.
            best = np.argsort(-expected)[:62]
            assert set(best[p[best] > 0.0025].tolist()) <= set(ids.tolist())
            assert set(ids.tolist()) <= {*np.flatnonzero(p > 0.0016).tolist(), int(p.argmax())}
            assert np.abs(np.exp(targets.logprobs[tokens]) - p[ids]).max() < 0.006
            tail = np.exp(targets.tail_logprobs[position, 0])
            assert abs(tail - (1 - p[ids].sum())) < 0.01


def test_the_manifest_says_what_was_imported(imported: Path, dataset: Path) -> None:
    found = Manifest.read(imported / "manifest.json")
    assert found.imported is not None and found.fidelity is not None
    assert found.imported.tail == "estimated" and found.imported.files == 3
    assert found.imported.compression["polynomial_terms"] == [0, 1, 2, 3, 4, "sqrt"]
    assert found.fidelity.kl < 1e-3 and found.fidelity.positions == found.positions
    assert found.fidelity.agreement > 0.95
    assert not (imported / "parts").exists()


@pytest.mark.parametrize("stage", ["tokens", "parts", "merged"])
def test_an_interrupted_import_is_resumed(
    stage: str,
    imported: Path,
    dataset: Path,
    tiny_teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = describe(dataset, tiny_teacher)
    name = {"tokens": "build_codec", "parts": "write_part", "merged": "build_manifest"}[stage]
    real, calls = getattr(run, name), []

    def interrupt(*args: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == (2 if stage == "parts" else 1):
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(run, name, interrupt)
    with pytest.raises(KeyboardInterrupt):
        import_logits(tmp_path, settings)
    if stage == "tokens":
        (tmp_path / "tokens" / "index.json").unlink()
        (tmp_path / "tokens" / "shard_00002.h5").unlink()
    import_logits(tmp_path, settings)
    assert (tmp_path / CACHE_FILE).read_bytes() == (imported / CACHE_FILE).read_bytes()
    assert (tmp_path / "manifest.json").read_bytes() == (imported / "manifest.json").read_bytes()
    assert (stage != "parts") or len(calls) == 4  # three files, one of them twice


def test_what_does_not_fit_together_is_refused(
    dataset: Path, imported: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    outs = (tmp_path / str(number) for number in range(20))

    def refuse(message: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            source = changes.pop("source", dataset)
            tokenizer = changes.pop("tokenizer", tiny_teacher)
            import_logits(next(outs), describe(source, tokenizer, **changes))

    refuse("does not exist", source=tmp_path / "none")
    refuse("cannot load the tokenizer", tokenizer=tmp_path / "none")
    refuse("--validation-fraction is 1.5", validation_fraction=1.5)
    other = tmp_path / "other.yaml"
    other.write_text(json.dumps(CONFIG | {"k": 60}))
    refuse("bytepacked_indices has .* values, but by", compression=other)
    other.write_text(json.dumps(CONFIG | {"d": 200}))
    refuse("has 300 tokens, but the dataset's teacher only 200 ids", compression=other)
    with pytest.raises(ValueError, match=r"is of another import \(other min_probability\)"):
        import_logits(imported, describe(dataset, tiny_teacher, min_probability=0.01))
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(dataset / "data_0.parquet", alone)
    refuse("has no compression_config.yaml: give --compression", source=alone)
    (alone / "data_0.parquet").write_bytes(b"PAR1")
    refuse(
        "not a readable parquet file",
        source=alone,
        compression=dataset / "compression_config.yaml",
    )


def test_distributions_of_other_tokens_are_refused(
    dataset: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    shutil.copytree(dataset, tmp_path / "logits")
    path = tmp_path / "logits" / "data_0.parquet"
    rows = pq.read_table(path).to_pylist()
    settings = describe(tmp_path / "logits", tiny_teacher)
    wrong = [row | {"input_ids": [(7 * i) % 60 + 240 for i in row["input_ids"]]} for row in rows]
    write_rows(path, wrong)
    with pytest.raises(ValueError, match=r"of the first texts' tokens only .* are among the 64"):
        import_logits(tmp_path / "out", settings)
    write_rows(path, [*rows[:-1], rows[-1] | {"input_ids": [*rows[-1]["input_ids"][:-1], 310]}])
    with pytest.raises(
        ValueError, match=r"data_0.parquet, row 29: has id 310, but the tokenizer only 300"
    ):
        import_logits(tmp_path / "ids", settings)
    for name in ("bytepacked_indices", "compressed_logprobs"):
        rows[-1][name] = rows[-1][name][:-3]
    write_rows(path, rows)
    with pytest.raises(ValueError, match=r"data_0.parquet: row 29 has .* tokens, but only"):
        import_logits(tmp_path / "short", settings)


def test_packed_rows_and_labels(
    dataset: Path, texts: list[list[int]], tiny_teacher: Path, tmp_path: Path
) -> None:
    rows = [row for p in sorted(dataset.glob("*.parquet")) for row in pq.read_table(p).to_pylist()]
    names = ("bytepacked_indices", "compressed_logprobs")
    packed = []
    for first in range(0, 60, 3):  # as its pack_logits does: without each text's last token
        group = [row for row in rows[first : first + 3] if len(row["input_ids"]) > 4]
        lengths = [len(row[names[0]]) for row in group]
        ids = [i for row, n in zip(group, lengths, strict=True) for i in row["input_ids"][:n]]
        marks = [number for number, n in enumerate(lengths, 1) for _ in range(n)]
        columns = {name: [x for row in group for x in row[name]] for name in names}
        labels = [-100 if place % 10 == 4 else i for place, i in enumerate(ids)]
        packed.append({"input_ids": ids, "labels": labels, "attention_mask": marks, **columns})
    folder = tmp_path / "packed"
    folder.mkdir()
    shutil.copy(dataset / "compression_config.yaml", folder)
    write_rows(folder / "data_0.parquet", packed)
    import_logits(tmp_path / "out", describe(folder, tiny_teacher))
    whole, cache = LogitCache(tmp_path / "out" / CACHE_FILE), {}
    for number in range(len(whole)):
        row, targets = whole.table[number], whole.read_targets(number)
        assert row.ids.tolist() in [text[:-1] for text in texts]
        assert not row.loss_mask[-1] and len(targets) == row.num_positions
        cache[tuple(row.ids.tolist())] = row.num_positions
    assert len(cache) > 20 and any(n < len(ids) - 1 for ids, n in cache.items())


def test_values_that_are_no_logprobs_have_an_unknown_tail(
    texts: list[list[int]], tiny_teacher: Path, tmp_path: Path
) -> None:
    legacy = {"vocab_size": WIDTH, "k": 64, "exact_k": 32, "polynomial_degree": 5}
    folder = tmp_path / "logits"
    write_dataset(folder, texts[:30], tiny_teacher, legacy, num_tokens=NUM_TOKENS)
    out = tmp_path / "out"
    import_logits(out, describe(folder, tiny_teacher))
    known = Manifest.read(out / "manifest.json")
    rows = pq.read_table(folder / "data_0.parquet").to_pylist()
    for row in rows:  # logits less their mean
        row["exact_values"] = [[x + 9.0 for x in values] for values in row["exact_values"]]
        row["coeffs"] = [[c[0] + 9.0, *c[1:]] for c in row["coeffs"]]
    write_rows(folder / "data_0.parquet", rows)
    import_logits(tmp_path / "more", describe(folder, tiny_teacher))
    found = Manifest.read(tmp_path / "more" / "manifest.json")
    assert known.imported and known.imported.tail == "estimated"
    assert found.imported and found.imported.tail == "unknown"
    assert known.fidelity and found.fidelity and found.fidelity.kl < 1e-3
    assert found.fidelity.tail_mass < known.fidelity.tail_mass


@pytest.mark.slow
def test_a_dataset_of_the_hub_is_the_same(
    dataset: Path, imported: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "retort", "import", "distillkit", NAME]
    command += ["--tokenizer", str(tiny_teacher), "--output", str(tmp_path / "out")]
    command += ["--min-probability", "0.002", "--validation-fraction", "0.2"]
    with serve(dataset, home=tmp_path / "home", patience_s=30) as hub:
        variables = os.environ | hub.environment
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    index = "tokens/index.json"
    assert (tmp_path / "out" / index).read_bytes() == (imported / index).read_bytes()
    # The Hub's commit names its teacher, so all but the header is the same.
    found, theirs = (LogitCache(folder / CACHE_FILE) for folder in (tmp_path / "out", imported))
    assert found.read_record(3) == theirs.read_record(3)
    command[-5] = str(tmp_path / "gone")
    gone = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert gone.returncode == 1 and "nor a dataset that the Hub gives" in gone.stderr, gone.stderr


def test_the_tokenizer_is_kept_as_it_is(imported: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    mine, theirs = load_tokenizer(str(imported / "tokenizer")), load_tokenizer(str(tiny_teacher))
    assert mine.get_vocab() == theirs.get_vocab()
    swapped = load_tokenizer(str(swap_tokens(tmp_path / "swapped", tiny_teacher)))
    assert mine.get_vocab() != swapped.get_vocab()
