"""Sharded training: FSDP2 for the dense part, experts on a mesh of their own.

All ranks train on batches of their own. Dense parameters are cut over all of them (FSDP2), whole
experts over `ep` of them, and each expert shard once more over the `world / ep` ranks that hold the
same experts. Every parameter becomes a DTensor, so checkpoints know what was cut. Gradients are
those of the mean of the ranks' losses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mogul.core.errors import ConfigError
from mogul.parallel.dispatch import Dispatcher, Plan, Rows, make_dispatcher
from mogul.parallel.owners import contiguous
from mogul.parallel.shard import experts_of, grouping_of, route_through
from mogul.spec.grouping import divisors


@dataclass(frozen=True, eq=False)
class TrainMesh:
    """Where a sharded model stands."""

    dense: DeviceMesh
    """All ranks; dimension "fsdp"."""
    experts: DeviceMesh
    """The same ranks as "efsdp" x "ep"."""
    dispatchers: list[Dispatcher]


def shard_for_training(
    model: nn.Module,
    *,
    ep: int | None = None,
    dispatch: str = "auto",
    chunks: int = 1,
    rows: Rows = "equal",
    device_type: str | None = None,
    precision: MixedPrecisionPolicy | None = None,
) -> TrainMesh:
    """Shard `model` in place over all ranks; every rank calls with the same weights.

    Build the optimizer afterwards and before the first forward: FSDP2 swaps parameters.

    Args:
        model: a causal language model of Transformers; its experts go through `dispatch`.
        ep: ranks that share the experts; None means as many as divide the experts.
        dispatch: "auto", "static", "gather" or "all_to_all".
        chunks: see `Plan`.
        rows: see `Plan`; "agree" for batches of unequal sizes.
        device_type: of the meshes; None means where the parameters are.
        precision: FSDP2's dtypes of parameters and reductions.

    Raises:
        ConfigError: ep does not divide the ranks or the experts.
        BackendError: the dispatch is illegal for the router.
    """
    world = dist.get_world_size()
    found = [module for _, module in experts_of(model)]
    ep = _expert_ranks(found, world, ep)
    kind = device_type or next(model.parameters()).device.type
    dense = init_device_mesh(kind, (world,), mesh_dim_names=("fsdp",))
    meshes = init_device_mesh(kind, (world // ep, ep), mesh_dim_names=("efsdp", "ep"))
    options: dict[str, Any] = {"mp_policy": precision} if precision else {}
    dispatchers: list[Dispatcher] = []
    whole: set[nn.Parameter] = set()
    for module in found:
        owners, grouping = contiguous(module.num_experts, ep), grouping_of(module)
        group = meshes["ep"].get_group()
        plan = Plan(group=group, owners=owners, grouping=grouping, chunks=chunks, rows=rows)
        dispatchers.append(_shard_experts(module, make_dispatcher(dispatch, plan), meshes["ep"]))
        if world == ep:
            whole |= _average(module, world)
            continue
        fully_shard(module, mesh=meshes["efsdp"], **options)
        module.set_gradient_divide_factor(world)
    for layer in _layers_of(model):
        fully_shard(layer, mesh=dense, ignored_params=whole, **options)
    fully_shard(model, mesh=dense, ignored_params=whole, **options)
    return TrainMesh(dense, meshes, dispatchers)


def _expert_ranks(found: list[Any], world: int, ep: int | None) -> int:
    if not found:
        return 1
    experts = found[0].num_experts
    legal = tuple(n for n in divisors(world) if experts % n == 0)
    if ep is None:
        return legal[-1]
    if ep not in legal:
        raise ConfigError(
            f"ep={ep} does not divide the {world} ranks and the {experts} experts",
            fix=f"use ep = one of {legal}",
        )
    return ep


def _layers_of(model: Any) -> nn.ModuleList:
    base = getattr(model, "model", model)
    if not isinstance(getattr(base, "layers", None), nn.ModuleList):
        raise ConfigError(f"{type(model).__name__} has no list of layers to shard")
    return base.layers


def _shard_experts(module: Any, dispatcher: Dispatcher, mesh: DeviceMesh) -> Dispatcher:
    """Make the parameters DTensors over the expert ranks and dispatch the forward."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        cut = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(cut, parameter.requires_grad))
    module.num_experts = dispatcher.owners.slots
    module._is_expert_parallel = True
    stock_forward = module.forward

    def local_forward(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        with _local_parameters(module):
            return stock_forward(x, ids, weights)

    module.forward = local_forward
    route_through(module, dispatcher)
    return dispatcher


@contextmanager
def _local_parameters(module: nn.Module) -> Iterator[None]:
    """This rank's part of each DTensor parameter in its place; gradients reach the DTensor."""
    whole = {n: p for n, p in module._parameters.items() if isinstance(p, DTensor)}
    module._parameters.update({n: p.to_local() for n, p in whole.items()})  # type: ignore[arg-type]
    try:
        yield
    finally:
        module._parameters.update(whole)  # type: ignore[arg-type]


def _average(module: nn.Module, world: int) -> set[nn.Parameter]:
    """Divide the gradients, which sum over all ranks' losses; returns the parameters."""
    found = set(module.parameters(recurse=False))
    for parameter in found:
        parameter.register_hook(lambda grad: grad / world)
    return found


def by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters apart by mesh and placement: an optimizer's fused step takes one kind at a time.

    Give each list as a parameter group of its own.
    """
    kinds: dict[Any, list[nn.Parameter]] = {}
    for one in parameters:
        is_cut = isinstance(one, DTensor)
        kinds.setdefault((one.device_mesh, one.placements) if is_cut else None, []).append(one)
    return list(kinds.values())


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale gradients on several meshes down to a norm over all of them; returns the norm.

    Torch's own function stacks norms and so needs one mesh.
    """
    held = [p.grad for p in model.parameters() if p.grad is not None]
    parts = [_local(grad) for grad in held]
    device = parts[0].device
    square = torch.zeros((), dtype=torch.float64, device=device)
    for grad, part in zip(held, parts, strict=True):
        wide = torch.promote_types(part.dtype, torch.float32)
        square += torch.linalg.vector_norm(part, dtype=wide).double().square() / _copies(grad)
    dist.all_reduce(square)
    norm = square.sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for part in parts:
        part.mul_(factor.to(part.dtype))
    return norm


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _copies(tensor: Tensor) -> int:
    """Ranks that hold the same part of a gradient."""
    if not isinstance(tensor, DTensor):
        return dist.get_world_size()
    copies = dist.get_world_size() // tensor.device_mesh.size()
    for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
        copies *= size if isinstance(placement, Replicate) else 1
    return copies
