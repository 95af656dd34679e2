"""Routing in one Triton launch: equal to the reference, ties and gradients too; it compiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scripts import rows_of

triton = pytest.importorskip("triton")

from torch._subclasses import FakeTensorMode  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mogul.core.errors import BackendError  # noqa: E402
from mogul.kernels import RouterSpec, route  # noqa: E402
from mogul.kernels.triton import route_kernels  # noqa: E402
from mogul.kernels.triton.routing import route_counted, why_not_route  # noqa: E402

RULES = (
    "plain",
    "one expert",
    "grouped, one each",
    "grouped, two each",
    "renormalised",
    "null experts",
    "null experts, no groups",
    "limited groups",
)


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return rows_of("run_routing.py", *RULES)


@pytest.mark.parametrize("rule", RULES)
def test_equal_to_the_reference(found: list[dict[str, Any]], rule: str) -> None:
    cases = [case["found"] for case in found if case["case"] == rule]
    assert len(cases) == 4
    for case in cases:
        for exact in ("ids", "counts", "offsets"):
            assert case.pop(exact) == 0, exact
        assert max(case.values()) < 1e-6
        assert "dlogits" in case


@pytest.mark.parametrize("rule", RULES)
def test_logits_that_are_no_number_leave_ids_those_of_experts(
    found: list[dict[str, Any]], rule: str
) -> None:
    (case,) = (case for case in found if case["case"] == f"{rule}, no number")
    assert case["wrong"] == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("rule", RULES)
def test_logits_of_16_bits(found: list[dict[str, Any]], rule: str, dtype: str) -> None:
    (case,) = (case for case in found if case["case"] == f"{rule}, torch.{dtype}")
    assert case["error"] < 1e-6


def test_a_second_derivative_is_the_reference_s(found: list[dict[str, Any]]) -> None:
    (case,) = (case for case in found if case["case"] == "second derivative")
    assert case["error"] < 1e-6


def test_a_compiled_graph_has_the_same_gradients(found: list[dict[str, Any]]) -> None:
    (case,) = (case for case in found if case["case"] == "compiled")
    assert case["error"] < 1e-6


GROUPED = {"E": 64, "NULLS": 0, "M": 8, "K": 8, "LIMIT": 0, "SCORE": 0, "WEIGHTING": 2}
SHAPES = {
    "grouped": {**GROUPED, "COLUMNS": 64, "BLOCK_T": 8},
    "plain": {**GROUPED, "E": 128, "M": 1, "WEIGHTING": 1, "COLUMNS": 128, "BLOCK_T": 4},
    "nulls": {**GROUPED, "E": 56, "NULLS": 8, "WEIGHTING": 1, "COLUMNS": 64, "BLOCK_T": 8},
    "limited": {
        **{**GROUPED, "E": 256, "LIMIT": 4, "SCORE": 1, "WEIGHTING": 1},
        **{"COLUMNS": 256, "BLOCK_T": 2},
    },
}


@pytest.mark.parametrize(
    ("shape", "arch"),
    [("grouped", 80), ("grouped", 89), ("grouped", 100), *((name, 90) for name in SHAPES)],
)
def test_it_compiles(shape: str, arch: int) -> None:
    kernel = route_kernels.route_tokens
    types = {
        "logits_ptr": "*bf16",
        **dict.fromkeys(("bias_ptr", "scale_ptr", "weights_ptr", "scores_ptr"), "*fp32"),
        **{"ids_ptr": "*i64", "rows_ptr": "*i32", "num_tokens": "i32"},
    }
    constants = {
        **SHAPES[shape],
        **{"NUM_BIAS": SHAPES[shape]["E"], "SCALED": True, "FACTOR": 2.5},
        **{"SLOTS": 8, "GROUPS": 8},
    }
    names = [parameter.name for parameter in kernel.params]
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    constexprs = {(i,): constants[name] for i, name in enumerate(names) if name in constants}
    source = ASTSource(kernel, signature, constexprs=constexprs)
    done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 1})
    assert "atom" in done.asm["ptx"]


def test_shapes_are_known_without_running() -> None:
    spec = RouterSpec(num_experts=16, top_k=4, num_groups=2)
    with FakeTensorMode():
        ids, weights, scores, count, offset = route_counted(torch.empty(5, 16), spec)
    assert (ids.shape, ids.dtype) == ((5, 4), torch.int64)
    assert (weights.shape, scores.shape) == ((5, 4), (5, 16))
    assert (count.shape, offset.shape) == ((16,), (17,))


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({}, None),
        ({"device": torch.device("cpu")}, "not on an NVIDIA GPU"),
        ({"dtype": torch.float64}, "float64"),
        ({"spec": RouterSpec(num_experts=5000, top_k=1)}, "5000 experts"),
    ],
)
def test_refusals_name_the_reason(monkeypatch, facts: dict[str, Any], words: str | None) -> None:
    monkeypatch.setattr("mogul.kernels.triton.routing._device_reason", lambda index: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    call = {"device": torch.device("cuda", 0), "dtype": torch.bfloat16, "spec": RouterSpec(8, 2)}
    reason = why_not_route(**{**call, **facts})
    assert reason is None if words is None else words in (reason or "")


def test_processors_keep_the_reference() -> None:
    spec, logits = RouterSpec(8, 2), torch.randn(3, 8)
    assert torch.equal(route(logits, spec).ids, route(logits, spec, backend="reference").ids)
    with pytest.raises(BackendError, match="not on an NVIDIA GPU"):
        route(logits, spec, backend="triton")
