"""Which requests an engine takes, and what ends their text: refusals by their words."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from operator import index
from typing import TYPE_CHECKING, Any

from mogul.core.errors import BackendError, ConfigError
from mogul.serve.params import SamplingParams

if TYPE_CHECKING:
    from mogul.serve.engine import Engine

Prompt = str | Sequence[int]

PROMPT_ROWS = 256
"""Prompt tokens a step of a request that wants their log-probabilities: [256, V] logits."""


def check_request(
    ids: tuple[int, ...], params: SamplingParams, priority: int, engine: Engine
) -> None:
    """Refuse what this engine cannot answer.

    Raises:
        ConfigError: no tokens, unknown ones, too many, or no tokenizer where one is needed.
        BackendError: routed experts of a model that has none.
    """
    if not isinstance(params, SamplingParams):
        raise ConfigError(f"{params!r} are no SamplingParams", fix="SamplingParams(max_tokens=64)")
    if not isinstance(priority, Integral):
        raise ConfigError(f"priority {priority!r} is no whole number", fix="lower goes first")
    if not ids:
        raise ConfigError("the prompt is empty", fix="give some text to continue")
    vocab_size, most = engine.runner.vocab_size, engine.sizes.max_length
    if max(ids) >= vocab_size or min(ids) < 0:
        unknown = next(token for token in ids if not 0 <= token < vocab_size)
        raise ConfigError(
            f"the prompt holds token {unknown}, the model knows 0..{vocab_size - 1}",
            fix="use the model's own tokenizer",
        )
    for field in ("logit_bias", "stop_token_ids"):
        if (largest := max(getattr(params, field), default=0)) >= vocab_size:
            raise ConfigError(
                f"{field} names token {largest}, the model knows 0..{vocab_size - 1}",
                fix="use the model's own tokenizer",
            )
    if len(ids) + params.max_tokens > most:
        raise ConfigError(
            f"{len(ids)} prompt tokens and {params.max_tokens} new ones exceed the length of "
            f"{most}",
            fix="shorten the prompt, ask for fewer tokens, or open the engine with a larger "
            "max_length or cache_tokens",
        )
    if params.routed_experts and not engine.runner.tap.num_layers:
        raise BackendError(
            "routed_experts is asked of a model without experts", fix="leave routed_experts out"
        )
    if params.stop and engine.tokenizer is None:
        raise ConfigError("stop strings need a tokenizer", fix="use stop_token_ids")


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Prompts as a list, where one alone may be given."""
    is_one = isinstance(prompts, str) or (len(prompts) > 0 and _is_token(prompts[0]))
    return [prompts] if is_one else list(prompts)  # pyright: ignore[reportReturnType]


def _is_token(value: Any) -> bool:
    """Whether this is one token id, as a number or as an array's or a tensor's element."""
    return isinstance(value, Integral) or getattr(value, "ndim", None) == 0


def as_ids(prompt: Prompt, tokenizer: Any) -> tuple[int, ...]:
    """Token ids of a prompt, as they stand or through the tokenizer.

    Raises:
        ConfigError: it is neither text nor token ids, or text without a tokenizer.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ConfigError("this engine has no tokenizer", fix="give token ids as prompt")
        return tuple(tokenizer(prompt)["input_ids"])
    try:
        return tuple(map(index, prompt))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"a prompt is neither text nor token ids: {error}", fix="give a text or whole numbers"
        ) from error


def end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The model's ends of text: its generation config's, else its tokenizer's."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    if ends is None and tokenizer is not None:
        ends = tokenizer.eos_token_id
    if ends is None:
        return frozenset()
    return frozenset(ends) if isinstance(ends, (list, tuple)) else frozenset((int(ends),))
