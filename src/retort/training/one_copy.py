"""One copy of a sharded student's weights in a node's memory before FSDP spreads them, whatever its number of GPUs.

The node's first rank builds the student and writes its weights to a file without a name, of which a kill leaves
nothing. All ranks of the node map that file into their memory, where the kernel keeps its pages once.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from typing import IO

import torch
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from retort.cluster.ranks import local_rank, rank
from retort.io.units import format_bytes

logger = logging.getLogger(__name__)


def build_in_one_copy(build: Callable[[bool], PreTrainedModel]) -> PreTrainedModel:
    """Return the model that `build` makes, with weights in memory that a node's ranks share; called by every rank.

    build: is told whether the weights need no values. Where the folder for temporary files (TMPDIR) has no room for
    them, every rank has its own copy.
    """
    model = build(False) if local_rank() == 0 else None
    file = _write_weights(model) if model else None
    path = f"/proc/{os.getpid()}/fd/{file.fileno()}" if file else ""
    found: list[str] = gather_object([path])  # waits for all ranks
    path = found[rank() - local_rank()]
    if model is None:
        model = build(bool(path))
    if path:
        model.load_state_dict(torch.load(path, mmap=True), assign=True)
        model.tie_weights()
    gather_object([""])  # before the file is closed
    return model


def _write_weights(model: PreTrainedModel) -> IO[bytes] | None:
    """Return an open file that has no name, with the model's state; None if there is no room for it."""
    size = model.get_memory_footprint()
    folder = tempfile.gettempdir()
    if (free := shutil.disk_usage(folder).free) < 1.1 * size:
        logger.warning(
            f"each GPU's process holds a copy of the student's weights in host memory until they are spread: "
            f"{folder} has {format_bytes(free)} free, and {format_bytes(size)} would let them share one. Set TMPDIR "
            "to a larger local disk if memory runs out."
        )
        return None
    file = tempfile.TemporaryFile()  # noqa: SIM115  # the ranks open it while it is open here
    torch.save(model.state_dict(), file)
    file.flush()
    return file
