"""Ranks of a node hold one copy of a sharded student's weights, equal to what one process builds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Writes, for students with untied and tied layers, and where there is no room for a file: the memory of its own that
# each rank has more of, as a share of the weights, whether layers are tied, and what the student reads.
_RANK = """
import gc, os, shutil
from accelerate import PartialState
from transformers import AutoModelForCausalLM, LlamaConfig
import torch
from retort.models.students import build_empty
from retort.training.one_copy import build_in_one_copy

shape = dict(vocab_size=20_000, hidden_size=256, intermediate_size=512, num_hidden_layers=2)

def own_bytes():
    gc.collect()
    line = next(x for x in open("/proc/self/status") if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

PartialState(cpu=True)
for ties, has_room in ((False, True), (True, True), (False, False)):
    config = LlamaConfig(**shape, num_attention_heads=4, tie_word_embeddings=ties)
    if not has_room:
        shutil.disk_usage = lambda _: shutil._ntuple_diskusage(1, 1, 0)

    def build(is_empty):
        if is_empty:
            return build_empty(config)
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)

    before = own_bytes()
    model = build_in_one_copy(build)
    share = (own_bytes() - before) / model.get_memory_footprint()
    is_tied = model.lm_head.weight is model.model.embed_tokens.weight
    with open(__file__ + os.environ["RANK"], "a") as seen:
        print(share, is_tied, model(torch.arange(8)[None]).logits.sum().item(), file=seen)
"""


@pytest.mark.slow
def test_two_ranks_share_the_weights_where_there_is_room(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(_RANK)
    place = tmp_path / "place"
    place.mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(  # torchrun's own folder may outlive it
        [*torchrun, "--nproc-per-node=2", f"--log-dir={tmp_path}", str(tmp_path / "rank.py")],
        capture_output=True,
        text=True,
        env=os.environ | {"TMPDIR": str(place)},
    )
    assert done.returncode == 0, done.stderr
    seen = "".join((tmp_path / f"rank.py{rank}").read_text() for rank in range(2))
    lines = [line.split() for line in seen.splitlines()]
    assert len(lines) == 6
    assert sorted(words[1] for words in lines) == ["False"] * 4 + ["True"] * 2
    assert len({tuple(words[1:]) for words in lines}) == 2, "all ranks, with room or without"
    shares = sorted(float(words[0]) for words in lines)
    assert shares[3] < 0.6 < 0.9 < shares[4], shares  # a few MB of libraries are noise
    assert list(place.iterdir()) == []
