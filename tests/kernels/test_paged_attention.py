"""Paged attention: the reference against plain attention, the backends against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from mogul.core.errors import BackendError, ConfigError
from mogul.kernels import paged_attention

FP8 = torch.float8_e4m3fn


def make(
    sequences: list[tuple[int, int]],
    *,
    page_size: int = 4,
    kv_heads: int = 2,
    group: int = 2,
    width: int = 8,
    padding: int = 0,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    seed: int = 0,
    in_order: bool = False,
) -> dict[str, Any]:
    """A call for sequences of (queries, length), their earlier keys already in scattered pages."""
    torch.manual_seed(seed)
    tokens = sum(queries for queries, _ in sequences) + padding
    counts = [-(-length // page_size) for _, length in sequences]
    num_pages = sum(counts) + 2
    free = (torch.arange(num_pages) if in_order else torch.randperm(num_pages)).tolist()
    tables = torch.full((len(sequences), max([*counts, 1]) + 1), 10**6, dtype=torch.int32)
    slots = torch.full((tokens,), -1, dtype=torch.int64)
    starts, at = [0], 0
    for s, (queries, length) in enumerate(sequences):
        pages = [free.pop(0) for _ in range(counts[s])]
        tables[s, : counts[s]] = torch.tensor(pages, dtype=torch.int32)
        for i in range(queries):
            position = length - queries + i
            slots[at + i] = pages[position // page_size] * page_size + position % page_size
        at += queries
        starts.append(at)
    shape = (num_pages, page_size, kv_heads, width)
    key_cache, value_cache = torch.randn(shape), torch.randn(shape)
    call: dict[str, Any] = {
        "query_THC": torch.randn(tokens, kv_heads * group, width).to(dtype),
        "key_TNC": torch.randn(tokens, kv_heads, width).to(dtype),
        "value_TNC": torch.randn(tokens, kv_heads, width).to(dtype),
        "key_cache": key_cache.to(cache_dtype or dtype),
        "value_cache": value_cache.to(cache_dtype or dtype),
        "slots_T": slots,
        "tables_SB": tables,
        "query_starts": torch.tensor(starts, dtype=torch.int32),
        "lengths_S": torch.tensor([length for _, length in sequences], dtype=torch.int32),
        "max_query_len": max([queries for queries, _ in sequences], default=0) or 1,
        "scaling": width**-0.5,
    }
    return call


def run(call: dict[str, Any], backend: str, **more: Any) -> tuple[torch.Tensor, ...]:
    """Output and caches of one call, the call's own caches untouched."""
    mine = {name: call[name].clone() for name in ("key_cache", "value_cache")}
    out = paged_attention(**{**call, **mine, **more}, backend=backend)
    return out, mine["key_cache"], mine["value_cache"]


def plain(call: dict[str, Any], key_cache: torch.Tensor, value_cache: torch.Tensor) -> torch.Tensor:
    """The same through PyTorch's attention, from caches that hold the new keys."""
    out = torch.zeros_like(call["query_THC"])
    starts, lengths = call["query_starts"].tolist(), call["lengths_S"].tolist()
    for s, length in enumerate(lengths):
        start, stop = starts[s], starts[s + 1]
        pages = call["tables_SB"][s, : -(-length // key_cache.shape[1])].long()
        if start == stop:
            continue
        key, value = (c[pages].flatten(0, 1)[:length] for c in (key_cache, value_cache))
        mask = torch.ones(stop - start, length, dtype=torch.bool).tril(length - (stop - start))
        out[start:stop] = scaled_dot_product_attention(
            call["query_THC"][start:stop].transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            attn_mask=mask,
            scale=call["scaling"],
            enable_gqa=True,
        )[0].transpose(0, 1)
    return out


MIXED = [(1, 9), (5, 5), (3, 20), (0, 7), (1, 1), (20, 33)]


def test_the_reference_is_plain_attention() -> None:
    call = make(MIXED, padding=3)
    out, key_cache, value_cache = run(call, "reference")
    torch.testing.assert_close(out, plain(call, key_cache, value_cache))
    real = call["slots_T"] >= 0
    slots = call["slots_T"][real]
    assert torch.equal(key_cache.flatten(0, 1)[slots], call["key_TNC"][real])
    changed = (key_cache != call["key_cache"]).flatten(0, 1).flatten(1).any(1)
    assert sorted(changed.nonzero().flatten().tolist()) == sorted(slots.tolist())


lengths = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 40)).map(lambda p: (p[0], p[0] + p[1])), max_size=5
)


@given(
    sequences=lengths.filter(lambda found: any(queries for queries, _ in found)),
    page_size=st.sampled_from([1, 4, 16]),
    group=st.sampled_from([1, 3, 4]),
    padding=st.integers(0, 3),
    window=st.sampled_from([None, 1, 5, 16]),
    has_sinks=st.booleans(),
    in_order=st.booleans(),
)
def test_cpu_equals_the_reference(
    sequences: list[tuple[int, int]],
    page_size: int,
    group: int,
    padding: int,
    window: int | None,
    has_sinks: bool,
    in_order: bool,
) -> None:
    call = make(sequences, page_size=page_size, group=group, padding=padding, in_order=in_order)
    more = {"sliding_window": window, "sinks": torch.randn(2 * group) if has_sinks else None}
    want = run(call, "reference", **more)
    got = run(call, "cpu", **more)
    for mine, its in zip(got, want, strict=True):
        torch.testing.assert_close(mine, its, rtol=2e-5, atol=2e-6)
    assert not want[0][sum(queries for queries, _ in sequences) :].any()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_window_hides_what_lies_behind_it(backend: str) -> None:
    call = make([(1, 20)])
    out = run(call, backend, sliding_window=6)[0]
    far = {name: call[name].clone() for name in ("key_cache", "value_cache")}
    for position in range(14):
        page = call["tables_SB"][0, position // 4]
        far["key_cache"][page, position % 4] += 5
        far["value_cache"][page, position % 4] += 5
    assert torch.equal(run({**call, **far}, backend, sliding_window=6)[0], out)
    assert not torch.allclose(run({**call, **far}, backend, sliding_window=7)[0], out)


def test_a_sink_takes_weight_and_gives_nothing() -> None:
    call = make([(1, 9)])
    out = run(call, "cpu")[0]
    assert torch.allclose(run(call, "cpu", sinks=torch.full((4,), -100.0))[0], out)
    assert run(call, "cpu", sinks=torch.full((4,), 100.0))[0].abs().max() < 1e-6


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_fp8_pages_hold_scaled_keys(backend: str, per_head: bool) -> None:
    call = make(MIXED, cache_dtype=FP8)
    scale = torch.tensor([0.02, 0.5]) if per_head else torch.tensor(0.05)
    out, key_cache, value_cache = run(call, backend, key_scale=scale, value_scale=scale * 2)
    real = call["slots_T"] >= 0
    stored = key_cache.view(torch.uint8).flatten(0, 1)[call["slots_T"][real]].view(FP8)
    column = scale.reshape(-1, 1)
    want = (call["key_TNC"][real] / column).clamp(-448, 448).to(FP8)
    assert torch.equal(stored.view(torch.uint8), want.view(torch.uint8))
    torch.testing.assert_close(
        out,
        plain(call, key_cache.float() * column, value_cache.float() * 2 * column),
        rtol=1e-4,
        atol=1e-5,
    )


def test_bf16_stays_near_the_reference() -> None:
    call = make(MIXED, dtype=torch.bfloat16)
    want, got = run(call, "reference")[0], run(call, "cpu")[0]
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_one_operator_for_the_compiler() -> None:
    call = make(MIXED)

    def step(query, key_cache, value_cache):
        rest = {
            name: call[name] for name in call if not name.endswith("cache") and name != "query_THC"
        }
        return paged_attention(query * 2, key_cache=key_cache, value_cache=value_cache, **rest) + 1

    caches = [call["key_cache"].clone(), call["value_cache"].clone()]
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(call["query_THC"], *caches)
    want, key_cache, _ = run({**call, "query_THC": call["query_THC"] * 2}, "cpu")
    torch.testing.assert_close(got, want + 1)
    assert torch.equal(caches[0], key_cache)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"query_THC": torch.zeros(30, 3, 8)}, "does not fit key"),
        ({"key_cache": torch.zeros(9, 4, 2, 6)}, r"is not \[P, Z, 2, 8\]"),
        ({"value_cache": torch.zeros(1, 4, 2, 8)}, "differ in shape"),
        ({"slots_T": torch.zeros(30)}, "is not int64"),
        ({"lengths_S": torch.zeros(2, dtype=torch.int32)}, "one number of sequences"),
        ({"lengths_S": torch.zeros(6, dtype=torch.int64)}, "must be int32"),
        ({"sliding_window": 0}, "sees nothing"),
        ({"sinks": torch.zeros(3)}, "not one a head"),
        ({"key_scale": torch.ones(1)}, "not fp8"),
    ],
)
def test_calls_that_do_not_fit_are_refused(changes: dict, words: str) -> None:
    call = make(MIXED)
    with pytest.raises(ConfigError, match=words):
        paged_attention(**{**call, **changes})


def test_other_cache_dtypes_and_scales_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"holds torch.float16") as caught:
        paged_attention(**make(MIXED, cache_dtype=torch.float16))
    assert "fix: make the cache of the model's dtype" in caught.value.__notes__[0]
    with pytest.raises(ConfigError, match="neither one float32 number"):
        paged_attention(**make(MIXED, cache_dtype=FP8), key_scale=torch.ones(3))


def test_unknown_backends_are_named() -> None:
    with pytest.raises(BackendError, match="no backend 'flash'"):
        paged_attention(**make(MIXED), backend="flash")
