"""How large an engine's cache and steps are, from its options, its model and its memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mogul.core.errors import BackendError, HardwareError
from mogul.core.log import log, say
from mogul.core.units import GIB, show_bytes
from mogul.serve.inputs import Layout
from mogul.serve.options import EngineOptions
from mogul.serve.runner import Runner

if TYPE_CHECKING:
    from mogul.serve.speculate import Speculator

CPU_CACHE_BYTES = 2 * GIB
CPU_STEP_TOKENS, STEP_TOKENS = 512, 8192
CPU_PAGE, PAGE = 64, 16
DEFAULT_LENGTH = 4096
"""Where neither options nor config know a length."""
PLANNED_BYTES = GIB // 2
"""Of FlashInfer: partial results, and 8 MB of plan for each of some 25 captured steps."""


@dataclass(frozen=True)
class Sizes:
    """What one engine holds."""

    max_length: int
    max_sequences: int
    step_tokens: int
    page_size: int
    num_pages: int

    @property
    def pages_a_table(self) -> int:
        """Pages of the longest request."""
        return -(-self.max_length // self.page_size)

    @property
    def largest_step(self) -> Layout:
        """The layout that every step fits in."""
        tokens = max(self.step_tokens, self.max_sequences)
        return Layout(tokens, self.max_sequences, tokens, self.pages_a_table, tokens)


def choose_sizes(
    runner: Runner, options: EngineOptions, speculator: Speculator | None = None
) -> Sizes:
    """Settle every size that the options leave open.

    Args:
        runner: whose model and device are known.
        options: what was asked for.
        speculator: may keep pages and work of its own beside the engine's.

    Raises:
        BackendError: texts so long change how others beside them are rotated.
        HardwareError: the weights leave no room for a cache.
    """
    on_cpu = runner.device.type == "cpu"
    if not on_cpu:
        torch.accelerator.empty_cache()  # what loading and quantising left behind is free again
    length = longest(runner.model.config.get_text_config(), options.max_length)
    # beside a device's whole share of prompts all others decode: else their tokens push the end of
    # the last prompt into a step of its own
    own_tokens = CPU_STEP_TOKENS if on_cpu else STEP_TOKENS + options.max_sequences
    step_tokens = options.step_tokens or own_tokens
    tokens = options.cache_tokens
    page = options.page_size or (CPU_PAGE if on_cpu else PAGE)
    token_bytes = runner.token_bytes
    if speculator is not None:
        token_bytes += speculator.token_bytes(runner)
    if tokens is None:
        room = CPU_CACHE_BYTES if on_cpu else _free_bytes(runner, options, step_tokens, speculator)
        whole = -(-length // page) * page  # a request takes whole pages
        tokens = min(int(room // token_bytes), options.max_sequences * whole)
    num_pages = -(-tokens // page) if options.cache_tokens else tokens // page
    if num_pages < 1:
        raise HardwareError(
            f"no room for a cache: one token takes {show_bytes(token_bytes)}",
            fix="use a larger memory_share, fewer bits, or another device",
        )
    return Sizes(min(length, num_pages * page), options.max_sequences, step_tokens, page, num_pages)


def longest(config: Any, asked: int | None) -> int:
    """Tokens of one request at most.

    Raises:
        BackendError: as `choose_sizes`.
    """
    context = getattr(config, "max_position_embeddings", None)
    length, steady = asked or context or DEFAULT_LENGTH, _steady_length(config)
    if steady is not None and length > steady:
        if asked is not None:
            raise BackendError(
                f"max_length {asked:,}: a text of more than {steady:,} tokens would rotate those "
                "that run beside it differently, too, as this model counts the longest of a step",
                fix=f"max_length={steady}, or Transformers' generate for longer texts",
            )
        say(f"requests of up to {steady:,} tokens: longer ones rotate what runs beside them")
        return steady
    if context is not None and length > context:
        log.warning(f"max_length {length:,} is more than the {context:,} the model was made for")
    return length


def _steady_length(config: Any) -> int | None:
    """Tokens up to which a rotation is the same for every text of a step; None for all."""
    rope = getattr(config, "rope_parameters", None) or {}
    each = [one for one in rope.values() if isinstance(one, dict)] or [rope]
    found = []
    for one in each:
        kind = one.get("rope_type") or ""
        if "dynamic" in kind:
            found.append(config.max_position_embeddings)
        elif kind == "longrope":
            found.append(one["original_max_position_embeddings"])
    return min(found, default=None)


def _free_bytes(
    runner: Runner, options: EngineOptions, step_tokens: int, speculator: Speculator | None
) -> float:
    """What an accelerator has left for the cache beside weights and the work of a step."""
    free, total = torch.accelerator.get_memory_info(runner.device)
    captured = max((n for n in options.captured_prompts if n <= step_tokens), default=0)
    work = (step_tokens + captured) * work_bytes_a_token(runner)
    work += PLANNED_BYTES if options.attention == "flashinfer" else 0
    if speculator is not None:
        work += speculator.work_bytes(runner, step_tokens, captured)
    return free - (1 - options.memory_share) * total - work


def work_bytes_a_token(runner: Runner) -> int:
    """Bytes of intermediate results of one token in the widest layer, roughly."""
    config = runner.model.config.get_text_config()
    hidden = config.hidden_size
    width = getattr(config, "moe_intermediate_size", None) or 0
    picks = getattr(config, "num_experts_per_tok", None) or 0
    dense = getattr(config, "intermediate_size", None) or 0
    widest = max(3 * dense, picks * (3 * width + hidden))
    attention = 4 * runner.shapes[0].num_heads * runner.shapes[0].width
    return 2 * runner.model.dtype.itemsize * (6 * hidden + attention + widest)
