"""Turn a top-k model into a MoGE: its experts in groups, renumbered group-major, every weight kept.

Only the router's choice changes: the best K/M in each group instead of the best K of all. The
family must be one whose layers `MogeForCausalLM` computes (Qwen3-MoE, Mixtral, MoGE without
groups); with one group the model is the same function.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from mogul.core.errors import ArtifactError, ConfigError
from mogul.core.files import atomic_folder, check_space, read_json
from mogul.core.log import progress
from mogul.models.moge.configuration_moge import MogeConfig
from mogul.models.moge.modeling_moge import MogeForCausalLM
from mogul.models.permute import Renumbering, write_reordered
from mogul.place.spread import spread
from mogul.spec.checkpoint import read_checkpoint
from mogul.spec.families import family_of, model_spec
from mogul.spec.grouping import Grouping
from mogul.spec.model import ModelSpec
from mogul.spec.trace import Trace

FAMILIES = ("qwen3_moe", "mixtral", "moge")

Groups = Mapping[int, np.ndarray]
"""Layer -> group of every expert [E]."""


def find_groups(trace: Trace, num_groups: int, *, seed: int = 0) -> dict[int, np.ndarray]:
    """Group the experts of every layer by what a trace saw.

    Raises:
        ConfigError: Groups that do not divide the experts and the picks.
    """
    model = trace.meta.model
    Grouping(num_experts=model.num_experts, num_groups=num_groups, top_k=model.top_k)
    ids, pairs = trace.get("sample_ids"), trace.get("coactivation")
    found = {}
    with progress("grouping experts", total=len(trace.meta.layers)) as bar:
        for index, layer in enumerate(trace.meta.layers):
            found[layer] = spread(ids[:, index], pairs[index], num_groups, seed=seed)
            bar.advance(1, f"layer {layer}")
    return found


def order_of(group_E: Int[np.ndarray, " E"]) -> Int[np.ndarray, " E"]:
    """Old expert at every new position: group-major, old order inside a group."""
    return np.argsort(group_E, kind="stable")


def regroup(model: PreTrainedModel, groups: Groups, num_groups: int) -> MogeForCausalLM:
    """Build the grouped model; weights are copied, the source stays as it is.

    Raises:
        ConfigError: A family that `MogeForCausalLM` does not compute, by what stands against it,
            or groups that cannot be.
    """
    config = grouped_config(model.config.to_dict() | {"dtype": model.dtype}, num_groups)
    _check_layers(config, groups)
    with torch.device("meta"):
        grouped = MogeForCausalLM(config)
    state = {}
    for name, tensor in model.state_dict().items():
        state[name] = _reordered(name, tensor.detach(), groups)
    grouped.load_state_dict(_complete(state, grouped), strict=True, assign=True)
    for module in grouped.modules():
        if hasattr(module, "reset_buffers"):
            module.reset_buffers()  # pyright: ignore[reportCallIssue]
    _rebuild_rope(grouped, config)
    grouped.tie_weights()
    grouped.set_experts_implementation(model.get_experts_implementation())
    grouped.generation_config = model.generation_config
    return grouped.eval()


_MIXTRAL_NAMES = (
    ("block_sparse_moe", "mlp"),
    (".w1.", ".gate_proj."),
    (".w3.", ".up_proj."),
    (".w2.", ".down_proj."),
)


def regroup_checkpoint(
    source: str | Path, out: str | Path, groups: Groups, num_groups: int, *, force: bool = False
) -> None:
    """Write the grouped checkpoint tensor by tensor: no model is built, quantised ones pass.

    Raises:
        ConfigError: as `regroup`.
        ArtifactError: a damaged checkpoint, or no room on the disk.
    """
    folder = Path(source)
    values = read_json(folder / "config.json")
    config = grouped_config(values, num_groups)
    _check_layers(config, groups)
    checkpoint = read_checkpoint(folder)
    if checkpoint is None:
        raise ArtifactError(f"{folder} has no safetensors files", fix="check the path")
    family = family_of(values)
    names = _MIXTRAL_NAMES if model_spec(values).family == "mixtral" else ()
    orders = {layer: order_of(group_E) for layer, group_E in groups.items()}
    check_space(Path(out), checkpoint.num_bytes)
    with atomic_folder(out, force=force) as work:
        write_reordered(checkpoint, work, Renumbering(family, orders, renames=names))
        config.save_pretrained(work)


def _check_layers(config: MogeConfig, groups: Groups) -> None:
    layers = {i for i in range(config.num_hidden_layers) if i not in (config.mlp_only_layers or [])}
    if missing := sorted(layers - set(groups)):
        raise ConfigError(
            f"the trace has no groups for the layers {missing}", fix="trace this model again"
        )


def grouped_config(values: Mapping[str, Any], num_groups: int) -> MogeConfig:
    """The configuration of the grouped model, from that of the model it is made of."""
    spec = model_spec(dict(values))
    if objection := _objection(spec, values):
        raise ConfigError(
            f"a {spec.family} model cannot become a MoGE: {objection}",
            fix=f"families that can: {', '.join(FAMILIES)}, without groups",
        )
    assert spec.moe is not None
    moe, attention = spec.moe, spec.attention
    Grouping(num_experts=moe.grouping.num_experts, num_groups=num_groups, top_k=moe.grouping.top_k)
    if spec.family == "moge":
        return MogeConfig(**{**values, "router_n_groups": num_groups})
    return MogeConfig(
        **{key: values[key] for key in _SHARED_KEYS if key in values},
        head_dim=attention.key_dim,
        attention_bias=attention.qkv_bias,
        attention_output_bias=attention.output_bias,
        use_qk_norm=attention.qk_norm == "head",
        sliding_window=attention.sliding_window if attention.num_windowed_layers else None,
        intermediate_size=spec.dense_width or None,
        mlp_only_layers=[i for i in range(spec.num_layers) if i not in spec.moe_layers],
        num_experts=moe.grouping.num_experts,
        num_experts_per_tok=moe.grouping.top_k,
        moe_intermediate_size=moe.expert_width,
        router_n_groups=num_groups,
        router_score=moe.router.score,
        router_weighting=moe.router.weighting,
        routed_scaling_factor=moe.router.scaling_factor,
        dtype=values.get("dtype") or values.get("torch_dtype"),
    )


_SHARED_KEYS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "rope_parameters", "rms_norm_eps",
    "initializer_range", "tie_word_embeddings", "attention_dropout", "pad_token_id",
    "bos_token_id", "eos_token_id",
)  # fmt: skip


def _objection(spec: ModelSpec, values: Mapping[str, Any]) -> str | None:
    """Why a model of this kind has no equal among MoGE models; None where it has."""
    if spec.moe is None:
        return "it has no experts"
    if spec.family not in FAMILIES:
        return f"family {spec.family!r} has layers a MoGE does not have"
    if spec.is_grouped:
        return f"it has {spec.moe.grouping.num_groups} groups already"
    windowed = spec.attention.num_windowed_layers
    if windowed not in (0, spec.num_layers):
        return f"{windowed} of its {spec.num_layers} layers have a sliding window"
    if values.get("num_null_experts"):
        return "its null experts belong to no group"
    return None


def _reordered(name: str, tensor: Tensor, groups: Groups) -> Tensor:
    """A tensor of the grouped model: blocks of experts in their new order."""
    parts = name.split(".")
    counts_experts = ".mlp.experts." in name or ".mlp.gate." in name
    if not counts_experts:
        return tensor.clone()
    group_E = groups.get(int(parts[parts.index("layers") + 1]))
    if group_E is None:  # a layer that predicts further tokens: no trace sees it, groups in order
        return tensor.clone()
    order_E = torch.from_numpy(order_of(group_E)).to(tensor.device)
    return tensor.index_select(0, order_E)


def _complete(state: dict[str, Tensor], grouped: MogeForCausalLM) -> dict[str, Tensor]:
    """The state with tied names filled in, as the strict load wants them."""
    tied = getattr(grouped, "all_tied_weights_keys", None) or {}
    for target, source in dict(tied).items():
        if target not in state and source in state:
            state[target] = state[source]
    return state


def _rebuild_rope(grouped: MogeForCausalLM, config: MogeConfig) -> None:
    """Buffers that are saved nowhere were built on the meta device: build them anew."""
    kind = type(grouped.model.rotary_emb)
    device = next(grouped.parameters()).device
    grouped.model.rotary_emb = kind(config).to(device)
