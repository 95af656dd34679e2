import pytest

from mogul.core.errors import ConfigError
from mogul.simulate.approximate import spec_to_price
from mogul.simulate.run import Setting, predict
from mogul.spec.hardware import hardware
from mogul.spec.parallel import Parallel
from mogul.spec.presets import config
from mogul.spec.quant import scheme
from mogul.spec.workload import Workload

QWEN35 = {
    "model_type": "qwen3_5_moe_text", "vocab_size": 248320, "hidden_size": 4096,
    "num_hidden_layers": 60, "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 256,
    "num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 1024,
    "shared_expert_intermediate_size": 1024, "linear_num_value_heads": 64,
    "linear_value_head_dim": 128, "linear_key_head_dim": 128,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 15,
}  # fmt: skip


def test_linear_attention_keeps_the_bytes_of_its_state():
    spec, note = spec_to_price(QWEN35)
    assert "linear attention" in note
    assert spec.attention.num_windowed_layers == 45
    window_bytes = spec.attention.sliding_window * spec.attention.kv_elements * 2
    assert window_bytes == pytest.approx(2 * 64 * 128 * 128 * 4, rel=0.01)
    assert 380e9 < spec.params() < 400e9
    point = predict(
        Setting(spec, hardware("h200"), Parallel(tp=8), scheme("fp8")), Workload(batch=8)
    )
    assert 0.002 < point.tpot_s < 0.05


def test_known_families_are_not_touched():
    spec, note = spec_to_price(config("deepseek-v3"))
    assert note == ""
    assert spec.attention.num_windowed_layers == 0


def test_sparse_attention_looks_back_its_selection():
    spec, note = spec_to_price(
        {**config("deepseek-v3"), "model_type": "deepseek_v32", "index_topk": 2048}
    )
    assert "sparse" in note
    assert spec.attention.sliding_window == 2048


def test_the_unknown_stays_unknown():
    with pytest.raises(ConfigError, match="unknown model_type 'mamba'"):
        spec_to_price({"model_type": "mamba"})


@pytest.mark.parametrize(
    "key", ["layer_types", "linear_num_value_heads", "linear_value_head_dim", "linear_key_head_dim"]
)
@pytest.mark.parametrize("value", ["missing", None, -1, "x", 0.5])
def test_a_key_of_linear_attention_that_cannot_be_is_named(key, value):
    given = {k: v for k, v in QWEN35.items() if k != key}
    given |= {} if value == "missing" else {key: value}
    with pytest.raises(ConfigError, match=key):
        spec_to_price(given)


def test_layers_must_all_have_a_kind():
    with pytest.raises(ConfigError, match="layer_types names 1 of 60 layers"):
        spec_to_price(QWEN35 | {"layer_types": ["linear_attention"]})


@pytest.mark.parametrize("value", ["missing", None, 0, -1, "x"])
def test_a_selection_that_cannot_be_is_named(value):
    given = {**config("deepseek-v3"), "model_type": "deepseek_v32"}
    given |= {} if value == "missing" else {"index_topk": value}
    with pytest.raises(ConfigError, match="index_topk"):
        spec_to_price(given)
