"""Moves through memory that all ranks of a node write to: no message, one kernel and one barrier.

A rank pushes its rows straight to where its peers want them, then all pass a barrier: for small
batches that is a fraction of a collective's time, and rows, weights and picks need no packing.
Needs GPUs that reach each other's memory (torch's symmetric memory); carries no gradient.

A region of memory is written anew at its next move. That is safe because moves alternate: between
two uses of a region lies a barrier that every rank reaches after it has read the first (what reads
a region must be queued before the next move). So each kind of move names a region of its own.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mogul.core.errors import BackendError
from mogul.core.log import log
from mogul.parallel.watch import WAIT_LIMIT_S

WORD = torch.int32
MAX_RANKS = 8
PUSHED_WORDS = 4096
"""Words that one program of the kernel copies."""
SUMMED = 2048
"""Values that one program sums."""
COPIED_BYTES = 1 << 24
"""Moves beside the computation and larger than this go by copy engine, which takes no processors
from the experts."""
MOST_WORDS = 1 << 30
"""Of a region: kernels count its words in 32 bits."""
ALIGNED = 64
"""Parts of a region begin at multiples of so many bytes."""


@dataclass
class Region:
    """Memory of one kind of move, on every rank."""

    own: Tensor
    """This rank's, as words."""
    peers: list[Tensor]
    """Every rank's, mapped here."""
    handle: Any
    addresses: Tensor | None = None
    limit_s: float = WAIT_LIMIT_S

    def barrier(self) -> None:
        """All ranks' queues pass together; the device fails when one does not come in time."""
        self.handle.barrier(channel=0, timeout_ms=int(self.limit_s * 1e3))


@dataclass
class Landing:
    """A move on its way; keeps what it reads alive."""

    found: list[Tensor]
    kept: Any = None
    event: Any = None

    def end(self) -> list[Tensor]:
        """Let the current stream wait, and return what has arrived."""
        if self.event is not None:
            torch.accelerator.current_stream(self.found[0].device).wait_event(self.event)
        self.kept = None
        return self.found


@dataclass
class Window:
    """The regions of a group of ranks."""

    rank: int
    size: int
    group: dist.ProcessGroup | None = None
    regions: dict[str, Region] = field(default_factory=dict)
    retired: list[Region] = field(default_factory=list)
    """Outgrown regions, which captured graphs may still use."""
    beside: Any = None
    """The stream of moves beside the computation."""
    limit_s: float = field(default_factory=lambda: WAIT_LIMIT_S)
    """How long a barrier waits for a rank that lives; one that is gone ends the others sooner."""

    def gather(self, parts: Sequence[Tensor], name: str, *, aside: bool = False) -> Landing:
        """Parts [T, ...] of every rank, one rank after another: [ranks * T, ...] each.

        At most three parts. What arrives is valid until the next move but one.
        """
        words = [_words(part) for part in parts]
        starts, total = [], 0
        for one in words:
            starts.append(total)
            total += _round_up(self.size * one.numel())
        region = self._region(name, total, parts[0].device)
        found = [
            region.own[first : first + self.size * one.numel()]
            .view(part.dtype)
            .view(self.size * part.shape[0], *part.shape[1:])
            for first, one, part in zip(starts, words, parts, strict=True)
        ]

        def move() -> list[Tensor]:
            self._push(region, words, starts, apart=False, engine=aside)
            region.barrier()
            return found

        return self._start(move, words, aside=aside)

    def scatter(self, rows: Tensor, name: str, *, aside: bool = False) -> Landing:
        """Sums over the ranks of rows [ranks * T, ...], each rank its own part [T, ...]."""
        whole = rows.contiguous()
        words = _words(whole)
        region = self._region(name, words.numel(), rows.device)
        shape = (self.size, rows.shape[0] // self.size, *rows.shape[1:])

        def move() -> list[Tensor]:
            self._push(region, [words], [0], apart=True, engine=aside)
            region.barrier()
            arrived = region.own[: words.numel()].view(rows.dtype).view(shape)
            return [self._sum(region, whole.view(shape)[self.rank], arrived)]

        return self._start(move, words, aside=aside)

    def scatter_made(
        self, write: Callable[[Tensor, Tensor], None], like: Tensor, name: str
    ) -> Tensor:
        """The same for sums that `write(addresses, own)` stores at their ranks as it makes them.

        Those for a peer go to [ranks, *like.shape] at its address, in this rank's place; those of
        this rank to `own`, like `like`.
        """
        region = self._region(name, self.size * like.nbytes // WORD.itemsize, like.device)
        assert region.addresses is not None
        own = torch.empty_like(like, memory_format=torch.contiguous_format)
        write(region.addresses, own)
        region.barrier()
        arrived = region.own[: self.size * like.nbytes // WORD.itemsize].view(like.dtype)
        return self._sum(region, own, arrived.view(self.size, *like.shape))

    def _sum(self, region: Region, own: Tensor, arrived: Tensor) -> Tensor:
        """Own rows and those that arrived from the others, in the order of the ranks."""
        if region.addresses is None:
            others = [own if r == self.rank else arrived[r] for r in range(self.size)]
            return torch.stack(others).sum(0)
        from mogul.kernels.triton.push_kernels import sum_arrived

        out = torch.empty_like(own)
        kernel: Any = sum_arrived
        kernel[(-(-own.numel() // SUMMED),)](
            own, arrived, out, own.numel(), self.rank, RANKS=self.size, BLOCK=SUMMED
        )
        return out

    def _start(self, move: Any, kept: Any, *, aside: bool) -> Landing:
        if not aside:
            return Landing(move())
        device = (kept[0] if isinstance(kept, list) else kept).device
        if self.beside is None:
            self.beside = torch.Stream(device)
        self.beside.wait_stream(torch.accelerator.current_stream(device))
        with self.beside:
            found = move()
            event = self.beside.record_event()
        return Landing(found, kept, event)

    def _push(
        self, region: Region, words: list[Tensor], starts: list[int], *, apart: bool, engine: bool
    ) -> None:
        """Write to every peer; `apart` gives each its own part of the (only) tensor.

        A rank's own part needs no move.
        """
        size = sum(one.numel() for one in words) * WORD.itemsize
        if region.addresses is not None and not (engine and size >= COPIED_BYTES):
            self._push_by_kernel(region, words, starts, apart)
            return
        for step in range(1, self.size + (not apart)):  # the next rank first, oneself last
            peer = (self.rank + step) % self.size
            for first, one in zip(starts, words, strict=True):
                part = one.view(self.size, -1)[peer] if apart else one
                begin = first + self.rank * part.numel()
                region.peers[peer][begin : begin + part.numel()].copy_(part)

    def _push_by_kernel(
        self, region: Region, words: list[Tensor], starts: list[int], apart: bool
    ) -> None:
        from mogul.kernels.triton.push_kernels import push_words

        counts = [one.numel() for one in words]
        step = 0
        if apart:
            counts[0] //= self.size
            step = counts[0]
        blocks = sum(-(-count // PUSHED_WORDS) for count in counts)
        missing = 3 - len(words)
        first, second, third = [*words, *[words[0]] * missing]
        counts += [0] * missing
        starts = [*starts, *[0] * missing]
        kernel: Any = push_words
        peers = self.size - apart
        kernel[(peers * max(1, blocks),)](
            region.addresses, first, second, third, *counts, *starts[1:], self.rank, step,
            RANKS=self.size, PEERS=peers, BLOCK=PUSHED_WORDS, num_warps=8,
        )  # fmt: skip

    def _region(self, name: str, words: int, device: torch.device) -> Region:
        """The region of a name, made (by all ranks alike) where there is none or one too small.

        Whoever makes its largest move first has none made later.
        """
        region = self.regions.get(name)
        if region is None or region.own.numel() < words:
            if words > MOST_WORDS:
                raise BackendError(
                    f"a move of {words * WORD.itemsize / 2**30:.1f} GiB is more than the "
                    f"{MOST_WORDS * WORD.itemsize / 2**30:.0f} GiB that ranks share at once",
                    fix="fewer tokens in one step, or collectives: leave out wire",
                )
            if region is not None:
                self.retired.append(region)
            with torch.inference_mode(False):  # later moves may run outside of it
                region = self.regions[name] = self._make(words, device)
        return region

    def _make(self, words: int, device: torch.device) -> Region:
        import torch.distributed._symmetric_memory as symmetric

        assert self.group is not None
        room = 1 << max(14, (words - 1).bit_length())
        own = symmetric.empty(room, dtype=WORD, device=device)
        handle: Any = symmetric.rendezvous(own, self.group)
        peers = [handle.get_buffer(peer, (room,), WORD) for peer in range(self.size)]
        addresses = torch.tensor([peer.data_ptr() for peer in peers], device=device)
        return Region(own, peers, handle, addresses, self.limit_s)


def _words(part: Tensor) -> Tensor:
    """The same memory as words."""
    return part.contiguous().view(-1).view(WORD)


def _round_up(words: int) -> int:
    step = ALIGNED // WORD.itemsize
    return -(-words // step) * step


_open: dict[str, tuple[dist.ProcessGroup, Window | str]] = {}
"""Name of a group -> the group, as names come again, and its window or why there is none."""


def open_window(group: dist.ProcessGroup, wire: str | None = "window") -> Window | None:
    """The window of a group, tried at the first call; every rank of it must call.

    None where `wire` wants none, or is "auto" and there can be none.

    Raises:
        BackendError: `wire` is "window", and these ranks cannot have one.
    """
    if wire not in ("window", "auto"):
        return None
    name = group.group_name
    if name not in _open or _open[name][0] is not group:
        _open[name] = group, _try(group)
    found = _open[name][1]
    if isinstance(found, Window):
        return found
    if wire == "auto":
        return None
    raise BackendError(
        f"these ranks share no memory: {found}", fix="leave wire at its default, collectives"
    )


LOST = ("launch failure", "device-side assert", "illegal instruction")
"""What torch says of a device whose kernel gave up."""


def why_lost(error: BaseException) -> str | None:
    """What a lost device may mean where moves go through windows."""
    limits = [found.limit_s for _, found in _open.values() if isinstance(found, Window)]
    if not limits or not any(words in str(error) for words in LOST):
        return None
    return (
        f"a rank may not have come to a barrier of the ranks' common memory within "
        f"{min(limits):.0f} s: look for the rank that did something else"
    )


def _try(group: dist.ProcessGroup) -> Window | str:
    """A window that has moved a row rightly, or the reason against it that all ranks agree on."""
    reason = _why_not(group)
    window = Window(group.rank(), group.size(), group)
    if reason is None:
        reason = _trial(window)
    reasons: list[Any] = [None] * group.size()
    dist.all_gather_object(reasons, reason, group=group)
    found = next((one for one in reasons if one), None)
    if found is not None and group.rank() == 0:
        log.info("no window: %s", found)
    return window if found is None else str(found)


def _why_not(group: dist.ProcessGroup) -> str | None:
    if dist.get_backend(group) != "nccl":
        return f"their backend is {dist.get_backend(group)}, not nccl"
    if not 1 < group.size() <= MAX_RANKS:
        return f"a group of {group.size()} ranks; 2 to {MAX_RANKS} are supported"
    hosts: list[Any] = [None] * group.size()
    dist.all_gather_object(hosts, socket.gethostname(), group=group)
    return None if len(set(hosts)) == 1 else f"they stand on {len(set(hosts))} hosts"


def _trial(window: Window) -> str | None:
    """Why a small move does not work, if so."""
    accelerator = torch.accelerator.current_accelerator()
    kind = "cpu" if accelerator is None else accelerator.type
    device = torch.device(kind, torch.accelerator.current_device_index())
    own = torch.full((2, 8), float(window.rank), device=device)
    try:
        (rows,) = window.gather([own], "trial").end()
        wanted = torch.arange(window.size, device=device).repeat_interleave(2)
        if not torch.equal(rows[:, 0], wanted.to(rows.dtype)):
            return "what arrived was not what was sent"
        (sums,) = window.scatter(rows.clone(), "trial sums").end()
        return None if float(sums[0, 0]) == window.size * window.rank else "sums were wrong"
    except (RuntimeError, ImportError, AttributeError) as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
