"""What a trace says is what the routers did: against plain numpy, for every family."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mogul.core.errors import BackendError, MogulError
from mogul.models import MogeForCausalLM
from mogul.models.convert_config import moge_config
from mogul.observe.numbers import layer_numbers
from mogul.observe.recorder import record_routing
from mogul.observe.tracer import Batch, Tracer
from mogul.spec import presets
from mogul.spec.families import FAMILIES, family_of
from mogul.spec.picks import trace_of_picks
from mogul.spec.trace import load_trace, merge

SMALL = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "intermediate_size": 24, "moe_intermediate_size": 12,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
MLA = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "first_k_dense_replace": 1, "n_shared_experts": 1, "head_dim": 4,
}  # fmt: skip
TOP2 = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
MORE = {
    "deepseek_v2": {**MLA, "topk_method": "greedy"}, "deepseek_v3": {**MLA, **TOP2},
    "glm4_moe": {**TOP2, "head_dim": 8}, "dots1": {**TOP2, "head_dim": 8, "n_shared_experts": 1},
    "moge": {"router_n_groups": 2}, "PanguProMoE": {}, "gpt_oss": {"head_dim": 8},
    "minimax_m2": {"head_dim": 8, "intermediate_size": 12}, "mixtral": {"head_dim": 8},
    "qwen3_moe": {"head_dim": 8, "mlp_only_layers": [1]},
}  # fmt: skip
TRACEABLE = sorted(
    kind
    for family in FAMILIES.values()
    if family.is_moe
    for kind in family.model_types
    if kind in CONFIG_MAPPING and kind != "qwen3_vl_moe"  # its text decoder is the model here
)
IDS = torch.randint(0, 64, (4, 80), generator=torch.Generator().manual_seed(1))


def tiny(kind="qwen3_moe", **changes):
    known = AutoConfig.for_model(kind).to_dict()
    wanted = {**SMALL, **MORE.get(kind, {}), **changes}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{k: v for k, v in wanted.items() if k in known})
    auto = AutoModel if kind.endswith("_text") else AutoModelForCausalLM
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".gate.weight" in name or ".router.weight" in name:
                parameter.normal_(0, 0.5)
    return model


@pytest.fixture(scope="module")
def model():
    return tiny()


def converted(name):
    """A family that only mogul's own class runs."""
    config = dict(presets.config(name))
    config |= config.pop("text_config", {})
    small = SMALL | {
        "n_routed_experts": 16, "num_experts": 16, "num_experts_per_tok": 8, "head_dim": 8,
        "first_k_dense_replace": 1, "qk_nope_dim": 4, "qk_rope_dim": 4, "v_channels": 6,
        "param_sink_number": 3, "bos_token_id": 1, "eos_token_id": None, "n_shared_experts": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    values = {key: small.get(key, value) for key, value in config.items()}
    model = MogeForCausalLM(moge_config(values, exact=False)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model


CONVERTED = ["intern-s1-pro", "openpangu-r-72b"]


def test_no_family_is_left_out():
    by_type = {kind: family.name for family in FAMILIES.values() for kind in family.model_types}
    seen = {by_type[kind] for kind in TRACEABLE}
    seen |= {family_of(presets.config(name)).name for name in CONVERTED}
    assert seen == {family.name for family in FAMILIES.values() if family.is_moe}


@pytest.mark.parametrize("kind", [*TRACEABLE, *CONVERTED])
def test_every_family_is_counted_as_numpy_counts_it(kind):
    model = converted(kind) if kind in CONVERTED else tiny(kind)
    with record_routing(model) as recording, Tracer(model) as tracer, torch.no_grad():
        model(IDS)
        model(IDS[:1, :40])
    trace = tracer.trace()
    ids_TLK = recording.ids().transpose(1, 0, 2)
    halves = [
        trace_of_picks(part, trace.meta.model, layers=trace.meta.layers)
        for part in (ids_TLK[:320], ids_TLK[320:])
    ]
    want = merge(*halves)
    assert trace.meta.layers == recording.layers
    assert trace.meta.num_tokens == 360
    for name in ("count", "coactivation", "transition", "distinct_hist", "busiest_hist"):
        np.testing.assert_array_equal(trace.arrays[name], want.arrays[name], err_msg=name)
    assert np.isfinite(trace.arrays["entropy_sum"]).all()
    assert (trace.arrays["entropy_sum"] > 0).all()
    assert trace.arrays["score_sum"].sum(1) == pytest.approx(360)
    assert (trace.arrays["weight_sum"] > 0).any(1).all()


def test_scores_weights_and_entropy_against_the_router(model):
    with Tracer(model) as tracer, torch.no_grad():
        logits = model(IDS, output_router_logits=True).router_logits
    trace = tracer.trace()
    for position, logits_TE in enumerate(logits):
        share_TE = logits_TE.double().softmax(-1)
        top_TK, ids_TK = share_TE.topk(2)
        weight_TK = top_TK / (top_TK.sum(-1, keepdim=True) if model.config.norm_topk_prob else 1)
        want_E = torch.zeros(8, dtype=torch.float64).index_add_(
            0, ids_TK.flatten(), weight_TK.flatten()
        )
        np.testing.assert_allclose(trace.arrays["weight_sum"][position], want_E, rtol=1e-5)
        entropy = -(share_TE * share_TE.log()).sum()
        assert trace.arrays["entropy_sum"][position] == pytest.approx(float(entropy), rel=1e-5)
        np.testing.assert_allclose(trace.arrays["score_sum"][position], share_TE.sum(0), rtol=1e-5)


def test_long_forwards_keep_no_logits_and_count_the_same(model, monkeypatch):
    from mogul.observe import tracer as module

    traces = []
    for limit in (2**22, 0):
        monkeypatch.setattr(module, "_MAX_KEPT_LOGITS", limit)
        with Tracer(model) as tracer, torch.no_grad():
            tracer.next_batch = Batch(np.arange(0, 160, 2), np.zeros(80, dtype=np.int64))
            model(IDS[:2])
        traces.append(tracer.trace())
    for name, array in traces[0].arrays.items():
        np.testing.assert_allclose(traces[1].arrays[name], array, rtol=1e-12, err_msg=name)


def test_parts_merge_to_the_whole(model):
    parts = []
    with Tracer(model) as tracer, torch.no_grad():
        for row in IDS.split(2):
            model(row)
            parts.append(tracer.trace())
            tracer.reset()
        for row in IDS.split(2):
            model(row)
        whole = tracer.trace()
    both = merge(*parts)
    for name, array in whole.arrays.items():
        if name.startswith("sample"):
            continue
        if array.dtype.kind == "i":
            np.testing.assert_array_equal(both.arrays[name], array)
        else:
            np.testing.assert_allclose(both.arrays[name], array, rtol=1e-12)


def test_the_model_is_untouched(model, num_hooks):
    hooks = num_hooks(model)
    with torch.no_grad():
        before = model(IDS).logits
        with Tracer(model) as tracer:
            assert num_hooks(model) > hooks
            during = model(IDS).logits
        after = model(IDS).logits
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    assert tracer.counts.num_tokens == IDS.numel()
    assert num_hooks(model) == hooks


def test_only_real_tokens_and_their_tasks_count(model):
    real = np.array([0, 5, 1, 6])
    with record_routing(model) as recording, torch.no_grad():
        model(IDS[:2, :5])
    with Tracer(model, tasks=("a", "b")) as tracer, torch.no_grad():
        tracer.next_batch = Batch(real, np.array([0, 1, 0, 1]))
        model(IDS[:2, :5])
    trace = tracer.trace()
    ids = recording.ids()[0]
    assert trace.meta.num_tokens == 4
    for task, rows in enumerate(([0, 1], [5, 6])):
        want = np.bincount(ids[rows].ravel(), minlength=8)
        np.testing.assert_array_equal(trace.arrays["task_count"][task, 0], want)


def test_sample_is_of_all_tokens_and_bounded(model):
    with Tracer(model, sample_limit=50) as tracer, torch.no_grad():
        for _ in range(5):
            model(IDS)
    trace = tracer.trace()
    assert trace.arrays["sample_ids"].shape == (50, 2, 2)
    assert (np.diff(trace.arrays["sample_key"].astype(np.float64)) >= 0).all()


def test_recomputed_layers_are_counted_once():
    model = tiny()
    old = "gradient_checkpointing_enable"
    getattr(model, "activation_checkpointing_enable", getattr(model, old, None))()
    model.train()
    with Tracer(model) as tracer:
        model(IDS, labels=IDS).loss.backward()
    assert tracer.trace().count[0].sum() == IDS.numel() * 2


def test_activations_against_each_expert(model):
    experts = model.model.layers[0].mlp.experts
    seen = []
    handle = experts.register_forward_pre_hook(lambda _m, args: seen.append(args))
    with torch.no_grad():
        before = model(IDS).logits
        handle.remove()
        with Tracer(model, level="activations") as tracer:
            during = model(IDS).logits
    torch.testing.assert_close(during, before, rtol=1e-4, atol=1e-6)
    trace = tracer.trace()
    x_TD, ids_TK, weight_TK = seen[0]
    for expert in (0, 3):
        row, pick = torch.where(ids_TK == expert)
        gate, up = (x_TD[row] @ experts.gate_up_proj[expert].T).chunk(2, -1)
        y_RD = (torch.nn.functional.silu(gate) * up) @ experts.down_proj[expert].T
        norm_R, weight_R = y_RD.norm(dim=-1), weight_TK[row, pick]
        for name, want in (
            ("norm_sum", norm_R.sum()),
            ("norm_sqsum", norm_R.square().sum()),
            ("weighted_norm_sum", (norm_R * weight_R).sum()),
            ("max_activation", y_RD.abs().max()),
        ):
            assert trace.arrays[name][0, expert] == pytest.approx(float(want.detach()), rel=1e-4), (
                name
            )
        np.testing.assert_allclose(
            trace.arrays["output_sum"][0, expert], y_RD.sum(0).detach(), rtol=1e-3, atol=1e-4
        )
    np.testing.assert_allclose(trace.arrays["input_absmax"][0], x_TD.abs().amax(0), rtol=1e-6)
    assert "forward" not in vars(experts)


def test_null_picks_are_no_rows():
    model = tiny("moge", router_n_groups=2, num_null_experts=6)
    with record_routing(model) as recording, Tracer(model) as tracer, torch.no_grad():
        model(IDS)
    trace = tracer.trace()
    rows = (recording.ids() < 8).sum((1, 2))
    assert (rows < IDS.numel() * 2).all()
    np.testing.assert_array_equal(trace.count.sum(1), rows)
    np.testing.assert_allclose(layer_numbers(trace).null_share, 1 - rows / (IDS.numel() * 2))


def test_nan_scores_are_named():
    model = tiny()
    with torch.no_grad():
        model.model.layers[2].mlp.gate.weight[0, 0] = float("nan")
        with Tracer(model) as tracer:
            model(IDS)
    with pytest.raises(MogulError, match=r"layers \[2\] gave scores or weights that are not fin"):
        tracer.trace()


def test_dense_models_are_refused():
    from mogul.core.errors import ConfigError

    dense = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "llama", vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=24, num_key_value_heads=2,
        )
    )  # fmt: skip
    with pytest.raises((BackendError, ConfigError), match="no experts"), Tracer(dense):
        pass


def test_a_trace_of_a_model_is_saved_whole(model, tmp_path):
    with Tracer(model) as tracer, torch.no_grad():
        model(IDS)
    tracer.trace().save(tmp_path)
    back = load_trace(tmp_path)
    for name, array in tracer.trace().arrays.items():
        np.testing.assert_array_equal(back.arrays[name], array, err_msg=name)
