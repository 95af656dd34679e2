"""What the recorder says is what the routers did; hooks never stay behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mogul.core.errors import BackendError, MogulError
from mogul.observe.recorder import record_routing


def _qwen3_moe():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, intermediate_size=24, moe_intermediate_size=8,
            num_experts=8, num_experts_per_tok=2, mlp_only_layers=[1],
        )
    ).eval()  # fmt: skip


def _deepseek_v3():
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
            qk_nope_head_dim=4, v_head_dim=4, intermediate_size=24, moe_intermediate_size=8,
            n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1,
            first_k_dense_replace=1, n_shared_experts=1,
        )
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return _qwen3_moe()


IDS = torch.arange(22).reshape(2, 11)


def test_ids_equal_those_of_the_router_logits(model):
    with record_routing(model) as recording, torch.no_grad():
        output = model(IDS, output_router_logits=True)
        model(IDS[:, :3])
    assert recording.layers == (0, 2)
    for layer, logits_TE in zip(recording.layers, output.router_logits, strict=True):
        first, second = recording.forwards(layer)
        want = logits_TE.softmax(-1).topk(2, dim=-1).indices.numpy()
        np.testing.assert_array_equal(np.sort(first), np.sort(want))
        assert second.shape == (6, 2)
    assert recording.ids().shape == (2, 28, 2)
    recording.clear()
    assert recording.forwards(0) == []


def test_a_router_without_ids_is_read_at_its_experts():
    torch.manual_seed(0)
    model = _deepseek_v3()
    seen = []
    experts = model.model.layers[1].mlp.experts
    experts.register_forward_pre_hook(lambda _m, args: seen.append(args[1].clone()))
    with record_routing(model) as recording, torch.no_grad():
        model(IDS)
    assert recording.layers == (1,)
    np.testing.assert_array_equal(recording.forwards(1)[0], seen[0].numpy())


def test_hooks_go_at_the_end_and_after_an_exception(model, num_hooks):
    before = num_hooks(model)
    with record_routing(model):
        assert num_hooks(model) > before
    with pytest.raises(ZeroDivisionError), record_routing(model):
        _ = 1 / 0
    assert num_hooks(model) == before


def test_recordings_nest(model):
    with record_routing(model) as outer, torch.no_grad():
        model(IDS)
        with record_routing(model) as inner:
            model(IDS)
        model(IDS)
    assert (len(outer.forwards(0)), len(inner.forwards(0))) == (3, 1)
    np.testing.assert_array_equal(outer.forwards(0)[1], inner.forwards(0)[0])


def test_an_empty_recording_says_so(model):
    with record_routing(model) as recording:
        pass
    with pytest.raises(MogulError, match="nothing was recorded"):
        recording.ids()


def test_a_dense_model_is_refused():
    with pytest.raises(BackendError, match="Linear has no experts to record"):
        record_routing(nn.Linear(2, 2)).__enter__()
