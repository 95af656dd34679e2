"""What a launch does beside launching: devices, contexts, and tapes whose parts fail."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from mogul.kernels.triton import launch, tape


def test_each_thread_is_given_a_context_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        torch.cuda, "is_current_stream_capturing", lambda: asked.append(threading.get_ident())
    )
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(launch, "_thread", threading.local())
    here = threading.get_ident()
    for _ in range(2):
        launch.bind_context()
    other = threading.Thread(target=lambda: [launch.bind_context() for _ in range(2)])
    other.start()
    ident = other.ident
    other.join()
    assert asked == [here, ident]


def test_a_descriptor_is_made_in_a_context(monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[str] = []
    monkeypatch.setattr(launch, "bind_context", lambda: bound.append("launch"))
    monkeypatch.setattr(tape, "bind_context", lambda: bound.append("tape"))
    launch.descriptor(torch.zeros(8, 8), [4, 4])
    assert not bound
    matrix: Any = SimpleNamespace(is_cuda=True, shape=(8, 8), stride=lambda: (8, 1))
    described = launch.descriptor(matrix, [4, 4])
    tape._Descriptor(described, None).at(512)
    assert bound == ["launch", "tape"]


def test_threads_that_describe_at_once_do_not_mix_addresses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from triton.backends.nvidia import driver

    one = tape._Descriptor(launch.descriptor(torch.zeros(8, 8), [4, 4]), None)
    real = driver.make_tensordesc_arg

    def interrupted(arg: Any, metadata: Any) -> list[Any]:
        if arg.base.data_ptr() == 512:
            one.at(1024)
        return real(arg, metadata)

    monkeypatch.setattr(driver, "make_tensordesc_arg", interrupted)
    assert one.at(512)[0].data_ptr() == 512
    assert one.at(1024)[0].data_ptr() == 1024


@pytest.mark.parametrize("device", [0, 1])
def test_a_launch_makes_its_device_the_current_one(
    monkeypatch: pytest.MonkeyPatch, device: int
) -> None:
    current = [0]

    @contextmanager
    def switched(to: int) -> Any:
        current.append(to)
        yield
        current.pop()

    launched: list[tuple[int, int]] = []
    monkeypatch.setattr(torch.cuda, "device", switched)
    monkeypatch.setattr(launch, "current_device", lambda: current[-1])
    monkeypatch.setattr(launch, "current_stream", lambda index: index)
    one = launch.Launch(None, {})
    one._function, one._packed, one._tail = None, None, ()
    one._run = lambda *args: launched.append((current[-1], args[3]))
    one((1, 1), device, torch.zeros(1))
    assert launched == [(device, device)]
    assert current == [0]


def _tape(entered: list[int], where: Any) -> tape.Tape:
    """A tape of two launches, the second of which is given a descriptor."""
    entries = [
        launch.Entry(lambda *_args, i=i: entered.append(i), (), [None] * i, ()) for i in range(2)
    ]
    described = launch.descriptor(torch.zeros(8, 8), [4, 4])
    heard: Any = [(None, (1, 1), (where,)), (None, (1, 1), (where, described))]
    return tape.Tape(heard, entries, (where,), torch.empty_like(where))


def test_a_descriptor_that_fails_leaves_no_half_of_a_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tape, "current_stream", lambda _device: 0)
    entered: list[int] = []
    x = torch.zeros(8)
    one = _tape(entered, x)

    def fails(_self: Any, _address: int) -> list[Any]:
        raise RuntimeError("invalid device context")

    with monkeypatch.context() as patch:
        patch.setattr(tape._Descriptor, "at", fails)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="invalid device context"):
                one.replay((x,), -1)
    assert not one._known
    one.replay((x,), -1)
    assert entered == [0, 1]


def test_tapes_keep_no_more_addresses_than_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape, "_MOST_PLACES", 3)
    monkeypatch.setattr(tape, "_MOST_OF_ALL", 5)
    monkeypatch.setattr(tape.Tape, "kept", 0)
    tapes = [_tape([], torch.zeros(8)) for _ in range(3)]
    for address in range(16, 16 * 9, 16):
        for one in tapes:
            one._entered(0, address, address, address)
            assert sum(len(other._known) for other in tapes) <= 5
            assert max(len(other._known) for other in tapes) <= 3
            for *_, described, _ in one._steps:
                assert all(len(descriptor._known) <= 3 for *_, descriptor in described)


def test_each_stream_counts_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = [7]
    monkeypatch.setattr(launch, "current_stream", lambda _index: stream[0])
    sets = torch.zeros((launch._COUNTER_SETS, launch._COUNTERS), dtype=torch.int32)
    made = (sets, {})
    monkeypatch.setattr(launch, "_counter_sets", lambda _device: made)
    device = torch.device("cuda", 0)
    first = launch.counters(device)
    first += 1
    assert launch.counters(device).data_ptr() == first.data_ptr()
    for address in range(8, 8 + launch._COUNTER_SETS - 1):
        stream[0] = address
        assert not launch.counters(device).any()
    stream[0] = 8 + launch._COUNTER_SETS  # more streams than sets: one is shared
    assert launch.counters(device).data_ptr() == first.data_ptr()
