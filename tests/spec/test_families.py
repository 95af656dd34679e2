"""Every family is read as Transformers builds it: counts, names on disk, router, errors."""

import json
from collections import Counter
from math import prod

import pytest

from mogul.core.errors import ConfigError
from mogul.spec import presets
from mogul.spec.checkpoint import read_checkpoint
from mogul.spec.families import FAMILIES, family_of, model_spec

# Widths are all different, and no head is hidden/heads wide, so that no mix-up stays unseen.
DENSE = {
    "vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 64,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
WIDE = {"head_dim": 12}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
ROUTED = {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
LOCAL = {"num_local_experts": 6, "num_experts_per_tok": 2}
MLA = {"kv_lora_rank": 14, "qk_nope_head_dim": 10, "qk_rope_head_dim": 4, "v_head_dim": 7}
GROUP_LIMITED = {"n_group": 2, "topk_group": 1, "n_shared_experts": 2, "first_k_dense_replace": 1}

STOCK = {
    "llama": ("llama", {}),
    "llama-biases-tied": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, **WIDE},
    ),
    "mistral": ("mistral", {**WIDE, "sliding_window": 8}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", WIDE),
    "phi3": ("phi3", {}),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {}),
    "qwen2_moe": ("qwen2_moe", {**MOE, "shared_expert_intermediate_size": 28}),
    "qwen2_moe-sparse": (
        "qwen2_moe",
        {**MOE, "shared_expert_intermediate_size": 28, "decoder_sparse_step": 2},
    ),
    "qwen3_moe": ("qwen3_moe", {**MOE, **WIDE}),
    "qwen3_moe-dense-layer": ("qwen3_moe", {**MOE, **WIDE, "mlp_only_layers": [1]}),
    "olmoe": ("olmoe", {"num_experts": 6, "num_experts_per_tok": 2}),
    "mixtral": ("mixtral", LOCAL),
    "minimax_m2": ("minimax_m2", {**LOCAL, **WIDE}),
    "deepseek_v2": ("deepseek_v2", {**ROUTED, **MLA, **GROUP_LIMITED, "q_lora_rank": None}),
    "deepseek_v3": ("deepseek_v3", {**ROUTED, **MLA, **GROUP_LIMITED, "q_lora_rank": 9}),
    "deepseek_v3-bias": (
        "deepseek_v3",
        {**ROUTED, **MLA, **GROUP_LIMITED, "q_lora_rank": 9, "attention_bias": True},
    ),
    "glm4_moe": (
        "glm4_moe",
        {**ROUTED, **GROUP_LIMITED, **WIDE, "attention_bias": True, "use_qk_norm": True},
    ),
    "dots1": ("dots1", {**ROUTED, **GROUP_LIMITED, **WIDE}),
    "gpt_oss": ("gpt_oss", {**LOCAL, **WIDE}),
}


def stock_config(case: str):
    from transformers import AutoConfig

    kind, changes = STOCK[case]
    return AutoConfig.for_model(kind, **{**DENSE, **changes})


def on_disk(config) -> dict:
    """The config as `save_pretrained` writes it: keys at their defaults may be missing."""
    return json.loads(config.to_json_string())


@pytest.mark.parametrize("case", STOCK)
def test_params_equal_the_model_transformers_builds(case):
    import torch
    from transformers import AutoModelForCausalLM

    config = stock_config(case)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    spec = model_spec(on_disk(config))
    assert spec.params() == sum(parameter.numel() for parameter in model.parameters())
    assert spec.family == STOCK[case][0]


@pytest.mark.parametrize(
    "case", [case for case, (kind, _) in STOCK.items() if FAMILIES[kind].is_moe]
)
def test_tensor_names_on_disk_belong_to_the_right_part(case, tmp_path):
    from transformers import AutoModelForCausalLM

    config = stock_config(case)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    family, spec = family_of(on_disk(config)), model_spec(on_disk(config))
    counted: Counter[str] = Counter()
    for entry in read_checkpoint(tmp_path).tensors.values():
        if not entry.name.endswith("e_score_correction_bias"):  # a buffer
            counted[family.part_of(entry.name)] += prod(entry.shape)
    assert dict(counted) == spec.breakdown()


def test_every_stock_family_is_compared():
    ours = {"moge", "PanguProMoE", "PanguProMoEV2", "interns1_pro", "qwen3_vl_moe"}
    assert {kind for kind, _ in STOCK.values()} == set(FAMILIES) - ours


def test_the_text_part_of_a_vision_model_is_compared_too():
    import torch
    from transformers import Qwen3VLMoeTextConfig, Qwen3VLMoeTextModel

    text = Qwen3VLMoeTextConfig(**{**DENSE, **MOE, **WIDE, "mlp_only_layers": [0]})
    with torch.device("meta"):
        model = Qwen3VLMoeTextModel(text)
    config = {"model_type": "qwen3_vl_moe", "text_config": on_disk(text)}
    spec = model_spec({**config, "tie_word_embeddings": True})
    assert spec.params() == sum(parameter.numel() for parameter in model.parameters())


MOGE = {
    "model_type": "moge",
    **DENSE,
    **MOE,
    "num_experts_per_tok": 3,
    "router_n_groups": 3,
    "shared_expert_intermediate_size": 28,
    "mlp_only_layers": [0],
    "attention_bias": True,
    "attention_output_bias": True,
    "use_qk_norm": True,
    "router_scale": True,
    "router_weighting": "renormalised_in_group",
    "num_null_experts": 3,
}


def test_our_own_family_equals_our_own_model():
    import torch

    import mogul.models as models

    with torch.device("meta"):
        model = models.MogeForCausalLM(models.MogeConfig(**MOGE))
    assert model_spec(MOGE).params() == sum(p.numel() for p in model.parameters())


def test_our_own_pangu_equals_our_own_model():
    import torch

    import mogul.models as models

    config = presets.config("pangu-pro-moe-72b")
    with torch.device("meta"):
        model = models.PanguProMoEForCausalLM(models.PanguProMoEConfig(**config))
    assert model_spec(config).params() == sum(p.numel() for p in model.parameters())


def test_moge_keys_are_read():
    spec = model_spec(MOGE)
    assert spec.moe_layers == (1, 2)
    assert spec.grouping.num_groups == 3
    assert spec.moe.router.weighting == "renormalised_in_group"
    assert spec.moe.router.has_expert_scale
    assert spec.moe.router.num_null_experts == 3
    assert spec.attention.qk_norm == "head"


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "deepseek_v3", "olmoe"])
def test_router_n_groups_means_grouped_routing_in_any_family(kind):
    base = {**DENSE, **MOE, **MLA, "model_type": kind}
    assert model_spec(base).grouping.num_groups == 1
    assert model_spec({**base, "router_n_groups": 2}).grouping.legal_devices() == (1, 2)
    assert model_spec({**base, "router_n_groups": -1}).grouping.num_groups == 1


def test_groups_that_do_not_divide_are_refused():
    config = {**DENSE, **MOE, "model_type": "qwen3_moe", "router_n_groups": 4}
    with pytest.raises(ConfigError, match="6 experts cannot stand in 4 equal groups"):
        model_spec(config)


def test_pangu_groups_default_to_the_picks():
    config = presets.config("pangu-pro-moe-72b")
    assert "router_n_groups" not in config
    assert model_spec(config).grouping.num_groups == 8
    assert model_spec({**config, "router_n_groups": 4}).grouping.num_groups == 4


def test_the_second_pangu_is_told_from_the_first():
    second = presets.config("openpangu-r-72b")
    assert second["model_type"] == "PanguProMoE"
    assert family_of(second).name == "PanguProMoEV2"
    assert family_of({**second, "model_type": "PanguProMoEV2"}).name == "PanguProMoEV2"
    spec = model_spec(second)
    assert spec.moe_layers == tuple(range(4, 50))
    assert spec.attention.kv_elements == 1280
    assert spec.norms_per_layer == 4
    assert spec.num_uncounted_mtp_layers == 1
    assert family_of(presets.config("pangu-pro-moe-72b")).name == "PanguProMoE"


def test_intern_s1_pro_is_read_from_its_text_config():
    config = presets.config("intern-s1-pro")
    spec = model_spec(config)
    assert spec.family == "interns1_pro"
    assert (spec.grouping.num_experts, spec.grouping.num_groups) == (512, 8)
    assert spec.moe.router.weighting == "renormalised"
    assert spec.breakdown()["routed experts"] == 94 * 512 * 3 * 4096 * 1536
    assert spec.dtype == "fp8"
    assert model_spec(config["text_config"]).params() == spec.params()


def test_routers_differ_by_family():
    deepseek = model_spec(presets.config("deepseek-v3")).moe.router
    assert (deepseek.score, deepseek.limit_num_groups, deepseek.limit_groups) == ("sigmoid", 8, 4)
    assert deepseek.has_selection_bias
    assert deepseek.scaling_factor == 2.5
    assert model_spec(presets.config("olmoe-1b-7b")).moe.router.weighting == "probability"
    assert model_spec(presets.config("qwen3-30b-a3b")).moe.router.weighting == "renormalised"
    assert not model_spec(presets.config("deepseek-v3")).is_grouped


def test_grouped_routing_replaces_group_limited_routing():
    grouped = model_spec({**presets.config("deepseek-v3"), "router_n_groups": 8})
    assert grouped.moe.router.limit_groups is None
    assert grouped.grouping.num_groups == 8
    greedy = model_spec({**presets.config("deepseek-v3"), "topk_method": "greedy"})
    assert greedy.moe.router.limit_groups is None


def test_an_unknown_family_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown model_type 'qwen3_mo'") as caught:
        model_spec({"model_type": "qwen3_mo"})
    assert "'qwen3_moe'" in caught.value.__notes__[0]
    with pytest.raises(ConfigError, match="no key 'model_type'"):
        model_spec({"hidden_size": 8})


def test_missing_keys_are_named_together_with_their_aliases():
    config = {**DENSE, "model_type": "qwen3_moe", "num_experts_per_tok": 2}
    del config["hidden_size"]
    with pytest.raises(ConfigError) as caught:
        model_spec(config)
    text = str(caught.value)
    assert "'hidden_size'" in text
    assert "'num_experts' or 'num_local_experts'" in text
    assert "'moe_intermediate_size'" in text


def test_aliases_that_disagree_are_an_error():
    config = {**DENSE, **MOE, "model_type": "qwen3_moe", "num_local_experts": 8}
    with pytest.raises(ConfigError, match="num_experts=6 and num_local_experts=8 mean the same"):
        model_spec(config)


def test_a_wrong_value_names_its_key():
    with pytest.raises(ConfigError, match="hidden_size"):
        model_spec({**DENSE, "model_type": "llama", "hidden_size": "wide", "head_dim": 8})


@pytest.mark.parametrize(
    ("changes", "words", "fix"),
    [
        ({"num_hidden_layers": "many"}, "num_hidden_layers is 'many'", "a whole number above 0"),
        ({"num_hidden_layers": 10**12}, "has 1,000,000,000,000 layers", "at most 10,000"),
        ({"vocab_size": float("nan")}, "vocab_size is nan", "a whole number above 0"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0", "a whole number above 0"),
        ({"num_key_value_heads": {}}, "num_key_value_heads is {}", "a whole number"),
        ({"router_n_groups": True}, "router_n_groups is True", "a whole number"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0", "a whole number above 0"),
        ({"mlp_only_layers": -1}, "mlp_only_layers is -1", "a list of layers"),
        ({"quantization_config": 8}, "quantization_config is 8", "an object"),
    ],
)
def test_values_of_the_wrong_kind_are_named(changes, words, fix):
    with pytest.raises(ConfigError, match=words) as caught:
        model_spec({**DENSE, **MOE, "model_type": "qwen3_moe", **changes})
    assert caught.value.__notes__ == [f"fix: give {fix}"]


@pytest.mark.parametrize("kind", [["moge"], {}, 3])
def test_a_model_type_that_is_no_word_is_unknown(kind):
    with pytest.raises(ConfigError, match="model_type"):
        model_spec({**DENSE, "model_type": kind})
