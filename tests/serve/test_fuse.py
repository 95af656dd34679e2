"""Joined linear layers and replaced picks compute what the model's own code computes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mogul.serve import SamplingParams
from mogul.serve.fuse import First, Next, fuse_linears


def fused_engine(tiny, family):
    from mogul.serve.engine import Engine
    from mogul.serve.options import EngineOptions

    options = EngineOptions(max_sequences=4, step_tokens=24, cache_tokens=400, page_size=4)
    engine = Engine(copy.deepcopy(tiny.model(family)), None, options)
    return engine, fuse_linears(engine.runner.model, engine.runner.device)


def test_joined_layers_say_the_same(tiny, any_family):
    engine, count = fused_engine(tiny, any_family)
    comes_joined = any_family.startswith(("deepseek", "phi3"))
    assert count > 0 or comes_joined
    prompts = tiny.prompts(5, 30)
    answers = engine.generate(prompts, SamplingParams(max_tokens=12, temperature=0))
    for prompt, answer in zip(prompts, answers, strict=True):
        tiny.assert_greedy(any_family, prompt, answer.token_ids, 12)


def test_parts_stay_views_of_one_weight(tiny):
    engine, count = fused_engine(tiny, "llama")
    assert count == 4, "two layers, attention and feed-forward each"
    attention = engine.runner.model.model.layers[0].self_attn
    assert isinstance(attention.q_proj, First)
    assert isinstance(attention.k_proj, Next)
    whole = attention.q_proj.joined[0].weight.untyped_storage().data_ptr()
    own = tiny.model("llama").state_dict()
    for name, parameter in engine.runner.model.named_parameters():
        assert torch.equal(parameter, own[name])
    assert attention.v_proj.weight.untyped_storage().data_ptr() == whole


class OtherOrder(nn.Module):
    """Calls what looks like the usual three with another input each."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return self.v_proj(self.k_proj(self.q_proj(x)))


def test_layers_with_other_inputs_are_left_alone(tiny):
    model = copy.deepcopy(tiny.model("llama"))
    model.set_attn_implementation("mogul_paged")
    odd = OtherOrder()
    model.model.layers[0].mlp.register_forward_hook(
        lambda _m, _a, out: out + odd(out[..., :4]).sum() * 0
    )
    model.odd = odd
    assert fuse_linears(model, torch.device("cpu")) == 4
    assert type(odd.q_proj) is nn.Linear


def test_few_picks_replace_topk_in_compiled_code():
    pytest.importorskip("triton")
    from torch.fx.experimental.proxy_tensor import make_fx

    from mogul.serve.passes import FewRows

    def route(x, wide):
        return (*x.softmax(-1).topk(3, -1), *wide.topk(2, 0), *wide.topk(64, -1))

    x, wide = torch.randn(5, 16), torch.randn(6, 100)
    graph = make_fx(route)(x, wide)
    want = graph(x, wide)
    FewRows()(graph.graph)
    graph.recompile()
    targets = [str(node.target) for node in graph.graph.nodes]
    assert targets.count("mogul.topk.default") == 1, "along rows, and few"
    assert all(torch.equal(a, b) for a, b in zip(graph(x, wide), want, strict=True))
