"""Lay a whole Transformers model out over ranks: attention DP x TP, experts EP x TP, shared TP.

The residual stream is kept cut by tokens over the `tp` ranks of an attention, so norms and routers
work on their share only: norm, all-gather, attention heads, reduce-scatter; norm, all-gather,
shared and routed experts, reduce-scatter (arXiv 2505.21411, section 5.1). Embedding and head are
whole on every rank. The modules of the model stay, their forwards are wrapped; a cache then holds
the rank's heads by itself. `sync_gradients` makes the gradients those of one process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mogul.core.errors import ConfigError
from mogul.parallel.dispatch import Dispatcher, Rows, Wire
from mogul.parallel.groups import Groups, make_groups
from mogul.parallel.local import local_experts
from mogul.parallel.move import gather, join, scatter, split
from mogul.parallel.shard import DISPATCHER, ExpertSpread, experts_of, spread_experts
from mogul.parallel.slices import cut_columns, cut_rows
from mogul.parallel.static import Static
from mogul.parallel.window import Window, open_window
from mogul.spec.families import model_spec
from mogul.spec.parallel import Parallel

ROLES = "_mogul_gradients"
"""Attribute of a module: {parameter name: role}, for parameters whose gradient is not whole."""
PARTIAL, STAGE = "part of a sum over tp", "sum over the stage"


@dataclass
class _Batch:
    """Shape of the batch in flight and this rank's part of its tokens."""

    group: dist.ProcessGroup
    window: Window | None = None
    sequences: int = 0
    length: int = 0

    def begin(self, x: Tensor) -> Tensor:
        """[B, L, D] that all tp ranks hold to this rank's rows [1, R, D]."""
        self.sequences, self.length = x.shape[:2]
        return split(self._padded(x.flatten(0, 1)), self.group)[None]

    def end(self, x: Tensor) -> Tensor:
        """Rows [1, R, D] back to [B, L, D] on all tp ranks."""
        return join(x[0], self.group, self.window)[: self.tokens].view(
            self.sequences, self.length, -1
        )

    def whole(self, x: Tensor) -> Tensor:
        """Rows [1, R, D] to [B, L, D] for a computation that is cut over the tp ranks."""
        return gather(x[0], self.group, self.window)[: self.tokens].view(
            self.sequences, self.length, -1
        )

    def share(self, x: Tensor) -> Tensor:
        """Parts of sums [B, L, D] to this rank's rows [1, R, D] of the sums."""
        return scatter(self._padded(x.flatten(0, 1)), self.group, self.window)[None]

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def rows(self) -> int:
        """Rows of each tp rank."""
        return -(-self.tokens // self.group.size())

    @property
    def own(self) -> int:
        """Rows of this rank that are tokens; the rest pads."""
        return max(0, min(self.rows, self.tokens - self.group.rank() * self.rows))

    def _padded(self, rows: Tensor) -> Tensor:
        pad = self.rows * self.group.size() - self.tokens
        return F.pad(rows, (0, 0, 0, pad)) if pad else rows


@dataclass(frozen=True, eq=False)
class Laid:
    """A model laid out: its groups and dispatchers."""

    groups: Groups
    dispatchers: list[Dispatcher]
    batch: _Batch


def lay_out(
    model: nn.Module,
    parallel: Parallel,
    *,
    dispatch: str = "auto",
    rows: Rows = "equal",
    chunks: int = 1,
    capacity: float | None = None,
    wire: Wire | None = None,
) -> Laid:
    """Cut `model` in place as `parallel` says; every rank calls with the same model.

    The `tp` ranks of one attention get the same batch, each of the `dp` copies its own. Works on
    the meta device: lay out first, then give the parameters memory.

    Raises:
        ConfigError: A layout that this model, or this number of ranks, does not allow.
        BackendError: `dispatch` is illegal for the router, with the legal layouts.
    """
    base = _decoder_of(model)
    _check_model(model, parallel, dispatch)
    groups = make_groups(parallel)
    batch = _Batch(groups.tp, open_window(groups.tp, wire) if groups.tp.size() > 1 else None)
    spread = ExpertSpread(
        dispatch=dispatch,
        moe_tp=parallel.expert_tp,
        rows=rows,
        chunks=chunks,
        capacity=capacity,
        wire=wire,
    )
    has_experts = any(True for _ in experts_of(model))
    dispatchers = spread_experts(model, groups.stage, spread) if has_experts else []
    for layer in base.layers:
        _lay_out_layer(layer, groups, batch)
    if parallel.tp > 1:
        _cut_residual(base, batch)
    return Laid(groups, dispatchers, batch)


def _decoder_of(model: nn.Module) -> Any:
    base = getattr(model, "model", model)
    if not isinstance(getattr(base, "layers", None), nn.ModuleList) or not hasattr(base, "norm"):
        raise ConfigError(
            f"{type(model).__name__} is no decoder of layers and a last norm",
            fix="give a causal language model of Transformers, such as MogeForCausalLM",
        )
    return base


def _check_model(model: Any, parallel: Parallel, dispatch: str) -> None:
    config = model.config
    parallel.check_runs(
        model_spec(config.to_dict() | {"architectures": [type(model).__name__]}), dispatch
    )
    wants_logits = getattr(config, "output_router_logits", False)
    if parallel.tp > 1 and (wants_logits or getattr(config, "router_z_loss_coef", 0)):
        raise ConfigError(
            f"with tp={parallel.tp} a rank's router sees its share of the tokens only, so the "
            "balance loss and the z-loss would not be those of the batch",
            fix="set output_router_logits=False and router_z_loss_coef=0, or use tp=1",
        )


def _cut_residual(base: Any, batch: _Batch) -> None:
    """Cut the tokens before the first layer, join them after the last."""
    first, last = base.layers[0], base.norm

    def into_rows(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (batch.begin(args[0]), *args[1:])

    def out_of_rows(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (batch.end(args[0]), *args[1:])

    first.register_forward_pre_hook(into_rows)
    last.register_forward_pre_hook(out_of_rows)


def _lay_out_layer(layer: Any, groups: Groups, batch: _Batch) -> None:
    if groups.tp.size() > 1:
        _cut_attention(layer.self_attn, batch)
        for name, module in layer.named_children():
            if name.endswith("norm"):
                _mark_all(module, PARTIAL)
    experts = getattr(layer.mlp, "experts", None)
    if experts is None or DISPATCHER not in experts.__dict__:
        if groups.tp.size() > 1:
            _cut_dense(layer.mlp, batch)
        return
    shared = getattr(layer.mlp, "shared_expert", None)
    if groups.tp.size() > 1:
        _mark_all(layer.mlp.gate, PARTIAL)
        _count_rows(experts, batch)
    if shared is not None:
        _lay_out_shared(layer.mlp, groups, batch)


def _cut_attention(attention: Any, batch: _Batch) -> None:
    """Heads over the tp ranks; the output's bias is added once, after the sum."""
    rank, ranks = batch.group.rank(), batch.group.size()
    for name in ("q_proj", "k_proj", "v_proj"):
        cut_columns(getattr(attention, name), rank, ranks)
    out = attention.o_proj
    cut_rows(out, rank, ranks)
    for name in ("q_norm", "k_norm"):
        if getattr(attention, name, None) is not None:
            _mark_all(getattr(attention, name), PARTIAL)
    for name in ("sink_key", "sink_value"):
        if getattr(attention, name, None) is not None:
            raise ConfigError("attention with sink keys cannot be cut by heads", fix="use tp=1")
    _mark(out, "bias", PARTIAL)
    forward = attention.forward
    out.forward = lambda x: F.linear(x, out.weight)

    def cut_forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        attended, *rest = forward(batch.whole(hidden_states), *args, **kwargs)
        attended = batch.share(attended)
        if out.bias is not None:
            attended = attended + out.bias
        return (attended, *rest)

    attention.forward = cut_forward


def _cut_dense(mlp: Any, batch: _Batch) -> None:
    """A dense feed-forward over the tp ranks."""
    cut_mlp(mlp, batch.group)
    forward = mlp.forward
    mlp.forward = lambda x: batch.share(forward(batch.whole(x)))


def cut_mlp(mlp: Any, group: dist.ProcessGroup) -> None:
    """Cut the inner width of a SwiGLU feed-forward; its output is then a part of the sum."""
    rank, ranks = group.rank(), group.size()
    width = mlp.gate_proj.weight.shape[0]
    if width % ranks:
        raise ConfigError(f"an inner width of {width} cannot be cut over {ranks} ranks")
    for name in ("gate_proj", "up_proj"):
        cut_columns(getattr(mlp, name), rank, ranks)
    cut_rows(mlp.down_proj, rank, ranks)


def _count_rows(experts: Any, batch: _Batch) -> None:
    """Hand only this rank's tokens to the dispatcher, which pads them with rows of no expert."""
    dispatcher: Dispatcher = experts.__dict__[DISPATCHER]
    local = local_experts(experts)

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return _dispatch(dispatcher, batch, hidden_states, top_k_index, top_k_weights, local)

    experts.forward = forward


def _dispatch(
    dispatcher: Dispatcher, batch: _Batch, x: Tensor, ids: Tensor, weights: Tensor, experts: Any
) -> Tensor:
    if batch.group.size() == 1:
        return dispatcher(x, ids, weights, experts)
    own = batch.own
    rows = batch.rows if dispatcher.plan.rows == "equal" else dispatcher.plan.rows
    y = dispatcher(x[:own], ids[:own], weights[:own], experts, rows=rows)
    missing = x.shape[0] - y.shape[0]
    return F.pad(y, (0, 0, 0, missing)) if missing else y


def _lay_out_shared(block: Any, groups: Groups, batch: _Batch) -> None:
    """The shared expert: whole, cut over tp, or cut over all ranks inside the static dispatch."""
    ranks, shared = groups.parallel.shared_ranks, block.shared_expert
    if ranks == 1:
        if groups.tp.size() > 1:
            _mark_all(shared, PARTIAL)
        return
    group = groups.shared
    cut_mlp(shared, group)
    if group is groups.stage:
        _mark_all(shared, STAGE)
    dispatcher: Dispatcher = block.experts.__dict__[DISPATCHER]
    if ranks == groups.stage.size() and isinstance(dispatcher, Static):
        _share_the_moves(block, dispatcher, batch)
        return
    forward = shared.forward

    def cut_forward(x: Tensor) -> Tensor:
        rows_RD = x.flatten(0, -2)
        pad = 0
        if group is groups.stage:  # the copies of the attention may have other numbers of rows
            pad = dispatcher.rows_of(rows_RD.shape[0], x.device) - rows_RD.shape[0]
        padded = F.pad(rows_RD, (0, 0, 0, pad)) if pad else rows_RD
        window = batch.window if group is batch.group else None
        y_RD = scatter(forward(gather(padded, group, window)), group, window)
        return y_RD[: rows_RD.shape[0]].view(x.shape)

    shared.forward = cut_forward


def _share_the_moves(block: Any, dispatcher: Dispatcher, batch: _Batch) -> None:
    """Shared and routed experts on the same gathered tokens, their sums in one reduce-scatter."""
    both = local_experts(block.experts, block.shared_expert)

    def forward(hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights_TK, ids_TK = block.gate(x_TD)
        return _dispatch(dispatcher, batch, x_TD, ids_TK, weights_TK, both).view(
            hidden_states.shape
        )

    block.forward = forward


def _mark(module: nn.Module, name: str, role: str) -> None:
    module.__dict__.setdefault(ROLES, {})[name] = role


def _mark_all(module: nn.Module, role: str) -> None:
    for part in module.modules():
        for name, _ in part.named_parameters(recurse=False):
            _mark(part, name, role)


@torch.no_grad()
def sync_gradients(model: nn.Module, laid: Laid) -> None:
    """Make every gradient that of the mean of the dp copies' losses.

    Parameters that saw this rank's rows only are summed over tp; those that saw one copy's tokens
    are averaged over dp. Experts, and a shared expert cut over the stage, saw all tokens.
    """
    dp, tp = laid.groups.dp, laid.groups.tp
    for module in model.modules():
        roles = module.__dict__.get(ROLES, {})
        is_expert = DISPATCHER in module.__dict__
        for name, parameter in module.named_parameters(recurse=False):
            role = STAGE if is_expert else roles.get(name)
            if parameter.grad is None:
                continue
            if role == PARTIAL and tp.size() > 1:
                dist.all_reduce(parameter.grad, group=tp)
            if dp.size() > 1 and role != STAGE:
                dist.all_reduce(parameter.grad, group=dp)
            parameter.grad /= dp.size()
