"""What an estimate is asked for: the device, the money, what may be run; and the models of a config."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig

from retort.estimate.gpus import FORWARD_UTILIZATION, TRAINING_UTILIZATION, Gpu

_ERROR = 1.15  # of memory, as measured (docs/benchmarks.md)


@dataclass(frozen=True)
class Measured:
    """The seconds of a step of a training, and the most bytes of its process; None: not known."""

    seconds: float
    memory: int | None


@dataclass(frozen=True)
class Rates:
    """What was measured elsewhere of the steps of runs, by their names."""

    student: Mapping[str, Measured] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True)
class Options:
    """gpu: None for a CPU. num_devices: GPUs, or CPU cores. slots: minutes of a job of a rule, by rule.

    utilization: None for the usual shares. may_run: whether models may be loaded and run here to measure. is_quick:
    read little of the text. is_counted: whether num_devices is known.
    """

    gpu: Gpu | None
    num_devices: int
    tokens: int | None = None
    price: float | None = None
    utilization: float | None = None
    may_run: bool = False
    is_quick: bool = False
    is_counted: bool = True
    rates: Rates = field(default_factory=Rates)
    slots: Mapping[str, int] = field(default_factory=dict)
    attempts: int = 1

    @property
    def usable(self) -> float:
        """Bytes that tensors can have on a GPU; the check of a run refuses only what is beyond the estimate's error."""
        return self.gpu.usable * (_ERROR if self.is_quick else 1.0) if self.gpu else 0.0

    @property
    def device(self) -> str:
        """The kind of device, as in PyTorch."""
        return "cuda" if self.gpu else "cpu"

    @property
    def forward_share(self) -> float:
        """The share of the peak that a forward pass reaches."""
        return self.utilization or FORWARD_UTILIZATION

    @property
    def training_share(self) -> float:
        """The share of the peak that a training reaches."""
        return self.utilization or TRAINING_UTILIZATION


@dataclass(frozen=True)
class Models:
    """Configs of teachers by id, of students by run; tokenizers by id of the tokens, None where there is none here."""

    teachers: Mapping[str, PretrainedConfig]
    students: Mapping[str, PretrainedConfig]
    tokenizers: Mapping[str, Any]
