"""Moves through shared memory: threads stand for ranks, their memory for that of other GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mogul.core.errors import BackendError, ConfigError
from mogul.parallel import Plan, contiguous, make_dispatcher, static
from mogul.parallel import window as windows
from mogul.parallel.process import _explained
from mogul.parallel.static import Static
from mogul.parallel.window import Landing, Region, Window, open_window
from mogul.spec.grouping import Grouping


class Node:
    """Ranks of one process that can write to each other's memory."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.line = threading.Barrier(size, timeout=20)
        self.made: list[torch.Tensor] = [torch.empty(0)] * size

    def window(self, rank: int) -> Window:
        node = self

        class OnNode(Window):
            def _make(self, words: int, device: torch.device) -> Region:
                node.made[rank] = torch.full((words,), -1, dtype=torch.int32)
                node.line.wait()
                peers = list(node.made)
                node.line.wait()
                handle = SimpleNamespace(barrier=lambda channel, timeout_ms: node.line.wait())
                return Region(peers[rank], peers, handle)

            def _start(self, move: Any, kept: Any, *, aside: bool) -> Landing:
                return Landing(move())  # a processor has no second stream

        return OnNode(rank, self.size)

    def run(self, function):
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(function, range(self.size)))


@pytest.mark.parametrize("size", [2, 4])
def test_rows_of_every_rank_arrive_in_order_and_sums_are_sums(size):
    node = Node(size)

    def on_rank(rank):
        window = node.window(rank)
        found = []
        for turn in range(3):  # regions are used again
            mark = torch.full((3, 2), 10.0 * rank + turn, dtype=torch.bfloat16)
            ids = torch.tensor([[rank, turn, 7]] * 3)
            rows, picks = window.gather((mark, ids), "tokens").end()
            rows, picks = rows.clone(), picks.clone()  # read before the next move
            sums = window.scatter(rows.double() * (rank + 1), "sums").end()[0]
            found.append((rows, picks, sums))
        return found

    for rank, turns in enumerate(node.run(on_rank)):
        for turn, (rows, picks, sums) in enumerate(turns):
            wanted = torch.arange(size).repeat_interleave(3)
            assert torch.equal(rows[:, 0], (10.0 * wanted + turn).bfloat16())
            assert torch.equal(picks[:, 0], wanted)
            assert (picks[:, 1:] == torch.tensor([turn, 7])).all()
            total = (10.0 * rank + turn) * size * (size + 1) / 2
            assert torch.equal(sums, torch.full((3, 2), total).double())


def test_a_larger_move_gets_a_larger_region_and_keeps_the_old_for_graphs():
    node = Node(2)

    def on_rank(rank):
        window = node.window(rank)
        for rows in (2, 5, 3):
            window.gather((torch.zeros(rows, 4),), "tokens").end()
        return [window.regions["tokens"].own.numel(), len(window.retired)]

    assert node.run(on_rank) == [[48, 1]] * 2  # 2 x 5 x 4 words, rounded up to 64 bytes


def test_a_move_that_kernels_cannot_count_is_refused():
    with pytest.raises(BackendError, match=r"a move of 8\.0 GiB is more than the 4 GiB") as caught:
        Window(0, 4)._region("tokens", 1 << 31, torch.device("cpu"))
    assert "fewer tokens" in caught.value.__notes__[0]


def test_smaller_steps_after_the_largest_make_no_region(monkeypatch):
    """An engine's first step is its largest: nothing is mapped while it serves."""
    pytest.importorskip("triton")
    from mogul.kernels.triton import steps

    monkeypatch.setattr(static, "EARLY_BYTES", 100)
    monkeypatch.setattr(steps, "take", lambda *_: SimpleNamespace(sort=None))
    monkeypatch.setattr(steps, "few", lambda _, x, *matrices: x)
    node = Node(2)

    def on_rank(rank):
        window = node.window(rank)
        road: Any = SimpleNamespace(picks=slice(0, 1), first=0)
        beside: Any = SimpleNamespace(beside=None)
        made = []
        for tokens in (16, 3, 1, 12):
            x = torch.zeros(tokens, 4)
            picks = torch.zeros(tokens, 2, dtype=torch.long), torch.ones(tokens, 2)
            Static._in_steps(road, window, x, picks, beside, (x, x))
            made.append(len(window.regions) + len(window.retired))
        return made

    assert node.run(on_rank) == [[3] * 4] * 2


def test_a_region_made_in_inference_mode_serves_outside_of_it():
    node = Node(2)

    def on_rank(rank):
        window = node.window(rank)
        found = []
        for mode in (torch.inference_mode(), torch.no_grad()):
            with mode:
                found += window.gather((torch.full((1, 2), float(rank)),), "tokens").end()
        return found[1].tolist()

    assert node.run(on_rank) == [[[0.0, 0.0], [1.0, 1.0]]] * 2


@pytest.mark.parametrize("name", ["static", "gather"])
def test_a_dispatcher_computes_the_same_through_a_window(name, monkeypatch):
    ranks, experts, picks, width, tokens = 2, 8, 4, 6, 5
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(experts, width, width, generator=generator, dtype=torch.float64)
    x = torch.randn(ranks, tokens, width, generator=generator, dtype=torch.float64)
    first = torch.arange(0, experts, experts // picks)
    ids = torch.randint(0, 2, (ranks, tokens, picks), generator=generator) + first
    ids[0, 0, 1] = experts  # no pick
    weights = torch.rand(ranks, tokens, picks, generator=generator)
    node = Node(ranks)
    own = [node.window(rank) for rank in range(ranks)]
    monkeypatch.setattr("mogul.parallel.static.open_window", lambda group, wire: own[group.rank()])

    def layer(rows, local, factors, matrices):
        whole = torch.cat([matrices, torch.zeros_like(matrices[:1])])
        each = torch.einsum("td,tkde->tke", rows, whole[local])
        return (each * factors[..., None].double()).sum(1)

    def on_rank(rank):
        group = SimpleNamespace(size=lambda: ranks, rank=lambda: rank)
        grouping = Grouping(num_experts=experts, num_groups=picks, top_k=picks)
        owners = contiguous(experts, ranks)
        plan = Plan(group=group, owners=owners, grouping=grouping, wire="window")  # type: ignore[arg-type]
        part = up.view(ranks, -1, width, width)[rank]
        with torch.no_grad():
            dispatcher = make_dispatcher(name, plan)
            return dispatcher(x[rank], ids[rank], weights[rank], lambda *a: layer(*a, part))

    for rank, given in enumerate(node.run(on_rank)):
        wanted = layer(x[rank], ids[rank], weights[rank].float(), up)
        assert (given - wanted).abs().max() < 1e-12


def test_only_dispatchers_that_gather_read_the_wire():
    group = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    grouping = Grouping(num_experts=8, num_groups=4, top_k=4)
    plan = Plan(group=group, owners=contiguous(8, 2), grouping=grouping, wire="window")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="all_to_all does not read wire"):
        make_dispatcher("all_to_all", plan)
    assert make_dispatcher("all_to_all", replace(plan, wire="auto")).plan.wire == "auto"


def test_a_window_carries_no_other_payload():
    group = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    grouping = Grouping(num_experts=8, num_groups=4, top_k=4)
    options = {"owners": contiguous(8, 2), "grouping": grouping, "wire": "window"}
    with pytest.raises(ConfigError, match="as they are, not as int8"):
        make_dispatcher("static", Plan(group=group, payload="int8", **options))  # type: ignore[arg-type]


def test_ranks_without_common_memory_are_refused(monkeypatch):
    group: Any = SimpleNamespace(group_name="processes")
    known = (group, "their backend is gloo, not nccl")
    monkeypatch.setitem(windows._open, "processes", known)
    with pytest.raises(BackendError, match="share no memory: their backend is gloo"):
        open_window(group)
    assert open_window(group, "auto") is None
    assert open_window(group, "collective") is None


def test_a_new_group_of_a_known_name_is_tried_anew(monkeypatch):
    first, second = (SimpleNamespace(group_name="again") for _ in range(2))
    monkeypatch.setattr(windows, "_open", {})
    tried: list[Any] = []
    monkeypatch.setattr(windows, "_try", lambda group: tried.append(group) or Window(0, 2, group))
    window = open_window(first)  # type: ignore[arg-type]
    assert open_window(first) is window  # type: ignore[arg-type]
    assert open_window(second) is not window  # type: ignore[arg-type]
    assert tried == [first, second]


KERNEL = """
import torch
from mogul.parallel.window import Region, Window

for ranks, rows in ((2, 3), (4, 1500)):
    own = [torch.full((1 << 17,), -1, dtype=torch.int32) for _ in range(ranks)]
    addresses = torch.tensor([one.data_ptr() for one in own])
    for apart in (False, True):
        for rank in range(ranks):
            window, region = Window(rank, ranks), Region(own[rank], own, None, addresses)
            x = torch.arange(rows * 2 * (ranks if apart else 1), dtype=torch.int32) + 10000 * rank
            parts = [x] if apart else [x, x[:5] + 1, x[:3] + 2]
            starts = [0] if apart else [0, 100000, 110000]
            window._push(region, parts, starts, apart=apart, engine=False)
        for peer in range(ranks):
            for rank in set(range(ranks)) - ({peer} if apart else set()):
                want = torch.arange(rows * 2) + 10000 * rank + (peer * rows * 2 if apart else 0)
                got = own[peer][rank * rows * 2 : (rank + 1) * rows * 2]
                assert torch.equal(got.long(), want), (apart, peer, rank)
                if not apart:
                    at = 110000 + 3 * rank
                    assert torch.equal(own[peer][at : at + 3].long(), want[:3] + 2)
    own, arrived = torch.randn(3000), torch.randn(ranks, 3000)
    for rank in range(ranks):
        summed = Window(rank, ranks)._sum(Region(arrived, [], None, addresses), own, arrived)
        parts = [own if r == rank else arrived[r] for r in range(ranks)]
        assert torch.equal(summed, sum(parts))
        wide = [part.double() + 1e-12 * n for n, part in enumerate((own, arrived))]
        region = Region(wide[1], [], None, addresses)
        parts = [wide[0] if r == rank else wide[1][r] for r in range(ranks)]
        assert torch.equal(Window(rank, ranks)._sum(region, *wide), sum(parts))
print("pushed")
"""


def test_the_kernel_writes_what_the_copies_write():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", KERNEL],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout.endswith("pushed\n"), done.stderr


def test_a_barrier_waits_as_long_as_a_collective_and_no_longer(monkeypatch):
    waits = []
    handle = SimpleNamespace(barrier=lambda channel, timeout_ms: waits.append(timeout_ms))
    Region(torch.zeros(1), [], handle, limit_s=Window(0, 2).limit_s).barrier()
    assert waits == [600_000]
    known = (SimpleNamespace(group_name="g"), Window(0, 2, limit_s=7.0))
    monkeypatch.setattr(windows, "_open", {"g": known})
    told = windows.why_lost(RuntimeError("CUDA error: unspecified launch failure"))
    assert told is not None
    assert "did something else" in told
    assert "within 7 s" in told
    assert windows.why_lost(RuntimeError("shapes do not match")) is None
    lost = RuntimeError("CUDA error: device-side assert triggered\nand advice")
    words = "RuntimeError: CUDA error: device-side assert triggered (a rank may not have come"
    assert _explained(lost).startswith(words), "the others hear both"
    assert "a rank may" in lost.__notes__[0]
    monkeypatch.setattr(windows, "_open", {})
    assert windows.why_lost(RuntimeError("unspecified launch failure")) is None
