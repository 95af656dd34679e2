"""A whole decode step of a model spread over devices, as one graph, at a full cache.

The model is laid out before its weights get memory, so a model larger than one device can be
measured with random weights. One step is: embedding, all layers over `context` cached positions,
head, argmax. The floor is what a rank must read (its dense weights, the experts its tokens are
expected to touch, its part of the cache) at the bandwidth measured in the same run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mogul.bench.devices_clock import Clock, best_s
from mogul.bench.kernels import DTYPES
from mogul.parallel import World, lay_out
from mogul.parallel.dispatch import Wire
from mogul.parallel.shard import experts_of
from mogul.spec.parallel import Parallel

ATTENTION = "mogul_full_cache"


@dataclass(frozen=True, kw_only=True)
class DecodeRequest:
    """Which model decodes, how laid out."""

    config: dict[str, Any]
    """Keys of a MogeConfig."""
    parallel: Parallel
    dispatch: str = "static"
    wire: Wire | None = None
    compiled: bool = False
    """Whether norms and the shared expert's activation are compiled to one kernel each."""
    context: int = 1024
    dtype: str = "bf16"
    budget_s: float = 1.0


def _attend(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    scaling: float = 1.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """One query over a cache that is full: nothing to mask."""
    out = F.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


def build(world: World, request: DecodeRequest) -> Any:
    """The model on this rank, random."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from mogul.models import MogeConfig, MogeForCausalLM
    from mogul.models.moge.modeling_moge import MogeMLP
    from mogul.models.moge.norm import MogeRMSNorm
    from mogul.models.moge.rotary import MogeRotaryEmbedding

    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, lambda *_args, **_kwargs: None)
    previous = torch.get_default_dtype()
    try:
        torch.set_default_dtype(DTYPES[request.dtype])
        with torch.device("meta"):
            model: Any = MogeForCausalLM(MogeConfig(**request.config))
    finally:
        torch.set_default_dtype(previous)
    lay_out(model, request.parallel, dispatch=request.dispatch, chunks=1, wire=request.wire)
    model.to_empty(device=world.device)
    model.requires_grad_(False)
    generator = torch.Generator(world.device).manual_seed(world.rank // request.parallel.tp)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(0, 0.02, generator=generator)
    with world.device:
        model.model.rotary_emb = MogeRotaryEmbedding(model.config)
    for module in model.modules():
        if hasattr(module, "group_of_expert"):
            module.group_of_expert.copy_(module._groups())
    model.config._attn_implementation = ATTENTION
    model.set_experts_implementation("mogul")
    if request.compiled:
        for module in model.modules():
            if isinstance(module, (MogeRMSNorm, MogeMLP)):
                module.forward = torch.compile(module.forward, dynamic=False)
    return model.eval()


class Step:
    """One decode step of this rank's sequences at the last position of a full cache."""

    def __init__(self, model: Any, world: World, request: DecodeRequest, batch: int) -> None:
        from transformers import StaticCache

        self.model, self.last = model, request.context - 1
        self.cache = StaticCache(config=model.config, max_cache_len=request.context)
        self.sequences = -(-batch // request.parallel.dp)
        generator = torch.Generator(world.device).manual_seed(world.rank // request.parallel.tp)
        self.ids = torch.randint(
            0, model.config.vocab_size, (self.sequences, 1),
            generator=generator, device=world.device,
        )  # fmt: skip
        self.positions = torch.full((1, 1), self.last, device=world.device)

    def __call__(self) -> Tensor:
        """The next tokens [sequences, 1]."""
        layers: Any = self.cache.layers
        known = [layer.cumulative_length for layer in layers if layer.is_initialized]
        if known:  # two launches for all layers
            many: Any = torch
            many._foreach_zero_(known)
            many._foreach_add_(known, self.last)
        logits = self.model(
            input_ids=self.ids,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        return logits[:, -1:].argmax(-1)


def read_bytes(model: Any, request: DecodeRequest, tokens: int, sequences: int) -> float:
    """Bytes that this rank must read in a step of `tokens` tokens over all ranks."""
    config, element = model.config, DTYPES[request.dtype].itemsize
    inside = {id(p) for _, module in experts_of(model) for p in module.parameters()}
    dense = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    dense -= model.model.embed_tokens.weight.numel()
    share = 1 - (1 - config.num_experts_per_tok / config.num_experts) ** tokens
    touched = share * sum(p.numel() for p in model.parameters() if id(p) in inside)
    heads = config.num_key_value_heads // request.parallel.tp
    cached = 2 * sequences * request.context * heads * config.head_dim * config.num_hidden_layers
    return (dense + touched + cached) * element


@torch.no_grad()
def measure_decode(
    world: World, model: Any, request: DecodeRequest, batch: int, bytes_per_s: float
) -> dict[str, Any]:
    """Time per output token at a batch over all ranks, in one graph."""
    clock = Clock(world.device)
    step = Step(model, world, request, batch)
    row: dict[str, Any] = {
        "layout": request.parallel.describe(),
        "dispatch": request.dispatch,
        "wire": request.wire or "collective",
        "compiled": request.compiled,
        "batch": batch,
        "context": request.context,
        "layers": model.config.num_hidden_layers,
    }
    step()
    graph = clock.on_gpu and request.dispatch != "all_to_all"
    row |= best_s(clock, step, request.budget_s, graph=graph)
    row["step_s"] = row.get("graph_s") or row["called_s"]
    row["floor_s"] = read_bytes(model, request, batch, step.sequences) / bytes_per_s
    row["ratio"] = row["step_s"] / row["floor_s"]
    return row
