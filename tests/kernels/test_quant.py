"""Quantised experts: packing is lossless, scales are best, every backend computes the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mogul.core.errors import BackendError, ConfigError
from mogul.kernels import (
    FORMATS,
    ExpertFormat,
    ExpertLayout,
    QuantisedExperts,
    dequantise_experts,
    expert_format,
    moe_forward,
    moe_forward_quantised,
    quant,
    quantise_experts,
)
from mogul.kernels.quant_format import (
    dequantise_fp8,
    dequantise_int4,
    quantise_fp8_weight,
    quantise_int4,
    quantise_rows,
    split_rows,
    unpack_int4,
)

EXPERTS, WIDTH, INNER = 4, 96, 80


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def weights(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(EXPERTS, 2 * INNER, WIDTH, generator=generator) * 0.1
    return gate_up, torch.randn(EXPERTS, WIDTH, INNER, generator=generator) * 0.1


def call(tokens: int = 9, picks: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, EXPERTS, generator=generator).topk(picks).indices
    if tokens > 2:
        ids[::3, 1], ids[0, 0] = EXPERTS, -1
    x = torch.randn(tokens, WIDTH, generator=generator)
    return x, ids, torch.rand(tokens, picks, generator=generator)


def test_formats_by_name_and_their_bits() -> None:
    assert expert_format("int4") == ExpertFormat("int4", 32)
    assert {name: spec.bits for name, spec in FORMATS.items()} == {
        "fp8": 8,
        "fp8-w8a16": 8,
        "int4-32": 5,
        "int4-64": 4.5,
        "int4-128": 4.25,
    }
    with pytest.raises(ConfigError, match="no format 'fp9'") as caught:
        expert_format("fp9")
    assert "did you mean 'fp8'" in caught.value.__notes__[0]
    with pytest.raises(ConfigError, match="no format 'int4-48'"):
        expert_format("int4-48")
    with pytest.raises(ConfigError, match="groups of 16"):
        ExpertFormat("int4", 16)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 5),
    pairs=st.integers(1, 100),
    group=st.sampled_from([32, 64, 128]),
    seed=st.integers(0, 99),
)
def test_values_on_the_grid_survive(rows: int, pairs: int, group: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    columns = 2 * pairs
    value = torch.randint(0, 16, (rows, columns), generator=generator).float()
    value[:, ::group], value[:, 1::group] = 0, 15  # every group spans its range
    weight = value * 0.25 - 1.5
    packed, scale = quantise_int4(weight, group)
    assert packed.shape == (rows, pairs)
    assert scale.shape == (-(-columns // group), rows, 2)
    assert torch.equal(unpack_int4(packed).float(), value)
    assert torch.equal(dequantise_int4(packed, scale, group, torch.float32), weight)


@pytest.mark.parametrize(("columns", "group"), [(1344, 128), (672, 64), (672, 128), (96, 32)])
def test_short_last_groups_are_as_exact_as_whole_ones(columns: int, group: int) -> None:
    weight = torch.randn(3, columns, generator=torch.Generator().manual_seed(1))
    packed, scale = quantise_int4(weight, group)
    error = dequantise_int4(packed, scale, group, torch.float32) - weight
    short = columns % group or group
    assert error.abs().max() < 0.6
    assert error[:, -short:].norm() / short**0.5 < 1.1 * error.norm() / columns**0.5


def test_least_squares_beat_the_plain_range_and_importance_moves_the_error() -> None:
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(2))
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    plain = ((weight - low) / (high - low) * 15).round() * (high - low) / 15 + low
    error = dequantise_int4(*quantise_int4(weight, 128), 128, torch.float32) - weight
    assert error.norm() < 0.97 * (plain - weight).norm()
    importance = torch.ones(128)
    importance[:8] = 100
    cared = dequantise_int4(*quantise_int4(weight, 128, importance), 128, torch.float32) - weight
    assert cared[:, :8].norm() < 0.8 * error[:, :8].norm()


def test_fp8_scales_make_the_weights_that_matter_exact() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(4))
    importance = torch.ones(64)
    importance[7] = 1000
    plain = dequantise_fp8(*quantise_fp8_weight(weight), torch.float32) - weight
    cared = dequantise_fp8(*quantise_fp8_weight(weight, importance), torch.float32) - weight
    assert cared[:, 7].norm() < 0.2 * plain[:, 7].norm()
    assert cared.norm() < 1.1 * plain.norm()
    assert torch.equal(quantise_fp8_weight(weight)[1], quantise_rows(weight)[1])


def test_fp8_rows_have_their_own_scales() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3)) * torch.tensor(
        [[1e-4], [1.0], [1e4], [0.0], [3.0]]
    )
    value, scale = quantise_rows(x)
    back = dequantise_fp8(value, scale, torch.float32)
    assert not back[3].any()
    assert ((back - x).abs() <= x.abs() / 16 + scale[:, None] * 2**-10).all()
    assert torch.equal(value.float().abs().amax(1)[[0, 1, 2, 4]], torch.full((4,), 448.0))


@pytest.mark.parametrize("name", FORMATS)
def test_the_record_holds_what_it_says(name: str) -> None:
    gate_up, down = weights()
    packed = quantise_experts(gate_up, down, name)
    assert packed.sizes == (EXPERTS, WIDTH, INNER)
    back = QuantisedExperts.of_tensors(packed.tensors(), packed.format, packed.layout)
    assert back == packed
    values = gate_up.numel() + down.numel()
    short = 1.15 if packed.format.group > 32 else 1.05  # short groups, and fp8's scales
    assert packed.format.bits <= packed.num_bytes * 8 / values < packed.format.bits * short
    with pytest.raises(ConfigError, match="are no experts layer"):
        replace(packed, down=packed.gate_up)
    with pytest.raises(ConfigError, match="gate rows before up rows"):
        replace(packed, layout=ExpertLayout(is_transposed=True))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", [1, 9])
def test_cpu_equals_the_reference(name: str, tokens: int) -> None:
    packed = quantise_experts(*weights(), name)
    x, ids, factors = call(tokens)
    want = moe_forward_quantised(x, packed, ids, factors, backend="reference")
    got = moe_forward_quantised(x, packed, ids, factors, backend="cpu")
    assert relative(got, want) < 1e-6
    small = moe_forward_quantised(x.bfloat16(), packed, ids, factors)
    assert small.dtype == torch.bfloat16
    assert relative(small.float(), want) < (5e-2 if name == "fp8" else 2e-2)


def test_int4_is_the_plain_layer_on_dequantised_weights() -> None:
    packed = quantise_experts(*weights(), "int4-64")
    x, ids, factors = call()
    want = moe_forward(x, *dequantise_experts(packed, torch.float32), ids, factors)
    assert relative(moe_forward_quantised(x, packed, ids, factors), want) < 1e-6


def test_fp8_error_is_that_of_the_format() -> None:
    gate_up, down = weights()
    x, ids, factors = call(64)
    packed = quantise_experts(gate_up, down, "fp8")
    got = moe_forward_quantised(x, packed, ids, factors)
    exact = moe_forward(x, gate_up, down, ids, factors)
    same_weights = moe_forward(x, *dequantise_experts(packed, torch.float32), ids, factors)
    assert 0.05 < relative(got, exact) < 0.08
    assert 0.03 < relative(got, same_weights) < 0.055


def test_rows_of_two_numbers_lose_nothing_that_16_bits_hold() -> None:
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    x[1], x[2, 3] = 0, 1e4
    value, scale = split_rows(x)
    assert value.shape == (6, 128)
    assert torch.equal(scale, quantise_rows(x)[1])
    first, rest = value.float().chunk(2, -1)
    error = ((first + rest) * scale[:, None] - x.float()).abs()
    assert (error <= x.float().abs() / 256 + scale[:, None] * 2**-10).all()
    gate_up, down = weights()
    hidden, ids, factors = call(64)
    packed = quantise_experts(gate_up, down, "fp8-w8a16")
    plain = quantise_experts(gate_up, down, "fp8")
    assert all(map(torch.equal, packed.tensors().values(), plain.tensors().values()))
    got = moe_forward_quantised(hidden, packed, ids, factors)
    want = moe_forward(hidden, *dequantise_experts(packed, torch.float32), ids, factors)
    assert relative(got, want) < 3e-3
    assert relative(got, want) < relative(moe_forward_quantised(hidden, plain, ids, factors), want)
    with pytest.raises(ConfigError, match="int4 is always weight-only"):
        ExpertFormat("int4", 32, weight_only=True)


@pytest.mark.parametrize("name", ["fp8", "int4-32"])
def test_every_layout_becomes_one(name: str) -> None:
    gate_up, down = weights()
    bias = {
        "gate_up_bias": torch.randn(EXPERTS, 2 * INNER),
        "down_bias": torch.randn(EXPERTS, WIDTH),
    }
    layout = ExpertLayout(
        is_transposed=True, is_concatenated=False, activation="clamped_swiglu", limit=1.0
    )
    turned = (gate_up.mT.contiguous(), down.mT.contiguous())
    packed = quantise_experts(*turned, name, layout=layout, **bias)
    x, ids, factors = call()
    want = moe_forward(x, *turned, ids, factors, layout=layout, **bias)
    assert relative(moe_forward_quantised(x, packed, ids, factors), want) < 0.1
    gate_up_back, _ = dequantise_experts(packed, torch.float32)
    assert relative(gate_up_back[:, :INNER], gate_up[:, ::2]) < 0.1
    assert torch.equal(packed.gate_up_bias[:, INNER:], bias["gate_up_bias"][:, 1::2])


def test_bad_calls_are_refused_by_name() -> None:
    packed = quantise_experts(*weights(), "fp8")
    x, ids, factors = call()
    with pytest.raises(ConfigError, match="have no gradient"):
        moe_forward_quantised(x.requires_grad_(), packed, ids, factors)
    x = x.detach()
    with pytest.raises(ConfigError, match=r"x \(9, 5\) is not \[T, 96\]"):
        moe_forward_quantised(x[:, :5], packed, ids, factors)
    with pytest.raises(ConfigError, match="not both"):
        moe_forward_quantised(x, packed, ids[:2], factors)
    with pytest.raises(ConfigError, match="not integers"):
        moe_forward_quantised(x, packed, ids.float(), factors)
    with pytest.raises(BackendError, match="not on an NVIDIA GPU"):
        moe_forward_quantised(x, packed, ids, factors, backend="triton")
    with pytest.raises(ConfigError, match="packs pairs"):
        quantise_int4(torch.randn(4, 33), 32)


def test_a_backend_that_only_dequantises_says_so(monkeypatch, capsys) -> None:
    told: list[str] = []
    monkeypatch.setattr(quant.MOE_QUANTISED, "_resolved", {})
    monkeypatch.setattr(quant.log, "warning", told.append)
    packed = quantise_experts(*weights(), "int4-128")
    for _ in range(2):
        moe_forward_quantised(call()[0], packed, *call()[1:])
    (line,) = told
    assert "int4-128 experts run on the cpu backend, which dequantises them" in line
    assert "not on an NVIDIA GPU" in line
