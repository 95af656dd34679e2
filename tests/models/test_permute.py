"""Renumbered experts compute the same function, in every layout on disk."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mogul.core.errors import ConfigError
from mogul.models.permute import orders_of, permute_checkpoint
from mogul.spec.fingerprint import stamp_of_folder, weights_hash
from mogul.spec.placement import LayerPlacement, Placement

SMALL = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24, "moe_intermediate_size": 12,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "tie_word_embeddings": False, "dtype": "float32",
}  # fmt: skip
MLA = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "first_k_dense_replace": 1, "n_shared_experts": 1, "head_dim": 4,
}  # fmt: skip
FAMILIES = {
    "qwen3_moe": {},
    "mixtral": {"intermediate_size": 12},
    "gpt_oss": {"intermediate_size": 12},
    "deepseek_v3": {**MLA, "n_group": 2, "topk_group": 1},
    "minimax_m2": {"intermediate_size": 12},
    "moge": {"router_n_groups": 2, "router_selection_bias": True, "num_null_experts": 2},
    "PanguProMoE": {},
}


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    known = AutoConfig.for_model(request.param).to_dict()
    values = {k: v for k, v in {**SMALL, **FAMILIES[request.param]}.items() if k in known}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **values))
    with torch.no_grad():
        for name, parameter in model.state_dict().items():
            if parameter.is_floating_point() and (
                "gate" in name or "router" in name or "bias" in name
            ):
                parameter.normal_(0, 0.3)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


def placement(folder, order, groups=1, devices=2):
    stamp = stamp_of_folder(folder)
    moe_layers = [1] if stamp.family == "deepseek_v3" else [0, 1]
    layers = tuple(
        LayerPlacement(
            layer=layer, expert_of_slot=tuple(order), method="swap",
            rho=1.0, rho_before=1.0, rho_bound=1.0, gap=0.0,
        )
        for layer in moe_layers
    )  # fmt: skip
    return Placement(
        model=stamp,
        num_devices=devices,
        slots_per_device=len(order) // devices,
        method="swap",
        layers=layers,
    )


def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    )
    with torch.no_grad():
        return model(torch.arange(40).view(2, 20)).logits, model


ORDER = [6, 4, 7, 5, 1, 0, 3, 2]  # groups of four stay whole


def test_the_same_logits_from_other_positions(checkpoint, tmp_path):
    permute_checkpoint(checkpoint, tmp_path / "out", placement(checkpoint, ORDER))
    (before, _), (after, model) = logits(checkpoint), logits(tmp_path / "out")
    assert before.abs().max() > 0.1
    # Routers take their softmax in float32, over another order of experts: nothing else differs.
    torch.testing.assert_close(after, before, rtol=0, atol=2e-7)
    assert weights_hash(tmp_path / "out") != weights_hash(checkpoint)
    old = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64)
    for name, parameter in old.state_dict().items():
        if name.endswith("1.mlp.experts.down_proj"):
            assert torch.equal(model.state_dict()[name], parameter[ORDER])


def test_permuting_back_is_the_identity(checkpoint, tmp_path):
    permute_checkpoint(checkpoint, tmp_path / "there", placement(checkpoint, ORDER))
    inverse = np.argsort(ORDER).tolist()
    permute_checkpoint(
        tmp_path / "there", tmp_path / "back", placement(tmp_path / "there", inverse)
    )
    before, after = logits(checkpoint)[1].state_dict(), logits(tmp_path / "back")[1].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_another_model_and_torn_groups_are_refused(checkpoint, tmp_path):
    one = placement(checkpoint, ORDER)
    stranger = one.replace(model=one.model.replace(weights_hash="0" * 32))
    with pytest.raises(ConfigError, match="made with another model: weights_hash"):
        permute_checkpoint(checkpoint, tmp_path / "out", stranger)
    assert not (tmp_path / "out").exists()
    if max(one.model.limit_num_groups, one.model.num_groups) > 1:
        with pytest.raises(ConfigError, match="tears the 2 groups"):
            orders_of(placement(checkpoint, [0, 4, 1, 5, 2, 6, 3, 7]))


def test_replicas_are_for_engines(checkpoint):
    with pytest.raises(ConfigError, match="every expert exactly once"):
        orders_of(placement(checkpoint, [*range(8), 0, 1]))
