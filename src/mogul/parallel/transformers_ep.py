"""mogul's dispatchers under Transformers' own expert parallelism (where it has the interface).

`DistributedConfig(ep_size=..., ep_implementation="mogul_static")`, or "mogul_all_to_all",
"mogul_gather" and "mogul" (static where legal). Transformers then shards the experts and calls the
class here with the tokens of a rank; ranks of one tp group hold the same tokens and take a share
each.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mogul.core.errors import BackendError
from mogul.parallel.dispatch import Plan, make_dispatcher
from mogul.parallel.move import join, split
from mogul.parallel.owners import contiguous
from mogul.parallel.shard import grouping_of

NAMES = {
    "mogul": "auto",
    "mogul_static": "static",
    "mogul_gather": "gather",
    "mogul_all_to_all": "all_to_all",
}


def register() -> None:
    """Tell Transformers about the implementations; calling it again changes nothing.

    Raises:
        BackendError: this version of Transformers has no such interface.
    """
    try:
        from transformers.distributed import expert_parallel
    except ImportError:
        raise BackendError(
            "this version of Transformers has no EPImplementation interface",
            fix="upgrade Transformers (5.23 has it), or use mogul.parallel.lay_out",
        ) from None
    for name, dispatch in NAMES.items():
        kind = type(
            f"Mogul_{dispatch}", (_implementation(expert_parallel),), {"dispatch": dispatch}
        )
        expert_parallel.EPImplementationInterface.register(name, kind)


def _implementation(expert_parallel: Any) -> type:
    class MogulEP(expert_parallel.EPImplementation):
        """One layer's dispatch, built by Transformers when it applies its plan."""

        dispatch = "auto"

        def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
            super().__init__(experts, ep_mesh, tp_mesh)
            self.tp_group = tp_mesh.get_group()
            whole = ep_mesh.size() * self.num_local_experts
            plan = Plan(
                group=ep_mesh.get_group(),
                owners=contiguous(whole, ep_mesh.size()),
                grouping=grouping_of(experts, whole),
            )
            self.dispatcher = make_dispatcher(self.dispatch, plan)

        def __call__(self, hidden_states: Tensor, top_k_index: Tensor, weights: Tensor) -> Tensor:
            """This rank's tokens through the experts of all."""
            return _on_share(self, hidden_states, top_k_index, weights)

    return MogulEP


def _on_share(layer: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Each of the tp ranks, which hold the same tokens, dispatches its share of them."""
    tokens, ranks = x.shape[0], layer.tp_group.size()
    rows = -(-tokens // ranks)
    pad = rows * ranks - tokens
    if pad:
        x, weights = F.pad(x, (0, 0, 0, pad)), F.pad(weights, (0, 0, 0, pad))
        ids = F.pad(ids, (0, 0, 0, pad), value=layer.dispatcher.owners.num_experts)
    x, weights = split(x, layer.tp_group), split(weights, layer.tp_group)
    ids = ids.chunk(ranks)[layer.tp_group.rank()]
    y = layer.dispatcher(x, ids, weights, layer.experts_forward)
    return join(y, layer.tp_group)[:tokens]
