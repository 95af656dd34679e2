"""ModelSpec counts what it promises: totals, active parameters, bytes, caches."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mogul.core.errors import ConfigError
from mogul.spec import presets
from mogul.spec.families import model_spec
from mogul.spec.grouping import Grouping
from mogul.spec.model import AttentionShape, ModelSpec, MoeShape

PANGU = model_spec(presets.config("pangu-pro-moe-72b"))


def tiny(**changes: object) -> ModelSpec:
    values = {
        "family": "moge",
        "vocab_size": 100,
        "hidden_size": 8,
        "num_layers": 2,
        "attention": AttentionShape(num_heads=2, num_kv_heads=1, key_dim=4, value_dim=4),
        "moe": MoeShape(grouping=Grouping(num_experts=4, num_groups=2, top_k=2), expert_width=3),
        "moe_layers": (1,),
        "dense_width": 5,
    }
    return ModelSpec(**{**values, **changes})


def test_pangu_pro_moe_counts_to_the_last_digit():
    assert PANGU.params() == 71_988_781_056
    assert PANGU.active_params() == 16_498_134_016
    assert PANGU.breakdown()["routed experts"] == 48 * 64 * 20_643_840
    assert PANGU.breakdown()["shared experts"] == 48 * 82_575_360
    assert PANGU.breakdown()["attention"] == 48 * 62_926_848
    assert PANGU.breakdown()["routers"] == 48 * (327_680 + 64)
    assert round(PANGU.active_params(input_embedding=False) / 1e9, 2) == 15.71


def test_pangu_pro_moe_bytes_and_balance():
    assert PANGU.kv_bytes_per_token() == 196_608
    assert PANGU.kv_bytes_per_token(1) == 98_304
    assert PANGU.weight_bytes("bf16") == 2 * 71_988_781_056
    assert PANGU.expert_bytes_per_layer("bf16") == 2 * 1_321_205_760
    assert PANGU.grouping == Grouping(num_experts=64, num_groups=8, top_k=8)
    assert PANGU.grouping.legal_devices() == (1, 2, 4, 8)
    assert PANGU.is_grouped


def test_a_tiny_model_counted_by_hand():
    spec = tiny()
    attention = 8 * (8 + 4 + 4) + 8 * 8
    assert spec.breakdown() == {
        "input embedding": 800,
        "attention": 2 * attention,
        "dense feed-forward": 3 * 8 * 5,
        "routed experts": 4 * 3 * 8 * 3,
        "routers": 4 * 8,
        "norms": 5 * 8,
        "output head": 800,
    }
    assert spec.active_params() == spec.params() - 2 * 72 - 8


def test_a_dense_model_is_all_active():
    dense = tiny(moe=None, moe_layers=())
    assert dense.active_params() == dense.params()
    assert dense.grouping is None
    assert not dense.is_grouped
    assert dense.expert_bytes_per_layer() == 0


def test_a_tied_head_is_counted_once_and_still_multiplied():
    tied = tiny(tie_embeddings=True)
    assert tied.params() == tiny().params() - 800
    assert tied.active_params(input_embedding=False) == tied.active_params()
    assert tiny().active_params(input_embedding=False) == tiny().active_params() - 800


def test_latent_attention_caches_its_latent_only():
    spec = model_spec(presets.config("deepseek-v3"))
    assert spec.kv_bytes_per_token() == 61 * (512 + 64) * 2


def test_windowed_layers_keep_their_window_only():
    spec = model_spec(presets.config("gpt-oss-20b"))
    layer_bytes = 2 * 8 * 64 * 2
    assert spec.kv_bytes_per_token() == 24 * layer_bytes
    assert spec.kv_bytes(100) == 100 * 24 * layer_bytes
    assert spec.kv_bytes(1000) == (12 * 1000 + 12 * 128) * layer_bytes


@pytest.mark.parametrize(
    ("dtype", "bits"), [("fp32", 32), ("bfloat16", 16), ("fp8", 8), ("int4", 4)]
)
def test_weight_bytes_by_dtype(dtype, bits):
    assert tiny().weight_bytes(dtype) == -(-tiny().params() * bits // 8)


def test_an_unknown_dtype_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown dtype 'bf32'") as caught:
        tiny().weight_bytes("bf32")
    assert "did you mean" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"moe_layers": ()}, "experts if and only if"),
        ({"moe_layers": (0, 2)}, "outside the 2 layers"),
        ({"dense_width": 0}, "no dense width"),
    ],
)
def test_shapes_that_cannot_be_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        tiny(**changes)


def test_heads_must_divide():
    with pytest.raises(ConfigError, match="6 query heads cannot share 4 key-value heads"):
        AttentionShape(num_heads=6, num_kv_heads=4, key_dim=4, value_dim=4)


@given(
    groups=st.integers(1, 4),
    group_size=st.integers(1, 4),
    width=st.integers(1, 7),
    layers=st.integers(1, 4),
    shared=st.integers(0, 5),
    tied=st.booleans(),
)
def test_counts_agree_with_each_other(groups, group_size, width, layers, shared, tied):
    grouping = Grouping(num_experts=groups * group_size, num_groups=groups, top_k=groups)
    moe = MoeShape(grouping=grouping, expert_width=width, shared_width=shared)
    spec = tiny(num_layers=layers, moe=moe, moe_layers=tuple(range(layers)), tie_embeddings=tied)
    assert sum(spec.breakdown().values()) == spec.params()
    idle = layers * groups * (group_size - 1) * 3 * 8 * width
    assert spec.active_params() == spec.params() - idle - spec.hidden_size
    one_layer = layers * spec.expert_bytes_per_layer("fp32") // 4
    assert one_layer == spec.breakdown()["routed experts"]
