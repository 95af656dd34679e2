"""Runs paged attention's Triton kernels in Triton's interpreter and prints how far they are off.

A process of its own, because TRITON_INTERPRET must be set before triton is imported.
"""

from __future__ import annotations

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_calls import make, run

from mogul.kernels import PAGED_ATTENTION
from mogul.kernels.paged_attention import TURNS
from mogul.kernels.triton import paged
from mogul.kernels.turn import CHUNKS, FEW, FRESH, Turn

FP8 = torch.float8_e4m3fn

PAGED_ATTENTION.add("interpreted", paged.paged_attention_triton)
TURNS.append("interpreted")
WORST: dict[str, float] = {}
EXAMPLES = settings(
    max_examples=int(os.environ.get("EXAMPLES", "5")), deadline=None, derandomize=True
)


def compare(name: str, call: dict, **more: object) -> None:
    """Keep the largest difference of output and caches."""
    got, want = run(call, "interpreted", **more), run(call, "reference", **more)
    for what, mine, its in zip(("out", "keys", "values"), got, want, strict=True):
        error = (mine.float() - its.float()).abs().max().item() if mine.numel() else 0.0
        key = f"{name} {what}"
        WORST[key] = max(WORST.get(key, 0.0), error if error == error else float("inf"))
    tokens = int(call["query_starts"][-1])
    if got[0][tokens:].any():
        WORST[f"{name} padding"] = float("inf")


def few(name: str) -> None:
    """Decode and short drafts: ragged lengths, every group and page size."""

    @EXAMPLES
    @given(
        sequences=st.lists(
            st.tuples(st.integers(0, 4), st.integers(0, 90)).map(lambda p: (p[0], sum(p))),
            min_size=1,
            max_size=5,
        ),
        page_size=st.sampled_from([1, 4, 16, 32]),
        group=st.sampled_from([1, 3, 8]),
        padding=st.integers(0, 3),
        window=st.sampled_from([None, 1, 20]),
        has_sinks=st.booleans(),
        workers=st.integers(1, 3),
        width=st.sampled_from([16, 24]),
    )
    def check(sequences, page_size, group, padding, window, has_sinks, workers, width):
        paged.few_tile = paged.FewTile(block=16, per_sm=workers, min_blocks=1, merge=4)
        if not any(queries for queries, _ in sequences):
            sequences[0] = (1, 5)
        dtype = torch.float16 if name == "few16" else torch.float32
        call = make(
            sequences, page_size=page_size, group=group, padding=padding, width=width, dtype=dtype
        )
        sinks = torch.randn(2 * group) if has_sinks else None
        compare(name, call, sliding_window=window, sinks=sinks)

    check()


def many(name: str) -> None:
    """Prompts, whole and in chunks, mixed with decode."""

    @EXAMPLES
    @given(
        sequences=st.lists(
            st.tuples(st.sampled_from([0, 1, 3, 17, 40, 65]), st.integers(0, 50)).map(
                lambda p: (p[0], sum(p))
            ),
            min_size=1,
            max_size=3,
        ),
        page_size=st.sampled_from([4, 16, 32]),
        group=st.sampled_from([1, 3, 8]),
        padding=st.integers(0, 3),
        window=st.sampled_from([None, 1, 20]),
        has_sinks=st.booleans(),
    )
    def check(sequences, page_size, group, padding, window, has_sinks):
        paged.few_tile = paged.FewTile(block=16, per_sm=2, min_blocks=1, merge=4)
        paged.many_tile = paged.fresh_tile = paged.ManyTile(rows=32, block=16)
        sequences = [*sequences, (18, 18)]
        dtype = torch.float16 if name == "many16" else torch.float32
        call = make(
            sequences, page_size=page_size, group=group, padding=padding, width=16, dtype=dtype
        )
        sinks = torch.randn(2 * group) if has_sinks else None
        compare(name, call, sliding_window=window, sinks=sinks)

    check()


def fp8(name: str) -> None:
    """Quantised pages, one scale and one a head.

    New keys are multiples of a half: the interpreter itself rounds some others wrongly.
    """
    paged.few_tile = paged.FewTile(block=16, per_sm=2, min_blocks=1, merge=4)
    paged.many_tile = paged.fresh_tile = paged.ManyTile(rows=32, block=16)
    one, each = torch.tensor(0.25), torch.tensor([0.5, 2.0])
    decode, chunks, prompts = [(1, 40), (2, 9)], [(20, 33), (1, 17)], [(40, 40), (20, 33), (18, 18)]
    scales = [(decode, None), (decode, one), (decode, each), (chunks, one), (prompts, each)]
    for sequences, scale in scales:
        call = make(sequences, width=16, cache_dtype=FP8, page_size=16)
        for new in ("key_TNC", "value_TNC"):
            call[new] = (call[new] * 2).round() / 2
        compare(name, call, key_scale=scale, value_scale=scale)


def views(name: str) -> None:
    """Queries, keys and values that are views of one projection, as models give them; sinks too."""
    paged.few_tile = paged.FewTile(block=16, per_sm=2, min_blocks=1, merge=4)
    call = make([(1, 30), (2, 31)], width=16, page_size=16)
    joined = torch.randn(3, 8, 16)
    call["query_THC"], call["key_TNC"] = joined[:, :4], joined[:, 4:6]
    call["value_TNC"] = joined.transpose(0, 1).contiguous().transpose(0, 1)[:, 6:]
    compare(name, call, sinks=torch.randn(4, 2)[:, 0])


def turns(name: str) -> None:
    """Queries and keys normed and rotated on the way: few, many, and both together."""
    paged.few_tile = paged.FewTile(block=16, per_sm=2, min_blocks=1, merge=4)
    paged.many_tile = paged.fresh_tile = paged.ManyTile(rows=32, block=16)
    paged.TURNED_INSIDE = 2  # three sequences are many
    few, many, both = [(1, 30), (2, 31)], [(40, 60)], [(18, 18), (1, 40)]
    before = [(1, 5), (1, 12), (1, 40)]
    kinds = ((16, True), (24, True), (16, False))
    for sequences, width, norms in (
        *((few, *kind) for kind in kinds),
        *((before, *kind) for kind in kinds),
        *((many, *kind) for kind in kinds[1:]),
        (both, *kinds[0]),
    ):
        call = make(sequences, width=width, group=3, padding=1, page_size=16)
        angles = torch.randn(len(call["query_THC"]), width // 2).repeat(1, 2)
        weights = (1 + torch.randn(2, width) / 4).unbind() if norms else (None, None)
        turn = Turn(angles.cos(), angles.sin(), *weights, 1e-6, 1e-2)
        compare(name, call, turn=turn)
    call = make(few, width=16, group=3, padding=1, page_size=16)
    angles = torch.randn(len(call["query_THC"]), 16)  # halves of their own
    compare(name, call, turn=Turn(angles.cos(), angles.sin()))


def alone(name: str) -> None:
    """Beside prompts, sequences of one query: said to be, they take smaller tiles."""
    paged.few_tile = paged.FewTile(block=16, per_sm=2, min_blocks=1, merge=4)
    paged.many_tile = paged.fresh_tile = paged.ManyTile(rows=32, block=16)
    for sequences in ([(18, 18), (1, 40)], [(1, 5), (3, 30), (20, 20)]):
        call = make(sequences, width=16, group=3, padding=1, page_size=16)
        compare(name, call, kinds=FEW | FRESH | CHUNKS)
    captured = [(1, 5), (3, 3), (2, 30), (20, 20), (0, 0), (0, 0)]
    call = make(captured, width=16, group=3, padding=22, page_size=16)
    compare(name, call | {"max_query_len": 48}, kinds=FEW | FRESH | CHUNKS)


def neighbours(name: str) -> None:
    """Prompts beside one whose keys and values are no numbers: only that one is spoilt."""
    paged.many_tile = paged.fresh_tile = paged.ManyTile(rows=32, block=16)
    call = make([(20, 20), (18, 18), (19, 25)], width=16, page_size=16)
    want = run(call, "reference")
    for new in ("key_TNC", "value_TNC"):
        call[new][20:38] = float("nan")
    got = run(call, "interpreted")
    apart = torch.tensor([*range(20), *range(38, 57)])
    error = (got[0][apart] - want[0][apart]).abs().max().item()
    WORST[f"{name} out"] = error if error == error else float("inf")


def main() -> None:
    """Case names from the command line; one JSON object."""
    for name in sys.argv[1:]:
        base = name.removesuffix("16")
        globals()[base](name)
    print(json.dumps(WORST))


if __name__ == "__main__":
    main()
