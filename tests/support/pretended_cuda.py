"""GPUs that are pretended: tensors say that they are on cuda:0, and are computed on the CPU.

So the code that asks for the device takes its CUDA branch, with real values, in PyTorch's CPU build. What CUDA would
refuse is an error here (tensors on two devices in one operation), and what makes the host wait for a GPU is counted.

The CPU build needs a guard of the device (cuda_guard.cpp), which stays in the process; so these tests run in a process
of their own (unit/test_pretended_gpu.py).
"""

import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from support.pretended_streams import Clock, Event, Stream
from support.syncs import needs_result

aten = torch.ops.aten
_SOURCE = Path(__file__).with_name("cuda_guard.cpp")
_MOVES = ("copy_", "_to_copy", "_copy_from", "_copy_from_and_resize")


def build_guard(folder: Path) -> Path:
    """Compile the guard into `folder` (2 to 3 s of processor time). Raises RuntimeError where there is no compiler."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise RuntimeError(
            "no C++ compiler (g++): PyTorch's CPU build cannot pretend to have a GPU"
        )
    home, library = Path(torch.__file__).parent, folder / "cuda_guard.so"
    flags = ["-O0", "-std=c++20", "-shared", "-fPIC", f"-I{home}/include", f"-L{home}/lib", "-lc10"]
    command = [compiler, str(_SOURCE), *flags, "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{_SOURCE.name} does not compile: {done.stderr[-2000:]}")
    return library


class OnGPU(Tensor):
    """A tensor that says it is on a GPU; `held`: the same on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, real: Tensor, device: torch.device) -> "OnGPU":
        # Never one of inference mode: it could not be a view of a weight.
        with torch.inference_mode(False):
            made: OnGPU = torch.Tensor._make_wrapper_subclass(
                cls,
                real.size(),
                strides=real.stride(),
                storage_offset=real.storage_offset(),
                dtype=real.dtype,
                device=device,
            )
        made.held = real
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{self.held!r} on {self.device}"

    def tolist(self) -> Any:
        """Return the values; PyTorch refuses this for tensors that are not its own."""
        return self.cpu().tolist()

    def record_stream(self, stream: Any) -> None:
        """Memory is not reused here."""
        assert isinstance(stream, Stream) and stream.device == self.device, (stream, self.device)

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise AssertionError(f"{func} outside of PretendedCUDA")


def on_gpu(values: Tensor, device: str = "cuda:0") -> OnGPU:
    """Return a CPU tensor on a pretended GPU, without counting a copy."""
    return OnGPU(values, torch.device(device))


def put_on_gpus(model: nn.Module, devices: dict[str, str]) -> None:
    """Put weights on pretended GPUs, by the name of their module, and let accelerate move what lies between them."""
    from accelerate.hooks import attach_align_device_hook_on_blocks

    moved: dict[int, nn.Parameter] = {}  # tied weights stay one
    for name, device in devices.items():
        for module in model.get_submodule(name).modules():
            for key, weight in module._parameters.items():
                if weight is not None and not isinstance(weight, OnGPU):
                    if id(weight) not in moved:
                        values = on_gpu(weight.detach(), device)
                        moved[id(weight)] = nn.Parameter(values, requires_grad=weight.requires_grad)
                    module._parameters[key] = moved[id(weight)]
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[key] = on_gpu(buffer, device)
    if len(set(devices.values())) > 1:
        attach_align_device_hook_on_blocks(
            model, execution_device=devices, offload=dict.fromkeys(devices, False)
        )


class PretendedCUDA(TorchDispatchMode):
    """Runs operations of pretended GPUs on the CPU.

    waits: how often the host waits for a GPU, by operation. attention: of every attention in inference mode, whether
    PyTorch could take its flash kernel on CUDA. dtypes: of the factors and results of matrix products. cost: seconds of
    an operation on its GPU's current stream (`clock`).
    """

    def __init__(self, *, gpus: int = 1, cost: Callable[[str], float] = lambda _: 0.0) -> None:
        super().__init__()
        self.clock, self.cost, self.num_gpus = Clock(gpus), cost, gpus
        self.waits, self.attention = Counter[str](), list[bool]()
        self.dtypes = Counter[tuple[torch.dtype, torch.dtype]]()
        self._undo: list[tuple[Any, str, Any]] = []
        self._depth = 0

    def __enter__(self) -> Any:
        """Make torch.cuda that of the pretended GPUs as well."""
        if not self._depth:
            self._replace_torch_cuda()
        self._depth += 1
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self._depth -= 1
        if not self._depth:
            torch._C._set_only_lift_cpu_tensors(False)
            while self._undo:
                setattr(*self._undo.pop())

    def _replace_torch_cuda(self) -> None:
        changes: dict[str, Any] = {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "is_bf16_supported": lambda **_: True,
            "device_count": lambda: self.num_gpus,
            "empty_cache": lambda: None,
            "synchronize": lambda *_: self.clock.wait_for_all(),
            "Stream": self.clock.new_stream,
            "Event": lambda **_: Event(self.clock),
            "stream": self.clock.use,
            "current_stream": self.clock.current,
        }
        for name, value in changes.items():
            self._undo.append((torch.cuda, name, getattr(torch.cuda, name)))
            setattr(torch.cuda, name, value)
        # torch.tensor(..., device="cuda:0") is made on the CPU, and then copied by an operation that is seen here.
        torch._C._set_only_lift_cpu_tensors(True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is aten.scaled_dot_product_attention.default:
            self._note_attention(args, kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # in inference mode even these come here
                return func.decompose(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        target = self._find_device(name, args, kwargs, inputs)
        if name in ("pin_memory", "_pin_memory"):
            return args[0]
        self._count(func, name, args, kwargs, target)
        found = self._compute(func, name, *tree_map(_unwrap, (args, kwargs)))
        if target is not None:
            found = tree_map(lambda x: OnGPU(x, target) if isinstance(x, Tensor) else x, found)
        is_alias = any(isinstance(x, OnGPU) for x in inputs)
        return return_and_correct_aliasing(func, args, kwargs, found) if is_alias else found

    def _find_device(
        self, name: str, args: Any, kwargs: dict[str, Any], inputs: list[Tensor]
    ) -> torch.device | None:
        """Return the GPU that an operation runs on, None for the CPU, and let it run on the CPU."""
        given = kwargs.get("device")
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if given is not None:
            kwargs["device"] = torch.device("cpu")
            given = torch.device(given)
            return None if given.type == "cpu" else torch.device("cuda", given.index or 0)
        gpus = {x.device for x in inputs if isinstance(x, OnGPU)}
        if name in _MOVES:
            return args[0].device if isinstance(args[0], OnGPU) else None
        strangers = [x for x in inputs if not isinstance(x, OnGPU) and x.dim() > 0]
        may_index = name in ("index", "index_put", "index_put_", "_index_put_impl_")
        assert len(gpus) <= 1, f"{name}: tensors on {sorted(map(str, gpus))}"
        assert not gpus or not strangers or may_index, f"{name}: a tensor on the CPU beside {gpus}"
        return next(iter(gpus), None)

    def _count(
        self, func: Any, name: str, args: Any, kwargs: dict[str, Any], target: torch.device | None
    ) -> None:
        sources = {x.device for x in tree_leaves((args, kwargs)) if isinstance(x, OnGPU)}
        busy = {device for device in (target, *sources) if device is not None}
        for device in busy:
            self.clock.run(device, self.cost(name))
        if len(busy) == 2:  # each GPU waits for the other at a copy
            self.clock.meet(*busy)
        if busy and _waits(name, args, kwargs, target):
            self.waits[name] += 1
            for device in busy:
                self.clock.wait_for(self.clock.current(device))

    def _note_attention(self, args: Any, kwargs: dict[str, Any]) -> None:
        """Note whether the flash kernel could be used: it takes no mask, and no float32."""
        mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        dtypes = {x.dtype for x in args[:3]}
        is_causal = args[5] if len(args) > 5 else kwargs.get("is_causal", False)
        self.attention.append(
            mask is None and is_causal and dtypes <= {torch.bfloat16, torch.float16}
        )

    def _compute(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        if name == "_fused_sdp_choice":
            return 0  # the sum of products that is written out
        if name == "mm" and func._overloadname.startswith("dtype"):
            left, right, dtype = args[0], args[1], args[2] if len(args) > 2 else kwargs["out_dtype"]
            assert left.dtype == right.dtype and left.dtype in (torch.bfloat16, torch.float16)
            assert dtype == torch.float32, dtype
            args, kwargs = (
                (left.float(), right.float()),
                {k: kwargs[k] for k in kwargs if k == "out"},
            )
            self.dtypes[left.dtype, dtype] += 1
            return aten.mm.out(*args, **kwargs) if kwargs else aten.mm.default(*args)
        found = func(*args, **kwargs)
        if name in ("mm", "addmm", "bmm"):
            self.dtypes[args[-1].dtype, found.dtype] += 1
        return found


def _waits(name: str, args: Any, kwargs: dict[str, Any], target: torch.device | None) -> bool:
    """Say whether the host waits for a GPU in this operation."""
    if needs_result(name, args, kwargs):
        return True
    if name in _MOVES:
        places = {target, args[1].device if name == "copy_" else args[0].device}
        crosses = len({"cpu" if p is None else torch.device(p).type for p in places}) == 2
        is_queued = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        return crosses and not is_queued
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):  # copied from the CPU
        return any(i is not None and not isinstance(i, OnGPU) for i in args[1])
    return (
        name == "segment_reduce" and kwargs.get("lengths") is not None and not kwargs.get("unsafe")
    )


def _unwrap(value: Any) -> Any:
    return value.held if isinstance(value, OnGPU) else value
