"""A call that the kernels refuse is told how to mend it, whatever is wrong with it."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mogul.kernels
from mogul.core.errors import MogulError
from mogul.kernels import (
    QuantisedExperts,
    RouterSpec,
    moe_forward,
    moe_forward_quantised,
    paged_attention,
    quantise_experts,
    route,
)
from mogul.kernels.quant_format import quantise_int4
from mogul.kernels.triton.linear import linear_fp8
from mogul.kernels.turn import Turn, check_turn

FP8 = torch.float8_e4m3fn


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def ints(*shape: int, device: str = "cpu") -> torch.Tensor:
    return zeros(*shape, dtype=torch.int64, device=device)


def experts(**changed: Any) -> torch.Tensor:
    call = {"x": zeros(4, 8), "gate_up": zeros(3, 12, 8), "down": zeros(3, 8, 6)}
    return moe_forward(**{**call, "ids": ints(4, 2), "weights": zeros(4, 2), **changed})


def quantised(**changed: Any) -> torch.Tensor:
    packed = quantise_experts(zeros(3, 12, 8), zeros(3, 8, 6), "fp8")
    call = {"x": zeros(4, 8), "experts": packed, "ids": ints(4, 2), "weights": zeros(4, 2)}
    return moe_forward_quantised(**{**call, **changed})


def nowhere() -> torch.Tensor:
    tensors = (zeros(4, 8), zeros(3, 12, 8), zeros(3, 8, 6), ints(4, 2), zeros(4, 2))
    return moe_forward(*(tensor.to("meta") for tensor in tensors))


def no_layer() -> QuantisedExperts:
    packed = quantise_experts(zeros(3, 12, 8), zeros(3, 8, 6), "fp8")
    return QuantisedExperts(packed.format, packed.down, packed.down)


def attention(**changed: Any) -> torch.Tensor:
    call = {"query_THC": zeros(3, 4, 8), "key_TNC": zeros(3, 2, 8), "value_TNC": zeros(3, 2, 8)}
    call |= {"key_cache": zeros(2, 4, 2, 8), "value_cache": zeros(2, 4, 2, 8), "slots_T": ints(3)}
    call |= {name: ints(size).int() for name, size in (("query_starts", 2), ("lengths_S", 1))}
    call |= {"tables_SB": ints(1, 2).int(), "max_query_len": 3, "scaling": 1.0}
    return paged_attention(**{**call, **changed})


def turn(**changed: Any) -> None:
    check_turn(Turn(**{"cos_TC": zeros(3, 8), "sin_TC": zeros(3, 8), **changed}), 3, 8)


def routed(logits: torch.Tensor, **more: Any) -> Any:
    return route(logits, RouterSpec(8, 4, 4), **more)


FP8_PAGES = {"key_cache": zeros(2, 4, 2, 8, dtype=FP8), "value_cache": zeros(2, 4, 2, 8, dtype=FP8)}
CASES: list[tuple[Callable[[], Any], str, str]] = [
    (lambda: experts(x=zeros(1, 4, 8)), r"x \(1, 4, 8\) is not \[T, 8\]", "x.reshape(-1, 8)"),
    (lambda: experts(ids=ints(4, 3)), r"ids \(4, 3\) and weights", "route returns"),
    (lambda: experts(ids=ints(4, 2, device="meta")), "ids on meta", "all of them to cpu"),
    (lambda: experts(down_bias=zeros(8)), r"down_bias \(8,\) is not", "one row an expert"),
    (lambda: quantised(x=zeros(4, 8, dtype=torch.int8)), "int8 and weights are", "as they are"),
    (lambda: quantised(weights=zeros(4, 1)), r"weights \(4, 1\) are not both", "route returns"),
    (lambda: quantised(ids=ints(4, 2, device="meta")), "ids on meta", "all of them to cpu"),
    (lambda: quantised(weights=zeros(4, 2, device="meta")), "weights on meta", "them to cpu"),
    (lambda: experts(gate_up=zeros(3, 12, 8, dtype=FP8)), "gate_up is torch.float8", "dequantise"),
    (nowhere, "x and the experts are on meta", "load the weights first"),
    (no_layer, r"gate_up \(3, 8, 6\) and down", "in one call of quantise_experts"),
    (lambda: quantise_int4(zeros(4, 33), 32), "rows have 33 weights", "use fp8"),
    (lambda: routed(zeros(3, 9)), r"router logits \(3, 9\)", "one row a token"),
    (lambda: routed(zeros(3, 8), bias=zeros(4)), r"bias \(4,\)", "one value an expert"),
    (lambda: routed(zeros(3, 8), scale=zeros(4)), r"scale \(4,\)", "one factor an expert"),
    (lambda: RouterSpec(8, 4, 0), "num_groups=0 must", "num_groups=1 is plain"),
    (lambda: RouterSpec(8, 4, 4, limit_groups=5), "limit_groups=5", "None picks from all"),
    (lambda: turn(cos_TC=zeros(1, 3, 8)), r"cos \(1, 3, 8\)", "loses its first axis"),
    (lambda: turn(query_norm=zeros(8)), "both or not at all", "neither and norm before"),
    (
        lambda: turn(query_norm=zeros(32), key_norm=zeros(8)),
        r"weight \(32,\) is not \[8\]",
        "norm whole rows before",
    ),
    (lambda: attention(sinks=zeros(2)), r"sinks \(2,\) are not", "one number a query head"),
    (lambda: attention(key_scale=zeros(1)), "float32, not fp8", "drop key_scale"),
    (
        lambda: attention(**FP8_PAGES, value_scale=zeros(3)),
        r"value_scale \(3,\) of torch.float32 is neither",
        "value_scale.float()",
    ),
    (lambda: attention(query_THC=zeros(3, 32)), r"query \(3, 32\), key", "tokens of all sequences"),
    (lambda: attention(query_THC=zeros(3, 3, 8)), "does not fit key", "a whole number of query"),
    (lambda: attention(key_cache=zeros(2, 4, 1, 8)), r"not \[P, Z, 2, 8\]", "for this model"),
    (lambda: attention(value_cache=zeros(9, 4, 2, 8)), r"value_cache \(9, 4", "make both alike"),
    (lambda: attention(slots_T=ints(2)), r"slots_T \(2,\)", "one slot of the cache"),
    (lambda: attention(lengths_S=ints(2).int()), r"lengths \(2,\)", "lengths [S]"),
    (lambda: attention(lengths_S=ints(1)), "lengths_S torch.int64 must be int32", ".int()"),
    (
        lambda: linear_fp8(zeros(2, 8), zeros(2), zeros(4, 6), zeros(4), torch.float32),
        r"rows \(2, 8\) do not fit weight \(4, 6\)",
        "rows [T, C] and a weight [N, C]",
    ),
    (
        lambda: linear_fp8(zeros(2, 8), zeros(2), zeros(4, 8), zeros(1), torch.float32),
        r"scales \(2,\) and \(1,\)",
        "two results of quantise_rows",
    ),
]


@pytest.mark.parametrize(("call", "words", "mend"), CASES, ids=[case[1] for case in CASES])
def test_a_refused_call_is_told_its_mend(call: Callable[[], Any], words: str, mend: str) -> None:
    with pytest.raises(MogulError, match=words) as caught:
        call()
    assert mend in caught.value.__notes__[0]


def test_a_residual_of_another_shape_is_told_its_mend() -> None:
    pytest.importorskip("triton")
    from mogul.kernels.triton import ops

    weights = (zeros(3, 12, 8), zeros(3, 8, 6))
    with pytest.raises(MogulError, match=r"residual \(1, 8\)") as caught:
        ops.moe_added(zeros(4, 8), *weights, ints(4, 2), zeros(4, 2), zeros(1, 8))
    assert "add it after the experts" in caught.value.__notes__[0]


def test_no_refusal_of_the_kernels_goes_without_a_mend() -> None:
    refusals = {error.__name__ for error in MogulError.__subclasses__()}
    bare, found = [], 0
    for path in Path(mogul.kernels.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
                continue
            if getattr(node.exc.func, "id", "") in refusals:
                found += 1
                if not any(word.arg == "fix" for word in node.exc.keywords):
                    bare.append(f"{path.name}:{node.lineno}")
    assert found > 40
    assert not bare
