"""Every layout on Triton: forward and gradients in the interpreter, compiled, and on a device."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from scripts import rows_of

triton = pytest.importorskip("triton")

from torch._subclasses import FakeTensorMode  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mogul.kernels import ExpertLayout, moe_forward  # noqa: E402
from mogul.kernels.layout import ACTIVATIONS, CLAMPED, CLAMPED_SILU, CLAMPED_SWIGLU  # noqa: E402
from mogul.kernels.triton import any_kernels, any_layer  # noqa: E402
from mogul.kernels.triton.any_ops import run_any  # noqa: E402

CASES = (
    "plain",
    "gpt-oss",
    "interleaved with biases",
    "transposed gelu_tanh",
    "gelu",
    "no gate, relu2",
    "no gate, relu, transposed",
    "clamped SiLU",
)
GPT_OSS = ExpertLayout(is_transposed=True, is_concatenated=False, activation=CLAMPED_SWIGLU)


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return rows_of("run_layouts.py", *CASES)


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients_equal_the_reference(found: list[dict[str, Any]], case: str) -> None:
    rows = [row for row in found if row["case"] == case]
    assert rows
    for row in rows:
        assert max(row["found"].values()) < (1e-6 if row["dtype"] == "float32" else 3e-3)
        assert {"out", "dx", "dgate_up", "ddown", "dweights"} <= row["found"].keys()
    assert ("ddown_bias" in rows[0]["found"]) == (case in CASES[1:3] or case == CASES[5])


def test_the_kernels_know_every_activation() -> None:
    assert set(any_layer.ACTIVATIONS) == {*ACTIVATIONS, *CLAMPED}
    assert any_layer.ACTIVATIONS[any_kernels.GELU_TANH.value] == "gelu_tanh"
    assert any_layer.ACTIVATIONS[any_kernels.CLAMPED.value] == CLAMPED_SWIGLU
    assert any_layer.ACTIVATIONS[any_kernels.CLAMPED_SILU.value] == CLAMPED_SILU


BLOCKS = {"BLOCK_T": 64, "BLOCK_N": 64, "BLOCK_K": 32}
FORM = any_layer.Form.of(GPT_OSS)
SIZES = {"D": 2880, "F": 2880, "K": 4, "E": 32}
KERNELS = {
    "up_any": {
        **SIZES,
        **FORM.strides(5760, 2880),
        **FORM.activation(),
        **{"INTERLEAVED": True, "BIAS": True, "SAVE": True},
        **BLOCKS,
    },
    "product_any": {
        **{"N": 2880, "C": 5760, "F": 2880, "E": 32},
        **FORM.strides(5760, 2880),
        **{"BACK": True, "INTERLEAVED": True, "BIAS": False},
        **BLOCKS,
    },
    "down_grad_any": {
        **SIZES,
        **FORM.strides(2880, 2880),
        **{**FORM.activation(), "BIAS": True, "ACT": 1},
        **BLOCKS,
    },
    "weight_grad_any": {
        **{"M": 5760, "N": 2880, "F": 2880, "K": 4},
        **FORM.strides(5760, 2880),
        **{"INTERLEAVED": True, "GATHER_LEFT": False},
        **{"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_R": 32},
    },
    "bias_grad_any": {
        **{"N": 5760, "F": 2880, "K": 4, "INTERLEAVED": True, "WEIGHTED": True},
        **{"BLOCK_N": 64, "BLOCK_R": 32},
    },
}


def compiled(name: str, arch: int, **changed: Any) -> Any:
    kernel, constants = getattr(any_kernels, name), {**KERNELS[name], **changed}
    special = {
        **dict.fromkeys(("order_ptr", "head_ptr", "tiles_ptr"), "*i32"),
        **{"weights_ptr": "*fp32", "part_ptr": "*fp32", "num_slots": "i32"},
    }
    names = [parameter.name for parameter in kernel.params]
    types = {n: special.get(n, "*bf16") for n in names}
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*"
    }
    constexprs = {(i,): constants[n] for i, n in enumerate(names) if n in constants}
    source = ASTSource(kernel, signature, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": 4, "num_stages": 2}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


@pytest.mark.parametrize(
    ("name", "arch"),
    [("up_any", 80), ("up_any", 89), ("up_any", 100), *((name, 90) for name in KERNELS)],
)
def test_they_compile_for_gpt_oss(name: str, arch: int) -> None:
    assert compiled(name, arch).metadata.shared < 100_000


@pytest.mark.parametrize("activation", [CLAMPED_SWIGLU, CLAMPED_SILU, "relu", "relu2"])
def test_what_is_no_number_stays_so_under_a_clamp(activation: str) -> None:
    """A GPU's plain minimum of NaN and a limit is the limit: a model that broke would go on."""
    ptx = compiled("up_any", 90, ACT=any_layer.ACTIVATIONS.index(activation)).asm["ptx"]
    clamps = {"min.NaN.f32", "max.NaN.f32"} if activation in CLAMPED else {"max.NaN.f32"}
    assert set(re.findall(r"\b(?:min|max)(?:\.NaN)?\.f32", ptx)) == clamps


def test_shapes_are_known_without_running() -> None:
    with FakeTensorMode():
        x, weights = torch.empty(5, 16, requires_grad=True), torch.ones(5, 2)
        gate_up, down = torch.empty(4, 16, 24), torch.empty(4, 12, 16)
        ids = torch.zeros(5, 2, dtype=torch.int64)
        out = run_any(x, gate_up, down, ids, weights, torch.empty(4, 24), None, GPT_OSS)
        (dx,) = torch.autograd.grad(out.sum(), x)
    assert out.shape == dx.shape == (5, 16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("tokens", [3, 700])
def test_gpt_oss_experts_on_a_device(tokens: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator) * std

    leaves = [normal(tokens, 256), normal(8, 256, 384, std=0.1), normal(8, 192, 256, std=0.1)]
    leaves += [normal(tokens, 4).softmax(-1), normal(8, 384), normal(8, 256)]
    ids = normal(tokens, 8).topk(4).indices
    dout, results = normal(tokens, 256), {}
    for backend, dtype in (("reference", torch.float32), ("triton", torch.bfloat16)):
        given = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        x, gate_up, down, weights, up_bias, down_bias = given
        out = moe_forward(
            x, gate_up, down, ids, weights, gate_up_bias=up_bias, down_bias=down_bias,
            layout=GPT_OSS, backend=backend,
        )  # fmt: skip
        grads = torch.autograd.grad(out, given, dout.to(dtype))
        results[backend] = [out.detach(), *grads]
    for got, want in zip(results["triton"], results["reference"], strict=True):
        assert float((got.float() - want).norm() / want.norm()) < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("tokens", [3, 700])
def test_clamped_silu_on_a_device(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(tokens, 256), (8, 384, 256), (8, 256, 192)]
    leaves = [(torch.randn(*s, device="cuda", generator=generator) * 0.3) for s in shapes]
    leaves = [leaf.bfloat16() for leaf in leaves]
    ids = torch.rand(tokens, 8, device="cuda", generator=generator).topk(4).indices
    layout, plain = ExpertLayout(activation=CLAMPED_SILU, limit=2.0), ExpertLayout.activate

    def results(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        given = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        weights = torch.full(ids.shape, 0.25, device="cuda", dtype=dtype)
        out = moe_forward(*given, ids, weights, layout=layout, backend=backend)
        return [out.detach(), *torch.autograd.grad((out * 2).sum(), given)]

    def rounded(self: ExpertLayout, hidden: torch.Tensor) -> torch.Tensor:
        """What is kept in bf16 may round to the limit, where the gradient jumps: 5 % of dx."""
        return plain(self, hidden + (hidden.bfloat16().float() - hidden).detach())

    found = results("triton", torch.bfloat16)
    monkeypatch.setattr(ExpertLayout, "activate", rounded)
    for got, want in zip(found, results("reference", torch.float32), strict=True):
        assert float((got.float() - want).norm() / want.norm()) < 2e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("activation", [CLAMPED_SWIGLU, CLAMPED_SILU, "relu"])
def test_a_row_that_is_no_number_stays_so_on_a_device(activation: str) -> None:
    x, gate_up, down = (
        torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.3
        for shape in ((4, 64), (3, 64, 64), (3, 64, 32))
    )
    x[1] = float("nan")
    ids = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2]], device="cuda")
    weights = torch.full((4, 2), 0.5, device="cuda")
    layout = ExpertLayout(activation=activation)
    out = moe_forward(x, gate_up, down, ids, weights, layout=layout, backend="triton")
    assert out.isnan().any(1).tolist() == [False, True, False, False]
