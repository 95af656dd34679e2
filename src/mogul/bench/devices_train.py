"""A training step of a slice of a model, on one device and on several, in tokens per second.

Every rank trains on tokens of its own (weak scaling). One device runs the plain model; several run
FSDP2 for the dense part and dispatched experts. A step is forward, backward, clipping and a fused
AdamW; weights, gradients and moments are in `dtype`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mogul.bench.devices_clock import Clock
from mogul.bench.kernels import DTYPES
from mogul.parallel import World, by_mesh, clip_gradients, shard_for_training


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """Which slice is trained and how."""

    config: dict[str, Any]
    """Keys of a MogeConfig."""
    sequences: int = 2
    """Of each rank."""
    length: int = 4096
    dtype: str = "bf16"
    dispatch: str = "static"
    chunks: int = 0
    budget_s: float = 3.0


def slice_config(config: dict[str, Any], layers: int, vocabulary: int) -> dict[str, Any]:
    """The first layers of a Pangu Pro MoE config as a MogeConfig, with fewer tokens."""
    names = (
        "hidden_size", "num_attention_heads", "num_key_value_heads", "moe_intermediate_size",
        "shared_expert_intermediate_size", "num_experts", "num_experts_per_tok", "rope_theta",
        "rms_norm_eps",
    )  # fmt: skip
    kept = {name: config[name] for name in names if name in config}
    return {
        **kept,
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "router_n_groups": config["num_experts_per_tok"],
        "router_scale": True,
        "attention_bias": True,
        "attention_output_bias": True,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
    }


def build(world: World, request: TrainRequest) -> nn.Module:
    """The slice with random weights, the same on all ranks, on the device."""
    from mogul.models import MogeConfig, MogeForCausalLM

    previous = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(DTYPES[request.dtype])
        with world.device:
            config = MogeConfig(**request.config)
            config._attn_implementation = "sdpa"
            model = MogeForCausalLM(config)
    finally:
        torch.set_default_dtype(previous)
    model.set_experts_implementation("mogul")
    return model.train()


def stepper(
    world: World, request: TrainRequest, *, alone: bool
) -> tuple[Callable[[], Tensor], nn.Module]:
    """A function that makes one training step and returns the loss."""
    model: Any = build(world, request)
    if not alone:
        shard_for_training(model, dispatch=request.dispatch, chunks=request.chunks)
    groups = [{"params": found} for found in by_mesh(model.parameters())]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=world.device.type != "cpu")
    generator = torch.Generator(world.device).manual_seed(world.rank)
    shape = (request.sequences, request.length)
    vocabulary = request.config["vocab_size"]
    ids = torch.randint(0, vocabulary, shape, generator=generator, device=world.device)

    def step() -> Tensor:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        if alone:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        else:
            clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step, model


def measure_training(world: World, request: TrainRequest, *, alone: bool = False) -> dict[str, Any]:
    """Seconds a step and tokens a second of all ranks.

    `alone`: every rank trains the plain model by itself, and the slowest counts as one device.
    """
    clock, ranks = Clock(world.device), 1 if alone else world.size
    gc.collect()  # a sharded model hangs in cycles of hooks
    if clock.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step, model = stepper(world, request, alone=alone)
    losses = [float(step()) for _ in range(2)]
    seconds = clock.most(clock.own_s(step, request.budget_s))
    tokens = request.sequences * request.length * ranks
    parameters = sum(p.numel() for p in model.parameters())
    memory = torch.cuda.max_memory_allocated() if clock.on_gpu else 0
    return {
        "ranks": ranks,
        "tokens": tokens,
        "parameters": parameters,
        "step_s": seconds,
        "tokens_per_s": tokens / seconds,
        "loss": losses[0],
        "loss_later": float(step()),
        "peak_bytes": memory,
    }
