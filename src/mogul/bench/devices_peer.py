"""Transformers' own expert parallelism as a way to run the layer, with its own experts.

Every rank holds all tokens, masks the picks of other ranks' experts and runs its own through
`grouped_mm`; one all-reduce sums. Versions whose plan has `EpRouterParallel` (5.17) are measured.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mogul.bench.devices_cases import Weights
from mogul.core.errors import BackendError
from mogul.parallel import World
from mogul.parallel.move import Gather, begin


class TransformersEP:
    """Looks like a dispatcher; tokens are gathered once, as its ranks hold them all."""

    def __init__(self, world: World, experts: int) -> None:
        try:
            from transformers.distributed.tensor_parallel import EpRouterParallel
        except ImportError:
            raise BackendError(
                "this version of Transformers has no EpRouterParallel",
                fix="measure it with Transformers 5.17",
            ) from None
        group = dist.group.WORLD
        assert group is not None
        self.group = group
        self.router: Any = EpRouterParallel()
        self.module = SimpleNamespace(num_experts=experts)
        self.mesh = SimpleNamespace(get_local_rank=lambda: world.rank, size=lambda: world.size)
        self._whole: tuple[Tensor, ...] | None = None

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor, experts: Any) -> Tensor:
        """The sums of all tokens."""
        if self._whole is None:
            self._whole = tuple(begin(one, Gather(self.group)).end() for one in (x, ids, weights))
        x_TD, ids_TK, weights_TK = self._whole
        _, local_weights, local = self.router.transform_output_post_forward(
            self.module, (None, weights_TK, ids_TK), self.mesh
        )
        y_TD = experts(x_TD, local, local_weights)
        dist.all_reduce(y_TD, group=self.group)
        return y_TD


def stock_experts(weights: Weights) -> Any:
    """Transformers' experts with these weights, through `grouped_mm`."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    local, width, inner = weights.down.shape
    config = Qwen3MoeConfig(num_experts=local, hidden_size=width, moe_intermediate_size=inner)
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module: Any = Qwen3MoeExperts(config)
    module.gate_up_proj = nn.Parameter(weights.gate_up, requires_grad=False)
    module.down_proj = nn.Parameter(weights.down, requires_grad=False)
    return lambda x, ids, factors: module(x, ids, factors.to(x.dtype))
