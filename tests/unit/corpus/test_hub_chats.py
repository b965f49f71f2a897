"""Chats of a dataset on the Hub are those of a local file, streamed or not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.corpora import write_jsonl
from support.hub import NAME, serve

CALL = {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"question {i}"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]}
            if i == 3
            else {"role": "assistant", "content": f"answer {i}"},
        ],
        "source": i,
    }
    for i in range(6)
]
_READ = """
import json, sys
from retort.config.sections import Dataset
from retort.corpus.documents import Counts
from retort.corpus.reading import read_shard_documents
keys = json.loads(sys.argv[1])
dataset = Dataset.model_validate({"num_proc": 1, "max_samples": 6} | keys)
found = read_shard_documents(dataset, shard=0, num_shards=1, counts=Counts())
print(json.dumps([d.messages for d in found]))
"""


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_chats_of_the_hub_are_read_as_local_ones(tmp_path: Path, kind: str) -> None:
    (tmp_path / "data").mkdir()
    local = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    if kind == "jsonl":
        write_jsonl(tmp_path / "data" / "train.jsonl", ROWS)
    else:
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.Table.from_pylist(ROWS)
        pyarrow.parquet.write_table(table, tmp_path / "data" / "train.parquet")
    with serve(tmp_path / "data") as hub:
        environment = os.environ | hub.environment | {"HF_HOME": str(tmp_path / "home")}

        def read(**keys: object) -> object:
            done = subprocess.run(
                [sys.executable, "-c", _READ, json.dumps(keys)],
                env=environment | {"HF_HUB_DOWNLOAD_TIMEOUT": "60"},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            return json.loads(done.stdout.splitlines()[-1])

        expected = read(name="json", data_files=str(local))
        assert read(name=NAME, streaming=True) == expected
        assert read(name=NAME) == expected
    assert isinstance(expected, list) and len(expected) == 6
    assert expected[3][1]["tool_calls"] == [CALL]
