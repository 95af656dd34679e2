"""The shape study: which depth, width, heads, experts and groups serve fastest within a budget.

After arXiv 2505.21411, section 3: candidates within ranges and parameter budgets are drawn, each
is priced on several machines at once under a TPOT target each, and the score is the geometric
mean of its decode rates over the reference's. Quality by the scaling laws stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from pydantic import model_validator

from mogul.core.errors import ConfigError
from mogul.simulate.engines import Engine, engine
from mogul.simulate.laws import Quality, quality
from mogul.simulate.memory import most_sequences
from mogul.simulate.operators import Step
from mogul.simulate.run import Setting
from mogul.spec import presets
from mogul.spec.base import Spec
from mogul.spec.families import model_spec
from mogul.spec.hardware import hardware
from mogul.spec.model import ModelSpec
from mogul.spec.parallel import Parallel, h2p
from mogul.spec.quant import scheme
from mogul.spec.workload import Workload

WIDTH_STEP = 64
"""Expert widths are multiples of this."""


class Target(Spec):
    """One machine the shape must serve on."""

    device: str
    devices: int = 4
    max_tpot_s: float
    is_hybrid: bool = False
    """Whether attention is halved into copies (`spec.parallel.h2p`); otherwise all is cut."""

    quant: str = "w8a8-kv8"
    engine: str = "ascend"
    context: int = 2048

    @property
    def layout(self) -> Parallel:
        """How a model lies on the devices."""
        return h2p(self.devices) if self.is_hybrid else Parallel(tp=self.devices)


class Ranges(Spec):
    """What may vary; the defaults are the paper's."""

    hidden: tuple[int, int] = (4096, 8192)
    heads: tuple[int, ...] = (32, 40, 48, 56, 64)
    kv_heads: tuple[int, ...] = (8, 16)
    layers: tuple[int, int] = (40, 64)
    experts: tuple[int, ...] = (32, 48, 64)
    picks: tuple[int, ...] = (2, 4, 8)
    """Picks a token."""

    picks_per_group: tuple[int, ...] = (1,)
    """Picks in each group; 1 is the paper's (as many groups as picks), 0 means one group."""

    shared: tuple[int, ...] = (1, 2, 4)
    """Width of the shared expert in expert widths."""

    total_params: tuple[float, float] = (60e9, 80e9)
    active_params: tuple[float, float] = (15e9, 18e9)
    """Not printed in the paper; around the published 16.5 B."""

    vocab: int = 153376

    @model_validator(mode="after")
    def _budgets_rise(self) -> Self:
        for least, most in (self.total_params, self.active_params):
            if not 0 <= least <= most:
                raise ConfigError(
                    f"no shape has between {least:g} and {most:g} parameters",
                    fix="give the least first, then the most",
                )
        return self


PAPER_TARGETS = (
    Target(device="ascend-300i-duo-chip", devices=8, max_tpot_s=0.1, is_hybrid=True),
    Target(device="ascend-910b", max_tpot_s=0.05),
)


@dataclass(frozen=True)
class Candidate:
    """One shape and what it reaches."""

    shape: dict[str, Any]
    model: ModelSpec
    rates: tuple[float, ...]
    """Decode tokens a second and device, by target; 0 where the target cannot be met."""

    score: float
    """Geometric mean of the rates over the reference's."""

    quality: Quality


@dataclass(frozen=True)
class Study:
    """All candidates, best first, and where the reference stands."""

    candidates: tuple[Candidate, ...]
    reference: Candidate
    better: int
    """Candidates with a higher score than the reference."""

    @property
    def percentile(self) -> float:
        """Share of the candidates that beat the reference (0.1: top decile)."""
        return self.better / len(self.candidates)

    @property
    def percentile_at_quality(self) -> float:
        """The same among candidates with at least the reference's equivalent compute and size."""
        floor, size = self.reference.quality.equivalent_flop, self.reference.model.params()
        peers = [
            one
            for one in self.candidates
            if one.quality.equivalent_flop >= floor and one.model.params() >= 0.97 * size
        ]
        return sum(one.score > 1.0 for one in peers) / len(peers) if peers else math.nan


def study(
    ranges: Ranges,
    targets: Sequence[Target] = PAPER_TARGETS,
    *,
    num_candidates: int = 300,
    seed: int = 0,
    tokens: float = 13e12,
    reference: ModelSpec | None = None,
) -> Study:
    """Draw candidates and price them.

    Raises:
        ConfigError: the budgets leave no candidate.
    """
    if not 0 < tokens < math.inf or num_candidates < 1:
        raise ConfigError(
            f"{num_candidates} shapes trained on {tokens:g} tokens cannot be ranked",
            fix="give one shape and one token at least",
        )
    known = reference or model_spec(presets.config("pangu-pro-moe-72b"))
    yardstick = tuple(rate(known, target) for target in targets)
    if not all(yardstick):
        raise ConfigError("the reference meets no target", fix="allow more time a token")
    first = Candidate(_shape_of(known), known, yardstick, 1.0, quality(known, tokens))
    rng = np.random.default_rng(seed)
    found: list[Candidate] = []
    tries = 0
    while len(found) < num_candidates and tries < 60 * num_candidates:
        tries += 1
        shape = _draw(ranges, rng)
        if shape is None:
            continue
        model = build(shape, ranges.vocab)
        rates = tuple(rate(model, target) for target in targets)
        score = _score(rates, yardstick)
        found.append(Candidate(shape, model, rates, score, quality(model, tokens)))
    if not found:
        raise ConfigError("no shape fits the budgets", fix="widen the ranges or the budgets")
    found.sort(key=lambda one: -one.score)
    better = sum(one.score > 1.0 for one in found)
    return Study(tuple(found), first, better)


def _score(rates: tuple[float, ...], yardstick: tuple[float, ...]) -> float:
    if not all(rates):
        return 0.0
    ratios = [mine / known for mine, known in zip(rates, yardstick, strict=True)]
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def rate(model: ModelSpec, target: Target) -> float:
    """Decode tokens a second and device at the largest batch within TPOT and memory."""
    device = hardware(target.device)
    layout = target.layout
    try:
        layout.check(model)
    except ConfigError:
        return 0.0
    chosen: Engine = engine(target.engine)
    setting = Setting(model, device, layout, scheme(target.quant), engine=chosen)
    load = Workload(input_tokens=target.context, output_tokens=1)
    most = most_sequences(model, layout, setting.quant, load, device, chosen)
    if most < 1:
        return 0.0
    steps = setting.step_model()

    def step_s(sequences: int) -> float:
        """Time of a step with so many sequences in each copy of the attention."""
        return steps.time(Step(sequences, 1, float(target.context))).seconds

    if step_s(1) > target.max_tpot_s:
        return 0.0
    low, high = 1, max(1, min(most, 2048) // layout.dp)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if step_s(middle) <= target.max_tpot_s else (low, middle - 1)
    return layout.dp * low / step_s(low) / target.devices


def _draw(ranges: Ranges, rng: np.random.Generator) -> dict[str, Any] | None:
    """One shape within the ranges whose expert width meets the total budget; None if none does."""
    hidden = int(rng.integers(ranges.hidden[0] // 512, ranges.hidden[1] // 512 + 1)) * 512
    experts, picks = int(rng.choice(ranges.experts)), int(rng.choice(ranges.picks))
    each = ranges.picks_per_group[0]
    if len(ranges.picks_per_group) > 1:
        each = int(rng.choice(ranges.picks_per_group))
    if each < 0 or (each and picks % each):
        return None
    groups = picks // each if each else 1
    if experts % groups:
        return None
    shape: dict[str, Any] = {
        "hidden": hidden,
        "heads": int(rng.choice(ranges.heads)),
        "kv_heads": int(rng.choice(ranges.kv_heads)),
        "layers": int(rng.integers(ranges.layers[0], ranges.layers[1] + 1)),
        "experts": experts,
        "picks": picks,
        "groups": groups,
        "shared": int(rng.choice(ranges.shared)),
    }
    if shape["heads"] % shape["kv_heads"]:
        return None
    total = float(rng.uniform(*ranges.total_params))
    per_width = shape["layers"] * 3 * hidden * (experts + shape["shared"])
    attention = shape["layers"] * hidden * 128 * 2 * (shape["heads"] + shape["kv_heads"])
    width = (total - attention - 2 * ranges.vocab * hidden) / per_width
    shape["width"] = max(WIDTH_STEP, round(width / WIDTH_STEP) * WIDTH_STEP)
    model = build(shape, ranges.vocab)
    is_total = ranges.total_params[0] <= model.params() <= ranges.total_params[1]
    is_active = ranges.active_params[0] <= model.active_params() <= ranges.active_params[1]
    return shape if is_total and is_active else None


def build(shape: dict[str, Any], vocab: int) -> ModelSpec:
    """The MoGE of a shape."""
    return model_spec(
        {
            "model_type": "moge",
            "router_n_groups": shape["groups"],
            "vocab_size": vocab,
            "hidden_size": shape["hidden"],
            "num_hidden_layers": shape["layers"],
            "num_attention_heads": shape["heads"],
            "num_key_value_heads": shape["kv_heads"],
            "head_dim": 128,
            "moe_intermediate_size": shape["width"],
            "shared_expert_intermediate_size": shape["shared"] * shape["width"],
            "num_experts": shape["experts"],
            "num_experts_per_tok": shape["picks"],
        }
    )


def _shape_of(model: ModelSpec) -> dict[str, Any]:
    assert model.moe is not None
    return {
        "hidden": model.hidden_size,
        "heads": model.attention.num_heads,
        "kv_heads": model.attention.num_kv_heads,
        "layers": model.num_layers,
        "experts": model.moe.grouping.num_experts,
        "picks": model.moe.grouping.top_k,
        "groups": model.moe.grouping.num_groups,
        "shared": round(model.moe.shared_width / model.moe.expert_width),
        "width": model.moe.expert_width,
    }
