"""`experts_implementation="mogul"` on Transformers' own models: as eager, or refused aloud."""

from __future__ import annotations

import copy
import importlib
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import mogul.models
from mogul.core.errors import BackendError
from mogul.kernels import MOE_FORWARD
from mogul.models import MogeConfig, MogeForCausalLM, expert_layout, experts, experts_backend
from mogul.models.expert_layout import first_matmul
from mogul.models.experts import layout_of, mogul_experts_forward

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": 64,
    "pad_token_id": 0,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_routed_experts": 8,
}  # fmt: skip
STOCK = {
    "Qwen3Moe": {"num_experts": 8, "moe_intermediate_size": 24, "head_dim": 8},
    "Olmoe": {"num_experts": 8, "intermediate_size": 24},
    "Mixtral": {"num_local_experts": 4, "intermediate_size": 24},
    "DeepseekV3": {**LATENT, "moe_intermediate_size": 24, "intermediate_size": 48},
    "GptOss": {"num_local_experts": 4, "intermediate_size": 24, "head_dim": 8},
}
TOKENS = torch.tensor([[5, 9, 1, 33, 60, 2, 7], [8, 8, 40, 3, 3, 21, 12]])


def build(family: str):
    torch.manual_seed(0)
    config = getattr(transformers, family + "Config")(**SMALL | STOCK[family])
    model = getattr(transformers, family + "ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or "bias" in name:
                parameter.normal_(std=0.25)
    return model


def step(model, implementation):
    model.set_experts_implementation(implementation)
    model.zero_grad()
    out = model(TOKENS, labels=TOKENS)
    out.loss.backward()
    return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("family", STOCK)
def test_stock_family_equals_eager_with_gradients(family):
    model = build(family)
    logits, gradients = step(model, "eager")
    given, given_gradients = step(model, "mogul")
    assert model.config._experts_implementation == "mogul"
    torch.testing.assert_close(given, logits, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(given_gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("family", STOCK)
def test_our_function_is_really_called(family, monkeypatch):
    calls = count_calls(monkeypatch)
    model = build(family).eval()
    model.set_experts_implementation("mogul")
    model(TOKENS)
    assert len(calls) == sum(1 for m in model.modules() if type(m).__name__.endswith("Experts"))


def count_calls(monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return mogul_experts_forward(*args, **kwargs)

    monkeypatch.setitem(type(ALL_EXPERTS_FUNCTIONS)._global_mapping, "mogul", counted)
    return calls


@pytest.mark.parametrize("kind", ["Moge", "PanguProMoE"])
def test_our_classes_honour_the_choice(kind, monkeypatch):
    calls = count_calls(monkeypatch)
    config = getattr(mogul.models, kind + "Config")(
        **SMALL | {"num_experts": 8, "moe_intermediate_size": 8},
        shared_expert_intermediate_size=8,
        router_n_groups=2,
    )
    model = getattr(mogul.models, kind + "ForCausalLM")(config).eval()
    expected = model(TOKENS).logits
    assert not calls
    assert implementation_of(model) == "grouped_mm"
    model.set_experts_implementation("mogul")
    assert implementation_of(model) == "mogul"
    torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)
    assert len(calls) == 2


def implementation_of(model):
    if hasattr(model, "get_experts_implementation"):
        return model.get_experts_implementation()[""]
    return model.config._experts_implementation


def experts_and_inputs(sentinels: bool):
    torch.manual_seed(1)
    shape = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 8}
    module = MogeForCausalLM(MogeConfig(**SMALL | shape)).model.layers[0].mlp.experts
    module.config._experts_implementation = "mogul"
    nn.init.normal_(module.gate_up_proj)
    nn.init.normal_(module.down_proj)
    ids = torch.stack([torch.randperm(6)[:3] for _ in range(10)])
    if sentinels:
        ids[::2, 1] = 6
        ids[3] = 6
    return module, torch.randn(10, 32, requires_grad=True), ids, torch.rand(10, 3)


def test_sentinel_rows_add_nothing_and_get_no_gradient():
    module, x, ids, weights = experts_and_inputs(sentinels=True)
    weights.requires_grad_()
    out = module(x, ids, weights)
    (out * torch.randn_like(out)).sum().backward()
    none = ids == 6
    assert out[3].abs().max() == 0
    assert x.grad[3].abs().max() == 0
    assert weights.grad[none].abs().max() == 0
    assert weights.grad[~none].abs().min() > 0
    module.config._experts_implementation = "eager"
    torch.testing.assert_close(module(x, ids, weights), out, atol=1e-4, rtol=1e-5)
    module.config._experts_implementation = "grouped_mm"
    module._is_expert_parallel = True
    torch.testing.assert_close(module(x, ids, weights), out, atol=1e-4, rtol=1e-5)


def test_fewer_local_experts_than_the_config_says():
    """Expert parallelism leaves a module some experts; the local count is then the sentinel."""
    module, x, ids, weights = experts_and_inputs(sentinels=False)
    expected = module(x, torch.where(ids < 3, ids, 6), weights)
    part = copy.copy(module)
    part._parameters = {name: nn.Parameter(p[:3]) for name, p in module._parameters.items()}
    part.num_experts = 3
    torch.testing.assert_close(part(x, torch.where(ids < 3, ids, 3), weights), expected)


def test_a_forced_backend_reaches_the_kernels():
    module, x, ids, weights = experts_and_inputs(sentinels=False)
    expected = module(x, ids, weights)
    with experts_backend("reference"):
        torch.testing.assert_close(module(x, ids, weights), expected, atol=1e-4, rtol=1e-5)
    with pytest.raises(BackendError, match="no backend 'nonsense'"), experts_backend("nonsense"):
        module(x, ids, weights)
    assert experts._backend == "auto"


def test_forced_backends_of_two_threads_may_end_in_any_order():
    first, second = experts_backend("reference"), experts_backend("cpu")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert experts._backend == "cpu"
    second.__exit__(None, None, None)
    assert experts._backend == "auto"


def test_what_changes_after_a_call_counts():
    module, x, ids, weights = experts_and_inputs(sentinels=False)
    before = module(x, ids, weights)
    module.act_fn = nn.GELU("tanh")
    changed = module(x, ids, weights)
    assert not torch.allclose(changed, before, atol=1e-3)
    module.config._experts_implementation = "eager"
    torch.testing.assert_close(changed, module(x, ids, weights), atol=1e-4, rtol=1e-4)
    clamped = own_gate("gpt_oss")
    clamped.config._experts_implementation = "mogul"
    rows = torch.randn(6, 16)
    picks, shares = torch.randint(4, (6, 2)), torch.rand(6, 2)
    clamped(rows, picks, shares)
    clamped.limit, clamped.alpha = 0.2, 1.1
    changed = clamped(rows, picks, shares)
    clamped.config._experts_implementation = "eager"
    torch.testing.assert_close(changed, clamped(rows, picks, shares), atol=1e-5, rtol=1e-5)


@pytest.fixture
def nothing_known(monkeypatch):
    """Nobody has asked for a layout or a backend yet."""
    monkeypatch.setattr(MOE_FORWARD, "_resolved", {})
    monkeypatch.setattr(expert_layout, "_layouts", SimpleNamespace())
    expert_layout._keep_layout.cache_clear()
    torch._dynamo.reset()
    yield
    expert_layout._keep_layout.cache_clear()


@torch.no_grad()
def assert_compiles(module, hidden_size, num_experts):
    call = (torch.randn(6, hidden_size), torch.randint(num_experts, (6, 2)), torch.ones(6, 2))
    given = torch.compile(module, fullgraph=True, backend="aot_eager")(*call)
    torch.testing.assert_close(given, module(*call))


@pytest.mark.usefixtures("nothing_known")
@pytest.mark.parametrize("model", ["gpt_oss", "deepseek_v4"])
def test_gates_of_their_own_compile_before_any_other_call(model):
    module = own_gate(model)
    module.config._experts_implementation = "mogul"
    assert_compiles(module, 16, 4)


@pytest.mark.usefixtures("nothing_known")
def test_experts_compile_before_any_other_call_and_after_a_change():
    module, *_ = experts_and_inputs(sentinels=False)
    for activation in (F.gelu, nn.ReLU()):
        del module.act_fn
        module.act_fn = activation
        assert_compiles(module, 32, 6)


@pytest.mark.usefixtures("nothing_known")
def test_a_refusal_passes_the_compiler_as_it_is():
    module, x, ids, weights = experts_and_inputs(sentinels=False)
    module.act_fn = nn.Tanh()
    compiled = torch.compile(module, backend="aot_eager")
    with pytest.raises(BackendError, match="activation Tanh is not one of") as caught:
        compiled(x, ids, weights)
    assert "grouped_mm" in caught.value.__notes__[0]


def test_layers_alike_share_one_layout():
    model = build("Qwen3Moe")
    first, second = (layer.mlp.experts for layer in model.model.layers)
    assert layout_of(first) is layout_of(second) is layout_of(copy.deepcopy(first))


@pytest.mark.parametrize(
    ("activation", "name"),
    [(F.silu, "silu"), (F.gelu, "gelu"), (F.relu, "relu"), (nn.GELU(), "gelu"),
     (nn.GELU("tanh"), "gelu_tanh")],
)  # fmt: skip
def test_activations_of_pytorch_are_known(activation, name):
    module, *_ = experts_and_inputs(sentinels=False)
    del module.act_fn
    module.act_fn = activation
    assert layout_of(module).activation == name
    del module.act_fn
    module.act_fn = F.tanh
    with pytest.raises(BackendError, match="its activation tanh is not one of"):
        layout_of(module)


def test_foreign_modules_are_refused_by_name():
    module, *_ = experts_and_inputs(sentinels=False)

    def refusal(**changes):
        changed = copy.copy(module)
        changed.__dict__.update(changes)
        with pytest.raises(BackendError) as caught:
            layout_of(changed)
        assert "grouped_mm" in caught.value.__notes__[0]
        return str(caught.value)

    assert "its up_proj is no plain tensor" in refusal(has_gate=False)
    assert "norms the output" in refusal(has_post_expert_norm=True)
    assert "activation Tanh" in refusal(_modules={"act_fn": nn.Tanh()})
    fp8 = {n: nn.Parameter(p.data.to(torch.float8_e4m3fn)) for n, p in module._parameters.items()}
    assert "quantised to torch.float8_e4m3fn" in refusal(_parameters=fp8)
    changed = type("OtherExperts", (type(module),), {"_apply_gate": lambda self, x: x})
    other = copy.copy(module)
    other.__class__ = changed
    with pytest.raises(BackendError, match="OtherExperts: it has a gate function of its own"):
        layout_of(other)


def test_experts_without_gate_equal_eager():
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    config = NemotronHConfig(
        n_routed_experts=4, hidden_size=16, moe_intermediate_size=8, moe_latent_size=None
    )
    module = NemotronHExperts(config)
    nn.init.normal_(module.up_proj)
    nn.init.normal_(module.down_proj)
    x, ids, weights = torch.randn(6, 16), torch.randint(4, (6, 2)), torch.rand(6, 2)
    config._experts_implementation = "eager"
    expected = module(x, ids, weights)
    config._experts_implementation = "mogul"
    assert layout_of(module).activation == "relu2"
    torch.testing.assert_close(module(x, ids, weights), expected, atol=1e-4, rtol=1e-5)


OWN_GATES = {
    "beam": "BeamExperts",  # not in Transformers 5.17
    "deepseek_v4": "DeepseekV4Experts",
    "glm5_next": "Glm5NextTextExperts",
    "gpt_oss": "GptOssExperts",
    "hy_v4": "HYV4Experts",
    "minimax_m3_vl": "MiniMaxM3VLExperts",
    "openai_privacy_filter": "OpenAIPrivacyFilterExperts",
}


def own_gate(model):
    home = pytest.importorskip(
        f"transformers.models.{model}.modeling_{model}", exc_type=ImportError
    )
    sizes = {"hidden_size": 16, "intermediate_size": 8, "moe_intermediate_size": 8}
    limits = {"hidden_act": "silu", "swiglu_limit": 0.5, "swiglu_alpha": 1.3}
    experts = {"num_local_experts": 4, "num_experts": 4, "_experts_implementation": "eager"}
    torch.manual_seed(3)
    module = getattr(home, OWN_GATES[model])(SimpleNamespace(**sizes, **limits, **experts))
    if model == "gpt_oss":
        module.limit = 0.5  # a constant of the class
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


@pytest.mark.parametrize("model", OWN_GATES)
def test_gates_of_their_own_equal_eager_with_gradients(model):
    module, ids = own_gate(model), torch.randint(4, (6, 2))
    x, weights = torch.randn(6, 16, requires_grad=True), torch.rand(6, 2)
    leaves = [x, *module.parameters()]
    expected = module(x, ids, weights)
    gradients = torch.autograd.grad((expected**2).sum(), leaves)
    module.config._experts_implementation = "mogul"
    given = module(x, ids, weights)
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)
    for got, want in zip(torch.autograd.grad((given**2).sum(), leaves), gradients, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_a_clamped_gate_with_another_activation_is_refused():
    module = own_gate("deepseek_v4")
    module.act_fn = ACT2FN["gelu"]
    with pytest.raises(BackendError, match="its activation GELUActivation is not SiLU"):
        layout_of(module)


def test_fp8_experts_are_refused_by_name():
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

    class FP8Experts(nn.Module):
        pass

    with pytest.raises(BackendError, match="cannot run FP8Experts: its weights are quantised"):
        ALL_FP8_EXPERTS_FUNCTIONS["mogul"](FP8Experts(), None, None, None)


def test_registering_again_changes_nothing():
    before = set(ALL_EXPERTS_FUNCTIONS.keys())
    mogul.models.register()
    assert set(ALL_EXPERTS_FUNCTIONS.keys()) == before
    assert ALL_EXPERTS_FUNCTIONS["mogul"] is mogul_experts_forward


REFUSED = {"Inkling2Experts", "MuseSparkExperts"}
"""A gate of its own, and a norm behind every expert."""
ANYTHING = {
    **dict.fromkeys(("hidden_act", "hidden_activation"), "silu"), "mlp_hidden_act": "relu2",
    **dict.fromkeys(("moe_latent_size", "zero_expert_num", "text_config"), None),
    **dict.fromkeys(("swiglu_limit", "swiglu_alpha", "mlp_gate_softcap"), 1.5),
    "rms_norm_eps": 1e-6,
}  # fmt: skip


class AnyConfig(SimpleNamespace):
    """Answers what classes of experts read; every size is 8."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return 8


def classes_of_experts():
    decorated = re.compile(r"@use_experts_implementation(?:\(.*?\))?\nclass (\w+)", re.DOTALL)
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for name in decorated.findall(path.read_text()):
            yield f"transformers.models.{path.parent.name}.{path.stem}", name


def test_every_class_of_experts_but_two_has_a_layout():
    refused, known = set(), set()
    for home, name in classes_of_experts():
        kind = getattr(importlib.import_module(home), name)
        more = list(inspect.signature(kind.__init__.__wrapped__).parameters)[2:]
        module = kind(AnyConfig(**ANYTHING), **dict.fromkeys(more, 8))
        try:
            layout_of(module).sizes(
                getattr(module, first_matmul(module.has_gate)), module.down_proj
            )
            known.add(name)
        except BackendError:
            refused.add(name)
    assert len(known) >= 50
    assert not known & REFUSED
    assert refused <= REFUSED


def test_an_activation_that_is_a_function_runs():
    from transformers.models.lfm2_moe.modeling_lfm2_moe import Lfm2MoeExperts

    module = Lfm2MoeExperts(AnyConfig(_experts_implementation="eager", **ANYTHING))
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    call = (torch.randn(6, 8), torch.randint(8, (6, 2)), torch.rand(6, 2))
    expected = module(*call)
    module.config._experts_implementation = "mogul"
    torch.testing.assert_close(module(*call), expected, atol=1e-4, rtol=1e-5)
