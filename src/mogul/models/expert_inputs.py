"""What experts multiply: mean squares of the inputs of both matmuls, from a few batches.

Decides how experts that see few tokens are treated: their means are drawn to the layer's with the
weight of `PRIOR_ROWS` rows. Rounding errors of int4 weights are weighed by these numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mogul.core.log import progress
from mogul.models.experts import layout_of
from mogul.models.quantise import Importance, experts_modules

PRIOR_ROWS = 32.0


@dataclass
class _Sums:
    """Sums of squares of one layer."""

    rows_E: Tensor
    input_ED: Tensor
    active_EF: Tensor

    def importance(self) -> Importance:
        """Means of every expert, drawn to the layer's."""
        layer_rows = self.rows_E.sum().clamp(min=1)
        means = []
        for sums in (self.input_ED, self.active_EF):
            prior = sums.sum(0) / layer_rows
            means.append((sums + PRIOR_ROWS * prior) / (self.rows_E[:, None] + PRIOR_ROWS))
        return Importance(*means)


@torch.no_grad()
def expert_inputs(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Importance]:
    """Run batches of token ids [B, L] and return the importance by the name of experts modules.

    Costs about two forwards of the experts; a few thousand tokens are enough.
    """
    sums: dict[str, _Sums] = {}
    hooks = [
        module.register_forward_pre_hook(_watch(name, module, sums), with_kwargs=True)
        for name, module in experts_modules(model)
    ]
    run_watched(model, batches, hooks, "measuring the inputs of experts")
    return {name: layer.importance() for name, layer in sums.items()}


def run_watched(
    model: nn.Module, batches: Iterable[Tensor], hooks: Sequence[RemovableHandle], what: str
) -> None:
    """Run batches of token ids [B, L] through a model in evaluation mode; then take hooks away."""
    was_training = model.training
    model.eval()
    todo = list(batches)
    try:
        with progress(what, len(todo)) as bar:
            for ids_BL in todo:
                run: Any = model
                run(input_ids=ids_BL, use_cache=False)
                bar.advance()
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()


def _watch(name: str, module: Any, sums: dict[str, _Sums]) -> Any:
    layout = layout_of(module)
    first = "gate_up_proj" if layout.has_gate else "up_proj"

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x_TD, ids_TK = (*args, *kwargs.values())[:2]
        gate_up, down = getattr(module, first).detach(), module.down_proj.detach()
        experts, width, inner = layout.sizes(gate_up, down)
        if name not in sums:
            new = x_TD.new_zeros
            shapes = ((experts,), (experts, width), (experts, inner))
            sums[name] = _Sums(*(new(shape, dtype=torch.float32) for shape in shapes))
        layer = sums[name]
        for expert in ids_TK[(ids_TK >= 0) & (ids_TK < experts)].unique().tolist():
            x_RD = x_TD[(ids_TK == expert).any(1)]
            matrix = gate_up[expert] if layout.is_transposed else gate_up[expert].T
            hidden_RF = x_RD @ matrix
            if module.has_bias:
                hidden_RF = hidden_RF + getattr(module, first + "_bias").detach()[expert]
            layer.rows_E[expert] += len(x_RD)
            layer.input_ED[expert] += x_RD.float().square().sum(0)
            layer.active_EF[expert] += layout.activate(hidden_RF).float().square().sum(0)

    return hook
