"""FlashInfer's plans: what they are made of, and on a device that its kernels attend alike."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from paged_calls import make, run

pytest.importorskip("triton")

from mogul.core.errors import BackendError, ConfigError
from mogul.kernels import paged_attention
from mogul.kernels.triton.attention import why_not_flashinfer
from mogul.kernels.triton.flashinfer_paged import Plans, fullest, listed
from mogul.kernels.turn import Turn
from mogul.serve.options import EngineOptions

FP8 = torch.float8_e4m3fn
MIXED = [(1, 9), (5, 5), (3, 20), (0, 7), (1, 1), (200, 333), (40, 40)]
DECODE = [(1, 1), (1, 17), (1, 64), (1, 1000), (0, 0), (1, 33)]
STEPS = {
    "decode": ([(1, 64)] * 6, DECODE),
    "prompts": (
        [(100, 100), (60, 200), (1, 40), (39, 39), (0, 0), (0, 0)],
        [(130, 333), (0, 5), (1, 7), (17, 17), (1, 300), (0, 0)],
    ),
}
"""Steps of as many tokens as are captured, and of fewer."""

on_device = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec("flashinfer") is None, reason="flashinfer is not installed"),
]


def of_device(sequences, cache_dtype=torch.bfloat16, *, window=None, heads=(4, 8), padding=3):
    """One call of width 128 in bf16, all its tensors on the device."""
    kv_heads, group = heads
    call = make(
        sequences, page_size=16, kv_heads=kv_heads, group=group, width=128, padding=padding,
        dtype=torch.bfloat16, cache_dtype=cache_dtype,
    )  # fmt: skip
    call["tables_SB"] = call["tables_SB"].clamp(max=len(call["key_cache"]) - 1)
    call = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    return {**call, "sliding_window": window}


def close(got: torch.Tensor, want: torch.Tensor, where: str = "the call") -> None:
    away_T = (got.float() - want.float()).flatten(1).norm(dim=1)
    long_T = want.float().flatten(1).norm(dim=1)
    error_T = away_T / long_T.clamp(min=1e-9)
    worst = int(error_T.argmax())
    said = f"{where}: {float(error_T[worst]):.4f} of the reference away in row {worst}"
    assert bool((error_T < 3e-2).all()), f"{said}; rows {[round(e, 4) for e in error_T.tolist()]}"
    assert away_T.norm() < 1e-2 * long_T.norm(), said


def numbers_of(call: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a plan is made of."""
    return call["query_starts"].cpu(), call["lengths_S"].cpu(), call["tables_SB"].cpu()


def room_of(*calls: dict[str, Any]) -> dict[str, Any]:
    """Memory of its own for a captured step, as large as the largest of these; no token in it."""
    held = dict(calls[0])
    for name, value in held.items():
        if isinstance(value, torch.Tensor):
            sizes = zip(*(call[name].shape for call in calls), strict=True)
            held[name] = value.new_zeros([max(size) for size in sizes])
    held["slots_T"].fill_(-1)
    held["max_query_len"] = max(call["max_query_len"] for call in calls)
    return held


def put_in(held: dict[str, Any], call: dict[str, Any]) -> None:
    """Write a call over the one before it, whose rest stays where this one has fewer tokens."""
    held["slots_T"].fill_(-1)
    for name, value in call.items():
        if isinstance(value, torch.Tensor):
            held[name][tuple(map(slice, value.shape))].copy_(value)


def captured(plans: Plans, held: dict[str, Any], name: Any) -> tuple[Any, torch.Tensor]:
    """The step without tokens, run once and captured, as an engine captures its own."""

    def attend() -> torch.Tensor:
        with plans.running():
            return paged_attention(**held, backend="flashinfer")

    side = torch.cuda.Stream()
    plans.begin(numbers_of(held), held["max_query_len"], name)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        attend()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    plans.begin(numbers_of(held), held["max_query_len"], name)  # as if captured once more
    with torch.cuda.graph(graph):
        out = attend()
    return graph, out


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_pages_are_listed_in_the_order_of_their_keys(page_size: int) -> None:
    call = make(MIXED, page_size=page_size)
    numbers = (call["query_starts"], call["lengths_S"], call["tables_SB"])
    found = listed(numbers, page_size)
    for s, (queries, length) in enumerate(MIXED):
        pages = found.pages[found.firsts[s] : found.firsts[s + 1]]
        count = -(-length // page_size) if queries else 0
        assert pages.tolist() == call["tables_SB"][s, :count].tolist()
        keys = max(len(pages) - 1, 0) * page_size + int(found.lasts_S[s])
        assert keys == int(found.lengths_S[s]) == (length if queries else 0)
    assert {one.dtype for one in found} == {torch.int32}


def test_a_sequence_longer_than_its_row_of_pages_is_refused() -> None:
    call = make([(1, 9), (1, 20)], page_size=4)
    numbers = (call["query_starts"], call["lengths_S"], call["tables_SB"][:, :4])
    with pytest.raises(BackendError, match=r"20 keys is longer than a row of 4 pages of 4"):
        listed(numbers, 4)


@pytest.mark.parametrize(("sequences", "tokens"), [(1, 1), (8, 8), (8, 24), (6, 64), (9, 4)])
def test_the_fullest_step_has_every_token(sequences: int, tokens: int) -> None:
    starts, lengths, tables = fullest(sequences, tokens, 16)
    assert len(starts) == sequences + 1 == len(tables) + 1
    assert int(starts[-1]) == tokens == int(lengths.sum())
    assert bool((starts.diff() >= 0).all())
    assert tables.shape[1] * 16 >= int(lengths.max())


def test_refusals_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=r"backend 'flashinfer' cannot run here.*on cpu"):
        run(make([(1, 3)]), "flashinfer")
    with pytest.raises(ConfigError, match="attention 'fa3' is unknown"):
        EngineOptions(attention="fa3")  # pyright: ignore[reportArgumentType]
    room = "mogul.kernels.triton.attention"
    monkeypatch.setattr(f"{room}.why_not_triton_attention", lambda **_: None)
    monkeypatch.setattr(f"{room}.find_spec", lambda _: None)
    assert "pip install 'mogul[flashinfer]'" in (why_not_flashinfer(head_width=128) or "")
    monkeypatch.setattr(f"{room}.find_spec", lambda _: object())
    assert "head width 192" in (why_not_flashinfer(head_width=192) or "")
    assert why_not_flashinfer(head_width=128) is None


@pytest.mark.parametrize("sequences", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize("heads", [(4, 8), (8, 5), (2, 1)])
class TestOnDevice:
    """Equal to the reference."""

    pytestmark = on_device

    def test_equals_the_reference(self, sequences, cache_dtype, heads) -> None:
        call = of_device(sequences, cache_dtype, heads=heads)
        if cache_dtype == FP8:
            call["key_scale"] = torch.rand(heads[0], device="cuda") + 0.5
            call["value_scale"] = torch.full((1,), 0.7, device="cuda")
        got, want = run(call, "flashinfer"), run(call, "reference")
        close(got[0], want[0])
        assert not got[0][int(call["query_starts"][-1]) :].any()
        for mine, its in zip(got[1:], want[1:], strict=True):
            assert torch.equal(mine.view(torch.uint8), its.view(torch.uint8))


class TestAlsoOnDevice:
    """Windows, sinks, captured steps."""

    pytestmark = on_device

    def test_a_window_hides_what_lies_before(self) -> None:
        for sequences in (MIXED, DECODE):
            call = of_device(sequences, window=32)
            close(run(call, "flashinfer")[0], run(call, "reference")[0])

    def test_sinks_are_refused(self) -> None:
        call = of_device(DECODE)
        with pytest.raises(BackendError, match="know no sinks"):
            run(call, "flashinfer", sinks=torch.zeros(32, device="cuda"))

    @pytest.mark.parametrize(
        ("cache_dtype", "window"), [(torch.bfloat16, None), (torch.bfloat16, 32), (FP8, None)]
    )
    @pytest.mark.parametrize("kind", STEPS)
    def test_a_captured_step_reads_new_numbers(self, kind, cache_dtype, window) -> None:
        full, other = (of_device(s, cache_dtype, window=window, padding=0) for s in STEPS[kind])
        held = room_of(full, other)
        plans = Plans(held["query_THC"].device, 16, *held["tables_SB"].shape)
        name = (kind, len(held["query_THC"]))
        graph, out = captured(plans, held, name)
        for step, call in enumerate((other, full, other)):
            put_in(held, call)
            plans.begin(numbers_of(call), held["max_query_len"], name)
            graph.replay()
            count = len(call["query_THC"])
            want = run(call, "reference")
            close(out[:count], want[0], f"step {step}")
            assert not out[count:].any(), f"step {step}: rows of padding"
            for pages, its in zip(("key_cache", "value_cache"), want[1:], strict=True):
                mine = held[pages][: len(its)]
                assert torch.equal(mine.view(torch.uint8), its.view(torch.uint8)), f"step {step}"

    @pytest.mark.parametrize("sequences", [MIXED, DECODE], ids=["mixed", "decode"])
    def test_turns_are_made_before(self, sequences) -> None:
        call = of_device(sequences)
        angle = torch.randn(len(call["query_THC"]), 64, device="cuda").repeat(1, 2)
        norms = (1 + torch.randn(2, 128, device="cuda") / 4).bfloat16().unbind()
        cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
        turn = Turn(cos, sin, norms[0], norms[1], 1e-6, 1e-3)
        close(run(call, "flashinfer", turn=turn)[0], run(call, "reference", turn=turn)[0])

    def test_calls_outside_an_engine_are_not_captured(self) -> None:
        call = of_device(DECODE)
        run(call, "flashinfer")
        with (
            pytest.raises(BackendError, match="cannot wait"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            paged_attention(**call, backend="flashinfer")
