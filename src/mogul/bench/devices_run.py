"""Start ranks and measure on them: what `mogul bench devices` and the device script share."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from mogul.bench.devices import Request, cells_of, explain, measure_cells, prepare
from mogul.bench.devices_train import TrainRequest, measure_training
from mogul.bench.kernels import LayerShape, device_name
from mogul.core.log import progress
from mogul.parallel import World, launch


def measure_on_ranks(
    request: Request, training: TrainRequest | None, ranks: int, *, on_cpu: bool
) -> dict[str, Any]:
    """Everything that was measured, from rank 0."""
    threads = 1 if on_cpu else None
    return launch(everything, ranks, request, training, on_cpu=on_cpu, threads=threads)[0]


def everything(world: World, request: Request, training: TrainRequest | None) -> dict[str, Any]:
    """The layer's cells, then the training step alone and together."""
    found = layers_on_rank(world, request)
    found["training"] = []
    if training is not None:
        for alone in (True, False):
            found["training"].append(measure_training(world, training, alone=alone))
    return found


def layers_on_rank(world: World, request: Request) -> dict[str, Any]:
    """All cells on one rank."""
    setup = prepare(world, request)
    facts = explain(setup)
    with progress("measuring", len(cells_of(request))) if world.rank == 0 else nullcontext() as bar:
        rows = []
        for row in measure_cells(setup):
            rows.append(row)
            if bar is not None:
                bar.advance(1, row["way"])
    device = device_name(world.device)
    return {"facts": facts, "rows": rows, "phases": setup.phases, "device": device}


def slice_of(request: Request, layers: int, length: int) -> TrainRequest | None:
    """A training step of so many layers of the shape; None without layers."""
    if not layers:
        return None
    config = config_of(request.shape, layers)
    return TrainRequest(config=config, length=length, dtype=request.dtype, budget_s=1.0)


def config_of(shape: LayerShape, layers: int) -> dict[str, Any]:
    """A small MogeConfig around a layer's shape."""
    heads = max(1, shape.width // 64)
    return {
        "hidden_size": shape.width,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": 64,
        "moe_intermediate_size": shape.inner,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.picks,
        "router_n_groups": shape.groups,
        "num_hidden_layers": layers,
        "vocab_size": 4096,
    }
