from __future__ import annotations

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mogul.core.errors import ConfigError
from mogul.models.upcycle import UpcyclePlan, upcycle
from mogul.models.upcycle.algebra import redrawn_columns

SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0,
        "original_max_position_embeddings": 16}  # fmt: skip
DENSE = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": YARN}),
    "llama-bias-tied": (
        LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "tie_word_embeddings": True},
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen2-window": (
        Qwen2ForCausalLM, Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 6}),
    "mistral-wide-heads": (
        MistralForCausalLM, MistralConfig, {"sliding_window": None, "head_dim": 12},
    ),
}  # fmt: skip


def dense_model(name: str = "llama", **changes: object) -> PreTrainedModel:
    """A tiny model in which no parameter is trivial: biases and norms are random too."""
    cls, config_cls, extra = DENSE[name]
    torch.manual_seed(5)
    model = cls(config_cls(**{**SIZES, **extra, **changes})).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.3 * torch.randn(parameter.shape) + ("norm" in key))
    return model


def token_ids() -> torch.Tensor:
    return torch.randint(0, 67, (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", DENSE)
def test_logits_equal_the_dense_model_for_any_router(name: str) -> None:
    dense = dense_model(name)
    with torch.no_grad():
        want = dense(token_ids()).logits
    assert want.abs().max() > 1
    chosen = []
    for seed in (0, 1, 2):
        moge = upcycle(dense, num_experts=12, num_groups=4, seed=seed)
        with torch.no_grad():
            got = moge(token_ids(), output_router_logits=True)
        torch.testing.assert_close(got.logits, want, rtol=0, atol=1e-5)
        chosen.append(got.router_ids[0])
    assert not torch.equal(chosen[0], chosen[1])
    assert not torch.equal(chosen[1], chosen[2])


def test_equality_needs_no_router_at_all() -> None:
    dense = dense_model("qwen3")
    moge = upcycle(dense, num_experts=8, num_groups=2)
    with torch.no_grad():
        for layer in moge.model.layers:
            layer.mlp.gate.weight.mul_(1e3).add_(7)
        torch.testing.assert_close(
            moge(token_ids()).logits, dense(token_ids()).logits, rtol=0, atol=1e-5
        )


def test_twin_of_whole_copies_is_exact_too() -> None:
    dense = dense_model()
    twin = upcycle(dense, num_experts=4, num_groups=1)
    assert (twin.config.num_experts_per_tok, twin.config.moe_intermediate_size) == (1, 48)
    with torch.no_grad():
        difference = (twin(token_ids()).logits - dense(token_ids()).logits).abs().max()
    assert difference < 1e-5


def test_shards_stand_where_they_belong() -> None:
    dense = dense_model()
    moge = upcycle(dense, num_experts=12, num_groups=4)
    ffn, experts = dense.model.layers[1].mlp, moge.model.layers[1].mlp.experts
    for expert in range(12):
        rows = slice(12 * (expert // 3), 12 * (expert // 3) + 12)
        gate, up = experts.gate_up_proj[expert].chunk(2)
        assert torch.equal(gate, ffn.gate_proj.weight[rows])
        assert torch.equal(up, ffn.up_proj.weight[rows])
        assert torch.equal(experts.down_proj[expert], ffn.down_proj.weight[:, rows])


@pytest.mark.parametrize("num_groups", [1, 4])
def test_every_router_learns_from_the_first_step(num_groups: int) -> None:
    moge = upcycle(dense_model(), num_experts=12, num_groups=num_groups).train()
    moge(token_ids(), labels=token_ids()).loss.backward()
    for layer in moge.model.layers:
        gradient = layer.mlp.gate.weight.grad
        assert torch.isfinite(gradient).all()
        assert gradient.abs().max() > 0
        assert (gradient.abs().amax(1) > 0).all()  # also of experts nobody picked


def test_router_rows_follow_the_seed_and_the_configured_width() -> None:
    dense = dense_model(hidden_size=64, initializer_range=0.5)
    one, same, other = (upcycle(dense, num_experts=24, num_groups=4, seed=s) for s in (3, 3, 4))
    rows = [model.model.layers[0].mlp.gate.weight for model in (one, same, other)]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    assert rows[0].std().item() == pytest.approx(0.5, rel=0.1)
    assert not torch.equal(rows[0], one.model.layers[1].mlp.gate.weight)


def test_dtype_mode_and_generation_config_are_kept() -> None:
    dense = dense_model().to(torch.bfloat16)
    dense.generation_config.eos_token_id = 9
    before = {name: weight.clone() for name, weight in dense.named_parameters()}
    moge = upcycle(dense, num_experts=8, num_groups=4)
    assert {weight.dtype for weight in moge.parameters()} == {torch.bfloat16}
    assert not moge.training
    assert moge.generation_config.eos_token_id == 9
    assert all(torch.equal(weight, before[name]) for name, weight in dense.named_parameters())
    assert all(
        moge.get_parameter(name).data_ptr() != weight.data_ptr()
        for name, weight in dense.named_parameters()
        if "mlp" not in name
    )


def test_noise_redraws_exactly_its_share_in_all_three_matrices() -> None:
    dense = dense_model(intermediate_size=80)
    plan = UpcyclePlan(num_experts=12, num_groups=4, seed=2, noise=0.25)
    clean = upcycle(dense, num_experts=12, num_groups=4, seed=2)
    noisy, again = (
        upcycle(dense, num_experts=12, num_groups=4, seed=2, noise=0.25) for _ in range(2)
    )
    sets = set()
    for layer in range(2):
        old, new, same = (m.model.layers[layer].mlp.experts for m in (clean, noisy, again))
        assert torch.equal(new.gate_up_proj, same.gate_up_proj)
        assert torch.equal(new.down_proj, same.down_proj)
        for expert in range(12):
            columns = redrawn_columns(20, layer=layer, expert=expert, plan=plan)
            want = torch.zeros(20, dtype=torch.bool)
            want[columns] = True
            assert want.sum() == 5
            rows = (old.gate_up_proj[expert] != new.gate_up_proj[expert]).all(1)
            some = (old.gate_up_proj[expert] != new.gate_up_proj[expert]).any(1)
            assert torch.equal(rows, torch.cat([want, want]))
            assert torch.equal(some, rows)
            down = old.down_proj[expert] != new.down_proj[expert]
            assert torch.equal(down.all(0), want)
            assert torch.equal(down.any(0), want)
            sets.add(tuple(columns.tolist()))
    assert len(sets) > 20  # each expert draws its own
    with torch.no_grad():
        assert (noisy(token_ids()).logits - dense(token_ids()).logits).abs().max() > 1e-2


def test_noise_has_the_moments_of_what_it_replaces() -> None:
    dense = dense_model(hidden_size=256, intermediate_size=256)
    with torch.no_grad():
        dense.model.layers[0].mlp.up_proj.weight.normal_(mean=3.0, std=0.5)
    moge = upcycle(dense, num_experts=4, num_groups=2, noise=1.0)
    up = moge.model.layers[0].mlp.experts.gate_up_proj[3].chunk(2)[1]
    assert up.mean().item() == pytest.approx(3.0, abs=0.05)
    assert up.std().item() == pytest.approx(0.5, rel=0.05)


def mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))


def olmo() -> PreTrainedModel:
    return OlmoForCausalLM(OlmoConfig(**SIZES, pad_token_id=0))


@pytest.mark.parametrize(
    ("make", "experts", "groups", "words", "fix"),
    [
        (mixtral, 8, 4, "MixtralForCausalLM .* mixture of experts already", "dense model"),
        (olmo, 8, 4, "OlmoForCausalLM .* cannot be upcycled", "LlamaForCausalLM, Mistral"),
        (
            lambda: dense_model().model, 8, 4,
            "LlamaModel .* cannot be upcycled", "LlamaForCausalLM",
        ),
        (dense_model, 14, 7, "48 columns cannot be cut in 7 equal shards", "14 experts use 1, 2 g"),
        (dense_model, 10, 4, "10 experts cannot stand in 4 equal groups", "divides 10"),
        (dense_model, 32, 16, "shards of 3 columns, an odd number", "use 1, 2, 4, 8 groups"),
        (dense_model, 8, 8, "leave one expert a group", "16 experts or more"),
        (
            lambda: dense_model(mlp_bias=True), 8, 4,
            "mlp_bias=True", "without FFN biases",
        ),
        (
            lambda: dense_model("qwen2-window", max_window_layers=1), 8, 4,
            "mixes full_attention and sliding_attention", "same attention",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_upcycled_is_refused_by_name(make, experts, groups, words, fix) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        upcycle(make(), num_experts=experts, num_groups=groups)
    assert fix in caught.value.__notes__[0]


def test_only_one_pick_a_group_and_only_a_noise_that_acts() -> None:
    dense = dense_model()
    with pytest.raises(ConfigError, match="8 picks a token in 4 groups") as caught:
        upcycle(dense, num_experts=16, num_groups=4, top_k=8)
    assert caught.value.__notes__ == ["fix: leave the picks out, or use 4"]
    with pytest.raises(ConfigError, match="less than one column: no effect"):
        upcycle(dense, num_experts=16, num_groups=4, noise=0.01)
    with pytest.raises(ConfigError, match=r"noise.*less than or equal to 1"):
        upcycle(dense, num_experts=16, num_groups=4, noise=1.5)


def test_a_quantised_model_is_refused() -> None:
    dense = dense_model()
    dense.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ConfigError, match="the model is quantised"):
        upcycle(dense, num_experts=8, num_groups=4)
