"""The door of routing: how a token's router logits become picks and weights.

Decides what a result holds (`Routing`) and which backend computes it; the rule itself is a
`RouterSpec`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mogul.core.errors import ConfigError
from mogul.core.registry import Registry
from mogul.kernels.checks import is_transformed
from mogul.kernels.cpu.route import route_one_each, takes_one_each
from mogul.kernels.reference.route import route_reference
from mogul.kernels.router_spec import RouterSpec
from mogul.kernels.triton.routing import route_triton, why_not_route


class Routing(NamedTuple):
    """The picks of every token, group by group, best first within a group."""

    ids: Int[Tensor, "T K"]
    """int64; a null pick is num_experts."""
    weights: Float[Tensor, "T K"]
    """float32; 0 for a null pick. Differentiable in the logits."""
    scores: Float[Tensor, "T E"]
    """float32, unbiased, of the true experts."""


class RouteFacts(NamedTuple):
    """What a backend's `why_not(**facts)` is told of a call."""

    device: torch.device
    dtype: torch.dtype
    spec: RouterSpec
    is_transformed: bool = False
    """By torch.func or forward-mode derivatives."""


class RouteFunction(Protocol):
    """What a backend of `route` must accept; it returns (ids, weights, scores)."""

    def __call__(
        self, logits: Tensor, spec: RouterSpec, bias: Tensor | None, scale: Tensor | None, /
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pick and weigh."""
        ...


ROUTE: Registry[RouteFunction] = Registry("route")
ROUTE.add("triton", route_triton, why_not=why_not_route)
ROUTE.add("reference", route_reference)


def route(
    logits: Float[Tensor, "T C"],
    spec: RouterSpec,
    *,
    bias: Float[Tensor, " C"] | None = None,
    scale: Float[Tensor, " E"] | None = None,
    backend: str = "auto",
) -> Routing:
    """Choose experts by score + bias and weigh them by the unbiased score.

    score = softmax or sigmoid over all C = E + num_null_experts columns, in float32 (float64 for
    float64 logits). weight = score of the pick, renormalised over the true picks of the token
    ("renormalised") or of the group ("renormalised_in_group"), a null pick counting nothing as in
    AdaMoE; then times scaling_factor and times `scale` of the pick, not renormalised afterwards.
    A token or group without a true pick has weights 0. Ties go to the lowest id.

    Args:
        logits: the router's output, true experts first.
        spec: the rule.
        bias: added for selection only; E values leave null experts unbiased.
        scale: Pangu Pro's learned factor of every expert ([E] or [1, E]).
        backend: a name of `ROUTE`, or "auto".

    Raises:
        ConfigError: shapes that do not belong together.
        BackendError: the forced backend cannot run here.
    """
    if logits.dim() != 2 or logits.shape[1] != spec.num_columns:
        raise ConfigError(
            f"router logits {tuple(logits.shape)} are not [T, {spec.num_columns}] "
            f"({spec.num_experts} experts, {spec.num_null_experts} null experts)",
            fix="flatten batches to one row a token, or give RouterSpec the router's own numbers",
        )
    if bias is not None and bias.shape not in ((spec.num_experts,), (spec.num_columns,)):
        raise ConfigError(
            f"selection bias {tuple(bias.shape)} is not [{spec.num_experts}]"
            + (f" or [{spec.num_columns}]" if spec.num_null_experts else ""),
            fix="pass one value an expert, or None",
        )
    if scale is not None and scale.numel() != spec.num_experts:
        raise ConfigError(
            f"router scale {tuple(scale.shape)} is not [{spec.num_experts}]",
            fix="pass one factor an expert, or None",
        )
    if backend == "auto" and logits.device.type == "cpu":  # nothing else runs there
        if bias is None and scale is None and takes_one_each(logits, spec):
            return Routing(*route_one_each(logits, spec))
        return Routing(*route_reference(logits, spec, bias, scale))
    facts = RouteFacts(logits.device, logits.dtype, spec, is_transformed())
    return Routing(*ROUTE.resolve(backend, facts)[1](logits, spec, bias, scale))
