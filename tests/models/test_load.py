"""Loading is strict: every fault is named, nothing is run from the folder, any family loads."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from mogul.core.errors import ArtifactError, ConfigError, HardwareError
from mogul.models import load_config, load_model, load_tokenizer
from mogul.models.load import default_device, named_device

TOKENS = torch.tensor([[1, 17, 30, 3]])
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


def refuse(folder, *words, error=ArtifactError, **options):
    with pytest.raises(error) as caught:
        load_model(folder, **options)
    for word in words:
        assert re.search(word, str(caught.value)), str(caught.value)
    return caught.value


def test_missing_tensors_are_named(pangu_folder):
    folder = pangu_folder(change=lambda t: [t.pop(EXPERT), t.pop("lm_head.weight")])
    refuse(folder, "2 missing", re.escape(EXPERT), "lm_head.weight")


def test_surplus_tensors_are_named(pangu_folder):
    extra = {"model.layers.0.mlp.experts.16.up_proj.weight": torch.zeros(12, 32)}
    refuse(pangu_folder(extra=extra), "1 surplus", r"experts\.16\.up_proj")


def test_misshaped_tensors_are_named(pangu_folder):
    folder = pangu_folder(change=lambda t: t.update({EXPERT: torch.zeros(13, 32)}))
    refuse(folder, "1 misshaped", re.escape(EXPERT) + r" \[13, 32\] instead of \[12, 32\]")


@pytest.mark.parametrize("shape", [(16, 1), (2, 8), (15,)], ids=str)
def test_a_scale_of_another_shape_is_misshaped(pangu_folder, shape):
    name = "model.layers.0.mlp.router_scale"
    folder = pangu_folder(change=lambda t: t.update({name: torch.ones(shape)}))
    refuse(folder, "1 misshaped", re.escape(f"{name} {list(shape)} instead of [1, 16]"))


def test_a_truncated_file_is_named(pangu_folder):
    folder = pangu_folder()
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    refuse(folder, "model-00002-of-00003.safetensors")


def test_a_missing_shard_is_named(pangu_folder):
    folder = pangu_folder()
    (folder / "model-00003-of-00003.safetensors").unlink()
    refuse(folder, "model-00003-of-00003.safetensors")


def test_pickled_weights_are_refused(pangu_folder):
    folder = pangu_folder()
    for file in folder.glob("model*"):
        file.unlink()
    refuse(folder, "no safetensors")
    torch.save({}, folder / "pytorch_model.bin")
    refuse(folder, "pickled weights only; reading them would run code")


def test_folders_that_are_no_checkpoint(tmp_path):
    refuse(tmp_path / "nowhere", "nowhere does not exist")
    refuse(tmp_path, "config.json does not exist")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    refuse(tmp_path, "model type 't5' is no causal language model")


def test_devices_are_named_before_anything_is_loaded():
    assert named_device(None) == named_device("auto") == default_device()
    assert named_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="device 'mars' is unknown") as caught:
        named_device("mars")
    assert caught.value.__notes__ == [f"fix: use one of auto, {', '.join(here())}"]
    with pytest.raises(HardwareError, match="this machine has no device 'hpu'"):
        named_device("hpu")
    with pytest.raises(HardwareError, match="cpu:3 is not among this machine's 1 devices"):
        named_device("cpu:3")


def here() -> list[str]:
    return list(dict.fromkeys(["cpu", default_device()]))


def test_an_unknown_experts_implementation_names_the_nearest(pangu_folder):
    error = refuse(pangu_folder(), "experts 'mogull' cannot be used", error=ConfigError,
                   experts="mogull")  # fmt: skip
    assert error.__notes__ == ["fix: did you mean 'mogul'?"]


def test_remote_code_is_never_run(tmp_path):
    config = {"model_type": "pangu_x", "auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    error = refuse(tmp_path, "model type 'pangu_x' is unknown here, and code from the folder")
    assert error.__notes__[0].startswith("fix: ")


def test_bad_config_values_name_the_file(pangu_folder):
    folder = pangu_folder(num_expert=16)
    with pytest.raises(ConfigError, match="unknown key 'num_expert'") as caught:
        load_config(folder)
    assert any("config.json" in note for note in caught.value.__notes__)


def test_what_transformers_cannot_build_is_told_in_words(pangu_folder):
    folder = pangu_folder()
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "hidden_act": "zelu"}))
    with pytest.raises(
        ArtifactError, match=r"no .* model can be built: KeyError: 'zelu'"
    ) as caught:
        load_model(folder)
    assert caught.value.__notes__ == ["fix: mend that value of config.json"]
    (folder / "config.json").write_text("[]")
    with pytest.raises(ArtifactError, match="holds no JSON object"):
        load_tokenizer(folder)


def test_a_header_that_cannot_be_read_is_named(pangu_folder):
    folder = pangu_folder()
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"F99"', 1))
    with pytest.raises(ArtifactError, match=r"F99|cannot be loaded"):
        load_model(folder)


def test_foreign_quantisation_is_refused(pangu_folder):
    folder = pangu_folder()
    (folder / "quant_model_description.json").write_text("{}")
    refuse(folder, "is quantised")


def test_dtypes(pangu_folder, capfd):
    folder = pangu_folder(dtype=torch.bfloat16)
    assert load_model(folder).dtype == torch.bfloat16
    assert "stored as" not in capfd.readouterr().err
    assert load_model(folder, dtype="float32").dtype == torch.float32
    refuse(folder, "dtype 'float31' is unknown", error=ConfigError, dtype="float31")


def test_mixed_dtypes_are_told(pangu_folder, capfd):
    name = "model.layers.0.mlp.router_scale"
    load_model(
        pangu_folder(dtype=torch.bfloat16, change=lambda t: t.update({name: torch.ones(1, 16)}))
    )
    assert f"stored as F32, held as torch.bfloat16: {name}" in capfd.readouterr().err


@pytest.mark.parametrize("family", ["Llama", "Mixtral"])
def test_any_family_loads(family, tmp_path):
    import transformers

    shape = {
        "vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 24, "pad_token_id": 0,
    }  # fmt: skip
    if family == "Mixtral":
        shape |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    model = getattr(transformers, family + "ForCausalLM")(
        getattr(transformers, family + "Config")(**shape)
    ).eval()
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert again.config._experts_implementation == ("mogul" if family == "Mixtral" else "eager")
    torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits, atol=1e-5, rtol=1e-5)

    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.more.weight"] = tensors.pop("model.layers.0.input_layernorm.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refuse(tmp_path, r"1 missing \(model.layers.0.input_layernorm", r"1 surplus \(model.more")


def test_tied_embeddings_need_no_head(tmp_path):
    from mogul.models import MogeConfig, MogeForCausalLM

    config = MogeConfig(
        vocab_size=48, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=8, tie_word_embeddings=True,
    )  # fmt: skip
    MogeForCausalLM(config).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load_model(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def tokenizer_files(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1, "world": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def test_tokenizer_gets_pangus_template(pangu_folder):
    folder = pangu_folder()
    tokenizer_files(folder)
    tokenizer = load_tokenizer(folder)
    assert tokenizer("hello world")["input_ids"] == [1, 2]
    assert "系统" in tokenizer.chat_template


def test_a_folder_without_tokenizer_is_refused(pangu_folder):
    with pytest.raises(ArtifactError, match="has no tokenizer that can be used"):
        load_tokenizer(pangu_folder())


def test_no_loading_bar_in_a_pipe(pangu_folder, capfd):
    from transformers.utils import logging

    load_model(pangu_folder())
    assert "Loading weights" not in capfd.readouterr().err
    assert logging.is_progress_bar_enabled()


def test_kimi_k2_is_deepseek_v3(tmp_path):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=24, moe_intermediate_size=12, n_routed_experts=8,
        num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=8,
        kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    )  # fmt: skip
    plain = DeepseekV3ForCausalLM(config).eval()
    plain.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved |= {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "configuration_deepseek.X"}}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    model = load_model(tmp_path)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [["moge"], 3])
def test_a_model_type_that_is_no_word_is_named(tmp_path, value):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": value}))
    with pytest.raises(ArtifactError, match="model_type is"):
        load_config(tmp_path)
