"""What is asked of a deployment: lengths, load, targets."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from mogul.core.errors import ConfigError
from mogul.spec.base import Spec


class Speculation(Spec):
    """Draft tokens verified in one step (multi-token prediction)."""

    draft_tokens: int = Field(default=1, ge=1, le=1024)
    acceptance: float = Field(default=0.7, ge=0, le=1)
    """Chance that a draft token is right, given that all before it were."""

    draft_cost: float = Field(default=0.03, ge=0)
    """Time of one draft pass over the time of one plain step."""

    @property
    def tokens_per_step(self) -> float:
        """Expected tokens a step emits: 1 + a + a^2 + ..."""
        return sum(self.acceptance**i for i in range(self.draft_tokens + 1))


class Workload(Spec):
    """Requests of one length, `batch` of them in flight over the whole deployment."""

    input_tokens: int = Field(default=2048, ge=1)
    output_tokens: int = Field(default=512, ge=1)
    batch: int = Field(default=64, ge=1)
    """Requests in flight over all data-parallel copies together."""

    arrival: Literal["steady", "together"] = "steady"
    """steady: a finished request is replaced at once, prompts fall between decode steps;
    together: all prompts are computed first, then all requests decode."""

    prefill_batch: int = Field(default=1, ge=1)
    """Requests whose prompts are computed in one step."""

    prefix_hit: float = Field(default=0.0, ge=0, lt=1)
    """Share of prompt tokens found in the prefix cache."""

    speculation: Speculation | None = None
    max_ttft_s: float | None = Field(default=None, gt=0)
    max_tpot_s: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _has_work(self) -> Self:
        if self.prefill_batch > self.batch:
            raise ConfigError(
                f"prefill_batch={self.prefill_batch} is more than the {self.batch} in flight",
                fix="lower prefill_batch or raise batch",
            )
        return self

    @property
    def mean_context(self) -> float:
        """Tokens a decoding request looks back on average."""
        return self.input_tokens + self.output_tokens / 2

    @property
    def new_prompt_tokens(self) -> int:
        """Prompt tokens of one request that must be computed."""
        return max(1, round(self.input_tokens * (1 - self.prefix_hit)))
