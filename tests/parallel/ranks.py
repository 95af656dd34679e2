"""What the ranks of the tests compute; importable, so that started processes find it.

Every case builds the same inputs on all ranks from a seed, computes once as one process would and
once spread, and compares this rank's part.
"""

from __future__ import annotations

import copy
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mogul.core.errors import ConfigError
from mogul.kernels import RouterSpec, moe_forward, route
from mogul.models import MogeConfig, MogeForCausalLM
from mogul.parallel import (
    ExpertSpread,
    Plan,
    World,
    by_mesh,
    clip_gradients,
    contiguous,
    dispatch,
    lay_out,
    load_sharded,
    make_dispatcher,
    save_sharded,
    shard_for_training,
    spread_experts,
    sync_gradients,
    whole_state,
)
from mogul.parallel.groups import node_groups
from mogul.parallel.parcel import quantise, restore
from mogul.parallel.slices import cuts_of
from mogul.spec.grouping import Grouping
from mogul.spec.parallel import Parallel, h2p
from mogul.spec.placement import LayerPlacement, Placement
from mogul.spec.trace import ModelStamp

EXPERTS, PICKS, WIDTH, INNER = 16, 4, 12, 8
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
CASES: dict[str, Callable[[World], None]] = {}


def run_cases(world: World, names: list[str]) -> dict[str, str]:
    """The traceback of every case that failed on this rank."""
    failed = {}
    for name in names:
        try:
            CASES[name](world)
        except Exception as error:
            failed[name] = "".join(traceback.format_exception(error))
    return failed


def case(name: str) -> Callable[[Callable[[World], None]], Callable[[World], None]]:
    def note(function: Callable[[World], None]) -> Callable[[World], None]:
        CASES[name] = function
        return function

    return note


def near(given: Tensor, wanted: Tensor, what: str, atol: float | None = None) -> None:
    atol = TOLERANCE[wanted.dtype] if atol is None else atol
    torch.testing.assert_close(given, wanted, atol=atol, rtol=atol, msg=lambda m: f"{what}: {m}")


# ---------------------------------------------------------------------------- one layer


class Layer:
    """One layer's inputs for all ranks, and what one process computes from them."""

    def __init__(
        self, world: World, tokens: list[int], groups: int, dtype: torch.dtype, nulls: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=dtype)

        self.grouping = Grouping(num_experts=EXPERTS, num_groups=groups, top_k=PICKS)
        total = sum(tokens)
        self.x, self.dy = normal(total, WIDTH), normal(total, WIDTH)
        self.gate_up, self.down = normal(EXPERTS, 2 * INNER, WIDTH), normal(EXPERTS, WIDTH, INNER)
        spec = RouterSpec(
            num_experts=EXPERTS, top_k=PICKS, num_groups=groups, num_null_experts=nulls
        )
        routing = route(normal(total, EXPERTS + nulls), spec)
        self.ids, self.weights = routing.ids, routing.weights.to(dtype)
        first = sum(tokens[: world.rank])
        self.own = slice(first, first + tokens[world.rank])
        self.wanted = self.run(self.x, self.ids, self.weights, self.gate_up, self.down, self.dy)

    @staticmethod
    def run(
        x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, dy: Tensor
    ) -> list[Tensor]:
        """Output and gradients of x, weights, gate_up, down."""
        leaves = [t.clone().requires_grad_() for t in (x, weights, gate_up, down)]
        y = moe_forward(leaves[0], leaves[2], leaves[3], ids, leaves[1], backend="reference")
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def check_layer(world: World, layer: Layer, name: str, moe_tp: int = 1, **options: Any) -> None:
    """Spread the layer and compare output and every gradient."""
    owners = contiguous(EXPERTS, world.size // moe_tp, moe_tp)
    plan = Plan(group=dist.group.WORLD, owners=owners, grouping=layer.grouping, **options)  # type: ignore[arg-type]
    dispatcher = make_dispatcher(name, plan)
    kept = list(owners.experts_of_rank[plan.expert_rank])
    share = INNER // moe_tp
    inner = torch.arange(share) + share * (world.rank % moe_tp)
    rows = torch.cat([inner, inner + INNER])
    whole = [layer.x[layer.own], layer.weights[layer.own], layer.gate_up[kept][:, rows]]
    whole.append(layer.down[kept][:, :, inner])
    x, weights, gate_up, down = (t.clone().requires_grad_() for t in whole)

    def experts(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return moe_forward(x, gate_up, down, ids, weights, backend="reference")

    y = dispatcher(x, layer.ids[layer.own], weights, experts)
    grads = torch.autograd.grad(y, (x, weights, gate_up, down), layer.dy[layer.own])
    wanted_y, wanted_x, wanted_w, wanted_gate_up, wanted_down = layer.wanted
    near(y, wanted_y[layer.own], "output")
    near(grads[0], wanted_x[layer.own], "gradient of x")
    near(grads[1], wanted_w[layer.own], "gradient of the weights")
    near(grads[2], wanted_gate_up[kept][:, rows], "gradient of gate_up")
    near(grads[3], wanted_down[kept][:, :, inner], "gradient of down")
    with torch.no_grad():  # the packed road
        near(dispatcher(x, layer.ids[layer.own], weights, experts), wanted_y[layer.own], "packed")


def _add_layer_cases() -> None:
    even = {2: [6, 6], 4: [6, 6, 6, 6]}
    uneven = {2: [5, 2], 4: [5, 0, 7, 3]}
    f64, f32 = torch.float64, torch.float32

    def add(title: str, name: str, tokens: dict[int, list[int]], groups: int, **more: Any) -> None:
        dtype, nulls = more.pop("dtype", f64), more.pop("nulls", 0)

        def run(world: World) -> None:
            layer = Layer(world, tokens[world.size], groups, dtype, nulls)
            check_layer(world, layer, name, **more)

        CASES[title] = run

    add("static", "static", even, 4)
    add("static fp32", "static", even, 4, dtype=f32)
    add("static in chunks", "static", even, 4, chunks=3)
    add("static with null picks", "static", even, 4, nulls=4)
    add("static uneven", "static", uneven, 4, rows="agree")
    add("static uneven, known", "static", uneven, 4, rows=9, chunks=2)
    add("static cut experts", "static", even, 4, moe_tp=2)
    add("gather any router", "gather", uneven, 1, rows="agree")
    add("all_to_all", "all_to_all", even, 1)
    add("all_to_all fp32", "all_to_all", even, 1, dtype=f32)
    add("all_to_all grouped, in chunks", "all_to_all", even, 4, chunks=3)
    add("all_to_all uneven", "all_to_all", uneven, 1, rows="agree", nulls=4)
    add("all_to_all cut experts", "all_to_all", even, 1, moe_tp=2)
    add("all_to_all capacity", "all_to_all", even, 1, capacity=1.0, chunks=2)


_add_layer_cases()


@case("all_to_all without picks")
def _no_picks(world: World) -> None:
    """A rank that sends nothing and one that gets nothing still take part in both passes."""
    layer = Layer(world, [3] * world.size, 1, torch.float64)
    layer.ids = torch.full_like(layer.ids, EXPERTS)
    layer.ids[3:6] = torch.arange(PICKS)  # rank 1 alone has picks, all on rank 0
    layer.wanted = layer.run(layer.x, layer.ids, layer.weights, layer.gate_up, layer.down, layer.dy)
    check_layer(world, layer, "all_to_all")


@case("4: two levels")
def _two_levels(world: World) -> None:
    """Two nodes of two ranks; sizes are uneven at every stage."""
    levels = node_groups(dist.group.WORLD, 2)  # type: ignore[arg-type]
    for nulls in (0, 4):
        layer = Layer(world, [5, 2, 7, 3], 1, torch.float64, nulls)
        check_layer(world, layer, "two_level", levels=levels, rows="agree", chunks=2)


@case("tokens of one byte")
def _one_byte(world: World) -> None:
    """The error stays within half a step of a row's scale; gradients are refused."""
    torch.manual_seed(0)
    layer = Layer(world, [6] * world.size, 4, torch.float32)
    owners = contiguous(EXPERTS, world.size)
    kept = list(owners.experts_of_rank[world.rank])

    def experts(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return moe_forward(x, layer.gate_up[kept], layer.down[kept], ids, weights)

    def plan(payload: str) -> Plan:
        return Plan(group=dist.group.WORLD, owners=owners, grouping=layer.grouping, payload=payload)  # type: ignore[arg-type]

    own = layer.own
    for name in ("static", "all_to_all"):
        for payload, bound in (("int8", 1 / 254), ("fp8", 1 / 16)):
            dispatcher = make_dispatcher(name, plan(payload))
            values, scale = quantise(layer.x, payload)  # type: ignore[arg-type]
            rounded = restore(values, scale, torch.float32)
            error = (rounded - layer.x).abs() / layer.x.abs().amax(1, keepdim=True)
            assert 0 < float(error.max()) <= bound
            wanted = layer.run(
                rounded, layer.ids, layer.weights, layer.gate_up, layer.down, layer.dy
            )[0]
            given = dispatcher(layer.x[own], layer.ids[own], layer.weights[own], experts)
            near(given, wanted[own], f"{name} {payload}")
            x = layer.x[own].clone().requires_grad_()
            with pytest.raises(ConfigError, match="cannot travel as"):
                dispatcher(x, layer.ids[own], layer.weights[own], experts)


@case("unequal rows are noticed under MOGUL_DEBUG")
def _debug(world: World) -> None:
    layer = Layer(world, ([7, 2] if world.size == 2 else [5, 2, 7, 3]), 4, torch.float64)
    dispatch.DEBUG = True
    try:
        if len(layer.x[layer.own]) == max([7, 2] if world.size == 2 else [5, 2, 7, 3]):
            plan = Plan(
                group=dist.group.WORLD,  # type: ignore[arg-type]
                owners=contiguous(EXPERTS, world.size),
                grouping=layer.grouping,
            )
            assert make_dispatcher("static", plan).rows_of(7, world.device) == 7
        else:
            with pytest.raises(ConfigError, match="another 7, but rows='equal'"):
                check_layer(world, layer, "static")
    finally:
        dispatch.DEBUG = False


@case("capacity drops and counts")
def _drops(world: World) -> None:
    layer = Layer(world, [8] * world.size, 1, torch.float64)
    layer.ids[:] = torch.arange(PICKS)  # all on rank 0
    owners = contiguous(EXPERTS, world.size)
    plan = Plan(group=dist.group.WORLD, owners=owners, grouping=layer.grouping, capacity=0.5)  # type: ignore[arg-type]
    dispatcher = make_dispatcher("all_to_all", plan)
    kept = list(owners.experts_of_rank[world.rank])

    def experts(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return moe_forward(x, layer.gate_up[kept], layer.down[kept], ids, weights)

    y = dispatcher(layer.x[layer.own], layer.ids[layer.own], layer.weights[layer.own], experts)
    assert int(dispatcher.dropped) == 4  # type: ignore[attr-defined]
    assert (y[4:] == 0).all()
    assert (y[:4] != 0).any()


# ----------------------------------------------------------------------------- whole model


def moge(**more: Any) -> MogeForCausalLM:
    """A small model with everything that a layout has to cut."""
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "head_dim": 8, "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 4,
        "router_n_groups": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
        "router_scale": True, "attention_bias": True, "attention_output_bias": True,
        "use_qk_norm": True, "mlp_only_layers": [0], "intermediate_size": 32,
        "initializer_range": 0.2,
    }  # fmt: skip
    model = MogeForCausalLM(MogeConfig(**{**values, **more})).double()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    model.set_experts_implementation("mogul")
    return model.train()


def recomputing() -> MogeForCausalLM:
    """Its layers run again in the backward pass, moves included."""
    model = moge()
    model.gradient_checkpointing_enable()
    return model


def qwen3() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, num_experts=8, num_experts_per_tok=4, moe_intermediate_size=16,
        intermediate_size=32, initializer_range=0.2,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).double()
    model.set_experts_implementation("mogul")
    return model.train()


def batches(copies: int, length: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 64, (copies, 2, length), generator=generator)


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    """Cross-entropy in the dtype of the logits; Transformers' own would round to float32."""
    logits = model(input_ids=tokens).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@contextmanager
def no_rounding() -> Iterator[None]:
    """Keep float64 where models go through float32 (norms, routers), for exact comparisons."""
    kept = torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.float = kept  # type: ignore[method-assign]


def exact(check: Callable[..., None], *args: Any, **more: Any) -> None:
    with nullcontext() if more.get("build") is qwen3 else no_rounding():
        check(*args, **more)


def one_process(model: nn.Module, batches_CBL: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Mean of the copies' losses, and its gradients."""
    losses = [loss_of(model, b) for b in batches_CBL]
    loss = torch.stack(losses).mean()
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), grads


def check_layout(
    world: World, parallel: Parallel, dispatch: str, build: Callable[[], Any] = moge, **more: Any
) -> None:
    atol = 1e-9 if build is moge else 1e-6  # Qwen3's norms round to float32
    data = batches(parallel.dp)
    model = build()
    loss, grads = one_process(copy.deepcopy(model), data)
    laid = lay_out(model, parallel, dispatch=dispatch, **more)
    own = data[world.rank // parallel.tp]
    given = loss_of(model, own)
    given.backward()
    sync_gradients(model, laid)
    mean = given.detach().clone()
    dist.all_reduce(mean)
    near(mean / world.size, torch.tensor(loss, dtype=torch.float64), "loss", atol)
    for prefix, module in model.named_modules():
        cuts = cuts_of(module)
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{prefix}.{name}"
            wanted = grads.get(full)
            if wanted is None:
                continue
            for cut in cuts.get(name, ()):
                wanted = cut.take(wanted)
            assert parameter.grad is not None, full
            near(parameter.grad, wanted, full, atol)
    with torch.no_grad():
        whole = build().eval()
        near(model.eval()(input_ids=own).logits, whole(input_ids=own).logits, "logits", atol)
        options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        words = model.generate(own, **options)  # decoding over a cache of this rank's heads
        assert words.tolist() == whole.generate(own, **options).tolist()


def _add_layout_cases() -> None:
    def add(title: str, parallel: Parallel, dispatch: str, **more: Any) -> None:
        CASES[title] = lambda world: exact(check_layout, world, parallel, dispatch, **more)

    add("2: dp2 ep2", Parallel(dp=2), "static")
    add("2: tp2 ep2 shared2", Parallel(tp=2, ep=2), "static")
    add("2: tp2 moe_tp2", Parallel(tp=2, ep=1, moe_tp=2), "static")
    add("2: tp2 all_to_all", Parallel(tp=2, ep=2), "all_to_all")
    add("2: qwen3 tp2", Parallel(tp=2), "all_to_all", build=qwen3)
    add("4: hybrid", h2p(4), "static")
    add("4: hybrid in chunks", h2p(4), "static", chunks=2, rows="agree")
    add("4: hybrid all_to_all", h2p(4), "all_to_all")
    add("4: tp2 dp2 ep4 shared1", Parallel(tp=2, dp=2, ep=4, shared_tp=1), "static")
    add("4: dp4 ep2 moe_tp2", Parallel(dp=4, ep=2, moe_tp=2, shared_tp=1), "static")
    add("4: tp2 dp2 shared2", Parallel(tp=2, dp=2, ep=4, shared_tp=2), "gather")


_add_layout_cases()


# ------------------------------------------------------------------------------- placement


@case("placement with replicas and an empty slot")
def _placement(world: World) -> None:
    """Experts stand where the file says; replicas share an expert's picks; null slots are zero."""
    experts = 8
    model = moge().eval()
    own = batches(world.size)[world.rank]
    with torch.no_grad():
        wanted = model(input_ids=own).logits
    slots = {2: [7, 0, 3, 5, 2, 1, 1, 6, 4, 0], 4: [7, 0, 3, 5, 2, 1, 1, 6, 4, 0, -1, 2]}[
        world.size
    ]
    placement = a_placement(model, slots, world.size, experts)
    spread_experts(
        model,
        dist.group.WORLD,  # type: ignore[arg-type]
        ExpertSpread(dispatch="all_to_all", placement=placement),
    )
    with torch.no_grad():
        near(model(input_ids=own).logits, wanted, "logits")
    assert not any(p.requires_grad for p in model.parameters())


def a_placement(model: Any, slots: list[int], devices: int, experts: int) -> Placement:
    numbers = {"rho": 1.0, "rho_before": 1.0, "rho_bound": 1.0, "gap": 0.0}
    layers = tuple(
        LayerPlacement(layer=i, expert_of_slot=tuple(slots), method="hand", **numbers)
        for i in (1, 2)
    )
    stamp = ModelStamp(
        name="tiny", family="moge", num_layers=3, num_experts=experts, top_k=4, num_groups=4,
        hidden_size=32,
    )  # fmt: skip
    return Placement(
        model=stamp, num_devices=devices, slots_per_device=len(slots) // devices, method="hand",
        layers=layers,
    )  # fmt: skip


# -------------------------------------------------------------------- Transformers' own plans


def transformers_ep(world: World, folder: str, options: dict[str, Any]) -> dict[str, float]:
    """Loss and gradients through Transformers' plan with mogul's dispatch, against one process."""
    from transformers.distributed import DistributedConfig

    from mogul.parallel.transformers_ep import register

    register()
    register()
    if world.rank == 0:
        moge().float().save_pretrained(folder)
    dist.barrier()
    own = batches(world.size)[world.rank if options.get("tp_size", 1) == 1 else 0]
    errors = {}
    for name in ("mogul_static", "mogul_all_to_all", "mogul_gather", "mogul"):
        loaded = MogeForCausalLM.from_pretrained(
            folder,
            experts_implementation="mogul",
            distributed_config=DistributedConfig(**options, ep_implementation=name),
        )
        loss = loss_of(loaded.train(), own)
        loss.backward()
        alone = MogeForCausalLM.from_pretrained(folder, experts_implementation="mogul")
        wanted = loss_of(alone.train(), own)
        errors[name] = abs(float(loss) - float(wanted))
        if options.get("tp_size", 1) > 1:
            wanted.backward()
            grads = dict(alone.named_parameters())
            for path in ("model.layers.1.mlp.gate.weight", "model.layers.1.mlp.experts.down_proj"):
                grad = dict(loaded.named_parameters())[path].grad
                whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
                errors[f"{name} {path}"] = float((whole - grads[path].grad).abs().max())  # type: ignore[operator]
    return errors


# ---------------------------------------------------------------- checkpoints, and ranks that die


def train_and_save(world: World, source: str | None, target: str, ep: int) -> list[float]:
    """Read `source` where given, make two steps on the same data, write `target`; the losses."""
    with no_rounding():
        model = moge()
        shard_for_training(model, ep=ep, dispatch="static")
        groups = [{"params": found} for found in by_mesh(model.parameters())]
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        extra = load_sharded(source, model, optimizer) if source else {"step": 0}
        losses = []
        for _ in range(2):
            data = batches(4).flatten(0, 1).chunk(world.size)[world.rank]
            loss = loss_of(model, data)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            losses.append(float(mean / world.size))
        save_sharded(target, model, optimizer, {"step": extra["step"] + 2})
        state = whole_state(model)
    if world.rank == 0:
        assert state["model.layers.1.mlp.experts.gate_up_proj"].shape == (8, 32, 32)
    return [*losses, extra["step"]]


def die_silently(world: World, victim: int) -> None:
    """One rank is killed, the others are in a collective that will never end."""
    if world.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(100)


def raise_error(world: World, victim: int) -> None:
    if world.rank == victim:
        raise ValueError("the data of this rank are broken")
    time.sleep(100)


# -------------------------------------------------------------------------------- training


def check_training(
    world: World, ep: int, dispatch: str, build: Callable[[], Any] = moge, **more: Any
) -> None:
    """FSDP2 x experts: loss, every gradient and the clipped norm are those of one process."""
    atol = 1e-6 if build is qwen3 else 1e-9
    data = batches(world.size)
    model = build()
    alone = copy.deepcopy(model)
    loss, grads = one_process(alone, data)
    shard_for_training(model, ep=ep, dispatch=dispatch, **more)
    given = loss_of(model, data[world.rank])
    given.backward()
    mean = given.detach().clone()
    dist.all_reduce(mean)
    near(mean / world.size, torch.tensor(loss, dtype=torch.float64), "loss", atol)
    for name, parameter in model.named_parameters():
        if name in grads:
            assert isinstance(parameter.grad, DTensor), name
            near(parameter.grad.full_tensor(), grads[name], name, atol)
    wanted = nn.utils.clip_grad_norm_(alone.parameters(), 0.1)
    near(clip_gradients(model, 0.1), wanted, "norm", atol)
    for name, parameter in model.named_parameters():
        if name in grads:
            near(parameter.grad.full_tensor(), grads[name], f"clipped {name}", atol)  # type: ignore[union-attr]


def _add_training_cases() -> None:
    def add(title: str, ep: int, dispatch: str, **more: Any) -> None:
        CASES[title] = lambda world: exact(check_training, world, ep, dispatch, **more)

    add("2: fsdp ep2", 2, "static")
    add("2: fsdp ep2, layers recomputed", 2, "static", chunks=2, build=recomputing)
    add("2: fsdp ep1", 1, "auto")
    add("2: fsdp qwen3 ep2", 2, "all_to_all", build=qwen3)
    add("4: fsdp ep2", 2, "static")
    add("4: fsdp ep4 in chunks", 4, "static", chunks=3)
    add("4: fsdp ep2 all_to_all", 2, "all_to_all")


_add_training_cases()
