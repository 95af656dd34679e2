"""What one training step is: batch, switches, and the FLOP it counts.

Model FLOP are 6 a parameter a token that uses it, plus attention; recomputation is not counted.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mogul.core.errors import ConfigError
from mogul.simulate.engines import Overlap
from mogul.spec.base import Spec
from mogul.spec.model import ModelSpec
from mogul.spec.parallel import Parallel

Recompute = Literal["auto", "none", "selective", "experts", "full"]


class TrainPlan(Spec):
    """One training step's batch and switches."""

    sequence_tokens: int = Field(default=4096, ge=1)
    global_batch: int = Field(default=2048, ge=1)
    """Sequences a step, over all devices."""

    micro_batch: int = Field(default=1, ge=1)
    """Sequences a data-parallel copy computes at once."""

    devices: int = Field(default=8, ge=1)
    virtual_stages: int = Field(default=1, ge=1)
    schedule: Literal["1f1b", "dualpipe"] = "1f1b"
    """How stages take turns; dualpipe (arXiv 2412.19437) fills the pipe from both ends."""

    context_parallel: int = Field(default=1, ge=1)
    """Devices one sequence is cut over; they count among the copies of the attention."""

    mtp_layers: int = Field(default=0, ge=0)
    """Layers that predict further tokens; each also costs a projection and the head again."""

    recompute: Recompute = "auto"
    """What the backward computes again: nothing; norms, activations and latent projections; the
    experts' part with its exchanges; all of a layer. auto: the least of these that fits."""

    graphs: Literal["none", "partial", "full"] = "none"
    """What is replayed from captured graphs: nothing; attention and router; everything."""

    sends_once: bool = True
    """A token goes once to every rank that needs it (DeepEP), not once a pick (plain NCCL)."""

    scale: float = Field(default=1.0, gt=0)
    """Measured over predicted time of a framework's arithmetic: the constant one may fit."""

    shards_weights: bool = False
    """Weights are gathered layer by layer (FSDP) instead of held by every copy."""

    is_balanced: bool = False
    """Rows are forced to be even, whatever the router says (a benchmark's switch)."""

    overlap: Overlap = Overlap()
    """How tokens' way to experts and back hides behind another micro-batch's arithmetic."""

    def copies(self, parallel: Parallel) -> int:
        """Copies of the attention over all devices, ranks of one sequence counted each.

        Raises:
            ConfigError: devices or batch do not divide.
        """
        if self.devices % parallel.devices:
            raise ConfigError(
                f"{self.devices} devices cannot hold whole copies of {parallel.describe()} "
                f"({parallel.devices} devices)",
                fix=f"use a multiple of {parallel.devices} devices",
            )
        copies = self.devices // (parallel.tp * parallel.pp)
        if copies % self.context_parallel or self.sequence_tokens % self.context_parallel:
            raise ConfigError(
                f"context_parallel={self.context_parallel} does not divide {copies} copies and "
                f"{self.sequence_tokens} tokens",
                fix="use a divisor of both",
            )
        sequences = copies // self.context_parallel * self.micro_batch
        if self.global_batch % sequences:
            raise ConfigError(
                f"a batch of {self.global_batch} sequences does not divide into {copies} copies x "
                f"{self.micro_batch} sequences",
                fix=f"use a multiple of {sequences}",
            )
        return copies

    def micro_batches(self, parallel: Parallel) -> int:
        """Micro-batches every copy computes in a step."""
        copies = self.copies(parallel) // self.context_parallel
        return self.global_batch // (copies * self.micro_batch)

    def bubble(self, parallel: Parallel) -> float:
        """Idle time of a stage over its busy time.

        1F1B: (p - 1) / (m v) of a micro-batch. DualPipe: (p / 2 - 1) (F&B + B - 3 W), with a
        forward 1, a backward 2 and its half for weights W 1.
        """
        if self.schedule == "dualpipe":
            return max(0.0, parallel.pp / 2 - 1) * (3 + 2 - 3) / 3 / self.micro_batches(parallel)
        return (parallel.pp - 1) / (self.micro_batches(parallel) * self.virtual_stages)

    @property
    def rank_tokens(self) -> int:
        """Tokens of a micro-batch one copy's rank holds."""
        return self.micro_batch * self.sequence_tokens // self.context_parallel


def stage_layers(num_layers: int, parallel: Parallel, virtual_stages: int) -> tuple[int, int]:
    """Layers of the fullest stage, and of the last one, where missing layers make room."""
    chunks = parallel.pp * virtual_stages
    most = -(-num_layers // chunks) * virtual_stages
    return most, max(0, most - (most * parallel.pp - num_layers))


def flop_per_token(model: ModelSpec, sequence_tokens: int, mtp_layers: int = 0) -> float:
    """Forward and backward: 6 a parameter, and causal attention."""
    shape = model.attention
    widths = shape.num_heads * (shape.key_dim + shape.value_dim)
    attention = 3 * 2 * widths * sequence_tokens / 2
    head = model.vocab_size * model.hidden_size
    whole = model.active_params(input_embedding=False)
    further = (whole - head) / model.num_layers + head + 2 * model.hidden_size**2
    attention *= model.num_layers + mtp_layers
    return 6.0 * (whole + mtp_layers * further) + attention
