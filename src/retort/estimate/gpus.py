"""What is known of GPUs by name: memory and speed, from their data sheets (gpus.yaml), or of those of this machine."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import yaml

# Shares of the peak that matrices reach over a whole pass. Training: 46 % in PaLM (arXiv 2204.02311, 2022, table 3), 38
# to 43 % in Llama 3 (arXiv 2407.21783, 2024, table 4), less for small models. A forward pass with selection: assumed.
FORWARD_UTILIZATION, TRAINING_UTILIZATION = 0.40, 0.35
# Memory of a GPU that PyTorch does not get, or that its allocator leaves unused: the context of CUDA, its libraries'
# workspaces, and 6 % of fragments.
_CONTEXT_BYTES, _USABLE = 1.0e9, 0.94


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU: bytes of memory, and operations a second of its matrix units (None: not known)."""

    name: str
    memory: float
    peak: float | None

    @property
    def usable(self) -> float:
        """The bytes that tensors can have."""
        return self.memory * _USABLE - _CONTEXT_BYTES


@cache
def _read_table() -> dict[str, dict[str, str | float]]:
    text = Path(__file__).with_name("gpus.yaml").read_text(encoding="utf-8")
    found: dict[str, dict[str, str | float]] = yaml.safe_load(text)
    return found


def find_gpu(name: str) -> Gpu:
    """Return what is known of a GPU. Raises ValueError, with the names that are known, for any other."""
    found = _read_table().get(name.strip().lower())
    if found is None:
        raise ValueError(
            f"the GPU {name!r} is not known. Known are {', '.join(_read_table())}. For another one, name the one that "
            "is nearest in memory."
        )
    return Gpu(name.strip().lower(), float(found["memory"]) * 1e9, float(found["tflops"]) * 1e12)


def detect_gpu() -> Gpu | None:
    """Return the first GPU that PyTorch sees on this machine, None without one."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    peaks = [
        float(gpu["tflops"]) * 1e12
        for gpu in _read_table().values()
        if re.search(rf"\b{gpu['device']}\b", found.name)
    ]
    return Gpu(found.name, float(found.total_memory), min(peaks) if peaks else None)
