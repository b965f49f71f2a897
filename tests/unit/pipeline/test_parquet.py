"""`retort export-parquet`: what datasets reads back is the cache; files are whole, resumed, and of one cache."""

from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pytest

from retort.cache.merged import merge_parts
from retort.cache.parts import part_path, write_part
from retort.cache.reader import CACHE_FILE, LogitCache
from retort.pipeline import parquet
from retort.pipeline.parquet import export_parquet
from support.synthetic import (
    CODEC,
    CODED,
    ORDER,
    make_header,
    make_tables,
    streams_of,
    write_parts,
    write_tokens,
)


@pytest.fixture(params=["top_k", "top_p", "sampled"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_folder(tmp_path / "cache", request.param)


def make_folder(folder: Path, method: str, *, seed: int = 0) -> Path:
    """Write a merged cache, with what makes it a finished one."""
    index = write_tokens(folder / "tokens", make_tables(seed))
    header = make_header(index, CODEC if method == "top_k" else CODED[method])
    for part in index.parts if method != "top_k" else ():
        table, path = index.read_part(part), part_path(folder / "parts", part.name, header)
        write_part(path, table, streams_of(table, CODED[method]), header, ORDER)
    if method == "top_k":
        write_parts(index, folder / "parts", header)
    merge_parts(index, folder / "parts", header, folder / CACHE_FILE)
    (folder / "manifest.json").write_text("{}")
    return folder


def test_what_datasets_reads_is_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "_GROUP_TOKENS", 30)
    cache, out = LogitCache(folder / CACHE_FILE), tmp_path / "out"
    files = export_parquet(folder, out, file_positions=20)
    assert len(files) > 1 and sorted(out.iterdir()) == files
    rows = datasets.load_dataset(
        "parquet", data_files=f"{out}/*.parquet", split="train", cache_dir=str(tmp_path / "hf")
    )
    assert len(rows) == len(cache)
    for index, row in enumerate(rows):
        sequence, targets = cache.table[index], cache.read_targets(index)
        assert row["input_ids"] == sequence.ids.tolist()
        assert row["loss_mask"] == sequence.loss_mask.tolist()
        assert row["key"] == sequence.key.hex()
        assert row["document"] == cache.table.documents[index]
        assert row["segment_starts"] == sequence.segment_starts.tolist()
        label = cache.table.label_names[cache.table.labels[index]]
        assert (row["category"], row["language"], row["source"]) == (*label, "")
        ids, logprobs = row["top_ids"], row["top_logprobs"]
        assert [len(i) for i in ids] == targets.sizes.tolist()
        assert list(chain(*ids)) == targets.ids.tolist()
        assert np.array_equal(np.array(list(chain(*logprobs)), np.float32), targets.logprobs)
        for column, name in enumerate(("tail_logprobs", "tail_logprobs_at_2.0")):
            if column < targets.tail_logprobs.shape[1]:
                found = np.array(row[name], np.float32)
                assert np.array_equal(found, targets.tail_logprobs[:, column])
        assert (targets.num_exact is not None) == ("num_exact" in row)
        if targets.num_exact is not None:
            assert row["num_exact"] == targets.num_exact.tolist()


def test_an_interrupted_export_is_resumed(tmp_path: Path) -> None:
    folder, out = make_folder(tmp_path / "cache", "top_p"), tmp_path / "out"
    files = export_parquet(folder, out, file_positions=20)
    contents = [file.read_bytes() for file in files]
    files[1].unlink()
    times = [file.stat().st_mtime_ns for file in files if file.exists()]
    (out / ".train.node.1.tmp").touch()
    assert export_parquet(folder, out, file_positions=20) == files
    assert [file.read_bytes() for file in files] == contents
    assert [f.stat().st_mtime_ns for f in (files[0], *files[2:])] == times


def test_files_of_another_cache_are_refused(tmp_path: Path) -> None:
    one, other = (make_folder(tmp_path / str(s), "top_p", seed=s) for s in (0, 1))
    files = export_parquet(one, tmp_path / "out")
    with pytest.raises(ValueError, match="is not of this cache, or damaged"):
        export_parquet(other, tmp_path / "out")
    files[0].write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="is not of this cache, or damaged"):
        export_parquet(one, tmp_path / "out")
    with pytest.raises(ValueError, match="is not a logit cache"):
        export_parquet(tmp_path, tmp_path / "more")
    (one / "manifest.json").unlink()
    with pytest.raises(ValueError, match="not a finished cache"):
        export_parquet(one, tmp_path / "more")
