"""Transformers' own MoE models on an NVIDIA GPU: experts_implementation="mogul" against eager.

One layer each, so that both sides route alike and only the experts differ.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import mogul.models
from mogul.models import experts_backend

pytestmark = pytest.mark.gpu

COMMON = {
    "vocab_size": 128, "hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": 512,
    "pad_token_id": 0,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16, "v_head_dim": 16, "n_group": 2, "topk_group": 1,
    "n_shared_experts": 1, "first_k_dense_replace": 0, "n_routed_experts": 8,
    "intermediate_size": 96,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"num_experts": 8, "moe_intermediate_size": 96, "head_dim": 32},
    "Olmoe": {"num_experts": 8, "intermediate_size": 96},
    "Mixtral": {"num_local_experts": 4, "intermediate_size": 96},
    "DeepseekV3": {**LATENT, "moe_intermediate_size": 96},
    "GptOss": {"num_local_experts": 4, "intermediate_size": 96, "head_dim": 32},
    "Moge": {
        **{"num_experts": 8, "moe_intermediate_size": 96, "router_n_groups": 2},
        "shared_expert_intermediate_size": 64,
    },
}
LIMIT = {torch.bfloat16: 1.2e-2, torch.float16: 2e-3}
"""Both sides round; each is within half of this of exact arithmetic."""


def build(family: str, dtype: torch.dtype, layers: int = 1) -> Any:
    torch.manual_seed(0)
    home = mogul.models if family == "Moge" else transformers
    settings = COMMON | FAMILIES[family] | {"num_hidden_layers": layers}
    config = getattr(home, family + "Config")(**settings)
    model = getattr(home, family + "ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
    return model.to("cuda", dtype)


def tokens(batch: int = 2, length: int = 150) -> Tensor:
    return torch.randint(1, 128, (batch, length), generator=torch.Generator().manual_seed(1)).cuda()


def step(model: nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = model(ids, labels=ids)
    (out.loss * 16).backward()
    return out.logits.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-12))


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_eager(family: str, dtype: torch.dtype) -> None:
    model, ids = build(family, dtype), tokens()
    model.set_experts_implementation("eager")
    logits, gradients = step(model, ids)
    model.set_experts_implementation("mogul")
    with experts_backend("triton"):
        given, given_gradients = step(model, ids)
    assert relative(given, logits) <= LIMIT[dtype]
    assert set(given_gradients) == set(gradients)
    for name, gradient in gradients.items():
        few = 2 if gradient.numel() < 64 else 1  # gpt-oss's sinks: four sums, small by cancellation
        assert relative(given_gradients[name], gradient) <= 2 * few * LIMIT[dtype], name


def test_auto_chooses_triton_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = build("Qwen3Moe", torch.bfloat16), tokens()
    model.set_experts_implementation("mogul")
    with torch.no_grad():
        free = model(ids).logits
        with experts_backend("triton"):
            assert torch.equal(model(ids).logits, free)
    assert "slow reference" not in caplog.text


def test_runs_are_equal_to_the_bit() -> None:
    model, ids = build("Olmoe", torch.bfloat16, layers=2), tokens()
    model.set_experts_implementation("mogul")
    first, first_gradients = step(model, ids)
    again, again_gradients = step(model, ids)
    assert torch.equal(first, again)
    experts = [name for name in first_gradients if "experts" in name]
    assert experts
    for name in experts:
        assert torch.equal(first_gradients[name], again_gradients[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_model_compiles_in_one_graph(family: str) -> None:
    """Traced but not fused, as fused operators round elsewhere: so equal to the bit.

    Attention is the eager one: tracing makes Transformers build a mask that SDPA else goes without,
    and SDPA has another kernel for it.
    """
    model, ids = build(family, torch.bfloat16), tokens()
    model.set_experts_implementation("mogul")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        traced = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(traced(ids, use_cache=False).logits, plain)


def test_a_whole_model_is_exported_for_any_length(exported: Any) -> None:
    """Attention is the eager one, as above."""
    model, ids = build("Qwen3Moe", torch.bfloat16, layers=2).eval(), tokens()
    model.set_experts_implementation("mogul")
    model.set_attn_implementation("eager")
    program = exported(model, ids[:, :40], 512)
    with torch.no_grad():
        assert program.graph_module.code.count("torch.ops.mogul.moe.default") == 2
        given = program.module()(ids, use_cache=False).logits
        assert relative(given, model(ids, use_cache=False).logits) <= LIMIT[torch.bfloat16]


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    model, ids = build("Qwen3Moe", torch.bfloat16, layers=2), tokens()
    model.set_experts_implementation("mogul")
    model.train()
    _, plain = step(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _, again = step(model, ids)
    for name, gradient in plain.items():
        if "experts" in name:
            assert torch.equal(again[name], gradient), name


def test_fully_sharded_by_one_rank(tmp_path: Any) -> None:
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    model, ids = build("Qwen3Moe", torch.bfloat16, layers=2), tokens()
    model.set_experts_implementation("mogul")
    _, plain = step(model, ids)
    sharded = copy.deepcopy(model)
    distributed.init_process_group(
        "nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        for layer in sharded.model.layers:
            fully_shard(layer)
        fully_shard(sharded)
        _, given = step(sharded, ids)
        for name, gradient in plain.items():
            if "experts" in name:
                assert relative(given[name].full_tensor(), gradient) <= 1e-6, name
    finally:
        distributed.destroy_process_group()


def sharded_rank(rank: int, folder: str) -> None:
    """One of two ranks: its own tokens, half of every parameter."""
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    torch.cuda.set_device(rank)
    distributed.init_process_group(
        "nccl", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    try:
        model = build("Qwen3Moe", torch.bfloat16, layers=2)
        model.set_experts_implementation("mogul")
        sharded, both = copy.deepcopy(model), tokens(4).chunk(2)
        alone = [step(model, ids) for ids in both]
        for layer in sharded.model.layers:
            fully_shard(layer)
        fully_shard(sharded)
        logits, given = step(sharded, both[rank])
        assert torch.equal(logits, alone[rank][0])
        for name in given:
            expected = (alone[0][1][name].float() + alone[1][1][name].float()) / 2
            assert relative(given[name].full_tensor(), expected) <= 5e-3, name  # sums in bf16
        with torch.no_grad():
            for ids in (both[rank], both[rank][:1, :1]):  # from the second on by known launches
                plain = model(ids, use_cache=False).logits
                for _ in range(3):
                    assert torch.equal(sharded(ids, use_cache=False).logits, plain)
    finally:
        distributed.destroy_process_group()


@pytest.mark.skipif(
    torch.accelerator.current_accelerator() is None or torch.accelerator.device_count() < 2,
    reason="needs two GPUs",
)
def test_two_ranks_with_halves_equal_one_with_all(tmp_path: Any) -> None:
    torch.multiprocessing.spawn(sharded_rank, (str(tmp_path),), nprocs=2)
