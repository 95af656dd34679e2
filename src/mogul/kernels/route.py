"""The door of routing: how a token's router logits become picks and weights.

Decides the record of a routing rule (`RouterSpec`), what a result holds (`Routing`) and which
backend computes it. Sources: grouped picks arXiv 2505.21411 (Eq. 5-7), group-limited top-k
arXiv 2412.19437, null experts arXiv 2406.13233.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from jaxtyping import Float, Int
from torch import Tensor

from mogul.core.errors import ConfigError
from mogul.core.registry import Registry
from mogul.kernels.reference.route import route_reference

SCORES = ("softmax", "sigmoid")
WEIGHTINGS = ("probability", "renormalised", "renormalised_in_group")


@dataclass(frozen=True)
class RouterSpec:
    """How a token chooses `top_k` of `num_experts`: top_k / num_groups in every group."""

    num_experts: int
    top_k: int
    num_groups: int = 1
    """Contiguous groups of equal size; 1 is the plain top-k."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Over all experts (and null experts), in float32."""
    weighting: Literal["probability", "renormalised", "renormalised_in_group"] = "probability"
    scaling_factor: float = 1.0
    """Every weight is multiplied by this at last."""
    limit_groups: int | None = None
    """Plain top-k inside this many best groups (by the sum of a group's two best scores)."""
    num_null_experts: int = 0
    """Experts that compute nothing; an equal share of them stands in every group."""

    def __post_init__(self) -> None:
        _check_choice("score", self.score, SCORES)
        _check_choice("weighting", self.weighting, WEIGHTINGS)
        for name in ("num_experts", "top_k", "num_groups"):
            if getattr(self, name) < 1:
                raise ConfigError(f"router {name}={getattr(self, name)} must be at least 1")
        divided = ["num_experts", "num_null_experts"]
        if self.limit_groups is None:
            divided.append("top_k")
        else:
            self._check_limit(self.limit_groups)
        for name in divided:
            if getattr(self, name) < 0 or getattr(self, name) % self.num_groups:
                raise ConfigError(
                    f"router {name}={getattr(self, name)} is not a multiple of "
                    f"num_groups={self.num_groups}",
                    fix=f"give every group the same share: change {name} or num_groups",
                )
        limit = (self.num_experts + self.num_null_experts) * (self.limit_groups or self.num_groups)
        if self.top_k * self.num_groups > limit:
            raise ConfigError(
                f"router top_k={self.top_k} is more than the {limit // self.num_groups} experts "
                "that may be picked",
                fix="lower top_k",
            )

    def _check_limit(self, limit_groups: int) -> None:
        if not 1 <= limit_groups <= self.num_groups:
            raise ConfigError(
                f"router limit_groups={limit_groups} is not in 1..num_groups={self.num_groups}"
            )
        if self.num_null_experts or self.weighting == "renormalised_in_group":
            raise ConfigError(
                "group-limited top-k has no fixed picks in a group, so it knows neither null "
                "experts nor weighting 'renormalised_in_group'",
                fix="drop limit_groups, or use another weighting and no null experts",
            )

    @property
    def num_columns(self) -> int:
        """Logits of one token: true experts first, then null experts."""
        return self.num_experts + self.num_null_experts

    @property
    def picks_per_group(self) -> int:
        """Picks of a token in each group (grouped routing)."""
        return self.top_k // self.num_groups


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"router {name}={value!r} is unknown", fix=f"use one of {known}")


class Routing(NamedTuple):
    """The picks of every token, group by group, best first within a group."""

    ids: Int[Tensor, "T K"]
    """int64; a null pick is num_experts."""
    weights: Float[Tensor, "T K"]
    """float32; 0 for a null pick. Differentiable in the logits."""
    scores: Float[Tensor, "T E"]
    """float32, unbiased, of the true experts."""


class RouteFunction(Protocol):
    """What a backend of `route` must accept; it returns (ids, weights, scores)."""

    def __call__(
        self, logits: Tensor, spec: RouterSpec, bias: Tensor | None, scale: Tensor | None, /
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pick and weigh."""
        ...


ROUTE: Registry[RouteFunction] = Registry("route")
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
            f"({spec.num_experts} experts, {spec.num_null_experts} null experts)"
        )
    if bias is not None and bias.shape not in ((spec.num_experts,), (spec.num_columns,)):
        raise ConfigError(
            f"selection bias {tuple(bias.shape)} is not [{spec.num_experts}]"
            + (f" or [{spec.num_columns}]" if spec.num_null_experts else "")
        )
    if scale is not None and scale.numel() != spec.num_experts:
        raise ConfigError(f"router scale {tuple(scale.shape)} is not [{spec.num_experts}]")
    if backend == "auto" and len(ROUTE.names()) == 1:
        return Routing(*route_reference(logits, spec, bias, scale))
    facts = {"device": logits.device, "dtype": logits.dtype, "spec": spec}
    function = ROUTE.choose(**facts)[1] if backend == "auto" else ROUTE.get(backend, **facts)
    return Routing(*function(logits, spec, bias, scale))
