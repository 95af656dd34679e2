"""What a training recipe may say: one frozen record a section, every key explained here.

Decides names, defaults and legal combinations; files, `extends` and `--set` are read in
`recipe_file.py`, models are built in `build.py`.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from mogul.core.errors import ConfigError
from mogul.spec.base import Spec
from mogul.train.balance_rules import BalanceSection
from mogul.train.data.spec import DataSpec
from mogul.train.optimizer import OptimizerSpec
from mogul.train.schedule import ScheduleSpec


class UpcycleSection(Spec):
    """A dense checkpoint turned into grouped experts before the first step."""

    checkpoint: str
    """Folder of the dense model, or a hub id."""

    experts: int = Field(ge=1)
    groups: int = Field(ge=1)
    seed: int = Field(default=0, ge=0)
    noise: float = Field(default=0.0, ge=0, le=1)
    """Share of each expert's inner columns drawn anew."""


class ModelSection(Spec):
    """Which model is trained: exactly one of `config`, `preset`, `checkpoint` and `upcycle`."""

    config: dict[str, Any] | None = None
    """Keys of a `config.json`; `model_type` is "moge" where not given. Weights are random."""

    preset: str | None = None
    """A published shape (`mogul info` lists them), with random weights."""

    checkpoint: str | None = None
    """A folder in Transformers' layout, or a hub id: its weights are trained further."""

    upcycle: UpcycleSection | None = None
    """A dense checkpoint, made a mixture of grouped experts first."""

    overrides: dict[str, Any] = Field(default_factory=dict)
    """Config keys changed after `preset`, `checkpoint` or `upcycle`."""

    tokenizer: str | None = None
    """Folder of the tokenizer, copied beside the exported model."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        given = [k for k in ("config", "preset", "checkpoint", "upcycle") if getattr(self, k)]
        if len(given) != 1:
            raise ConfigError(
                f"[model] names {' and '.join(given) or 'nothing'} to train",
                fix="give exactly one of config, preset, checkpoint and upcycle",
            )
        return self


class RunSection(Spec):
    """How the steps are run."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps."""

    tokens: int | None = Field(default=None, ge=1)
    """The same as tokens: rounded up to whole steps."""

    batch_size: int = Field(default=8, ge=1)
    """Sequences in one micro-batch."""

    sequence_length: int = Field(default=512, ge=2)
    accumulation: int = Field(default=1, ge=1)
    """Micro-batches in a step."""

    gradient_dtype: Literal["float32", "parameter"] = "float32"
    """What micro-batches are summed in; `parameter` saves memory where weights are bf16."""

    precision: Literal["auto", "float32", "bfloat16", "autocast", "float64"] = "auto"
    """`bfloat16`: weights in bf16, the optimizer holds the other half of a float32; `autocast`:
    float32 weights, products in bf16. auto: bfloat16 on an accelerator, float32 on a CPU."""

    float8: Literal["none", "tensorwise", "rowwise"] = "none"
    """Products of attention and shared experts in float8, by the package torchao; scales of a
    whole tensor (fastest) or of its rows (closest)."""

    device: str = "auto"
    compile: bool | Literal["auto"] = "auto"
    """Compile each decoder layer; auto: on accelerators (where the update of large bf16 weights is
    compiled in any case)."""

    activation_checkpointing: bool | int = Field(default=False, ge=0)
    """Compute layers again in the backward pass; a number n: every n-th layer."""

    experts: str = "mogul"
    """Experts implementation: mogul, grouped_mm, eager..."""

    attention: str = "auto"
    """Attention implementation of Transformers; `cudnn`: sdpa, cuDNN's kernel first, which auto
    takes where there is one."""

    loss: Literal["auto", "chunked", "model"] = "auto"
    """`chunked` never holds all logits; `model` calls the model with labels."""

    seed: int = Field(default=0, ge=0, lt=1 << 63)
    deterministic: bool = False
    """Refuse operators whose result may differ between runs."""

    spike_factor: float = Field(default=0.0, ge=0)
    """Skip a step whose loss exceeds the running mean by so many standard deviations and take its
    batch again later; 0: never."""

    spike_retries: int = Field(default=1, ge=0)
    """How often a skipped batch comes back."""

    @model_validator(mode="after")
    def _has_an_end(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            raise ConfigError(
                "[run] needs its length: one of steps and tokens", fix="give run.steps"
            )
        return self

    @property
    def tokens_per_step(self) -> int:
        """Tokens in all micro-batches of a step."""
        return self.batch_size * self.sequence_length * self.accumulation

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return self.steps or -(-(self.tokens or 0) // self.tokens_per_step)


class CheckpointSection(Spec):
    """When the training is saved."""

    every_steps: int = Field(default=500, ge=1)
    keep: int = Field(default=2, ge=1)
    """Checkpoints kept, newest first."""

    asynchronous: bool = True
    """Write in a thread of its own, from a copy in memory."""


class LogSection(Spec):
    """What is written while it runs."""

    every_steps: int = Field(default=10, ge=1)
    eval_every_steps: int = Field(default=0, ge=0)
    """Held-out loss and a trace of the routing; 0: at the end only."""

    eval_batches: int = Field(default=16, ge=1)
    tensorboard: bool = False
    report: bool = True
    """Write report.html at the end."""


class Recipe(Spec):
    """Everything that decides a training."""

    model: ModelSection
    data: DataSpec
    run: RunSection
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    balance: BalanceSection = BalanceSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()

    @model_validator(mode="before")
    @classmethod
    def _mistakes_name_their_section(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        made = dict(values)
        for name, field in cls.model_fields.items():
            kind, given = field.annotation, values.get(name)
            if isinstance(given, dict) and isinstance(kind, type) and issubclass(kind, Spec):
                made[name] = kind.parse(given, where=f"[{name}]")
        return made
