"""Who is on stage: the dense model, its MoGE and the honest twin, and how large the demo is.

The twin has as many parameters, total and active, as the MoGE, and computes the dense function at
step 0 too: whole copies of the FFN, one picked a token with weight 1. It differs in one thing
only: its experts do not stand in groups.
"""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

from mogul.core.errors import ConfigError
from mogul.spec.base import Spec
from mogul.spec.grouping import Grouping

Name = Literal["MoGE", "twin", "dense"]
NAMES: tuple[Name, ...] = ("MoGE", "twin", "dense")

PROMPTS = (
    "What is the capital of France?",
    "Tell me about the Moon in one sentence.",
    "Why do we need sleep? Answer in one sentence.",
)


class DemoSettings(Spec):
    """How large the demo is; the defaults are the demo, tests use smaller ones."""

    num_experts: int = 32
    """Experts of the MoGE in every layer."""

    num_groups: int = 8
    """Groups of the MoGE; one pick in each."""

    prompts: tuple[str, ...] = PROMPTS
    """Questions both models answer in act 1."""

    new_tokens: int = Field(default=40, ge=1)
    """Longest answer in act 1, in tokens."""

    batch_sizes: tuple[int, ...] = (1, 8, 16, 64)
    """Sequences that decode together in act 2."""

    context_tokens: int = Field(default=48, ge=2)
    """Tokens of every sequence in act 2."""

    decode_steps: int = Field(default=16, ge=1)
    """Positions at the end of each sequence that count as decode steps in act 2."""

    seconds: float = Field(default=60.0, gt=0)
    """How long the MoGE trains in act 3; the others get the same batches."""

    max_steps: int | None = Field(default=None, ge=1)
    """End the MoGE's training after so many steps, if that is sooner."""

    window_tokens: int = Field(default=128, ge=2)
    """Tokens of a training window in act 3."""

    batch_windows: int = Field(default=2, ge=1)
    """Windows in a training batch in act 3."""

    held_out_windows: int = Field(default=16, ge=1)
    """Windows of the held-out text in act 3."""

    lr: float = Field(default=1e-4, gt=0)
    """Learning rate in act 3, for all three models."""

    warmup_steps: int = Field(default=4, ge=0)
    """Steps until that rate is reached."""

    balance_coef: float = Field(default=0.01, ge=0)
    """Weight of the balance loss of the routers in act 3."""

    seed: int = 0
    """Seed of routers and of the order of the text."""

    @model_validator(mode="after")
    def _can_be_run(self) -> Self:
        _ = self.grouping
        if self.decode_steps >= self.context_tokens:
            raise ConfigError(
                f"{self.decode_steps} decode steps need a longer context than "
                f"{self.context_tokens} tokens",
                fix="lower decode_steps or raise context_tokens",
            )
        odd = [size for size in self.batch_sizes if self.sequences % size]
        if odd:
            raise ConfigError(
                f"batch sizes {odd} do not divide the largest, {self.sequences}",
                fix="use divisors of the largest batch size",
            )
        return self

    @property
    def sequences(self) -> int:
        """Sequences act 2 reads: the largest batch."""
        return max(self.batch_sizes)

    @property
    def grouping(self) -> Grouping:
        """Grouping of the MoGE: one pick a group."""
        return Grouping(
            num_experts=self.num_experts, num_groups=self.num_groups, top_k=self.num_groups
        )

    @property
    def twin_grouping(self) -> Grouping:
        """The twin: as many copies of the whole FFN, one pick, no groups."""
        return Grouping(num_experts=self.grouping.group_size, num_groups=1, top_k=1)

    def grouping_of(self, name: Name) -> Grouping:
        """Grouping of the MoGE or of the twin."""
        return self.grouping if name == "MoGE" else self.twin_grouping


def load_dense(checkpoint: Path) -> Any:
    """The dense model in fp32, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def with_experts(dense: Any, name: Name, settings: DemoSettings) -> Any:
    """The MoGE or the twin of a dense model; the dense model is left as it is."""
    from mogul.models.upcycle import upcycle

    grouping = settings.grouping_of(name)
    model = upcycle(
        dense,
        num_experts=grouping.num_experts,
        num_groups=grouping.num_groups,
        seed=settings.seed,
    )
    model.set_experts_implementation("mogul")
    return model.eval()


def cast_member(checkpoint: Path, name: Name, settings: DemoSettings) -> Any:
    """One model alone, fresh from the checkpoint."""
    dense = load_dense(checkpoint)
    return dense if name == "dense" else with_experts(dense, name, settings)


def free_memory() -> None:
    """Give freed memory back to the system, so that one model at a time is what it costs."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)
