"""The shipped shapes give the counts their makers publish, and say where they come from."""

import pytest

from mogul.core.errors import ConfigError
from mogul.spec import presets
from mogul.spec.families import model_spec

REQUIRED = {
    "pangu-pro-moe-72b", "openpangu-r-72b", "intern-s1-pro", "qwen3-30b-a3b", "qwen3-235b-a22b",
    "olmoe-1b-7b", "mixtral-8x7b", "deepseek-v3", "gpt-oss-20b", "gpt-oss-120b", "smollm2-135m",
    "llama-3.1-8b", "qwen3-32b",
}  # fmt: skip


def test_the_promised_presets_are_there():
    assert set(presets.names()) >= REQUIRED


@pytest.mark.parametrize("name", presets.names())
def test_counts_match_the_published_ones(name):
    spec, published = model_spec(presets.config(name)), presets.published(name)
    assert len(presets.source(name)) > 30
    assert published, "a preset without a published number is not checked by anything"
    if "params" in published:
        assert spec.params() == published["params"]
    if "active" in published:
        assert spec.active_params() == published["active"]
    if "params_billion" in published:
        assert spec.params() / 1e9 == pytest.approx(published["params_billion"], rel=0.01)
    if "active_billion" in published:
        with_input = not published.get("active_is_without_input_embedding", False)
        active = spec.active_params(input_embedding=with_input) / 1e9
        # the makers print whole billions for the large ones
        rel = 0.07 if published["active_billion"] == int(published["active_billion"]) else 0.02
        assert active == pytest.approx(published["active_billion"], rel=rel)


def test_grouped_presets_are_balanced_where_they_should_be():
    for name, legal in [("intern-s1-pro", (1, 2, 4, 8)), ("openpangu-r-72b", (1,))]:
        assert model_spec(presets.config(name)).grouping.legal_devices() == legal


def test_a_preset_can_be_changed_without_changing_the_next_reader():
    presets.config("mixtral-8x7b")["hidden_size"] = 1
    presets.config("intern-s1-pro")["text_config"]["hidden_size"] = 1
    assert presets.config("mixtral-8x7b")["hidden_size"] == 4096
    assert presets.config("intern-s1-pro")["text_config"]["hidden_size"] == 4096


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="no preset 'qwen3-30b-a3'") as caught:
        presets.config("qwen3-30b-a3")
    assert "qwen3-30b-a3b" in caught.value.__notes__[0]
