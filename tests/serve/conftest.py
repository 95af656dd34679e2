"""Tiny models of every kind of attention and experts, and what Transformers says of them."""

from __future__ import annotations

import copy
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # tests find the modules beside them

SIZES = {
    "vocab_size": 120,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MLA = {
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}


def _moe(experts: str = "num_experts", **more: object) -> dict[str, object]:
    return {experts: 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, **more}


SHAPES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {"intermediate_size": 48}),
    "qwen2": ("qwen2", {"intermediate_size": 48}),
    "qwen3": ("qwen3", {"intermediate_size": 48, "head_dim": 12}),
    "mistral": ("mistral", {"intermediate_size": 48, "head_dim": 8, "sliding_window": 9}),
    "phi3": ("phi3", {"intermediate_size": 48, "sliding_window": 9}),
    "olmo2": ("olmo2", {"intermediate_size": 48}),
    "smollm3": ("smollm3", {"intermediate_size": 48}),
    "qwen3_moe": ("qwen3_moe", _moe(intermediate_size=48, head_dim=8)),
    "qwen2_moe": ("qwen2_moe", _moe(intermediate_size=48, shared_expert_intermediate_size=24)),
    "olmoe": ("olmoe", {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 16}),
    "mixtral": (
        "mixtral",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 16,
            "sliding_window": 9,
        },
    ),
    "phimoe": (
        "phimoe",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 16,
            "sliding_window": 9,
        },
    ),
    "minimax_m2": (
        "minimax_m2",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 16,
            "head_dim": 8,
            "rotary_dim": 8,
        },
    ),
    "glm4_moe": (
        "glm4_moe",
        _moe(
            "n_routed_experts",
            n_shared_experts=1,
            first_k_dense_replace=1,
            head_dim=8,
            n_group=1,
            topk_group=1,
            intermediate_size=48,
        ),
    ),
    "dots1": (
        "dots1",
        _moe(
            "n_routed_experts",
            n_shared_experts=1,
            first_k_dense_replace=1,
            head_dim=8,
            n_group=1,
            topk_group=1,
            intermediate_size=48,
        ),
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 16,
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "deepseek_v2": (
        "deepseek_v2",
        _moe("n_routed_experts", intermediate_size=48, n_group=1, topk_group=1, **MLA),
    ),
    "deepseek_v3": (
        "deepseek_v3",
        _moe("n_routed_experts", intermediate_size=48, n_group=2, topk_group=1, **MLA),
    ),
    "moge": (
        "moge",
        _moe(router_n_groups=2, shared_expert_intermediate_size=24, router_score="softmax"),
    ),
    "pangu": (
        "PanguProMoE",
        {
            "num_experts": 8,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
        },
    ),
    "moge_window": ("moge", _moe(router_n_groups=2, sliding_window=7)),
}
MAIN = ("llama", "qwen3_moe", "olmoe", "moge")
"""The families that every property is tested on."""


@cache
def plain_model(name: str):
    """A random model of a family, as Transformers builds it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    import mogul.models  # noqa: F401

    kind, changes = SHAPES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | changes)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "sinks" in parameter_name:
                parameter.normal_()
    return model


def make_engine(name: str, tokenizer=None, speculator=None, **options: object):
    """An engine over a copy of the plain model."""
    from mogul.serve.engine import Engine
    from mogul.serve.options import EngineOptions

    small = {"max_sequences": 4, "step_tokens": 24, "cache_tokens": 400, "page_size": 4}
    model = copy.deepcopy(plain_model(name))
    settled = EngineOptions(**{**small, "seed": 0, **options})
    return Engine(model, tokenizer, settled, name=name, speculator=speculator)


@cache
def letters():
    """A tokenizer with a token for each byte, as many as the tiny models have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ"]
    vocab = {c: i for i, c in enumerate(characters)}
    fast = Tokenizer(models.BPE(vocab, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<end>")


def random_prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    vocab = SIZES["vocab_size"]
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]


@torch.inference_mode()
def expected(name: str, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of Transformers' own `generate`."""
    ids = torch.tensor([prompt])
    out = plain_model(name).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@torch.inference_mode()
def logprobs_of(name: str, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities [L, V] of a whole text in one plain forward."""
    return plain_model(name)(torch.tensor([tokens])).logits[0].log_softmax(-1)


def assert_greedy(name: str, prompt: list[int], said: tuple[int, ...], count: int) -> None:
    """Equal to Transformers, or different first where the two likeliest are within 1e-4."""
    wanted = expected(name, prompt, count)
    assert len(said) == count
    for i, (ours, theirs) in enumerate(zip(said, wanted, strict=True)):
        if ours != theirs:
            top = logprobs_of(name, [*prompt, *wanted[:i]])[-1].topk(2).values
            assert float(top[0] - top[1]) < 1e-4, f"{name}: token {i} is {ours}, not {theirs}"
            return


@pytest.fixture(params=MAIN)
def family(request) -> str:
    return request.param


@pytest.fixture(params=SHAPES)
def any_family(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """The functions of this file, for tests, which cannot import it."""
    return SimpleNamespace(
        engine=make_engine,
        model=plain_model,
        prompts=random_prompts,
        letters=letters,
        expected=expected,
        logprobs=logprobs_of,
        assert_greedy=assert_greedy,
        vocab=SIZES["vocab_size"],
    )
