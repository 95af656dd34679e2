"""Other people's expert layers behind one call: (x, ids, weights) -> out. None of their code.

A peer that is missing raises at construction; the benchmark prints why and goes on.
`vllm` needs a folder with vLLM's fused_moe.py, moe_align_block_size.py and configs/, and its
compiled _moe_C library; `triton_kernels` the package of that name on PYTHONPATH.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from common import Case, time_events
from torch import Tensor

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


def mogul(case: Case) -> Forward:
    """This project's layer, through its public door."""
    from mogul.kernels import moe_forward

    return lambda x, ids, weights: moe_forward(
        x, case.gate_up, case.down, ids, weights, backend="triton"
    )


@triton.jit
def _silu_mul(h_ptr, out_ptr, F: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(h_ptr + row * 2 * F + cols, mask=cols < F).to(tl.float32)
    up = tl.load(h_ptr + row * 2 * F + F + cols, mask=cols < F).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * F + cols, value.to(out_ptr.dtype.element_ty), mask=cols < F)


def silu_mul(h: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(first half) * second half."""
    rows, width = h.shape[0], h.shape[1] // 2
    out = h.new_empty(rows, width) if out is None else out
    block = min(1024, triton.next_power_of_2(width))
    _silu_mul[(rows, triton.cdiv(width, block))](h, out, width, block)
    return out


def _sorted(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    flat = ids.flatten()
    order = flat.sort(stable=True).indices
    ones = torch.ones_like(flat, dtype=torch.int32)
    count = torch.zeros(experts, device=ids.device, dtype=torch.int32).scatter_add_(0, flat, ones)
    return order, count.cumsum(0, dtype=torch.int32)


def torch_grouped(case: Case) -> Forward:
    """Torch's grouped_mm with plain torch around it; differentiable."""
    experts, _, _ = case.dims
    grouped = getattr(F, "grouped_mm", None) or torch._grouped_mm

    def forward(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order, ends = _sorted(ids, experts)
        h = grouped(x[order // ids.shape[1]], case.gate_up.transpose(1, 2), offs=ends)
        if torch.is_grad_enabled():
            gate, up = h.chunk(2, -1)
            act = F.silu(gate) * up
        else:
            act = silu_mul(h)
        y = grouped(act, case.down.transpose(1, 2), offs=ends)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=x.device)
        y = y[back].unflatten(0, ids.shape)
        return (y * weights.unsqueeze(-1).to(y.dtype)).sum(1)

    return forward


def hf_grouped(case: Case) -> Forward:
    """Transformers' Qwen3-MoE experts under grouped_mm."""
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    experts, width, inner = case.dims
    config = Qwen3MoeConfig(
        hidden_size=width,
        moe_intermediate_size=inner,
        num_experts=experts,
        num_experts_per_tok=case.picks,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)

    def forward(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        module._parameters["gate_up_proj"] = case.gate_up
        module._parameters["down_proj"] = case.down
        return module(x, ids, weights.to(x.dtype))

    return forward


def triton_kernels(case: Case) -> Forward:
    """matmul_ogs with gather, SwiGLU and scatter fused; its top-k bit matrix is made outside."""
    import triton_kernels.matmul_ogs as ogs
    import triton_kernels.routing as routing
    import triton_kernels.topk as topk

    experts, _, inner = case.dims
    gate, up = case.gate_up[:, :inner], case.gate_up[:, inner:]
    interleaved = torch.stack((gate, up), 2).reshape(experts, 2 * inner, -1).contiguous()
    w_up, w_down = interleaved.transpose(1, 2), case.down.transpose(1, 2)
    function = ogs.FnSpecs("swiglu_plain", _swiglu_pairs, ())
    act = ogs.FusedActivation(function, (), 2)
    prepared: dict[Any, Any] = {}

    def forward(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        key = (ids.data_ptr(), ids.shape)
        if key not in prepared:
            logits = torch.full((ids.shape[0], experts), -30.0, device=x.device)
            logits = logits.scatter_(1, ids, weights.log() + 20)
            prepared[key] = topk.topk(logits, ids.shape[1], apply_softmax=True)
        value, index, bits = prepared[key]
        data, gather, scatter = routing.routing_from_bitmatrix(
            bits, value, index, experts, ids.shape[1]
        )
        h = ogs.matmul_ogs(x, w_up, None, data, gather_indx=gather, fused_activation=act)
        return ogs.matmul_ogs(h, w_down, None, data, scatter_indx=scatter, gammas=data.gate_scal)

    return forward


@triton.jit
def _swiglu_pairs(x):
    gate, up = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return gate * tl.sigmoid(gate) * up


# ---------------------------------------------------------------- vLLM without the rest of vLLM


class _Anything:
    """Answers every attribute with a function that says no."""

    def __getattr__(self, name: str) -> Any:
        if name == "get_device_name":
            return torch.cuda.get_device_name
        if name in ("is_cuda", "is_cuda_alike"):
            return lambda: True
        return lambda *args, **kwargs: None


def _module(name: str, **members: Any) -> None:
    module = types.ModuleType(name)
    module.__dict__.update(members)
    module.__path__ = []  # type: ignore[attr-defined]
    sys.modules[name] = module
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, module)


def _vllm_module(folder: Path, library: Path, chosen: dict[str, Any]) -> Any:
    """VLLM's fused_moe.py behind stand-ins for what it imports."""
    torch.ops.load_library(str(library))
    base = "vllm.model_executor.layers.fused_moe"

    class Activation:
        SILU = "silu"

        @staticmethod
        def from_str(name: str) -> str:
            return name

    class Modular:
        @staticmethod
        def adjust_N_for_activation(n: int, _activation: str) -> int:
            return n // 2

    _module("vllm")
    _module("vllm.envs", VLLM_BATCH_INVARIANT=False, VLLM_TUNED_CONFIG_FOLDER=None)
    _module("vllm.model_executor")
    _module("vllm.model_executor.layers")
    _module(base, get_config=lambda: chosen.get("config"))
    _module(base + ".modular_kernel", FusedMoEExpertsModular=Modular)
    _module(
        "vllm._custom_ops",
        moe_align_block_size=lambda *a: torch.ops._moe_C.moe_align_block_size(*a),
        moe_sum=lambda y, out: torch.ops._moe_C.moe_sum(y, out),
    )
    _module("vllm.logger", init_logger=lambda name: _Anything())
    _module(
        base + ".activation",
        MoEActivation=Activation,
        apply_moe_activation=lambda act, out, h: silu_mul(h, out),
    )
    _module(
        base + ".config",
        FUSED_MOE_UNQUANTIZED_CONFIG=_Anything(),
        FusedMoEQuantConfig=_Anything,
        _get_config_dtype_str=lambda **kwargs: None,
    )
    _module(
        base + ".utils",
        disable_inplace=lambda: False,
        moe_kernel_quantize_input=lambda A, A_scale, **kwargs: (A, None),
    )
    _module("vllm.platforms", current_platform=_Anything())
    _module("vllm.triton_utils", tl=tl, triton=triton)
    _module("vllm.utils")
    _module("vllm.utils.torch_utils", direct_register_custom_op=lambda *a, **k: None)
    _module(
        "vllm.utils.math_utils",
        round_up=lambda a, b: (a + b - 1) // b * b,
        cdiv=lambda a, b: -(-a // b),
    )
    for name in ("moe_align_block_size", "fused_moe"):
        spec = importlib.util.spec_from_file_location(f"{base}.{name}", folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        sys.modules[spec.name] = module  # type: ignore[union-attr]
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def _tile(m: int, n: int, k: int, group: int, warps: int, stages: int) -> dict[str, int]:
    return {
        "BLOCK_SIZE_M": m,
        "BLOCK_SIZE_N": n,
        "BLOCK_SIZE_K": k,
        "GROUP_SIZE_M": group,
        "SPLIT_K": 1,
        "num_warps": warps,
        "num_stages": stages,
    }


_VLLM_TILES = {
    8: [_tile(16, 64, 128, 1, 4, 4), _tile(16, 128, 128, 1, 4, 3), _tile(16, 32, 256, 1, 4, 3)],
    64: [_tile(16, 64, 128, 1, 4, 4), _tile(16, 128, 128, 1, 4, 3), _tile(32, 128, 64, 1, 4, 4)],
    456: [_tile(64, 128, 64, 1, 4, 4), _tile(64, 256, 64, 1, 8, 3), _tile(32, 128, 64, 1, 4, 4)],
    1 << 30: [
        _tile(128, 256, 64, 16, 8, 3),
        _tile(64, 256, 64, 16, 4, 3),
        _tile(128, 256, 64, 8, 8, 4),
    ],
}


def vllm(folder: str, library: str, *, tuned: bool) -> Callable[[Case], Forward]:
    """fused_experts of vLLM with its default tiles, or with the best of a few for each size."""

    def make(case: Case) -> Forward:
        chosen: dict[str, Any] = {}
        module = sys.modules.get("mogul_bench_vllm")
        if module is None:
            module = _vllm_module(Path(folder), Path(library), chosen)
            module.bench_chosen = chosen
            sys.modules["mogul_bench_vllm"] = module
        chosen = module.bench_chosen
        best: dict[int, dict[str, int]] = {}
        short: dict[Any, Tensor] = {}

        def call(x: Tensor, ids: Tensor, weights: Tensor, config: dict[str, int] | None) -> Tensor:
            chosen["config"] = config
            key = (ids.data_ptr(), ids.shape)
            if key not in short:
                short[key] = ids.to(torch.int32)
            return module.fused_experts_impl(x, case.gate_up, case.down, weights, short[key], False)

        def forward(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            tokens = x.shape[0]
            if tuned and tokens not in best:
                tiles = next(t for bound, t in _VLLM_TILES.items() if tokens <= bound)
                timed = [
                    (time_events([lambda t=t: call(x, ids, weights, t)], 0.03), i)
                    for i, t in enumerate(tiles)
                ]
                best[tokens] = tiles[min(timed)[1]]
            return call(x, ids, weights, best.get(tokens))

        return forward

    return make
