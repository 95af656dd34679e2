"""Pangu Pro MoE: the released layout in and out, the exact forward, the counts, the template."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from mogul.core.errors import ConfigError
from mogul.models import PanguProMoEConfig, PanguProMoEForCausalLM, load_model
from mogul.models.moge.chat_template import PANGU_CHAT_TEMPLATE

TOKENS = torch.tensor([[1, 17, 80, 3, 44, 9, 60]])


def stored(folder):
    """Everything the safetensors files of a folder hold: name -> (dtype, shape, bytes)."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(name)
                raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
                found[name] = (tensor.dtype, tuple(tensor.shape), raw)
    return found


def weights_of(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "mogul"])
@pytest.mark.parametrize("scale_shape", ["[1, E]", "[E]"])
def test_logits_equal_the_plain_reference(pangu_folder, reference_logits, experts, scale_shape):
    folder = pangu_folder(scale_shape=scale_shape)
    model = load_model(folder, experts=experts)
    assert isinstance(model, PanguProMoEForCausalLM)
    assert model.config._experts_implementation == experts
    expected = reference_logits(
        weights_of(folder), TOKENS[0], json.loads((folder / "config.json").read_text())
    )
    with torch.no_grad():
        given = model(TOKENS).logits[0]
    assert given.std() > 0.1
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale_shape", ["[1, E]", "[E]"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_tensors_are_identical(pangu_folder, tmp_path, scale_shape, dtype):
    folder = pangu_folder(scale_shape=scale_shape, dtype=dtype)
    model = load_model(folder)
    assert model.dtype == dtype
    model.save_pretrained(tmp_path / "copy", max_shard_size="40KB")
    assert (tmp_path / "copy/model.safetensors.index.json").exists()
    assert stored(tmp_path / "copy") == stored(folder)
    again = load_model(tmp_path / "copy")
    torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits, atol=0, rtol=0)


def test_a_new_model_is_saved_in_the_released_layout(pangu_folder, tmp_path):
    released = stored(pangu_folder())
    config = PanguProMoEConfig.from_pretrained(tmp_path / "pangu")
    PanguProMoEForCausalLM(config).save_pretrained(tmp_path / "new")
    new = stored(tmp_path / "new")
    assert {n: t[:2] for n, t in new.items()} == {n: t[:2] for n, t in released.items()}


def test_the_base_model_keeps_the_scale_shape(pangu_folder, tmp_path):
    from transformers import AutoModel

    released = stored(pangu_folder(scale_shape="[E]"))
    AutoModel.from_pretrained(tmp_path / "pangu").save_pretrained(tmp_path / "base")
    saved = stored(tmp_path / "base")
    assert len(saved) == len(released) - 1  # no head
    assert all(released["model." + name.removeprefix("model.")] == t for name, t in saved.items())


def test_leftover_names_are_skipped_and_told(pangu_folder, tmp_path, capfd):
    leftovers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.1.module.x": torch.ones(2),
        "model.layers.0.self_attn.kv_cache_offset": torch.ones(1),
    }
    model = load_model(pangu_folder(extra=leftovers))
    told = capfd.readouterr().err
    for name in leftovers:
        assert f"skipped {name}" in told
    model.save_pretrained(tmp_path / "copy")
    assert not set(leftovers) & set(stored(tmp_path / "copy"))


def test_parameter_counts_are_the_published_ones():
    with torch.device("meta"):
        model = PanguProMoEForCausalLM(PanguProMoEConfig())
    total = sum(p.numel() for p in model.parameters())
    experts = [p.numel() for n, p in model.named_parameters() if ".experts." in n]
    final_norm = model.model.norm.weight.numel()  # which the published number leaves out
    assert total == 71_988_781_056
    assert total - sum(experts) * 56 // 64 - final_norm == 16_498_134_016


def test_groups_default_to_the_picks_and_the_attention_has_biases():
    config = PanguProMoEConfig(num_experts=16, num_experts_per_tok=4)
    assert (config.router_n_groups, config.grouping.picks_per_group) == (4, 1)
    assert config.rope_parameters["rope_theta"] == 16e6
    assert config.attention_bias
    assert config.attention_output_bias


def test_the_successor_is_not_taken_for_the_original():
    with pytest.raises(ConfigError, match="openPangu-R-72B"):
        PanguProMoEConfig(param_sink_number=128)


def render(messages, *, add_generation_prompt=True):
    from transformers import LlamaTokenizer

    tokenizer = LlamaTokenizer()
    tokenizer.bos_token = "<s>"
    tokenizer.chat_template = PANGU_CHAT_TEMPLATE
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )


def test_chat_template_emits_an_empty_system_segment():
    user = {"role": "user", "content": "Hi"}
    expected = "<s>[unused9]系统：[unused10][unused9]用户：Hi[unused10][unused9]助手："
    assert render([user]) == expected
    assert render([{"role": "system", "content": ""}, user]) == expected
    assert render([{"role": "system", "content": "S"}, user]) == expected.replace("统：", "统：S")


def test_chat_template_keeps_answers_without_thinking():
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "[unused16]hm[unused17]b"},
    ]
    told = render(turns, add_generation_prompt=False)
    assert (
        told == "<s>[unused9]系统：[unused10][unused9]用户：a[unused10][unused9]助手：b[unused10]"
    )
    with pytest.raises(Exception, match="unknown role tool"):
        render([{"role": "tool", "content": "x"}])
