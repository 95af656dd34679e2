"""One optimizer for all parameters: AdamW, and Muon for matrices, each expert matrix its own.

Low-precision weights keep a float32 master: large ones as a second half (`halves.py`), small ones
as a copy. The gradients are handed over, with one factor for all, so that clipping costs no pass
of its own. State is plain tensors and one step count: checkpoints need no pickle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from mogul.core.errors import ArtifactError, ConfigError
from mogul.train.halves import adamw_halves, compiled
from mogul.train.muon import LISTS, LOW, MuonRule, Slices, Stack, numbers_on_device, stacks_of

LARGE = 1 << 18
"""Elements from which a low-precision weight is kept in halves."""


class MuonAdamW(torch.optim.Optimizer):
    """AdamW and Muon by parameter group; `update` takes gradients, `step` takes `.grad`."""

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        momentum: float = 0.95,
        state_dtype: torch.dtype = torch.float32,
        slices: Mapping[nn.Parameter, Slices] | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(list(groups), {"lr": lr, "kind": "adamw", "weight_decay": 0.0})
        self.betas, self.eps, self.momentum = betas, eps, momentum
        self.state_dtype, self.compiles = state_dtype, compile
        self.num_updates = 0
        self._stacks: list[list[Stack]] = [
            stacks_of(g["params"], slices or {}, is_in_halves, compiles=compile)
            if g["kind"] == "muon"
            else []
            for g in self.param_groups
        ]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Every parameter, in the order of the gradients that `update` takes."""
        return [p for group in self.param_groups for p in group["params"]]

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update from `.grad`, unscaled."""
        if closure is not None:
            raise ConfigError("MuonAdamW takes no closure", fix="compute the gradients before")
        self.update([p.grad for p in self.parameters])

    @torch.no_grad()
    def update(self, gradients: Sequence[Tensor | None], factor: float = 1.0) -> None:
        """One step with `factor` times these gradients; None leaves a parameter as it is."""
        if len(gradients) != len(self.parameters):
            raise ConfigError(f"{len(gradients)} gradients for {len(self.parameters)} parameters")
        self.num_updates += 1
        place = iter(gradients)
        for group, stacks in zip(self.param_groups, self._stacks, strict=True):
            own = {p: next(place) for p in group["params"]}
            if stacks:
                self._muon(stacks, own, group, factor)
            else:
                self._adamw([(p, g) for p, g in own.items() if g is not None], group, factor)

    # ---- AdamW

    def _adamw(
        self, pairs: list[tuple[nn.Parameter, Tensor]], group: dict[str, Any], factor: float
    ) -> None:
        whole = [pair for pair in pairs if not is_in_halves(pair[0])]
        if halves := [pair for pair in pairs if is_in_halves(pair[0])]:
            self._adamw_in_halves(halves, group, factor)
        for dtype in {p.dtype for p, _ in whole}:
            self._adamw_fused([pair for pair in whole if pair[0].dtype == dtype], group, factor)

    def _adamw_fused(
        self, pairs: list[tuple[nn.Parameter, Tensor]], group: dict[str, Any], factor: float
    ) -> None:
        states = [self._state(p) for p, _ in pairs]
        masters = [
            state.get("master", p.detach()) for (p, _), state in zip(pairs, states, strict=True)
        ]
        device = masters[0].device
        steps = torch.full((len(masters),), float(self.num_updates - 1), device=device)
        adamw(
            masters,
            _as([gradient for _, gradient in pairs], masters[0].dtype),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            list(steps.unbind()),
            fused=True,
            grad_scale=None if factor == 1 else torch.full((), 1 / factor, device=device),
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=self.eps,
            maximize=False,
        )
        if "master" in states[0]:
            LISTS._foreach_copy_([p.detach() for p, _ in pairs], masters)

    def _adamw_in_halves(
        self, pairs: list[tuple[nn.Parameter, Tensor]], group: dict[str, Any], factor: float
    ) -> None:
        (beta1, beta2), rate, count = self.betas, group["lr"], self.num_updates
        numbers = (
            factor, beta1, beta2, rate / (1 - beta1**count), (1 - beta2**count) ** 0.5, self.eps,
            1 - rate * group["weight_decay"],
        )  # fmt: skip
        # One small copy to the device a group, not one a weight: each may wait for the host.
        on_device = torch.tensor(numbers, dtype=torch.float32).to(pairs[0][0].device)
        kernel = compiled(adamw_halves, self.compiles)
        for parameter, gradient in pairs:
            state = self._state(parameter)
            tensors = (gradient, state["exp_avg"], state["exp_avg_sq"])
            high, low = parameter.detach().view(torch.int16), state["low"]
            kernel(high.flatten(), low.flatten(), *(t.flatten() for t in tensors), on_device)

    # ---- Muon

    def _muon(
        self,
        stacks: Sequence[Stack],
        gradients: Mapping[nn.Parameter, Tensor | None],
        group: dict[str, Any],
        factor: float,
    ) -> None:
        rule = MuonRule(group["lr"], group["weight_decay"], self.momentum, factor)
        numbers = numbers_on_device(stacks, rule)
        for stack, own in zip(stacks, numbers, strict=True):
            self._open(stack)
            stack.step(self.state, [gradients[weight] for weight in stack.weights], rule, own)

    def _open(self, stack: Stack) -> None:
        wide = _at_least_32(stack.weights[0].dtype)
        stack.open(self.state, self.state_dtype if stack.in_halves else wide)

    # ---- state

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """AdamW's averages, and what a low-precision weight lacks."""
        state = self.state[parameter]
        if state:
            return state
        dtype = self.state_dtype if is_in_halves(parameter) else _at_least_32(parameter.dtype)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(
                parameter, dtype=dtype, memory_format=torch.contiguous_format
            )
        if is_in_halves(parameter):
            state["low"] = torch.zeros_like(parameter, dtype=torch.int16)
        elif parameter.dtype in LOW:
            state["master"] = parameter.detach().float()
        return state

    def tensors(self, names: Mapping[nn.Parameter, str]) -> Iterator[tuple[str, Tensor]]:
        """Every state tensor under `<parameter>:<what>`."""
        for parameter in self.parameters:
            for what, tensor in self.state.get(parameter, {}).items():
                yield f"{names[parameter]}:{what}", tensor

    def restore(
        self, names: Mapping[nn.Parameter, str], tensors: Mapping[str, Tensor], num_updates: int
    ) -> None:
        """Take the state of another run of the same recipe.

        Raises:
            ArtifactError: A tensor is missing or misshaped, by name.
        """
        self.num_updates = num_updates
        for stack in (one for stacks in self._stacks for one in stacks if num_updates):
            self._open(stack)
        for group in self.param_groups:
            for parameter in group["params"]:
                name = names[parameter]
                if num_updates == 0 or not any(k.startswith(f"{name}:") for k in tensors):
                    continue  # never stepped: an expert layer nobody used has no state
                for what, own in self._state(parameter).items():
                    stored = tensors.get(f"{name}:{what}")
                    if stored is None or stored.shape != own.shape or stored.dtype != own.dtype:
                        raise ArtifactError(
                            f"the optimizer state {name}:{what} is missing or of another kind",
                            fix="resume with the recipe the checkpoint was made with",
                        )
                    own.copy_(stored)


def is_in_halves(parameter: nn.Parameter) -> bool:
    """Whether a weight's float32 is kept as itself and a second half."""
    return (
        parameter.dtype == torch.bfloat16
        and parameter.numel() >= LARGE
        and parameter.is_contiguous()
    )


def _at_least_32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _as(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies of another dtype in one launch; the tensors themselves where they have it."""
    if all(tensor.dtype == dtype for tensor in tensors):
        return tensors
    wide = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    LISTS._foreach_copy_(wide, tensors)
    return wide
