"""Starts a compiled kernel with as little host work as Triton allows.

The first call goes through Triton's own path (which compiles); later calls hand the arguments
straight to the compiled launcher.  Callers key a Launch by everything Triton would specialise on:
dtypes, constants, 16-byte alignment of every pointer (checked once a layer call).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import get_ident
from typing import Any, NamedTuple

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
"""Address of the current stream of a device; without the cost of a torch.cuda.Stream."""

current_device: Any = getattr(torch._C, "_cuda_getDevice", None)

_thread = threading.local()


def bind_context() -> None:
    """Give this thread a CUDA context, which making a TMA descriptor needs.

    Threads (autograd's, too) have none while all they ask for is memory that torch already holds.
    """
    if not getattr(_thread, "is_bound", False) and torch.cuda.is_initialized():
        torch.cuda.is_current_stream_capturing()  # a runtime call, allowed while capturing
        _thread.is_bound = True


Heard = tuple["Launch", tuple[int, int], tuple[Any, ...]]
"""A launch, its grid and its arguments."""
_listeners: dict[int, tuple[list[Heard], bool]] = {}
"""By thread: who hears of its launches, and whether they happen."""
_KNOWN_LAUNCHER = "iiiKKppOOOOOO"
"""Format of what Triton's launchers take before a kernel's arguments: grid, stream, function,
cooperative, dependent launch, two scratch memories, two records, two hooks."""


@contextmanager
def listening(*, launch: bool = True) -> Iterator[list[Heard]]:
    """Every launch that this thread makes, or with launch=False would make, inside the block."""
    heard: list[Heard] = []
    _listeners[get_ident()] = (heard, launch)
    try:
        yield heard
    finally:
        del _listeners[get_ident()]


class Entry(NamedTuple):
    """A compiled kernel's launcher without the steps around it: pointers may be plain integers.

    It takes the grid, the stream, `fixed`, the arguments (a descriptor as the driver's own list)
    and `tail`.
    """

    call: Any
    fixed: tuple[Any, ...]
    descriptors: list[Any]
    tail: tuple[Any, ...]


class Launch:
    """One kernel with its constants fixed; call it with a grid and the run-time arguments."""

    __slots__ = (
        *("_compiled", "_function", "_packed", "_run", "_tail"),
        *("constants", "kernel", "options"),
    )

    def __init__(
        self,
        kernel: Any,
        constants: dict[str, Any],
        *,
        warps: int = 4,
        stages: int = 2,
        pdl: bool = False,
    ):
        self.kernel = kernel
        self.constants = constants
        self.options: dict[str, Any] = {"num_warps": warps, "num_stages": stages}
        if pdl and not INTERPRETED:
            self.options["launch_pdl"] = True
        self._run: Any = None
        self._compiled: Any = None

    def __call__(self, grid: tuple[int, int], device: int, *args: Any) -> None:
        """Launch on the current stream of `device`; `args` are those before the constants."""
        if _listeners and (listener := _listeners.get(get_ident())) is not None:
            listener[0].append((self, grid, args))
            if not listener[1]:
                return
        if self._run is None:
            with torch.cuda.device(device):
                self._first(grid, args)
        elif device < 0 or current_device() == device:
            self._again(grid, device, args)
        else:  # the launcher works on the current device
            with torch.cuda.device(device):
                self._again(grid, device, args)

    def _again(self, grid: tuple[int, int], device: int, args: tuple[Any, ...]) -> None:
        self._run(
            grid[0], grid[1], 1, current_stream(device), self._function, self._packed,
            None, None, None, *args, *self._tail,
        )  # fmt: skip

    def _first(self, grid: tuple[int, int], args: tuple[Any, ...]) -> None:
        options = {} if INTERPRETED else self.options
        compiled = self.kernel[grid](*args, **self.constants, **options)
        if INTERPRETED or compiled is None or not hasattr(compiled, "packed_metadata"):
            return
        names = self.kernel.arg_names[len(args) :]
        self._tail = tuple(self.constants[name] for name in names)
        self._compiled = compiled
        self._function, self._packed, self._run = (  # _run last: other threads look at it
            compiled.function,
            compiled.packed_metadata,
            compiled.run,
        )

    @property
    def is_new(self) -> bool:
        """Nothing is compiled yet."""
        return self._run is None

    def compiled(self, args: tuple[Any, ...]) -> Any:
        """Triton's compiled kernel for arguments like these, or its promise; without a launch."""
        return self.kernel.warmup(*args, grid=(1,), **self.constants, **self.options)

    def entry(self) -> Entry | None:
        """The launcher itself; None before the first call and where Triton's is another."""
        run = self._run
        if self._compiled is None or not _launcher_is_known() or not hasattr(run, "launch_pdl"):
            return None
        if run.global_scratch_size or run.profile_scratch_size:
            return None
        call = run.launch
        if (cells := getattr(call, "__closure__", None)) is not None:  # it makes descriptors first
            call = dict(zip(call.__code__.co_freevars, cells, strict=True))[
                "launcher"
            ].cell_contents
        described = getattr(self._compiled.metadata, "tensordesc_meta", None) or []
        flags = (run.launch_cooperative_grid, run.launch_pdl)
        fixed = (self._function, *flags, None, None, self._packed, None, None, None)
        return Entry(call, fixed, list(described), self._tail)


@cache
def _launcher_is_known() -> bool:
    try:
        from triton.backends.nvidia import driver
    except ImportError:
        return False
    return getattr(driver, "_BASE_ARGS_FORMAT", None) == _KNOWN_LAUNCHER


def descriptor(matrix: torch.Tensor, block: list[int]) -> Any:
    """TMA descriptor of a 2-D row-major matrix."""
    return _describe(matrix, block, *_descriptor_kind(None, None))


def split_descriptor(matrix: torch.Tensor, block: list[int]) -> Any:
    """TMA descriptor for the Gluon kernels, which also fix the layout in shared memory."""
    return _describe(matrix, block, *_descriptor_kind(tuple(block), matrix.dtype))


def _describe(matrix: torch.Tensor, block: list[int], kind: Any, layout: Any) -> Any:
    """A descriptor without its own checks, which cost more than the launch; callers made them."""
    if matrix.is_cuda:
        bind_context()
    made = object.__new__(kind)
    made.base, made.block_shape, made.padding = matrix, block, "zero"
    made.shape, made.strides = list(matrix.shape), list(matrix.stride())
    if layout is not None:
        made.layout = layout
    return made


@cache
def _descriptor_kind(
    block: tuple[int, ...] | None, dtype: torch.dtype | None
) -> tuple[Any, Any | None]:
    """Class of a descriptor and its layout: Triton's without a block, else Gluon's."""
    if block is None or dtype is None:
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor, None
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]
    return GluonDescriptor, gl.NVMMASharedLayout.get_default_for(list(block), element)


_COUNTER_SETS, _COUNTERS = 64, 64


@cache
def _counter_sets(device: torch.device) -> tuple[torch.Tensor, dict[int, int]]:
    """All counters of a device, and the set of each stream that asked."""
    return torch.zeros((_COUNTER_SETS, _COUNTERS), dtype=torch.int32, device=device), {}


def counters(device: torch.device) -> torch.Tensor:
    """64 counters at 0 for a kernel of the current stream that leaves them so.

    Launches of one stream follow each other. Each of the first 64 streams has a set of its own;
    all exist from the first call on, so that none is made while a graph is captured.
    """
    sets, of_stream = _counter_sets(device)
    stream = current_stream(device.index) if device.type == "cuda" else 0
    return sets[of_stream.setdefault(stream, len(of_stream) % _COUNTER_SETS)]


def device_index(tensor: torch.Tensor) -> int:
    """The index of a tensor's GPU; -1 on the processor, where kernels are interpreted."""
    return tensor.device.index if tensor.is_cuda else -1


def cdiv(a: int, b: int) -> int:
    """A / b rounded up."""
    return -(-a // b)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous and on a 16-byte address, as the compiled kernels assume."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def next_power_of_2(n: int) -> int:
    """Smallest power of two >= n."""
    return 1 << max(0, n - 1).bit_length()


def even_block(width: int) -> int:
    """Power of two, 256 to 1024, that wastes least of `width` in its last block."""
    return min((1024, 512, 256), key=lambda block: cdiv(width, block) * block)
