"""The general grouped-expert model: generation, equivalences, invariances, losses, plans."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.cache_utils import StaticCache

from mogul.core.errors import ConfigError
from mogul.models import MogeConfig, MogeForCausalLM, PanguProMoEConfig, PanguProMoEForCausalLM

TINY = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 4,
    "router_n_groups": 4, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 16,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
VARIANTS = {
    "plain": {},
    "biased": {"attention_bias": True, "attention_output_bias": True, "router_scale": True},
    "sigmoid": {
        "router_score": "sigmoid", "router_selection_bias": True,
        "router_weighting": "renormalised", "routed_scaling_factor": 2.5,
        "use_qk_norm": True, "tie_word_embeddings": True,
    },
    "dense first": {"mlp_only_layers": [0], "intermediate_size": 24},
    "windowed": {"sliding_window": 5},
    "null experts": {"num_null_experts": 4, "router_n_groups": 1},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}},
}  # fmt: skip
TOKENS = torch.tensor([[5, 9, 1, 33, 60, 2, 7, 11], [8, 8, 40, 3, 3, 21, 12, 50]])


def build(cls=MogeForCausalLM, **changes):
    torch.manual_seed(0)
    config_class = PanguProMoEConfig if cls is PanguProMoEForCausalLM else MogeConfig
    model = cls(config_class(**TINY | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
            elif "norm" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if "e_score_correction_bias" in name:
                buffer.normal_(std=0.1)
    model.set_experts_implementation("mogul")
    return model


@pytest.fixture(params=VARIANTS)
def model(request):
    return build(**VARIANTS[request.param])


def greedy(model, tokens, **options):
    options = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6} | options
    return model.generate(tokens, **options)[:, tokens.shape[1] :]


@torch.no_grad()
def test_cached_equals_uncached(model):
    expected = greedy(model, TOKENS, use_cache=False)
    assert torch.equal(greedy(model, TOKENS), expected)
    assert torch.equal(greedy(model, TOKENS, cache_implementation="static"), expected)


@torch.no_grad()
def test_static_cache_gives_the_same_logits(model):
    cache = StaticCache(config=model.config, max_cache_len=16)
    whole = model(TOKENS).logits
    first = model(TOKENS[:, :5], past_key_values=cache).logits
    rest = model(TOKENS[:, 5:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat((first, rest), 1), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_left_padding_changes_nothing(model):
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), TOKENS), 1)
    mask = (torch.arange(11) >= 3).long().expand(2, -1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(given, model(TOKENS).logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(greedy(model, padded, attention_mask=mask), greedy(model, TOKENS))


@torch.no_grad()
def test_eager_attention_agrees(model):
    expected = model(TOKENS).logits
    model.set_attn_implementation("eager")
    out = model(TOKENS, output_attentions=True)
    torch.testing.assert_close(out.logits, expected, atol=1e-5, rtol=1e-5)
    assert out.attentions[0].shape == (2, 4, 8, 8)


@torch.no_grad()
def test_tokens_do_not_see_their_neighbours(model):
    """Batch members and later positions change nothing; nor does the order of the batch."""
    whole = model(TOKENS).logits
    torch.testing.assert_close(model(TOKENS[1:]).logits, whole[1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(TOKENS.flip(0)).logits, whole.flip(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(TOKENS[:, :4]).logits, whole[:, :4], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_experts_implementations_agree(model):
    expected = model(TOKENS).logits
    for name in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(name)
        torch.testing.assert_close(
            model(TOKENS).logits, expected, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@torch.no_grad()
def test_logits_to_keep_and_embeddings_in(model):
    whole = model(TOKENS).logits
    torch.testing.assert_close(model(TOKENS, logits_to_keep=2).logits, whole[:, -2:])
    kept = torch.tensor([0, 3])
    torch.testing.assert_close(model(TOKENS, logits_to_keep=kept).logits, whole[:, kept])
    embedded = model.get_input_embeddings()(TOKENS)
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, whole)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(TOKENS, inputs_embeds=embedded)


def test_saved_and_loaded_again(model, tmp_path):
    model.save_pretrained(tmp_path)
    again, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, experts_implementation="mogul", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is MogeForCausalLM
    torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits, atol=0, rtol=0)


def test_gradient_checkpointing_changes_no_gradient(model):
    def gradients():
        model.train().zero_grad()
        model(TOKENS, labels=TOKENS, output_router_logits=True).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    expected = gradients()
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)()
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_records_of_the_routers():
    model = build(mlp_only_layers=[0], intermediate_size=24)
    out = model(
        TOKENS, output_router_logits=True, output_router_weights=True, output_router_ids=True
    )
    assert [len(r) for r in (out.router_logits, out.router_weights, out.router_ids)] == [1, 1, 1]
    assert out.router_logits[0].shape == (16, 8)
    assert out.router_weights[0].dtype == torch.float32
    assert torch.equal(out.router_ids[0] // 2, torch.arange(4).expand(16, 4))
    plain = model(TOKENS)
    assert plain.router_logits is None
    assert plain.router_ids is None


@pytest.mark.parametrize("renormalised", [True, False])
def test_one_group_is_qwen3_moe(renormalised):
    foreign = ("router_n_groups", "shared_expert_intermediate_size")
    shape = {key: value for key, value in TINY.items() if key not in foreign}
    theirs = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **shape, norm_topk_prob=renormalised, mlp_only_layers=[0], intermediate_size=24
        )
    )
    ours = build(
        router_n_groups=1, use_qk_norm=True, shared_expert_intermediate_size=0,
        router_weighting="renormalised" if renormalised else "probability",
        mlp_only_layers=[0], intermediate_size=24,
    )  # fmt: skip
    theirs.load_state_dict(ours.state_dict())
    ours.train()
    theirs.train()
    results = [m(TOKENS, labels=TOKENS, output_router_logits=True) for m in (ours, theirs)]
    torch.testing.assert_close(results[0].logits, results[1].logits, atol=1e-5, rtol=1e-5)
    # Theirs does not divide the load by the picks: balance is K there and 1 here.
    torch.testing.assert_close(results[0].aux_loss * 4, results[1].aux_loss, atol=1e-5, rtol=1e-5)
    losses = [out.loss - 0.001 * out.aux_loss for out in results]
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-5)
    for loss in losses:
        loss.backward()
    named = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad,
            named[name].grad,
            atol=1e-5,
            rtol=1e-4,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def test_loss_divides_by_the_items_of_the_whole_batch():
    model = build()
    mean = model(TOKENS, labels=TOKENS).loss
    given = model(TOKENS, labels=TOKENS, num_items_in_batch=torch.tensor(28)).loss
    torch.testing.assert_close(given, mean * 14 / 28)


def test_router_losses_join_the_loss():
    model = build()
    plain = model(TOKENS, labels=TOKENS).loss
    model.config.router_aux_loss_coef = 0.5
    out = model(TOKENS, labels=TOKENS, output_router_logits=True)
    torch.testing.assert_close(out.loss, plain + 0.5 * out.aux_loss)
    model.config.router_z_loss_coef = 0.1
    z = torch.stack([x.logsumexp(-1).square().mean() for x in out.router_logits]).mean()
    torch.testing.assert_close(model(TOKENS, labels=TOKENS).loss, plain + 0.1 * z)


# ---------------------------------------------------------------------- router gradients


def router(**changes):
    gate = build(**changes).model.layers[0].mlp.gate
    return gate.train(), torch.randn(6, 32, generator=torch.Generator().manual_seed(3))


def weight_gradient(gate, x, mix):
    gate.zero_grad()
    _, weights, ids = gate(x)
    (weights * mix).sum().backward()
    return weights.detach(), ids, gate.weight.grad.clone()


def test_one_pick_a_group_teaches_through_the_softmax_of_its_group():
    common = {"router_weighting": "renormalised_in_group"}
    gate, x = router(**common, router_gradient="straight_through")
    mix = torch.randn(6, 4)
    weights, ids, gradient = weight_gradient(gate, x, mix)
    torch.testing.assert_close(weights, torch.ones(6, 4))
    free = gate.weight.detach().clone().requires_grad_()
    share = (x @ free.T).unflatten(-1, (4, 2)).softmax(-1).flatten(1)
    (share.gather(1, ids) * mix).sum().backward()
    torch.testing.assert_close(gradient, free.grad, atol=1e-6, rtol=1e-4)
    assert gradient.abs().max() > 1e-3
    exact, _ = router(**common)
    assert weight_gradient(exact, x, mix)[2].abs().max() < 1e-6


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("weighting", ["renormalised", "renormalised_in_group"])
def test_straight_through_keeps_the_forward_and_the_scale_gradient(score, weighting):
    options = {
        "router_score": score, "router_weighting": weighting, "router_scale": True,
        "num_experts_per_tok": 4, "router_n_groups": 2, "routed_scaling_factor": 1.5,
    }  # fmt: skip
    exact, x = router(**options)
    straight, _ = router(**options, router_gradient="straight_through")
    mix = torch.randn(6, 4)
    expected, ids, exact_gradient = weight_gradient(exact, x, mix)
    weights, ids_2, gradient = weight_gradient(straight, x, mix)
    assert torch.equal(ids, ids_2)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(straight.router_scale.grad, exact.router_scale.grad)
    assert not torch.allclose(gradient, exact_gradient, atol=1e-4)
    straight.eval()
    torch.testing.assert_close(weight_gradient(straight, x, mix)[2], exact_gradient)


def test_router_stays_in_float32_under_autocast_and_low_precision():
    gate, x = router()
    exact = gate(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, _, _ = gate(x)
    torch.testing.assert_close(logits, exact[0], atol=0, rtol=0)
    half = gate.to(torch.bfloat16)
    logits, weights, _ = half(x.bfloat16())
    assert logits.dtype == weights.dtype == torch.float32


def test_selection_bias_is_kept_in_float32(tmp_path):
    build(**VARIANTS["sigmoid"]).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, experts_implementation="mogul"
    )
    gate = model.model.layers[0].mlp.gate
    assert gate.e_score_correction_bias.dtype == torch.float32
    assert gate.e_score_correction_bias.abs().max() > 0
    assert gate.weight.dtype == torch.bfloat16
    assert torch.equal(gate.group_of_expert, torch.arange(8) // 2)
    model(TOKENS)


def test_router_is_no_traceable_top_k():
    """A server that finds only `weight` and a bias would swap in its own global top-k."""
    for changes in ({}, {"router_n_groups": 1}, {"router_selection_bias": True}):
        gate, _ = router(**changes)
        state = {name for name, _ in [*gate.named_parameters(), *gate.named_buffers()]}
        assert state - {"weight", "e_score_correction_bias"}


# ------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("cls", "variant"),
    [(PanguProMoEForCausalLM, "plain"), *((MogeForCausalLM, variant) for variant in VARIANTS)],
)
def test_every_entry_of_the_plans_matches(cls, variant):
    model = build(cls, **VARIANTS[variant])
    names = {n for n, _ in [*model.model.named_modules(), *model.model.named_parameters()]}
    config = model.config
    for plan in (config.base_model_tp_plan, config.base_model_ep_plan, config.base_model_pp_plan):
        for entry in plan:
            pattern = re.escape(entry).replace(r"\*", r"\d+")
            assert any(re.fullmatch(pattern, name) for name in names), entry
    if hasattr(config, "base_model_fsdp_plan"):
        assert set(config.base_model_fsdp_plan) >= {"embed_tokens", "layers.*", "norm"}


def test_initial_weights_have_the_configured_spread():
    model = MogeForCausalLM(MogeConfig(**TINY | {"router_scale": True, "initializer_range": 0.5}))
    block = model.model.layers[1].mlp
    for weight in (block.experts.gate_up_proj, block.experts.down_proj, block.gate.weight):
        assert weight.std().item() == pytest.approx(0.5, rel=0.15)
    assert torch.equal(block.gate.router_scale, torch.ones(8))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"router_n_groups": 3}, "8 experts cannot stand in 3 equal groups"),
        ({"num_experts_per_tok": 6}, "6 picks a token cannot be shared equally by 4 groups"),
        ({"router_score": "tanh"}, "router_score='tanh' is unknown"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3"),
        ({"mlp_only_layers": [0]}, "intermediate_size is missing"),
        ({"router_gradient": "straight_through"}, "has no effect on router_weighting"),
        ({"num_expert": 8}, "unknown key 'num_expert'"),
    ],
)
def test_values_that_cannot_work_are_refused(change, words):
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        MogeConfig(**TINY | change)
    assert caught.value.__notes__[0].startswith("fix: ")


def test_foreign_keys_are_kept_and_told(tmp_path, capfd):
    config = MogeConfig(**TINY, training_run="a7", torch_dtype="float32", rope_theta=5000.0)
    assert "key 'training_run' is unknown here; kept, without effect" in capfd.readouterr().err
    config.save_pretrained(tmp_path)
    again = MogeConfig.from_pretrained(tmp_path)
    told = capfd.readouterr().err
    assert again.training_run == "a7"
    assert told.count("is unknown here") == 1
    assert again.rope_parameters == {"rope_type": "default", "rope_theta": 5000.0}
    named = {"_name_or_path", "transformers_version", "architectures"}
    assert {k: v for k, v in again.to_dict().items() if k not in named} == {
        k: v for k, v in config.to_dict().items() if k not in named
    }


def test_reward_model_head():
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_config(MogeConfig(**TINY, num_labels=1))
    assert model(TOKENS).logits.shape == (2, 1)


def test_the_selection_bias_is_float32_in_a_model_of_any_dtype():
    config = MogeConfig(**TINY | {"router_selection_bias": True})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    gate = model.model.layers[0].mlp.gate
    assert gate.weight.dtype == torch.bfloat16
    assert gate.e_score_correction_bias.dtype == torch.float32
