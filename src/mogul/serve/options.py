"""What an engine can be told, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal

from mogul.core.errors import ConfigError

PROMPT_TOKENS = (64, 256, 512, 1024, 1536, 2048)
"""Steps with prompts that are captured: of more tokens the host is done before the device."""


@dataclass(frozen=True)
class EngineOptions:
    """Sizes and switches of one engine; None leaves a choice to the engine."""

    max_length: int | None = None
    """Tokens of one request at most; None is what the model was made for, if the cache has it."""

    max_sequences: int = 64
    """Requests that run at once."""

    step_tokens: int | None = None
    """Tokens computed in one step; None is 512 on a processor, on an accelerator 8,192 and one for
    each of `max_sequences`."""

    page_size: int | None = None
    """Tokens of one page of the cache; None is 64 on a processor and 16 on an accelerator."""

    cache_tokens: int | None = None
    """Tokens the cache holds; None fills `memory_share` of an accelerator, or 2 GiB."""

    memory_share: float = 0.9
    """Share of an accelerator's memory for weights, cache and work together."""

    reuse_prefix: bool = True
    """Share pages between requests that begin alike."""

    kv_dtype: Literal["auto", "fp8"] = "auto"
    """Number format of the cache; auto is the model's own."""

    attention: Literal["auto", "flashinfer"] = "auto"
    """Kernels of attention over pages; auto are mogul's own."""

    graphs: bool = True
    """Capture steps as graphs, on accelerators."""

    graph_sizes: tuple[int, ...] = ()
    """Batch sizes to capture; empty is a ladder up to `max_sequences`."""

    prompt_sizes: tuple[int, ...] | None = None
    """Tokens of the steps with prompts that are captured as graphs, too: a step takes the smallest
    that holds it. None is a ladder up to 2,048; empty captures none."""

    compile: bool = True
    """Compile the decoder layer, on accelerators."""

    fuse: bool = True
    """Join linear layers that read one input, on accelerators."""

    tune: bool = False
    """Search tile sizes for the step of a single token while compiling: a slower start."""

    record_experts: bool = False
    """Keep the picks of every step in `Engine.last_picks`."""

    count_experts: bool = False
    """Count the tokens of every expert on the device, for `Engine.expert_counts`."""

    seed: int | None = None
    """Seed of the seeds of requests that name none; None draws one."""

    @property
    def captured_prompts(self) -> tuple[int, ...]:
        """Tokens of the steps with prompts that shall be captured."""
        if not self.graphs:
            return ()
        return PROMPT_TOKENS if self.prompt_sizes is None else self.prompt_sizes

    def __post_init__(self) -> None:
        """Refuse sizes that hold nothing."""
        if self.max_sequences is None:
            raise ConfigError("max_sequences None is no number", fix="give a whole number")
        sizes = ("max_length", "max_sequences", "step_tokens", "page_size", "cache_tokens")
        for name in (*sizes, "seed"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Integral):
                raise ConfigError(f"{name} {value!r} is no number", fix="give a whole number")
            if value is not None and value < 1 and name in sizes:
                raise ConfigError(f"{name} {value} holds nothing", fix="give 1 or more")
        for name in ("graph_sizes", "prompt_sizes"):
            sizes = getattr(self, name)
            if isinstance(sizes, str) or not isinstance(sizes, Sequence | None):
                raise ConfigError(f"{name} {sizes!r} is no list", fix="give a list of sizes")
            for value in sizes or ():
                if not isinstance(value, Integral) or value < 1:
                    raise ConfigError(
                        f"{name} {value!r} is no size of a step", fix="give whole numbers from 1"
                    )
        if self.attention not in ("auto", "flashinfer"):
            raise ConfigError(
                f"attention {self.attention!r} is unknown", fix='use "auto" or "flashinfer"'
            )
        if not isinstance(self.memory_share, Real) or not 0 < self.memory_share <= 1:
            raise ConfigError(f"memory_share {self.memory_share!r} is no share", fix="use (0, 1]")
