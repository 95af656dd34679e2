"""Plans: the table is read as written, every shape has one, and forbidden tiles never appear."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

import mogul.kernels.triton
from mogul.core.errors import BackendError
from mogul.kernels import ExpertLayout, choose_backend
from mogul.kernels.triton import moe_forward_triton, plans, why_not_triton
from mogul.kernels.triton.plans import (
    Shape,
    few_plan,
    last_width,
    plan_for,
    table,
    tell_of_rule,
)

PANGU = Shape(experts=64, picks=8, width=5120, inner=1344)
CUDA = torch.device("cuda", 0)


def test_known_shapes_come_from_the_table() -> None:
    bounds = [entry.tokens for entry in table()[(64, 8, 5120, 1344)] if not entry.device]
    assert bounds == sorted(bounds)
    assert plan_for(PANGU, 64).up.swap
    assert plan_for(PANGU, 16384).up.split
    assert few_plan(PANGU).up_k == 1024


def test_rows_of_a_device_come_first_there_and_count_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tile = {"n": 64, "k": 64}
    facts = {"experts": 48, "picks": 6, "width": 1280, "inner": 640}
    rows = [
        {**facts, "tokens": 9, "plan": {"rows": 16, "up": tile, "down": tile}},
        {**facts, "tokens": 9, "device": "H200", "plan": {"rows": 32, "up": tile, "down": tile}},
        {**facts, "tokens": 20, "device": "H200", "plan": {"rows": 64, "up": tile, "down": tile}},
    ]
    path = tmp_path / "plans.json"
    path.write_text(json.dumps(rows))
    monkeypatch.setenv(plans.USER_PLANS, str(path))
    here = plans.Shape(48, 6, 1280, 640, device="NVIDIA H200")
    elsewhere = plans.Shape(48, 6, 1280, 640, device="NVIDIA H100 80GB HBM3")
    assert [plans.plan_for(here, tokens).rows for tokens in (1, 9, 10, 20)] == [32, 32, 64, 64]
    assert plans.plan_for(elsewhere, 9).rows == 16
    assert plans.plan_for(elsewhere, 20) == plans.rule(elsewhere, 20)
    assert plans.plan_for(here, 21) == plans.rule(here, 21)
    plans.plan_for.cache_clear()


def test_an_unknown_shape_says_once_why_it_waits(caplog: pytest.LogCaptureFixture) -> None:
    for shape in (PANGU, Shape(9, 3, 640, 328), Shape(9, 3, 640, 328)):
        tell_of_rule(shape)
    assert caplog.text.count("no measured tiles") == 1
    assert "9 experts of 640 x 328" in caplog.text


@pytest.mark.parametrize("capability", [80, 89, 90, 100])
@pytest.mark.parametrize("tokens", [1, 8, 100, 3000, 65536])
def test_every_shape_has_a_plan_with_a_backward(capability: int, tokens: int) -> None:
    for experts, picks, width, inner in (
        (8, 2, 4096, 14336),
        (256, 8, 7168, 2048),
        (32, 8, 576, 192),
    ):
        plan = plan_for(Shape(experts, picks, width, inner, capability), tokens)
        assert plan.down_grad
        assert plan.up_grad
        assert plan.gate_up_weight
        assert plan.down_weight
        assert plan.rows >= 16
        if capability != 90:
            assert not plan.up.split
            assert not plan.up.tma


def test_split_tiles_fit_the_shared_memory_of_a_multiprocessor() -> None:
    known = [e.plan for entries in table(90).values() for e in entries if e.plan is not None]
    by_rule = [plans.rule(Shape(64, 8, 5120, inner), 16384) for inner in (256, 1344)]
    whole = [*map(plans._with_backward, known, [Shape(64, 8, 1, 1)] * len(known)), *by_rule]
    assert sum(plan.up.split for plan in whole) > 4
    assert not any(plans.why_too_large(plan) for plan in whole)


def test_tiles_that_no_longer_fit_are_left_out_in_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tile = {"n": 128, "k": 64, "stages": 4, "split": True}
    facts = {"experts": 48, "picks": 6, "width": 1280, "inner": 640}
    plan = {"rows": 128, "up": tile, "down": tile}
    old = {**plan, "down_grad": {**tile, "stages": 6}}  # six stages fitted until `pre` came
    rows = [{**facts, "tokens": 9, "plan": old}, {**facts, "tokens": 20, "plan": plan}]
    path = tmp_path / "plans.json"
    path.write_text(json.dumps(rows))
    assert [entry.tokens for entry in table(90, path)[(48, 6, 1280, 640)]] == [20]
    assert f"{path}: tiles of (48, 6, 1280, 640) up to 9 tokens are left out" in caplog.text
    assert "down_grad needs 278,528 bytes of shared memory, a program has 232,448" in caplog.text


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"device": torch.device("cpu")}, "not on an NVIDIA GPU"),
        ({"dtype": torch.float32}, "bfloat16 and float16"),
        ({"hidden_size": 100}, "hidden size 100"),
        ({"expert_width": 12}, "expert width 12"),
    ],
)
def test_refusals_name_the_reason(monkeypatch: pytest.MonkeyPatch, facts: dict, words: str) -> None:
    monkeypatch.setattr("mogul.kernels.triton._device_reason", lambda index: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    call = {"device": CUDA, "dtype": torch.bfloat16, "hidden_size": 64, "expert_width": 64}
    assert why_not_triton(**call) is None
    assert words in (why_not_triton(**{**call, **facts}) or "")


def test_a_gpu_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    why = mogul.kernels.triton._reason_of_device.__wrapped__
    monkeypatch.setattr("mogul.kernels.triton.find_spec", lambda _name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _index: (7, 5))
    assert why(0) == "the GPU has compute capability 7.5, below 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _index: (8, 0))
    assert why(0) is None
    monkeypatch.setattr("mogul.kernels.triton.find_spec", lambda _name: None)
    assert why(0) == "triton is not installed"


def test_processors_never_choose_it() -> None:
    assert choose_backend("cpu", torch.bfloat16) != "triton"


def test_weights_that_are_views_are_refused_by_name() -> None:
    ops = pytest.importorskip("mogul.kernels.triton.ops")
    gate_up, down = torch.zeros(4, 16, 32).mT, torch.zeros(4, 16, 16)
    ids = torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(BackendError, match="gate_up with strides") as caught:
        ops.moe(torch.zeros(3, 16), gate_up, down, ids, torch.ones(3, 2))
    assert caught.value.__notes__[0].startswith("fix: pass gate_up.contiguous()")
    with pytest.raises(BackendError, match="down with strides"):
        ops.moe_train(torch.zeros(3, 16), gate_up.contiguous(), down.mT[..., ::2], ids, ids)
    layout = ExpertLayout(activation="gelu")  # other layouts have kernels of their own
    with pytest.raises(BackendError, match="gate_up with strides"):
        moe_forward_triton(torch.zeros(3, 16), gate_up, down, ids, torch.ones(3, 2), layout=layout)


def test_no_tokens_are_no_work() -> None:
    ops = pytest.importorskip("mogul.kernels.triton.ops")
    x = torch.zeros(0, 16, requires_grad=True)
    gate_up, down = torch.zeros(4, 32, 16, requires_grad=True), torch.zeros(4, 16, 16)
    ids = torch.zeros(0, 2, dtype=torch.int64)
    out = ops.run(x, gate_up, down, ids, torch.ones(0, 2))
    out.sum().backward()
    assert out.shape == (0, 16)
    assert gate_up.grad is not None
    assert not gate_up.grad.any()


def test_shapes_are_known_without_running() -> None:
    ops = pytest.importorskip("mogul.kernels.triton.ops")
    with FakeTensorMode():
        x, gate_up, down = torch.empty(5, 16), torch.empty(4, 32, 16), torch.empty(4, 16, 16)
        ids, weights = torch.zeros(5, 2, dtype=torch.int64), torch.ones(5, 2)
        out, pre, sort = torch.ops.mogul.moe_train(x, gate_up, down, ids, weights)
        assert ops.run(x, gate_up, down, ids, weights).shape == (5, 16)
    assert out.shape == (5, 16)
    assert pre.shape == (10, 32)
    assert sort.dtype == torch.int32


@given(st.integers(1, 5000), st.sampled_from([64, 128, 256]))
def test_the_last_tile_is_wide_enough_and_no_wider_than_needed(width: int, block: int) -> None:
    last, left = last_width(width, block), width % block or block
    assert left <= last <= block
    assert last == block or last // 2 < left or last == 64


@pytest.mark.parametrize("device", ["", "NVIDIA H200"])
def test_an_even_share_of_a_known_layer_runs_as_the_layer(device, tmp_path, monkeypatch):
    monkeypatch.delenv(plans.USER_PLANS, raising=False)
    whole = plans.Shape(64, 8, 5120, 1344, device=device)
    for parts in (2, 4):
        share = replace(whole, experts=64 // parts, picks=8 // parts)
        for tokens in (16, 64, 4096, 16384):
            assert plans.plan_for(share, tokens) == plans.plan_for(whole, tokens)
        assert plans.plan_for(share, 456) == plans.rule(share, 456), "its tiles of 64 rows are not"
    own = {"rows": 16, "up": {"n": 32, "k": 64}, "down": {"n": 64, "k": 64}}
    shape = {"experts": 32, "picks": 4, "width": 5120, "inner": 1344}
    file = tmp_path / "plans.json"
    file.write_text(json.dumps([{**shape, "tokens": 700, "plan": own}]))
    monkeypatch.setenv(plans.USER_PLANS, str(file))
    plans.plan_for.cache_clear()
    share = replace(whole, experts=32, picks=4)
    assert plans.plan_for(share, 456).rows == 16, "rows of its own come first"
    assert plans.plan_for(share, 4096) == plans.plan_for(whole, 4096)
    plans.plan_for.cache_clear()
    monkeypatch.delenv(plans.USER_PLANS)
    masked = replace(whole, experts=32)  # half of the experts, all picks: other rows an expert
    assert not plans.is_measured(masked)
    assert plans.plan_for(masked, 456) == plans.rule(masked, 456)
