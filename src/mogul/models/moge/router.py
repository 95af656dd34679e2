"""Which experts of a grouped-expert layer a token meets, and with which weights.

The router's scores, buffers and its gradient where one pick a group leaves none; the choice itself
is `mogul.kernels.route`'s. Letters as in `modeling_moge`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast

from mogul.kernels import RouterSpec, Routing, route
from mogul.models.moge.configuration_moge import MogeConfig


def router_spec(config: MogeConfig) -> RouterSpec:
    """The routing of one layer in the words of the kernels."""
    return RouterSpec(
        num_experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        num_groups=config.router_n_groups,
        score=config.router_score,
        weighting=config.router_weighting,
        scaling_factor=config.routed_scaling_factor,
        num_null_experts=config.num_null_experts,
    )


class MogeRouter(nn.Module):
    """Choose the experts of every token, in float32: returns (logits, weights, ids).

    `group_of_expert` is a buffer on purpose: servers that replace a router whose only state is
    `weight` and a bias by their own global top-k then leave this one alone.
    """

    group_of_expert: Tensor
    e_score_correction_bias: Tensor | None
    router_scale: nn.Parameter | None

    def __init__(self, config: MogeConfig) -> None:
        super().__init__()
        self.spec = router_spec(config)
        self.num_experts = config.num_experts  # read by expert parallelism of Transformers 5.17
        self.straight_through = config.router_gradient == "straight_through"
        num_rows = config.num_experts + config.num_null_experts
        self.weight = nn.Parameter(torch.zeros(num_rows, config.hidden_size))
        wants_bias = config.router_selection_bias  # float32 in a model of any dtype
        bias = torch.zeros(num_rows, dtype=torch.float32) if wants_bias else None
        self.register_buffer("e_score_correction_bias", bias)
        scale = nn.Parameter(torch.ones(config.num_experts)) if config.router_scale else None
        self.register_parameter("router_scale", scale)
        self.register_buffer("group_of_expert", self._groups(), persistent=False)

    def _groups(self) -> Tensor:
        group_size = self.spec.num_experts // self.spec.num_groups
        return torch.arange(self.spec.num_experts) // group_size

    def reset_buffers(self) -> None:
        """Fill the buffers; Transformers calls this after building on the meta device."""
        init.copy_(self.group_of_expert, self._groups())
        if self.e_score_correction_bias is not None:
            init.zeros_(self.e_score_correction_bias)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route [..., D]: logits [T, E], weights [T, K] (both float32), ids [T, K] (int64)."""
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        with maybe_autocast(device_type=x_TD.device.type, enabled=False):
            logits_TE = self.adjust(self.product(x_TD))
            bias, scale = self.e_score_correction_bias, self.router_scale
            if not (self.straight_through and self.training):
                routing = route(logits_TE, self.spec, bias=bias, scale=scale)
                return logits_TE, routing.weights, routing.ids
            routing = route(logits_TE, self.spec, bias=bias)
            weights_TK = self._with_straight_gradient(logits_TE, routing)
            if scale is not None:
                weights_TK = weights_TK * F.pad(scale.float(), (0, 1))[routing.ids]
        return logits_TE, weights_TK, routing.ids

    def product(self, x_TD: Tensor) -> Tensor:
        """Logits in float32 or wider; training makes them without wide copies."""
        weight_ED = self.weight
        if x_TD.dtype is not torch.float32 or weight_ED.dtype is not torch.float32:
            wide = torch.promote_types(x_TD.dtype, torch.float32)
            x_TD, weight_ED = x_TD.to(wide), weight_ED.to(wide)
        return F.linear(x_TD, weight_ED)

    def adjust(self, logits_TE: Tensor) -> Tensor:
        """Change the logits before they choose; a routing warm-up replaces this in training."""
        return logits_TE

    def _with_straight_gradient(self, logits_TE: Tensor, routing: Routing) -> Tensor:
        """Weights whose gradient is that of the share among all candidates, not among the picks.

        Candidates are the experts of the pick's group for `renormalised_in_group`, all experts for
        `renormalised`. With one pick a group the weight is the constant 1 and this is
        w = 1 + p - stop(p), where p is the softmax within the group.
        """
        in_groups = self.spec.weighting == "renormalised_in_group"
        num_pools = self.spec.num_groups if in_groups else 1
        pools_TME = logits_TE[:, : self.spec.num_experts].unflatten(-1, (num_pools, -1))
        if self.spec.score == "softmax":
            share_TE = pools_TME.softmax(-1).flatten(1)
        else:
            scores_TME = pools_TME.sigmoid()
            share_TE = (scores_TME / (scores_TME.sum(-1, keepdim=True) + 1e-20)).flatten(1)
        share_TK = F.pad(share_TE, (0, 1)).gather(1, routing.ids) * self.spec.scaling_factor
        return routing.weights.detach() + share_TK - share_TK.detach()
