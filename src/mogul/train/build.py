"""From a recipe to a model on its device: configuration, weights, precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import mogul.models
from mogul.core.errors import ConfigError, nearest
from mogul.core.log import say
from mogul.models.convert_config import is_grouped_elsewhere, moge_config
from mogul.models.load import named_device
from mogul.models.moge.configuration_moge import TRANSFORMERS_KEYS, MogeConfig
from mogul.spec import presets
from mogul.spec.families import model_spec
from mogul.train.recipe import ModelSection, Recipe, RunSection

CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
FRESH = ("e_score_correction_bias", "router_scale")
"""Tensors that an override may add to a checkpoint; they start neutral."""


def choose_device(name: str) -> torch.device:
    """The device of a run; `auto`: the accelerator where there is one."""
    device = torch.device(named_device(name))
    return torch.device(device.type, 0) if name == "auto" and device.type != "cpu" else device


def weight_dtype(run: RunSection, device: torch.device) -> torch.dtype:
    """What the weights are kept in."""
    kind = run.precision
    if kind == "auto":
        kind = "float32" if device.type == "cpu" else "bfloat16"
    return torch.float32 if kind == "autocast" else getattr(torch, kind)


def around_forward(run: RunSection, device: torch.device) -> Callable[[], AbstractContextManager]:
    """What is open around every forward: autocast, where the recipe asks for it."""
    if run.precision != "autocast":
        return nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


@contextmanager
def chosen_kernels(run: RunSection, device: torch.device) -> Iterator[None]:
    """What holds for a whole run, backward passes that compute layers again included.

    Attention: cuDNN's kernel first, where `run.attention` says so. Routers: their float32 products
    use tensor cores where that loses nothing: with bfloat16 weights both factors of a router's
    logits fit in TF32 exactly, and the sum is float32 either way; only its gradient is rounded, to
    more bits than the bfloat16 it becomes.
    """
    on_device = device.type != "cpu" and torch.backends.cudnn.is_available()
    before = torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        if run.attention == "cudnn" or (run.attention == "auto" and on_device):
            stack.enter_context(sdpa_kernel(CUDNN_FIRST, set_priority=True))
        if device.type != "cpu" and weight_dtype(run, device) == torch.bfloat16:
            torch.set_float32_matmul_precision("high")
            stack.callback(torch.set_float32_matmul_precision, before)
        yield


def build_model(recipe: Recipe, device: torch.device) -> PreTrainedModel:
    """The model of a recipe in training mode, seeded by `run.seed`.

    Raises:
        ConfigError: A config key that does not exist, or values that cannot be.
        ArtifactError: A checkpoint that cannot be read.
    """
    mogul.models.register()
    _refuse_implementations(recipe.run)
    run, changes = recipe.run, dict(recipe.model.overrides)
    dtype = weight_dtype(run, device)
    torch.manual_seed(run.seed)
    try:
        model = _model(recipe, changes, dtype, device)
    except ImportError as error:  # Transformers' word for an attention that is not installed
        if _attention(run) in ("sdpa", "eager"):
            raise
        raise ConfigError(
            f"[run] attention={run.attention!r} cannot be used here: {error}",
            fix="install what it names, or set run.attention='auto'",
        ) from error
    _leave_balance_to_us(model)
    return model.train()


def _model(
    recipe: Recipe, changes: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    section, run = recipe.model, recipe.run
    if section.config or section.preset:
        config = _config(section, changes, needs_bias=recipe.balance.bias != "none")
        model_spec(config.to_dict())  # refuses by name what cannot be
        with torch.device(device):
            return _from_config(config, dtype, run)
    model = _from_weights(section, dtype, run)
    if recipe.balance.bias != "none" and isinstance(model.config, MogeConfig):
        changes.setdefault("router_selection_bias", True)
    if changes:
        model = _with_overrides(model, changes, dtype, run)
    return model.to(device)  # pyright: ignore[reportArgumentType]


def _refuse_implementations(run: RunSection) -> None:
    """Refuse names that Transformers does not know, before it builds anything."""
    for key, given, known in (
        ("experts", run.experts, {"eager", *ALL_EXPERTS_FUNCTIONS.keys()}),
        ("attention", _attention(run), {"eager", *ALL_ATTENTION_FUNCTIONS.keys()}),
    ):
        if given not in known and "/" not in given:  # a kernel of the hub is a path
            raise ConfigError(f"[run] {key}={given!r} is unknown", fix=nearest(given, known))


def _config(
    section: ModelSection, changes: Mapping[str, Any], *, needs_bias: bool
) -> PreTrainedConfig:
    values = dict(section.config or {}) or presets.config(section.preset or "")
    values = {"model_type": "moge", **values, **changes}
    kind = values.pop("model_type")
    if kind in ("moge", "PanguProMoE") and needs_bias:
        values.setdefault("router_selection_bias", True)
    if section.preset and is_grouped_elsewhere({**values, "model_type": kind}):
        return moge_config({**values, "model_type": kind})
    if kind == "moge":
        _refuse_unknown(values)
    try:
        return AutoConfig.for_model(kind, **values)
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"[model] {error}", fix="check model_type and its keys") from error


def _refuse_unknown(values: Mapping[str, Any]) -> None:
    known = set(MogeConfig.__dataclass_fields__) | TRANSFORMERS_KEYS
    for key in sorted(set(values) - known):
        ours = [name for name in MogeConfig.__dataclass_fields__ if not name.startswith("_")]
        raise ConfigError(f"[model.config] has no key {key!r}", fix=nearest(key, ours))


def _from_config(config: PreTrainedConfig, dtype: torch.dtype, run: RunSection) -> PreTrainedModel:
    chosen = {"experts_implementation": run.experts}
    if not (hasattr(config, "num_experts") or hasattr(config, "num_local_experts")):
        chosen = {}
    return AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=_attention(run), **chosen
    )


def _from_weights(section: ModelSection, dtype: torch.dtype, run: RunSection) -> PreTrainedModel:
    from mogul.models import load_model, upcycle

    if section.checkpoint:
        model = load_model(section.checkpoint, dtype=dtype, experts=run.experts)
    else:
        plan = section.upcycle
        assert plan is not None  # the section names one origin
        model = upcycle(
            load_model(plan.checkpoint, dtype=dtype),
            num_experts=plan.experts,
            num_groups=plan.groups,
            seed=plan.seed,
            noise=plan.noise,
        )
        model.set_experts_implementation(run.experts)
    model.set_attn_implementation(_attention(run))
    return model


def _with_overrides(
    model: PreTrainedModel, changes: Mapping[str, Any], dtype: torch.dtype, run: RunSection
) -> PreTrainedModel:
    """The same weights in a model of the changed configuration."""
    values = {**model.config.to_dict(), **changes}
    kind = values.pop("model_type")
    for key in sorted(set(changes) - set(model.config.to_dict())):
        raise ConfigError(
            f"[model.overrides] has no key {key!r}", fix=nearest(key, model.config.to_dict())
        )
    new = _from_config(AutoConfig.for_model(kind, **values), dtype, run)
    try:
        missing, surplus = new.load_state_dict(model.state_dict(), strict=False)
    except RuntimeError as error:
        raise ConfigError(
            f"[model.overrides] changes the tensors: {error}",
            fix="override only keys that leave the shapes as they are",
        ) from error
    first_new = f"layers.{model.config.num_hidden_layers}."
    lost = [n for n in missing if not n.endswith(FRESH) and first_new not in n]
    if lost or surplus:
        raise ConfigError(
            f"[model.overrides] changes the tensors: {', '.join([*lost, *surplus][:5])}",
            fix="override only keys that leave the shapes as they are",
        )
    if missing:
        say(f"new tensors, not in the checkpoint: {len(missing)} ({missing[0]}, ...)")
    return new


def _attention(run: RunSection) -> str:
    return "sdpa" if run.attention in ("auto", "cudnn") else run.attention


def _leave_balance_to_us(model: PreTrainedModel) -> None:
    """The model's own balance losses would come on top of the recipe's."""
    for key, off in (("output_router_logits", False), ("router_z_loss_coef", 0.0)):
        if getattr(model.config, key, off) != off:
            say(f"{key} of the model is set aside: [balance] decides")
            setattr(model.config, key, off)
