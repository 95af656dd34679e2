"""The multi-token-prediction layer: what it computes, its loss, its names on disk, its cache."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import DynamicCache

from mogul.core.errors import ArtifactError, ConfigError
from mogul.models import MogeConfig, MogeForCausalLM, load_model
from mogul.observe.hooks import watch
from mogul.train.objective import ChunkedLoss

TINY = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 4,
    "router_n_groups": 4, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 16,
    "max_position_embeddings": 128, "num_nextn_predict_layers": 1, "tie_word_embeddings": True,
}  # fmt: skip
TOKENS = torch.tensor([[5, 9, 1, 33, 60, 2, 7, 11], [8, 8, 40, 3, 3, 21, 12, 50]])


def build(**changes) -> MogeForCausalLM:
    torch.manual_seed(0)
    model = MogeForCausalLM(MogeConfig(**TINY | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def model():
    return build().eval()


def norm(x, weight, eps=1e-6):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


@torch.no_grad()
def test_joins_the_hidden_state_with_the_next_embedding(model):
    hidden = model.model(TOKENS).last_hidden_state[:, :-1]
    layer = model.model.layers[2]
    embeds = model.model.embed_tokens.weight[TOKENS[:, 1:]]
    joined = torch.cat((norm(embeds, layer.enorm.weight), norm(hidden, layer.hnorm.weight)), -1)
    x = joined @ layer.eh_proj.weight.T
    # A decoder layer on its own: a model of one layer without its final norm.
    one = build(num_hidden_layers=1, num_nextn_predict_layers=0).eval()
    block = one.model.layers[0]
    block.load_state_dict({k: v for k, v in layer.state_dict().items() if k in block.state_dict()})
    one.model.norm.load_state_dict(layer.shared_head["norm"].state_dict())
    one.lm_head.weight.copy_(model.lm_head.weight)
    expected = one(inputs_embeds=x).logits
    torch.testing.assert_close(model.mtp(hidden, TOKENS[:, 1:]), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_cache_gives_the_same_logits(model):
    hidden = model.model(TOKENS).last_hidden_state[:, :-1]
    whole = model.mtp(hidden, TOKENS[:, 1:])
    cache = DynamicCache()
    first = model.mtp(hidden[:, :3], TOKENS[:, 1:4], past_key_values=cache)
    rest = [
        model.mtp(hidden[:, t : t + 1], TOKENS[:, t + 1 : t + 2], past_key_values=cache)
        for t in range(3, 7)
    ]
    torch.testing.assert_close(torch.cat([first, *rest], 1), whole, atol=1e-5, rtol=1e-5)
    assert cache.get_seq_length() == 7


def test_the_loss_scores_the_token_after_next(model):
    model.train()
    out = model(TOKENS, labels=TOKENS)
    with torch.no_grad():
        hidden = model.model(TOKENS).last_hidden_state
        logits = model.mtp(hidden[:, :-2], TOKENS[:, 1:-1])
    model.eval()
    expected = functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 2:].flatten())
    torch.testing.assert_close(out.mtp_loss, expected, atol=1e-6, rtol=1e-6)
    plain = model(TOKENS, labels=TOKENS)
    assert plain.mtp_loss is None
    torch.testing.assert_close(out.loss, plain.loss + 0.3 * out.mtp_loss, atol=1e-6, rtol=1e-6)


def test_the_training_objective_tells_the_loss_apart(model):
    objective = ChunkedLoss()
    model.train()
    whole, out = objective(model, TOKENS), model(TOKENS, labels=TOKENS)
    model.eval()
    torch.testing.assert_close(objective.parts["mtp_loss"], out.mtp_loss.detach())
    torch.testing.assert_close(whole, out.loss)


def test_ignored_labels_are_ignored_by_both_losses(model):
    model.train()
    labels = TOKENS.clone()
    labels[:, 4:] = -100
    whole = model(TOKENS, labels=labels)
    short = model(TOKENS[:, :4], labels=TOKENS[:, :4])
    model.eval()
    torch.testing.assert_close(short.mtp_loss, whole.mtp_loss, atol=1e-6, rtol=1e-6)


def test_every_parameter_learns_and_the_router_is_recorded():
    model = build(router_weighting="renormalised_in_group", router_gradient="straight_through")
    model.train()
    out = model(TOKENS, labels=TOKENS, output_router_logits=True)
    assert len(out.router_ids) == 3  # two layers and the MTP layer
    out.loss.backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent
    assert len(model.eval()(TOKENS, output_router_logits=True).router_logits) == 2


def test_generation_does_not_change(model):
    plain = build(num_nextn_predict_layers=0).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(TOKENS, **options), plain.generate(TOKENS, **options))


def test_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointed in (False, True):
        model = build()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.train()(TOKENS, labels=TOKENS).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-6)


def test_saved_under_the_names_of_the_field(model, tmp_path):
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    own = {name for name in load_file(file) if name.startswith("model.layers.2.")}
    for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm", "mlp.experts.7.down_proj"):
        assert f"model.layers.2.{name}.weight" in own
    assert not any("embed_tokens" in name or "shared_head.head" in name for name in own)
    loaded = load_model(tmp_path, dtype="float32")
    with torch.no_grad():
        hidden = model.model(TOKENS).last_hidden_state
        expected = model.mtp(hidden, TOKENS)
        torch.testing.assert_close(loaded.mtp(hidden, TOKENS), expected, atol=1e-5, rtol=1e-5)


def test_a_missing_tensor_of_the_layer_is_named(model, tmp_path):
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.2.eh_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"1 missing \(model.layers.2.eh_proj.weight\)"):
        load_model(tmp_path)


def test_copies_of_embedding_and_head_are_left_out(model, tmp_path, capsys):
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    copy = tensors["model.embed_tokens.weight"]
    for name in ("embed_tokens.weight", "shared_head.head.weight"):
        tensors[f"model.layers.2.{name}"] = copy.clone()
    save_file(tensors, file, metadata={"format": "pt"})
    loaded = load_model(tmp_path, dtype="float32")
    assert "skipped model.layers.2.shared_head.head.weight" in capsys.readouterr().err
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="num_nextn_predict_layers=2 is not supported"):
        MogeConfig(**TINY | {"num_nextn_predict_layers": 2})
    model = build(num_nextn_predict_layers=0)
    with pytest.raises(ConfigError, match="no multi-token-prediction layer"):
        model.mtp(torch.zeros(1, 1, 32), TOKENS[:1, :1])


def test_a_record_of_routing_leaves_the_layer_out(model):
    with watch(model, lambda _: None) as blocks:
        model(TOKENS)
    assert [block.layer for block in blocks] == [0, 1]
