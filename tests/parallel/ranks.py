"""What the ranks of the tests compute; importable, so that started processes find it.

Every case builds the same inputs on all ranks from a seed, computes once as one process would and
once spread, and compares this rank's part.
"""

from __future__ import annotations

import copy
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import rank_layers  # noqa: F401  (adds its cases)
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rank_cases import CASES, case, near
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mogul.models import MogeConfig, MogeForCausalLM
from mogul.parallel import (
    ExpertSpread,
    World,
    by_mesh,
    clip_gradients,
    lay_out,
    load_sharded,
    save_sharded,
    shard_for_training,
    spread_experts,
    sync_gradients,
    whole_state,
)
from mogul.parallel.slices import cuts_of
from mogul.spec.parallel import Parallel, h2p
from mogul.spec.placement import LayerPlacement, Placement
from mogul.spec.trace import ModelStamp


def run_cases(world: World, names: list[str]) -> dict[str, str]:
    """The traceback of every case that failed on this rank."""
    failed = {}
    for name in names:
        try:
            CASES[name](world)
        except Exception as error:
            failed[name] = "".join(traceback.format_exception(error))
    return failed


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


def abort(world: World, victim: int) -> None:
    """One rank is ended from within, the others are in a collective with it."""
    dist.barrier()  # all have joined
    if world.rank == victim:
        os.abort()
    dist.barrier()


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


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
