"""Every layout on Triton: forward and gradients in the interpreter, compiled, and on a device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from torch._subclasses import FakeTensorMode  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mogul.kernels import ExpertLayout, moe_forward  # noqa: E402
from mogul.kernels.layout import ACTIVATIONS, CLAMPED_SWIGLU  # noqa: E402
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
)
GPT_OSS = ExpertLayout(is_transposed=True, is_concatenated=False, activation=CLAMPED_SWIGLU)


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    script = Path(__file__).with_name("run_layouts.py")
    done = subprocess.run(
        [sys.executable, str(script), *CASES], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients_equal_the_reference(found: list[dict[str, Any]], case: str) -> None:
    rows = [row for row in found if row["case"] == case]
    assert rows
    for row in rows:
        assert max(row["found"].values()) < (1e-6 if row["dtype"] == "float32" else 3e-3)
        assert {"out", "dx", "dgate_up", "ddown", "dweights"} <= row["found"].keys()
    assert ("ddown_bias" in rows[0]["found"]) == (case in CASES[1:3] or case == CASES[5])


def test_the_kernels_know_every_activation() -> None:
    assert set(any_layer.ACTIVATIONS) == {*ACTIVATIONS, CLAMPED_SWIGLU}
    assert any_layer.ACTIVATIONS[any_kernels.GELU_TANH.value] == "gelu_tanh"
    assert any_layer.ACTIVATIONS[any_kernels.CLAMPED.value] == CLAMPED_SWIGLU


@pytest.mark.parametrize("arch", [80, 89, 90, 100])
def test_up_compiles_for_gpt_oss(arch: int) -> None:
    kernel = any_kernels.up_any
    types = {
        **dict.fromkeys(("x_ptr", "w_ptr", "bias_ptr", "act_ptr", "pre_ptr"), "*bf16"),
        **dict.fromkeys(("order_ptr", "head_ptr", "tiles_ptr"), "*i32"),
    }
    form = any_layer.Form.of(GPT_OSS)
    constants = {
        **{"D": 2880, "F": 2880, "K": 4, "E": 32, **form.strides(5760, 2880)},
        **form.activation(),
        **{"INTERLEAVED": form.interleaved, "BIAS": True, "SAVE": True},
        **{"BLOCK_T": 64, "BLOCK_N": 64, "BLOCK_K": 32},
    }
    names = [parameter.name for parameter in kernel.params]
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name][0] == "*"
    }
    constexprs = {(i,): constants[name] for i, name in enumerate(names) if name in constants}
    source = ASTSource(kernel, signature, constexprs=constexprs, attrs=attributes)
    done = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4, "num_stages": 2}
    )
    assert done.metadata.shared < 100_000


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
