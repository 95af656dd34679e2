"""One optimizer for all parameters: AdamW, and Muon for matrices, each expert matrix its own.

Low-precision weights keep a float32 master: large ones as a second half (`halves.py`), small ones
as a copy. The gradients are handed over, with one factor for all, so that clipping costs no pass
of its own. State is plain tensors and one step count: checkpoints need no pickle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from mogul.core.errors import ArtifactError, ConfigError
from mogul.train.halves import adamw_halves, join, split
from mogul.train.newton_schulz import orthogonalise

LARGE = 1 << 18
"""Elements from which a low-precision weight is kept in halves."""
RMS_OF_ADAMW = 0.2
"""Muon's step is scaled to the root mean square that AdamW's usually has (arXiv 2502.16982)."""


@dataclass(frozen=True)
class Slices:
    """How one tensor divides into matrices that belong together by accident only."""

    dim: int = -2
    parts: int = 1
    interleaved: bool = False

    def of(self, tensor: Tensor) -> list[Tensor]:
        """Views of the parts."""
        if self.parts == 1:
            return [tensor]
        if self.interleaved:
            place = tensor.movedim(self.dim, -1)
            return [place[..., i :: self.parts].movedim(-1, self.dim) for i in range(self.parts)]
        return list(tensor.chunk(self.parts, dim=self.dim))


WHOLE = Slices()


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
        self._slices = dict(slices or {})

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
        for group in self.param_groups:
            pairs = [(p, g) for p in group["params"] if (g := next(place)) is not None]
            if group["kind"] == "muon":
                for parameter, gradient in pairs:
                    self._muon(parameter, gradient, group, factor)
            else:
                self._adamw(pairs, group, factor)

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
        states = [self._state(p, "exp_avg", "exp_avg_sq") for p, _ in pairs]
        masters = [
            state.get("master", p.detach()) for (p, _), state in zip(pairs, states, strict=True)
        ]
        device = masters[0].device
        wide = masters[0].dtype
        steps = torch.full((len(masters),), float(self.num_updates - 1), device=device)
        adamw(
            masters,
            [gradient.to(wide) for _, gradient in pairs],
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
            for (parameter, _), master in zip(pairs, masters, strict=True):
                parameter.copy_(master)

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
        kernel = _halves_kernel(self.compiles)
        for parameter, gradient in pairs:
            state = self._state(parameter, "exp_avg", "exp_avg_sq")
            tensors = (gradient, state["exp_avg"], state["exp_avg_sq"])
            high, low = parameter.detach().view(torch.int16), state["low"]
            kernel(high.flatten(), low.flatten(), *(t.flatten() for t in tensors), on_device)

    # ---- Muon

    def _muon(
        self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any], factor: float
    ) -> None:
        state = self._state(parameter, "momentum")
        master = _wide(parameter, state)
        momentum = state["momentum"]
        wide = gradient.to(master.dtype) * factor
        momentum.lerp_(wide.to(momentum.dtype), 1 - self.momentum)
        look = wide.lerp_(momentum.to(wide.dtype), self.momentum)
        rate, is_half = group["lr"], parameter.dtype in (torch.bfloat16, torch.float16)
        master = master.mul(1 - rate * group["weight_decay"])
        slices = self._slices.get(parameter, WHOLE)
        for weight, step in zip(slices.of(master), slices.of(look), strict=True):
            scale = RMS_OF_ADAMW * max(step.shape[-2:]) ** 0.5
            turned = orthogonalise(step.to(torch.bfloat16) if is_half else step)
            weight.sub_(turned.to(weight.dtype), alpha=rate * scale)
        _keep(parameter, state, master)

    # ---- state

    def _state(self, parameter: nn.Parameter, *averages: str) -> dict[str, Tensor]:
        state = self.state[parameter]
        if state:
            return state
        is_half = parameter.dtype in (torch.bfloat16, torch.float16)
        dtype = self.state_dtype if is_in_halves(parameter) else _at_least_32(parameter.dtype)
        for name in averages:
            state[name] = torch.zeros_like(
                parameter, dtype=dtype, memory_format=torch.contiguous_format
            )
        if is_in_halves(parameter):
            state["low"] = torch.zeros_like(parameter, dtype=torch.int16)
        elif is_half:
            state["master"] = parameter.detach().float()
        return state

    def _averages_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum",) if group["kind"] == "muon" else ("exp_avg", "exp_avg_sq")

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
        for group in self.param_groups:
            for parameter in group["params"]:
                name = names[parameter]
                if num_updates == 0 or not any(k.startswith(f"{name}:") for k in tensors):
                    continue  # never stepped: an expert layer nobody used has no state
                for what, own in self._state(parameter, *self._averages_of(group)).items():
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


def _wide(parameter: nn.Parameter, state: dict[str, Tensor]) -> Tensor:
    if "low" in state:
        return join(parameter.detach(), state["low"])
    return state.get("master", parameter.detach())


def _keep(parameter: nn.Parameter, state: dict[str, Tensor], master: Tensor) -> None:
    if "low" in state:
        high, low = split(master)
        parameter.copy_(high)
        state["low"].copy_(low)
        return
    if "master" in state:
        state["master"].copy_(master)
    parameter.copy_(master)


@cache
def _halves_kernel(compiles: bool) -> Any:
    return torch.compile(adamw_halves, dynamic=True) if compiles else adamw_halves
