"""Balance over a training: dress the routers, count once a micro-batch, move the bias, tell.

`Balancer` is used by recipes and by the callback for Transformers' Trainer alike. Its numbers
come from the picks the routers really made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mogul.core.errors import ConfigError
from mogul.observe.hooks import MoeBlock, moe_blocks
from mogul.spec.families import model_spec
from mogul.spec.model import MoeShape
from mogul.train.balance_rules import BalanceSection, bias_step
from mogul.train.routers import RouterRules, trained_class, undress

SAMPLE_TOKENS = 256
BUFFERS = ("count", "losses", "shift", "gate", "alpha", "sample")


class Balancer:
    """The routers of one model while it trains; use as a context.

    Args:
        model: any model whose routers return (logits, weights, ids).
        section: losses, bias and warm-up.
        micro_batches: in a step; the losses of each are divided by it.
        num_steps: of the training, for `bias_until`; None: the bias always moves.
        sample_tokens: picks kept of every micro-batch for numbers that need tokens; each
            micro-batch must have so many.
        compiled: whether the layers are compiled.
        reduce: adds up a tensor over all processes in place; None: there is one.
    """

    def __init__(
        self,
        model: nn.Module,
        section: BalanceSection,
        *,
        micro_batches: int = 1,
        num_steps: int | None = None,
        sample_tokens: int = 0,
        compiled: bool = False,
        reduce: Callable[[Tensor], object] | None = None,
    ) -> None:
        config: Any = model.config
        shape = model_spec(config.to_dict()).moe
        if shape is None:
            raise ConfigError("a dense model has nothing to balance", fix="leave out [balance]")
        self.model, self.section, self.shape = model, section, shape
        self.blocks: list[MoeBlock] = moe_blocks(model, with_mtp=_runs_mtp(model))
        self.routers: list[Any] = [_router_of(block) for block in self.blocks]
        self.num_steps, self.updates, self.steps = num_steps, 0, 0
        self._reduce = reduce
        self._check_bias()
        grouping = shape.grouping
        self.rules = RouterRules(
            section=section,
            num_experts=grouping.num_experts,
            num_groups=grouping.num_groups,
            score=shape.router.score,
            loss_factor=section.loss_coef / len(self.routers) * (section.loss != "none"),
            z_factor=section.z_loss_coef / len(self.routers),
            share=1.0 / micro_batches,
            compiled=compiled,
        )
        self._make_buffers(sample_tokens)
        self._micro_batches_seen = self._last_taken = 0
        self._handles: list[Any] = []

    def _make_buffers(self, sample_tokens: int) -> None:
        """One tensor for all routers; each router gets its row."""
        grouping = self.shape.grouping
        device = self.routers[0].weight.device
        layers, experts = len(self.routers), grouping.num_experts
        self.count = torch.zeros(layers, experts, device=device)
        self.losses = torch.zeros(layers, 3, device=device)
        self.shift = torch.zeros(layers, experts, device=device)
        self.gate = torch.zeros((), device=device)
        self.alpha = torch.zeros((), device=device)
        self.sample = torch.zeros(
            layers, sample_tokens, grouping.top_k, dtype=torch.int16, device=device
        )
        self.total = torch.zeros(layers, experts, dtype=torch.int64, device=device)
        self._seen = torch.zeros(layers, 3, device=device)
        self._vio = torch.zeros((), device=device)

    def _check_bias(self) -> None:
        lacks = [r for r in self.routers if getattr(r, "e_score_correction_bias", None) is None]
        if self.section.bias != "none" and lacks:
            raise ConfigError(
                f"balance.bias={self.section.bias!r}, but {type(lacks[0]).__name__} has no "
                "selection bias",
                fix="set router_selection_bias=true in the model's config, or balance.bias='none'",
            )
        no_warm_up = [r for r in self.routers if not hasattr(r, "adjust")]
        if self.section.warmup_steps and no_warm_up:
            raise ConfigError(
                f"{type(no_warm_up[0]).__name__} shows its logits too late for a routing warm-up",
                fix="set balance.warmup_steps=0",
            )

    def __enter__(self) -> Self:
        for layer, router in enumerate(self.routers):
            undress(router)  # of a training that was interrupted
            router.__class__ = trained_class(type(router))
            for name in BUFFERS:
                value: Tensor = getattr(self, name)
                own = value if name in ("gate", "alpha") else value[layer]
                router.register_buffer(f"balance_{name}", own, persistent=False)
            router.balance_rules, router.balance_length = self.rules, 1
            router.balance_valid, router.balance_warms = None, False
        decoder: Any = getattr(self.model, "base_model", self.model)
        self._handles = [
            decoder.register_forward_pre_hook(self._open, with_kwargs=True),
            decoder.register_forward_hook(self._close, always_call=True),
        ]
        self.begin_step(0)
        return self

    def __exit__(self, *_error: object) -> None:
        for handle in self._handles:
            handle.remove()
        for router in self.routers:
            undress(router)

    # ---- one step

    def begin_step(self, step: int) -> None:
        """Prepare the warm-up of step `step`, counted from 0."""
        share = step / self.section.warmup_steps if self.section.warmup_steps else 1.0
        self.alpha.fill_(min(1.0, share))
        for router in self.routers:
            if router.balance_warms != (share < 1):
                router.balance_warms = share < 1

    def _open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not module.training:
            return
        tokens = kwargs.get("input_ids", kwargs.get("inputs_embeds", args[0] if args else None))
        mask = kwargs.get("attention_mask")
        valid = mask.flatten().bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        length = 1 if tokens is None else tokens.shape[1]
        for router in self.routers:
            router.balance_valid = valid
            if router.balance_length != length:
                router.balance_length = length
        self._micro_batches_seen += 1
        self.gate.fill_(1.0)

    def _close(self, *_: object) -> None:
        self.gate.fill_(0.0)

    @torch.no_grad()
    def end_step(self, *, updated: bool = True) -> None:
        """After the optimizer: add up the counts, move the bias, start the counts anew.

        A step that was skipped (`updated=False`) leaves the bias and the numbers alone.
        """
        if updated and self._micro_batches_seen:
            self.steps += 1
            if self._reduce is not None:
                self._reduce(self.count)
            if self._moves_bias():
                self._move_bias()
            self.total += self.count.long()
            self._vio += _max_vio(self.count)
            self._seen += self.losses / self._micro_batches_seen
        self._micro_batches_seen = 0
        for sums in (self.count, self.losses, self.shift):
            sums.zero_()

    def _moves_bias(self) -> bool:
        if self.section.bias == "none":
            return False
        return self.num_steps is None or self.steps <= self.section.bias_until * self.num_steps

    def _scales(self) -> tuple[Tensor, Tensor]:
        """Spread [L] and shift [L, E], means over the micro-batches of all processes."""
        spread_L1 = self.losses[:, 2:]
        seen_L1 = torch.full_like(spread_L1, self._micro_batches_seen)
        sums = torch.cat((seen_L1, spread_L1, self.shift), dim=1)
        if self._reduce is not None:
            self._reduce(sums)
        means = sums[:, 1:] / sums[:, :1]
        return means[:, 0], means[:, 1:]

    def _move_bias(self) -> None:
        self.updates += 1
        spread_L, shift_LE = self._scales()
        step = bias_step(
            self.count,
            self.section,
            spread=spread_L,
            shift=shift_LE,
            num_groups=self.rules.num_groups,
            update=self.updates,
        )
        for router, change in zip(self.routers, step, strict=True):
            router.e_score_correction_bias[: len(change)] += change

    # ---- what it knows

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers with experts."""
        return tuple(block.layer for block in self.blocks)

    def take(self) -> tuple[Tensor, dict[str, float]]:
        """Counts [L, E] since the last call, and means over steps and layers.

        `max_vio_step` is MaxVio of single steps: a bias that swings evens out in the counts.
        """
        counts, steps = self.total.cpu().clone(), max(1, self.steps - self._last_taken)
        aux, z, _ = (self._seen / steps).mean(0).tolist()
        vio = float(self._vio) / steps
        for sums in (self.total, self._seen, self._vio):
            sums.zero_()
        self._last_taken = self.steps
        return counts, {"balance_loss": aux, "z_loss": z, "max_vio_step": vio}

    def state(self) -> dict[str, int]:
        """What a checkpoint needs beside the model's own buffers."""
        return {"steps": self.steps, "updates": self.updates}

    def restore(self, state: dict[str, int]) -> None:
        """Go on from a state."""
        self.steps = self._last_taken = int(state["steps"])
        self.updates = int(state["updates"])


def _max_vio(count: Float[Tensor, "L E"]) -> Float[Tensor, ""]:
    """Most loaded expert over the mean, less 1; mean over layers."""
    return (count.amax(-1) / count.mean(-1).clamp(min=1e-30) - 1).mean()


def _runs_mtp(model: Any) -> bool:
    """Whether training passes the multi-token-prediction layer, whose router counts like others."""
    return getattr(model, "has_mtp", False) and model.config.mtp_loss_coef > 0


def has_experts(model: nn.Module) -> bool:
    """Whether there is anything to balance."""
    config: Any = model.config
    shape: MoeShape | None = model_spec(config.to_dict()).moe
    return shape is not None


def _router_of(block: MoeBlock) -> nn.Module:
    if block.router is None:
        raise ConfigError(
            f"layer {block.layer} has experts but no router that can be seen",
            fix="set balance.loss='none' and balance.bias='none'",
        )
    return block.router
