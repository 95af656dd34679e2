"""Which parameter is stepped how: decay groups, Muon's matrices, and the records that say it.

Matrices and stacks of matrices decay; vectors (norms, biases, scales) and embeddings do not. With
`muon`, matrices inside the decoder go to Muon, but for routers; embeddings, head, routers and
vectors stay with AdamW.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from mogul.core.errors import ConfigError
from mogul.spec.base import Spec
from mogul.train.muon import Slices
from mogul.train.muon_adamw import MuonAdamW
from mogul.train.schedule import ScheduleSpec

Decay = Annotated[float, Field(ge=0, lt=1)]
"""Of a running mean: 1 would never take anything in."""


class OptimizerSpec(Spec):
    """How parameters are stepped."""

    kind: Literal["adamw", "muon"] = "adamw"
    """`muon`: Muon for matrices, AdamW for the rest."""

    lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate; Muon's steps are scaled to AdamW's, so one rate serves both."""

    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay of AdamW's first and second moments."""

    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of AdamW's second moment."""

    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled decay of matrices; vectors and embeddings never decay."""

    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Muon's momentum (Nesterov)."""

    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the moments of large bf16 weights are kept in."""

    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm over all parameters."""


class TrainSettings(Spec):
    """A short training in one call (`loop.train`); what it is trained on comes as batches."""

    lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""

    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay of AdamW's first and second moments."""

    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of AdamW's second moment."""

    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled decay of matrices; vectors and embeddings never decay."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly to its peak."""

    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: stay, or fall to `final_lr_ratio` at `max_steps`."""

    final_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Where the cosine ends, as a share of the peak."""

    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm over all parameters."""

    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many steps."""

    max_seconds: float | None = Field(default=None, gt=0)
    """Stop with the first step that ends after so many seconds."""

    @model_validator(mode="after")
    def _has_an_end(self) -> Self:
        if self.max_steps is None and self.max_seconds is None:
            raise ConfigError(
                "a training without max_steps and max_seconds never ends", fix="give one of them"
            )
        if self.schedule == "cosine" and self.max_steps is None:
            raise ConfigError(
                "a cosine schedule needs max_steps: it must know where it ends",
                fix="give max_steps, or use schedule 'constant'",
            )
        return self

    def lr_at(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        schedule = ScheduleSpec(
            kind=self.schedule, warmup_steps=self.warmup_steps, final_ratio=self.final_lr_ratio
        )
        return self.lr * schedule.factor(step, self.max_steps)


def build_optimizer(
    model: nn.Module, settings: OptimizerSpec | TrainSettings, *, compile: bool = False
) -> MuonAdamW:
    """An optimizer over the parameters that ask for a gradient.

    Call it before the first forward: a sharded model may swap its parameters in a forward.
    """
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise ConfigError(
            "no parameter of the model asks for a gradient", fix="set requires_grad on some"
        )
    embeddings = _parameters_of(m for m in model.modules() if isinstance(m, nn.Embedding))
    decays = [p for _, p in trained if p.ndim >= 2 and id(p) not in embeddings]
    stays = [p for _, p in trained if p.ndim < 2 or id(p) in embeddings]
    groups: list[dict[str, Any]] = [
        {"params": decays, "weight_decay": settings.weight_decay},
        {"params": stays, "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {}
    if isinstance(settings, OptimizerSpec):
        options["momentum"] = settings.momentum
        options["state_dtype"] = getattr(torch, settings.state_dtype)
        if settings.kind == "muon":
            groups = _with_muon(model, groups, embeddings)
            options["slices"] = expert_slices(model)
    return MuonAdamW(
        [group for group in groups if group["params"]],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        compile=compile,
        **options,
    )


def _with_muon(
    model: nn.Module, groups: list[dict[str, Any]], embeddings: set[int]
) -> list[dict[str, Any]]:
    """Move matrices from the decaying group to one of Muon's."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    stay = embeddings | _parameters_of(
        [m for m in model.modules() if "Router" in type(m).__name__] + ([head] if head else [])
    )
    decays = groups[0]["params"]
    matrices = [p for p in decays if id(p) not in stay and p.ndim in (2, 3)]
    moved = {id(p) for p in matrices}
    rest = [p for p in decays if id(p) not in moved]
    return [
        {**groups[0], "params": matrices, "kind": "muon"},
        {**groups[0], "params": rest},
        groups[1],
    ]


def expert_slices(model: nn.Module) -> dict[nn.Parameter, Slices]:
    """The stacked gate and up projections of experts: two matrices in one tensor."""
    found = {}
    for module in model.modules():
        weight = getattr(module, "gate_up_proj", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 3:
            flags: Any = module
            found[weight] = Slices(
                dim=-1 if getattr(flags, "is_transposed", False) else -2,
                parts=2,
                interleaved=not getattr(flags, "is_concatenated", True),
            )
    return found


def _parameters_of(modules: Iterable[nn.Module]) -> set[int]:
    return {id(parameter) for module in modules for parameter in module.parameters()}


def holds_parameters_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> bool:
    """Whether the optimizer steps exactly the model's current trained parameters."""
    held: Iterable[nn.Parameter] = (p for group in optimizer.param_groups for p in group["params"])
    current = {id(p) for p in model.parameters() if p.requires_grad}
    return {id(p) for p in held} == current


def refuse_stale(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raise ConfigError when the optimizer was built on parameters the model has replaced."""
    if not holds_parameters_of(optimizer, model):
        raise ConfigError(
            "the optimizer was built on parameters that the model no longer has: it would train "
            "copies that nobody reads",
            fix="build the optimizer after the last change to the model and before any forward",
        )
