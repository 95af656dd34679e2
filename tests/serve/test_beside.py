"""A shared fp8 expert in the call of the routed ones: what is joined, and that it says the same."""

from __future__ import annotations

import json

import pytest
import torch

from mogul.models.quantise import PackedExperts
from mogul.serve import beside
from mogul.serve.attention import NAME
from mogul.serve.fuse import fuse_linears
from mogul.serve.loading import random_model
from mogul.spec import presets

CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path, monkeypatch):
    """Two layers of Pangu Pro MoE, small, in fp8, as if on a device that joins them."""
    config = presets.config("pangu-pro-moe-72b") | {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 16,
        "vocab_size": 128,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    made = random_model(tmp_path, dtype="bfloat16", device="cpu", experts="mogul", quantise="fp8")
    made.eval().requires_grad_(False).set_attn_implementation(NAME)
    monkeypatch.setattr(beside, "takes_shared", lambda *_: True)
    return made


def join(model):
    fuse_linears(model, CPU)
    return beside.join_shared(model, CPU)


@torch.inference_mode()
def test_compiled_blocks_say_the_same(model):
    block = model.model.layers[0].mlp
    x = torch.randn(1, 7, 64, dtype=torch.bfloat16)
    want = block(x)
    assert join(model) == 2
    assert torch.equal(block(x), want), "code that is not compiled runs both as before"
    calls = []

    def run(graph, _inputs):
        calls.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    got = torch.compile(block, backend=run)(x)
    torch._dynamo.reset()
    assert (got.float() - want.float()).norm() < 2e-2 * want.float().norm()
    assert block.experts.kept == ()
    assert sum("linear_fp8" in call for call in calls) == 2, "the shared expert ran once"


@torch.inference_mode()
def test_a_forced_backend_runs_by_itself_and_what_a_failed_call_left_is_not_handed_out(model):
    block = model.model.layers[0].mlp
    x = torch.randn(1, 7, 64, dtype=torch.bfloat16)
    want = block(x)
    assert join(model) == 2
    block.experts.kept = (torch.full_like(x[0], float("nan")),)
    assert torch.equal(block(x), want)
    block.experts.backend = "reference"
    torch._dynamo.reset()
    with_shared = "mogul.models.quantise.moe_with_shared"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(with_shared, lambda *_: pytest.fail("joined in spite of the backend"))
        got = torch.compile(block, backend="eager")(x)
    torch._dynamo.reset()
    assert (got.float() - want.float()).norm() < 2e-2 * want.float().norm()


def test_weights_keep_their_names(model):
    names = {name: tensor.shape for name, tensor in model.named_buffers()}
    join(model)
    assert {name: tensor.shape for name, tensor in model.named_buffers()} == names


def test_joining_twice_changes_nothing(model):
    assert join(model) == 2
    assert beside.join_shared(model, CPU) == 0


def test_other_orders_are_left_alone(model):
    block = model.model.layers[1].mlp

    def first_shared(x):
        flat = x.reshape(-1, x.shape[-1])
        more = block.shared_expert(flat)
        _, weights, ids = block.gate(flat)
        return (block.experts(flat, ids, weights) + more).reshape(x.shape)

    block.forward = first_shared
    assert join(model) == 1
    assert not isinstance(block.shared_expert, beside.Kept)


def test_a_shared_expert_that_says_something_else_is_left_alone(model):
    shared = model.model.layers[1].mlp.shared_expert
    forward = shared.forward
    shared.forward = lambda x: 2 * forward(x)
    assert join(model) == 1
    assert model.model.layers[1].mlp.shared_expert is shared


def test_experts_that_a_device_cannot_join_are_left_alone(model, monkeypatch):
    monkeypatch.undo()
    assert join(model) == 0
    experts = [m for m in model.modules() if isinstance(m, PackedExperts)]
    assert len(experts) == 2
    assert all(not m.beside for m in experts)
