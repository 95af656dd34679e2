"""Which requests an engine takes, and what ends their text: refusals by their words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mogul.core.errors import BackendError, ConfigError
from mogul.serve.params import SamplingParams

if TYPE_CHECKING:
    from mogul.serve.engine import Engine

Prompt = str | Sequence[int]

PROMPT_ROWS = 256
"""Prompt tokens a step of a request that wants their log-probabilities: [256, V] logits."""


def check_request(ids: tuple[int, ...], params: SamplingParams, engine: Engine) -> None:
    """Refuse what this engine cannot answer.

    Raises:
        ConfigError: no tokens, unknown ones, too many, or no tokenizer where one is needed.
        BackendError: routed experts of a model that has none.
    """
    if not ids:
        raise ConfigError("the prompt is empty", fix="give some text to continue")
    vocab_size, most = engine.runner.vocab_size, engine.sizes.max_length
    if max(ids) >= vocab_size or min(ids) < 0:
        raise ConfigError(
            f"the prompt holds token {max(ids, key=abs)}, the model knows 0..{vocab_size - 1}",
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
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int)):
        return [prompts]  # pyright: ignore[reportReturnType]
    return list(prompts)  # pyright: ignore[reportReturnType,reportArgumentType]


def end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The model's ends of text: its generation config's, else its tokenizer's."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    if ends is None and tokenizer is not None:
        ends = tokenizer.eos_token_id
    if ends is None:
        return frozenset()
    return frozenset(ends) if isinstance(ends, (list, tuple)) else frozenset((int(ends),))
