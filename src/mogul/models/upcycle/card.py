"""What an upcycled checkpoint says about itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mogul.core.units import show_bytes, show_count
from mogul.models.upcycle.plan import UpcyclePlan


@dataclass(frozen=True, slots=True)
class UpcycleReport:
    """What was written."""

    folder: Path
    """The new checkpoint."""
    plan: UpcyclePlan
    """How it was made."""
    expert_width: int
    """Inner columns of one expert (F)."""
    params: int
    """Parameters in all."""
    active_params: int
    """Parameters one token uses, embeddings included."""
    num_bytes: int
    """Bytes of the weights."""


def model_card(source_name: str, report: UpcycleReport) -> str:
    """Write the README.md of an upcycled checkpoint (Markdown)."""
    plan = report.plan
    if plan.noise:
        function = (
            f"Drop-upcycling noise re-drew {plan.noise:.0%} of every expert's inner columns, so "
            "this model does **not** compute what the dense model computes; it needs training."
        )
    else:
        function = (
            "Untrained, it computes the dense model's function, whatever its routers choose: the "
            "experts of a group are equal copies and every pick has weight 1. It is a start for "
            "training, not a better model than its source."
        )
    command = (
        f"mogul upcycle {source_name} --experts {plan.num_experts} --groups {plan.num_groups} "
        f"--seed {plan.seed}" + (f" --noise {plan.noise:g}" if plan.noise else "")
    )
    return _CARD.format(
        source=source_name,
        function=function,
        experts=plan.num_experts,
        groups=plan.num_groups,
        copies=plan.group_size,
        width=report.expert_width,
        params=show_count(report.params),
        active=show_count(report.active_params),
        size=show_bytes(report.num_bytes),
        command=command,
    )


_CARD = """\
# {source}, upcycled to grouped experts

A mixture of grouped experts (MoGE, arXiv 2505.21411) made from the dense checkpoint {source} by
mogul. {function}

| | |
|---|---|
| experts a layer | {experts} in {groups} groups, {width} inner columns each |
| picks a token | {groups}, one in each group |
| copies of each FFN shard | {copies} |
| parameters | {params}, of which {active} active for a token |
| weights | {size} |

```python
import mogul.models
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this", experts_implementation="mogul")
```

Made with `{command}`. The licence of the source holds for this model as well.
"""
