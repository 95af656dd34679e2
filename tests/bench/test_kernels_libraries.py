"""Other libraries' layers: what they are given, and that they appear beside mogul."""

from __future__ import annotations

import sys
from collections import namedtuple
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch

from mogul.bench import kernels
from mogul.kernels import moe_forward

TINY = kernels.LayerShape(experts=8, picks=2, width=32, inner=16)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(kernels, "CELL_S", 0.0)
    monkeypatch.setitem(kernels.LIMIT_SIZE, "cpu", 64)


def install(monkeypatch, name, **members):
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__path__ = []
    module.__dict__.update(members)
    monkeypatch.setitem(sys.modules, name, module)


def fused_experts(x, gate_up, down, weights, ids):
    assert ids.dtype == torch.int32
    return moe_forward(x, gate_up, down, ids.long(), weights).detach()


def general_routing(x, scores, token, expert, gate_up, _b1, down, _b2, **options):
    """Slots in any order, weights as [2F, D, E] and [D, F, E], as SonicMoE documents them."""
    assert options["E"] == down.shape[-1]
    assert options["concat_layout"]
    assert options["is_inference_mode_enabled"] == (not torch.is_grad_enabled())
    assert (token.dtype, expert.dtype) == (torch.int32, torch.int32)
    out = torch.zeros_like(x)
    for slot in range(len(token)):
        gate, up = (gate_up[:, :, expert[slot]] @ x[token[slot]]).chunk(2)
        y = down[:, :, expert[slot]] @ (torch.nn.functional.silu(gate) * up)
        out = out.index_add(0, token[slot : slot + 1].long(), (scores[slot] * y)[None])
    return out, None


def grouped_product(x, weight, _bias, data, **options):
    """triton_kernels' product, slot by slot: rows by token with a gather, their sum with a scatter.

    Its activation takes gate and up in pairs of columns.
    """
    experts, picks = data.index.flatten(), data.index.shape[1]
    if "scatter_indx" in options:
        out = torch.stack([x[slot] @ weight[e] for slot, e in enumerate(experts)])
        return (out * options["gammas"].flatten()[:, None]).unflatten(0, (-1, picks)).sum(1)
    assert options["fused_activation"].reduction == 2
    rows = torch.stack([x[slot // picks] @ weight[e] for slot, e in enumerate(experts)])
    return torch.nn.functional.silu(rows[:, ::2]) * rows[:, 1::2]


def routing_from_bits(_bits, value, index, _experts, picks):
    assert index.shape[1] == picks
    return SimpleNamespace(index=index, gate_scal=value), "gather", "scatter"


def most(scores, picks, apply_softmax):
    assert apply_softmax
    value, index = scores.topk(picks)
    return value.softmax(-1), index, "bits"


@pytest.fixture
def libraries(monkeypatch):
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers"):
        install(monkeypatch, name)
    install(monkeypatch, "vllm.model_executor.layers.fused_moe", fused_experts=fused_experts)
    install(monkeypatch, "sonicmoe", moe_general_routing_inputs=general_routing)
    install(monkeypatch, "sonicmoe.enums", ActivationType=SimpleNamespace(SWIGLU="swiglu"))
    pytest.importorskip("triton")
    install(monkeypatch, "triton_kernels")
    install(
        monkeypatch, "triton_kernels.matmul_ogs", matmul_ogs=grouped_product,
        FnSpecs=namedtuple("FnSpecs", "name function arguments"),
        FusedActivation=namedtuple("FusedActivation", "specs arguments reduction"),
    )  # fmt: skip
    install(monkeypatch, "triton_kernels.routing", routing_from_bitmatrix=routing_from_bits)
    install(monkeypatch, "triton_kernels.topk", topk=most)
    for name in ("matmul_ogs", "routing", "topk"):
        module = sys.modules["triton_kernels." + name]
        monkeypatch.setattr(sys.modules["triton_kernels"], name, module, raising=False)


LIBRARIES = {"vllm", "triton_kernels", "sonicmoe"}


@pytest.mark.usefixtures("libraries")
def test_installed_libraries_run_in_the_same_run():
    result = kernels.measure(kernels.Request(TINY, tokens=(5,), dtype="fp32"))
    cells = {cell.variant: cell for cell in result.cells}
    assert {"mogul", *LIBRARIES} <= set(cells)
    assert not LIBRARIES & set(result.absent)
    assert max(cells[name].error for name in LIBRARIES) < 1e-5
    assert set(kernels.ledger_row(result, cells["mogul"])["peers"]) >= LIBRARIES


@pytest.mark.usefixtures("libraries")
def test_a_library_without_backward_is_left_out_of_training():
    result = kernels.measure(kernels.Request(TINY, tokens=(5,), dtype="fp32", train=True))
    assert {result.absent[name] for name in ("vllm", "triton_kernels")} == {"has no backward"}
    assert "sonicmoe" in {cell.variant for cell in result.cells}


def test_missing_and_failing_libraries_are_told(monkeypatch):
    def broken(*_args, **_options):
        raise RuntimeError("no such device")

    install(monkeypatch, "sonicmoe", moe_general_routing_inputs=broken)
    install(monkeypatch, "sonicmoe.enums", ActivationType=SimpleNamespace(SWIGLU="swiglu"))
    result = kernels.measure(kernels.Request(TINY, tokens=(2,), dtype="fp32"))
    assert {result.absent[name] for name in ("vllm", "triton_kernels")} == {"not installed"}
    assert result.absent["sonicmoe"] == "RuntimeError: no such device"
