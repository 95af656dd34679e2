"""vLLM's fused_moe without the rest of vLLM: bf16, and fp8 with a scale a channel and a token.

Its own fused_moe.py, moe_align_block_size.py and tuned configurations run behind stand-ins for what
they import; its compiled libraries `_moe_C` (alignment, sum over picks) and, where it is there,
`_C_stable_libtorch` (SiLU with product, rounding to fp8) do the rest. FOLDER holds fused_moe/ and
the two libraries. "Tuned" takes the best of a few tiles for each size, the package's configuration
files of the shape (of any Hopper card) among them.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from common import Case, time_events
from peer_parts import Forward, silu_mul
from torch import Tensor

BASE = "vllm.model_executor.layers.fused_moe"
NAME = "mogul_bench_vllm"
Tile = dict[str, int]


class _Anything:
    """Answers every attribute with a function that says no."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


class _Platform(_Anything):
    """This machine, as vLLM asks for it."""

    get_device_name = staticmethod(torch.cuda.get_device_name)
    is_cuda = is_cuda_alike = staticmethod(lambda: True)
    fp8_dtype = staticmethod(lambda: torch.float8_e4m3fn)


class _Activation:
    SILU = "silu"

    @staticmethod
    def from_str(name: str) -> str:
        """Only SiLU is asked for here."""
        return name


class _Modular:
    @staticmethod
    def adjust_N_for_activation(n: int, _activation: str) -> int:
        """Gate and up become one."""
        return n // 2


def _module(name: str, **members: Any) -> None:
    module = types.ModuleType(name)
    module.__dict__.update(members)
    module.__path__ = []  # type: ignore[attr-defined]
    sys.modules[name] = module
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, module)


def _own_silu(activation: str, out: Tensor, h: Tensor) -> None:
    torch.ops._C.silu_and_mul(out, h)


def _our_silu(activation: str, out: Tensor, h: Tensor) -> None:
    silu_mul(h, out)


def _quantise(
    A: Tensor, A_scale: Tensor | None, quant_dtype: Any, **_kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Rows to fp8 by vLLM's own kernel, where the layer asks for it."""
    if quant_dtype is None:
        return A, None
    out = torch.empty_like(A, dtype=quant_dtype)
    scale = torch.empty(A.shape[0], 1, dtype=torch.float32, device=A.device)
    torch.ops._C.dynamic_per_token_scaled_fp8_quant(out, A, scale, None)
    return out, scale


def _stand_ins(chosen: dict[str, Any], own_silu: bool) -> None:
    _module("vllm")
    _module("vllm.envs", VLLM_BATCH_INVARIANT=False, VLLM_TUNED_CONFIG_FOLDER=None)
    _module("vllm.model_executor")
    _module("vllm.model_executor.layers")
    _module(BASE, get_config=lambda: chosen.get("config"))
    _module(BASE + ".modular_kernel", FusedMoEExpertsModular=_Modular)
    _module(
        "vllm._custom_ops",
        moe_align_block_size=lambda *a: torch.ops._moe_C.moe_align_block_size(*a),
        moe_sum=lambda y, out: torch.ops._moe_C.moe_sum(y, out),
    )
    _module("vllm.logger", init_logger=lambda name: _Anything())
    _module(
        BASE + ".activation",
        MoEActivation=_Activation,
        apply_moe_activation=_own_silu if own_silu else _our_silu,
    )
    _module(
        BASE + ".config",
        FUSED_MOE_UNQUANTIZED_CONFIG=_Anything(),
        FusedMoEQuantConfig=_Anything,
        _get_config_dtype_str=lambda use_fp8_w8a8=False, **_: "fp8_w8a8" if use_fp8_w8a8 else None,
    )
    _module(BASE + ".utils", disable_inplace=lambda: False, moe_kernel_quantize_input=_quantise)
    _module("vllm.platforms", current_platform=_Platform())
    _module("vllm.triton_utils", tl=tl, triton=triton)
    _module("vllm.utils")
    _module("vllm.utils.torch_utils", direct_register_custom_op=lambda *a, **k: None)
    _module(
        "vllm.utils.math_utils",
        round_up=lambda a, b: (a + b - 1) // b * b,
        cdiv=lambda a, b: -(-a // b),
    )


def _has_own_silu(library: Path) -> bool:
    """Load vLLM's elementwise kernels, if they are there and fit this torch."""
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        print(f"vllm runs with our SiLU and without fp8: {str(error)[:160]}")
        return False
    return True


def _load(folder: Path) -> Any:
    """VLLM's fused_moe.py, once a process; `bench_chosen["config"]` overrides its tiles."""
    if NAME in sys.modules:
        return sys.modules[NAME]
    torch.ops.load_library(str(folder / "_moe_C.abi3.so"))
    chosen: dict[str, Any] = {}
    _stand_ins(chosen, _has_own_silu(folder / "_C_stable_libtorch.abi3.so"))
    module: Any = None
    for name in ("moe_align_block_size", "fused_moe"):
        spec = importlib.util.spec_from_file_location(
            f"{BASE}.{name}", folder / "fused_moe" / f"{name}.py"
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    module.bench_chosen = chosen
    module.bench_folder = folder
    sys.modules[NAME] = module
    return module


def _tile(m: int, n: int, k: int, group: int, warps: int, stages: int) -> Tile:
    sizes = {"BLOCK_SIZE_M": m, "BLOCK_SIZE_N": n, "BLOCK_SIZE_K": k, "GROUP_SIZE_M": group}
    return {**sizes, "SPLIT_K": 1, "num_warps": warps, "num_stages": stages}


_TILES = {
    8: [_tile(16, 64, 128, 1, 4, 4), _tile(16, 128, 128, 1, 4, 3), _tile(16, 32, 256, 1, 4, 3)],
    64: [_tile(16, 64, 128, 1, 4, 4), _tile(16, 128, 128, 1, 4, 3), _tile(32, 128, 64, 1, 4, 4)],
    456: [_tile(64, 128, 64, 1, 4, 4), _tile(64, 256, 64, 1, 8, 3), _tile(32, 128, 64, 1, 4, 4)],
    1 << 30: [
        _tile(128, 256, 64, 16, 8, 3),
        _tile(64, 256, 64, 16, 4, 3),
        _tile(128, 256, 64, 8, 8, 4),
    ],
}
_FP8_TILES = {
    8: [_tile(16, 64, 128, 1, 4, 4), _tile(16, 64, 256, 1, 4, 3), _tile(16, 128, 128, 1, 4, 4)],
    64: [
        _tile(16, 64, 256, 1, 4, 4),
        _tile(16, 128, 128, 1, 4, 4),
        _tile(16, 128, 256, 1, 8, 3),
        _tile(32, 128, 128, 1, 4, 4),
    ],
    456: [
        _tile(64, 128, 128, 1, 4, 4),
        _tile(64, 128, 128, 1, 8, 4),
        _tile(32, 128, 128, 1, 4, 4),
        _tile(64, 256, 128, 1, 8, 3),
    ],
    1 << 30: [_tile(128, 256, 128, 16, 8, 3), _tile(128, 128, 128, 16, 8, 4)],
}


def _from_files(folder: Path, case: Case, tokens: int) -> list[Tile]:
    """What the package's files say of the shape in bf16 for this size."""
    experts, _, inner = case.dims
    found = []
    for path in (folder / "fused_moe" / "configs").glob(f"E={experts},N={inner},*.json"):
        if "dtype" not in path.name:
            table = {int(k): v for k, v in json.loads(path.read_text()).items() if k.isdigit()}
            found.append(table[min(table, key=lambda size: abs(size - tokens))])
    return found


def _best(call: Callable[[Tile | None], object], tiles: list[Tile]) -> Tile:
    """The fastest of the tiles that run."""
    timed = []
    for place, tile in enumerate(tiles):
        try:
            timed.append((time_events([lambda t=tile: call(t)], 0.03), place))
        except Exception as error:  # a tile may ask for more shared memory than there is
            print(f"  a tile of vllm fails: {type(error).__name__} {str(error)[:80]}")
    return tiles[min(timed)[1]]


def vllm(folder: str, *, tuned: bool, fp8: bool = False) -> Callable[[Case], Forward]:
    """fused_experts of vLLM with its default tiles, or with the best of a few for each size."""

    def make(case: Case) -> Forward:
        module = _load(Path(folder))
        gate_up, gate_up_scale = fp8_weight(case.gate_up) if fp8 else (case.gate_up, None)
        down, down_scale = fp8_weight(case.down) if fp8 else (case.down, None)
        options = {"use_fp8_w8a8": fp8, "per_channel_quant": fp8}
        scales = {"w1_scale": gate_up_scale, "w2_scale": down_scale}
        best: dict[int, Tile] = {}
        short: dict[Any, Tensor] = {}

        def call(x: Tensor, ids: Tensor, weights: Tensor, tile: Tile | None) -> Tensor:
            module.bench_chosen["config"] = tile
            key = (ids.data_ptr(), ids.shape)
            if key not in short:
                short[key] = ids.to(torch.int32)
            args = (x, gate_up, down, weights, short[key], False)
            return module.fused_experts_impl(*args, **options, **scales)

        def forward(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            tokens = x.shape[0]
            if tuned and tokens not in best:
                table = _FP8_TILES if fp8 else _TILES
                tiles = next(tiles for bound, tiles in table.items() if tokens <= bound)
                more = [] if fp8 else _from_files(module.bench_folder, case, tokens)
                best[tokens] = _best(lambda t: call(x, ids, weights, t), [*tiles, *more])
            return call(x, ids, weights, best.get(tokens))

        return forward

    return make


def fp8_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[E, N, K] -> e4m3 and one scale an output channel, [E, N, 1]."""
    value = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    scale = torch.empty(*weight.shape[:2], 1, dtype=torch.float32, device=weight.device)
    for expert in range(len(weight)):  # expert by expert: fp32 copies of all would not fit
        wide = weight[expert].float()
        scale[expert] = wide.abs().amax(-1, keepdim=True).clamp_min(1e-8) / 448
        value[expert] = (wide / scale[expert]).to(value.dtype)
    return value, scale
