"""Who runs the layer: mogul and the peers installed here.

Decides what a peer is given: the same weights, ids and router weights in the form it wants, made
before the clock starts. A peer that cannot run is told with its reason, never silently left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mogul.bench import kernels_libraries
from mogul.bench.kernels_layer import Forward, Layer
from mogul.core.errors import MogulError
from mogul.kernels import moe_forward, moe_forward_quantised, quantise_experts

PEERS = ("grouped_mm", "eager", "vllm", "triton_kernels", "sonicmoe")
SHOWN = {name: f"transformers {name}" for name in PEERS[:2]}
"""Names in tables and in the ledger, where they are longer."""


def variants(
    layer: Layer,
    backend: str,
    quant: str | None = None,
    *,
    train: bool = False,
    peers: Sequence[str] = PEERS,
    tell: Callable[[str], object] = lambda _name: None,
) -> tuple[dict[str, Forward], dict[str, str]]:
    """Name -> implementation, mogul first; and why the others did not come."""
    makers: dict[str, Callable[[Layer], Forward]] = {
        "grouped_mm": _transformers("grouped_mm"),
        "eager": _transformers("eager"),
        "vllm": kernels_libraries.vllm,
        "triton_kernels": kernels_libraries.triton_kernels,
        "sonicmoe": kernels_libraries.sonicmoe,
    }

    def mogul(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return moe_forward(x, layer.gate_up, layer.down, ids, weights, backend=backend)

    found, absent = {"mogul": Forward(mogul)}, {}
    if quant is not None:
        found[f"mogul {quant}"] = _quantised(layer, quant)
    for peer in peers:
        make, name = makers[peer], SHOWN.get(peer, peer)
        tell(name)
        try:
            forward = make(layer)
            if train and not forward.trains:
                raise MogulError("has no backward")
            forward.run(*layer.tokens(2))
            found[name] = forward
        except MogulError as error:
            absent[name] = str(error)
        except Exception as error:  # a foreign library may fail in any way: its reason is shown
            absent[name] = f"{type(error).__name__}: {str(error)[:160]}"
    return found, absent


def _quantised(layer: Layer, name: str) -> Forward:
    """The same layer in a quantised format; fp8 doubles a GPU's rate, fp8-w8a16 its work, too."""
    experts = quantise_experts(layer.gate_up, layer.down, name)

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return moe_forward_quantised(x, experts, ids, weights)

    is_fast = experts.format.name == "fp8" and layer.device.type != "cpu"
    return Forward(run, experts.format.bits / 8, 2.0 if is_fast else 1.0)


def _transformers(implementation: str) -> Callable[[Layer], Forward]:
    """Qwen3-MoE's experts module with the layer's own weights."""

    def make(layer: Layer) -> Forward:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        shape = layer.shape
        config = Qwen3MoeConfig(
            hidden_size=shape.width,
            moe_intermediate_size=shape.inner,
            num_experts=shape.experts,
            num_experts_per_tok=shape.picks,
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            module = Qwen3MoeExperts(config)
        # the layer's own tensors, so that gradients reach them
        module._parameters |= {"gate_up_proj": layer.gate_up, "down_proj": layer.down}  # type: ignore[dict-item]

        def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            return module(x, ids, weights.to(x.dtype))

        return Forward(run)

    return make
