"""train.py with one thing about several ranks changed, for tests: python -m torch.distributed.run THIS HOW FLAGS.

`fsdp`: accelerate takes the CPU for an accelerator (it would train by DDP without a word). `alone`: gradients are not
shared. `counted`: each rank notes in reads_RANK.txt which sequences it read. `bf16`, `fp16`, `fsdp-bf16`, `fsdp-fp16`:
mixed precision, as if the CPU were a GPU, where every loss must be float32.
"""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch.nn.parallel import DistributedDataParallel

from retort.losses.terms import LossTerms
from retort.training import arguments
from retort.training.batches import Item, TrainingData
from retort.training.loss_window import LossWindow

_SCRIPT = Path(__file__).parents[2] / "workflow" / "scripts" / "train.py"
_add = LossWindow.add
_init_state, _read = AcceleratorState.__init__, TrainingData.read
_init_accelerator = Accelerator.__init__


def _call_the_cpu_an_accelerator(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
    PartialState()
    if PartialState._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    _init_state(self, *args, **kwargs)
    PartialState._shared_state["distributed_type"] = self.distributed_type


def _note(self: TrainingData, index: int) -> Item:
    with Path(f"reads_{os.environ['RANK']}.txt").open("a") as file:
        file.write(f"{index}\n")
    return _read(self, index)


def _pass_on(self: DistributedDataParallel, *args: Any, **kwargs: Any) -> Any:
    return self.module(*args, **kwargs)


def _add_float32(self: LossWindow, terms: LossTerms, **options: Any) -> None:
    assert {term.dtype for term in terms if term is not None} == {torch.float32}
    _add(self, terms, **options)


def _scale_fp16(self: Accelerator, *args: Any, **kwargs: Any) -> None:
    """accelerate leaves float16 out on a CPU, without a word."""
    _init_accelerator(self, *args, **kwargs)
    self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu")


how = sys.argv.pop(1)
if how.endswith(("bf16", "fp16")):
    arguments.choose_precision = lambda *_: how[-4:]
    LossWindow.add = _add_float32  # type: ignore[method-assign]  # on purpose
if how.endswith("fp16"):
    Accelerator.__init__ = _scale_fp16
if how.startswith("fsdp"):
    AcceleratorState.__init__ = _call_the_cpu_an_accelerator
elif how == "alone":
    DistributedDataParallel.forward = _pass_on  # type: ignore[method-assign]  # on purpose
elif how == "counted":
    TrainingData.read = _note  # type: ignore[method-assign]  # on purpose
sys.argv[0] = str(_SCRIPT)
runpy.run_path(str(_SCRIPT), run_name="__main__")
