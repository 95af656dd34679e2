"""A forward's launches, recorded at the first call of a size and replayed with new addresses.

Decides what a call costs the host: plans, grids, constants and the layout of all intermediate
memory are fixed by the number of tokens, so a replay makes two tensors and enters each kernel's
launcher. A forward that does more than make memory and launch has no tape and runs as written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mogul.kernels.triton.ahead import compile_ahead
from mogul.kernels.triton.launch import Entry, Heard, current_stream, listening

_HARMLESS = {"empty", "new_empty", "empty_like", "view", "slice", "select", "detach", "alias"}
"""Operators that start nothing on the device."""
_ALIGNMENT = 512
_MOST_DESCRIPTORS = 1024
_MOST_PLACES = 256
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

            if len(self._known) >= _MOST_DESCRIPTORS:
                self._known.clear()
            self.base = _Address(address)
            found = self._known[address] = make_tensordesc_arg(self, self._metadata)
        return found


class _Address:
    """A tensor as far as the driver looks at one."""

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


class Tape:
    """The launches of one size: each argument is an offset from an input, `out` or the work."""

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
        if len(self._known) >= _MOST_PLACES:
            self._known.clear()
        at = (*places, 0)
        ready = self._known[stream, *places] = []
        for call, grid, fixed, plain, described, tail in self._steps:
            args: list[Any] = [at[base] + offset for base, offset in plain]
            for place, base, offset, descriptor in described:
                args[place:place] = descriptor.at(at[base] + offset)
            ready.append((call, (*grid, stream, *fixed, *args, *tail)))
        return ready


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

        if key in self._known:
            return run(*inputs)
        if len(self._known) >= _MOST_TAPES:
            self._known.clear()
        compile_ahead(layer, inputs, train=False)
        out, self._known[key] = record(run, inputs)
        return out
