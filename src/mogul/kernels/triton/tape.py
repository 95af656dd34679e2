"""A forward's launches, recorded at the first call of a size and replayed with new addresses.

Decides what a call costs the host: plans, grids, constants and the layout of all intermediate
memory are fixed by the number of tokens, so a replay makes two tensors and enters each kernel's
launcher. A forward that does more than make memory and launch has no tape and runs as written.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mogul.kernels.triton.ahead import compile_ahead
from mogul.kernels.triton.launch import Entry, Heard, bind_context, current_stream, listening

_HARMLESS = {"empty", "new_empty", "empty_like", "view", "slice", "select", "detach", "alias"}
"""Operators that start nothing on the device."""
_ALIGNMENT = 512
_MOST_PLACES, _MOST_OF_ALL = 256, 1 << 14
"""Sets of addresses that a tape keeps, and that all tapes together do: some kilobytes each."""
_MOST_TAPES = 1024


class _Watch(TorchDispatchMode):
    """Notices operators that a replay would leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.harmless = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.harmless &= func.overloadpacket.__name__ in _HARMLESS
        return func(*args, **(kwargs or {}))


class _Descriptor:
    """What the driver needs for a TMA descriptor, made once for each address."""

    def __init__(self, sample: Any, metadata: Any) -> None:
        self.shape, self.strides, self.padding = sample.shape, sample.strides, sample.padding
        self._metadata = metadata
        self._known: dict[int, list[Any]] = {}

    def at(self, address: int) -> list[Any]:
        """The launcher's arguments for this matrix at `address`."""
        found = self._known.get(address)
        if found is None:
            from triton.backends.nvidia.driver import make_tensordesc_arg

            bind_context()
            described = _At(_Address(address), self.shape, self.strides, self.padding)
            found = self._known[address] = make_tensordesc_arg(described, self._metadata)
        return found

    def forget(self) -> None:
        """Let all addresses go."""
        self._known.clear()


class _Address(NamedTuple):
    """A tensor as far as the driver looks at one."""

    address: int

    def data_ptr(self) -> int:
        return self.address


class _At(NamedTuple):
    """A descriptor as far as the driver looks at one; each address has its own: threads share."""

    base: _Address
    shape: list[int]
    strides: list[int]
    padding: str


class Tape:
    """The launches of one size: each argument is an offset from an input, `out` or the work."""

    kept = 0
    """Sets of addresses that all tapes keep, and some that died kept."""

    def __init__(
        self, heard: list[Heard], entries: list[Entry], inputs: tuple[Tensor, ...], out: Tensor
    ) -> None:
        self._bases = [*inputs, out]
        self._work: dict[int, int] = {}
        self._work_bytes = 0
        self._known: dict[tuple[int, ...], list[tuple[Any, tuple[Any, ...]]]] = {}
        self._steps = [
            self._step(entry, grid, args)
            for entry, (_, grid, args) in zip(entries, heard, strict=True)
        ]
        del self._bases, self._work
        _tapes.add(self)

    def _step(self, entry: Entry, grid: tuple[int, int], args: tuple[Any, ...]) -> tuple[Any, ...]:
        plain: list[tuple[int, int]] = []
        described: list[tuple[int, int, int, _Descriptor]] = []
        metadata = iter(entry.descriptors)
        place = 0
        for arg in args:
            if isinstance(arg, int):
                plain.append((-1, arg))
                place += 1
            elif isinstance(arg, Tensor):
                plain.append(self._place_of(arg))
                place += 1
            else:
                one = _Descriptor(arg, next(metadata, None))
                described.append((place, *self._place_of(arg.base), one))
                place += len(one.at(arg.base.data_ptr()))
        return entry.call, (*grid, 1), entry.fixed, plain, described, entry.tail

    def _place_of(self, tensor: Tensor) -> tuple[int, int]:
        """Which base a tensor lies in, and how far from its start; new memory joins the work."""
        address = tensor.data_ptr()
        for index, base in enumerate(self._bases):
            offset = address - base.data_ptr()
            if 0 <= offset < base.numel() * base.element_size():
                return index, offset
        storage = tensor.untyped_storage()
        start = self._work.get(storage.data_ptr())
        if start is None:
            start = self._work[storage.data_ptr()] = self._work_bytes
            self._work_bytes += -(-storage.nbytes() // _ALIGNMENT) * _ALIGNMENT
        return len(self._bases), start + address - storage.data_ptr()

    def replay(self, inputs: tuple[Tensor, ...], device: int) -> Tensor | None:
        """The recorded forward on contiguous tensors of the same sizes and dtypes.

        None where one lies on no 16-byte address.
        """
        out = torch.empty_like(inputs[0])
        work = out.new_empty(self._work_bytes, dtype=torch.uint8)
        places = [tensor.data_ptr() for tensor in inputs]
        at = (current_stream(device), *places, out.data_ptr(), work.data_ptr())
        ready = self._known.get(at)
        if ready is None:
            if any(place % 16 for place in places):
                return None
            ready = self._entered(*at)
        for call, args in ready:
            call(*args)
        return out

    def _entered(self, stream: int, *places: int) -> list[tuple[Any, tuple[Any, ...]]]:
        """Every launcher with all it takes, kept for the next call at the same addresses."""
        at = (*places, 0)
        ready: list[tuple[Any, tuple[Any, ...]]] = []
        for call, grid, fixed, plain, described, tail in self._steps:
            args: list[Any] = [at[base] + offset for base, offset in plain]
            for place, base, offset, descriptor in described:
                args[place:place] = descriptor.at(at[base] + offset)
            ready.append((call, (*grid, stream, *fixed, *args, *tail)))
        self._keep((stream, *places), ready)  # only whole: a descriptor may fail
        return ready

    def _keep(self, at: tuple[int, ...], ready: list[tuple[Any, tuple[Any, ...]]]) -> None:
        if len(self._known) >= _MOST_PLACES:
            self.forget()
        if Tape.kept >= _MOST_OF_ALL:
            for tape in list(_tapes):
                tape.forget()
            Tape.kept = 0
        self._known[at] = ready
        Tape.kept += 1

    def forget(self) -> None:
        """Let all addresses go; the next call at each looks them up again."""
        Tape.kept -= len(self._known)
        self._known.clear()
        for _, _, _, _, described, _ in self._steps:
            for *_, descriptor in described:
                descriptor.forget()


_tapes: WeakSet[Tape] = WeakSet()


def record(
    forward: Callable[..., Tensor], inputs: tuple[Tensor, ...]
) -> tuple[Tensor, Tape | None]:
    """Run `forward` on the inputs; the tape is None where it cannot be replayed.

    `forward` returns a tensor shaped like the first input and makes no other that outlives it.
    """
    with _Watch() as watch, listening() as heard:
        out = forward(*inputs)
    entries = [entry for launch, _, _ in heard if (entry := launch.entry()) is not None]
    if not watch.harmless or len(entries) < len(heard) or out.shape != inputs[0].shape:
        return out, None
    return out, Tape(heard, entries, inputs, out)


def _overlap(inputs: tuple[Tensor, ...]) -> bool:
    """Whether some share memory: a tape could not tell which of them a launch was given."""
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in inputs if t.numel())
    return any(end > start for (_, end), (start, _) in pairwise(spans))


class Tapes:
    """The tapes of one layer, by number of tokens, of inputs, and by what chooses its plans."""

    def __init__(self) -> None:
        self._known: dict[Any, Tape | None] = {}

    def get(self, tokens: int, inputs: int, plans: Any) -> Tape | None:
        """The tape of a kind of forward, if it can have one and ran before.

        Forced plans, of a search, come from other functions: their forwards have their own tapes.
        """
        return self._known.get((tokens, inputs, plans))

    def forward(self, layer: Any, inputs: tuple[Tensor, ...], plans: Any) -> Tensor:
        """A forward of aligned tensors that keeps nothing, recorded the first time."""
        tokens = inputs[0].shape[0]
        key = (tokens, len(inputs), plans)
        if (tape := self._known.get(key)) is not None:
            out = tape.replay(inputs, layer.device)
            assert out is not None, "the caller has aligned them"
            return out

        def run(*tensors: Tensor) -> Tensor:
            if layer.shape.uses_few(tokens):
                return layer.few(*tensors)
            return layer.forward(*tensors)[0]

        if key in self._known or _overlap(inputs):
            return run(*inputs)
        if len(self._known) >= _MOST_TAPES:
            self._known.clear()
        compile_ahead(layer, inputs, train=False)
        out, self._known[key] = record(run, inputs)
        return out
