"""Other families as grouped-expert models: the presets' counts, tiny models that run, refusals."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from mogul.core.errors import ArtifactError, ConfigError
from mogul.models import MogeForCausalLM, load_model
from mogul.models.convert_config import moge_config
from mogul.spec import presets
from mogul.spec.families import model_spec

TOKENS = torch.tensor([[5, 9, 1, 33, 60, 2, 7, 11], [8, 8, 40, 3, 3, 21, 12, 50]])
SMALLER = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 12, "intermediate_size": 24,
    "num_experts": 16, "n_routed_experts": 16, "first_k_dense_replace": 1, "qk_nope_dim": 8,
    "qk_rope_dim": 4, "v_channels": 6, "param_sink_number": 5, "bos_token_id": 1,
    "eos_token_id": None, "max_position_embeddings": 64,
}  # fmt: skip


def smaller(name):
    config = dict(presets.config(name))
    if "text_config" in config:
        config["text_config"] = shrink(config["text_config"])
        return config
    return shrink(config)


def shrink(config):
    return {key: SMALLER.get(key, value) for key, value in config.items()}


@pytest.mark.parametrize("name", ["intern-s1-pro", "openpangu-r-72b", "qwen3-30b-a3b"])
def test_the_model_has_the_parameters_that_the_spec_counts(name):
    config = presets.config(name)
    with torch.device("meta"):
        model = MogeForCausalLM(moge_config(config, exact=False))
    assert sum(p.numel() for p in model.parameters()) == model_spec(config).params()


def tiny(name):
    torch.manual_seed(0)
    model = MogeForCausalLM(moge_config(smaller(name), exact=False)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.set_experts_implementation("mogul")
    return model


@pytest.mark.parametrize("name", ["intern-s1-pro", "openpangu-r-72b"])
@torch.no_grad()
def test_a_tiny_model_generates_with_and_without_cache(name):
    model = tiny(name)
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(TOKENS, use_cache=False, **options)
    assert torch.equal(model.generate(TOKENS, **options), expected)
    assert torch.equal(model.generate(TOKENS, cache_implementation="static", **options), expected)
    logits = model(TOKENS).logits
    torch.testing.assert_close(model(TOKENS[:, :5]).logits, logits[:, :5], atol=1e-5, rtol=1e-5)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(TOKENS).logits, logits, atol=1e-5, rtol=1e-5)
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), TOKENS), 1)
    mask = (torch.arange(11) >= 3).long().expand(2, -1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(given, logits, atol=1e-5, rtol=1e-5)


def test_routing_of_the_two():
    intern = moge_config(presets.config("intern-s1-pro"), exact=False)
    assert (intern.router_n_groups, intern.grouping.picks_per_group) == (8, 1)
    assert (intern.router_score, intern.router_weighting) == ("softmax", "renormalised")
    pangu = moge_config(presets.config("openpangu-r-72b"))
    assert (pangu.router_n_groups, pangu.num_experts_per_tok, pangu.num_experts) == (1, 8, 80)
    assert (pangu.router_score, pangu.routed_scaling_factor) == ("sigmoid", 2.5)
    assert pangu.router_selection_bias
    assert pangu.rope_parameters["partial_rotary_factor"] == pytest.approx(64 / 192)
    assert pangu.mlp_only_layers == [0, 1, 2, 3]


@torch.no_grad()
def test_sink_keys_take_their_share_of_attention():
    """With zero values they only shrink the output: the weights of the others sum below one."""
    model = tiny("openpangu-r-72b")
    model.set_attn_implementation("eager")
    chances = model(TOKENS, output_attentions=True).attentions[0]
    assert chances.shape == (2, 4, 8, 5 + 8)
    torch.testing.assert_close(chances.sum(-1), torch.ones(2, 4, 8))
    assert chances[..., :5].min() > 0
    assert chances[..., 0, 6:].max() == 0  # the first token sees the sinks and itself


@torch.no_grad()
def test_interleaved_and_half_split_rotations_are_permutations():
    from mogul.models.moge.rotary import factors, rotate

    x = torch.randn(1, 5, 2, 8)
    angles = torch.randn(1, 5, 1, 3)
    order = torch.tensor([0, 2, 4, 1, 3, 5, 6, 7])
    expected = rotate(x[..., order], *factors(angles))
    pairs = rotate(x, *factors(angles, interleaved=True), interleaved=True)
    torch.testing.assert_close(pairs[..., order], expected)
    turned = torch.view_as_complex(x[..., :6].unflatten(-1, (3, 2)).contiguous())
    turned = torch.view_as_real(turned * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    torch.testing.assert_close(pairs[..., :6], turned)
    assert torch.equal(expected[..., 6:], x[..., 6:])
    torch.testing.assert_close(expected.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("name", ["intern-s1-pro", "openpangu-r-72b"])
def test_info_counts_the_converted_model(name):
    """The config as it is saved, model_type "moge", describes every parameter."""
    model = tiny(name)
    assert model_spec(model.config.to_dict()).params() == model.num_parameters()


def test_fourier_positions_are_refused_unless_told():
    with pytest.raises(ConfigError, match=r"Fourier positions \(fope_init_factor, fope_sep_head\)"):
        moge_config(presets.config("intern-s1-pro"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("deepseek-v3", "latent attention"),
        ("gpt-oss-20b", "a router with a bias, experts with biases"),
        ("olmoe-1b-7b", "a norm over all heads"),
        ("qwen1.5-moe-a2.7b", "a shared expert behind a gate"),
        ("smollm2-135m", "has no experts"),
    ],
)
def test_what_cannot_be_expressed_is_named(name, words):
    with pytest.raises(ConfigError, match=words):
        moge_config(presets.config(name))


def qwen_folder(tmp_path, **changes):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    shape = {
        k: v for k, v in SMALLER.items() if k in Qwen3MoeConfig().to_dict() | {"num_experts": 0}
    }
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, num_experts_per_tok=4, norm_topk_prob=True))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    return model.eval()


def test_a_qwen_checkpoint_with_groups_is_routed_in_groups(tmp_path):
    plain = qwen_folder(tmp_path, router_n_groups=4)
    model = load_model(tmp_path)
    assert isinstance(model, MogeForCausalLM)
    ids = model(TOKENS, output_router_ids=True).router_ids[0]
    assert torch.equal(ids // 4, torch.arange(4).expand(16, 4))
    assert (model(TOKENS).logits - plain(TOKENS).logits).abs().max() > 1e-4
    model.save_pretrained(tmp_path / "copy")
    assert (
        load_file(tmp_path / "copy/model.safetensors").keys()
        == load_file(tmp_path / "model.safetensors").keys()
    )


def test_groups_of_one_are_left_to_transformers(tmp_path):
    plain = qwen_folder(tmp_path, router_n_groups=1)
    model = load_model(tmp_path)
    assert type(model) is type(plain)
    torch.testing.assert_close(model(TOKENS).logits, plain(TOKENS).logits, atol=1e-5, rtol=1e-5)


def test_groups_in_a_family_with_other_tensors_are_refused(tmp_path):
    config = presets.config("mixtral-8x7b") | {"router_n_groups": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"grouped routing .* 'mixtral' cannot be loaded"):
        load_model(tmp_path)
