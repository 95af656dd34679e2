"""The figure of the imbalance score for uniform routing (arXiv 2505.21411, figure 2b).

Even a router without any preference is uneven on small batches; grouping makes the score 0.
"""

from __future__ import annotations

import numpy as np

from mogul.draw.chart import BLUE, ORANGE, Chart, Series
from mogul.spec import balance
from mogul.spec.grouping import Grouping


def imbalance_chart(
    *,
    num_experts: int = 64,
    top_k: int = 8,
    num_devices: int = 8,
    num_tokens: int = 16,
    draws: int = 20_000,
) -> Chart:
    """How often a batch has which imbalance score: top-k beside as many groups as devices."""
    sides = []
    for groups, name, color in ((1, "top-k", ORANGE), (num_devices, "MoGE", BLUE)):
        grouping = Grouping(num_experts=num_experts, num_groups=groups, top_k=top_k)
        scores = balance.monte_carlo_imbalance(
            grouping, num_tokens=num_tokens, num_devices=num_devices, draws=draws
        )
        sides.append((name, color, np.round(scores * num_tokens).astype(int)))
    largest = max(int(rows.max()) for _, _, rows in sides)
    names = [str(rows) for rows in range(largest + 1)]
    return Chart(
        title=f"Imbalance of uniform routing, {num_tokens} tokens on {num_devices} devices",
        x_label=f"rows of the busiest device minus rows of the idlest ({num_tokens} x IS)",
        y_label="% of batches",
        series=[
            Series(
                name=f"{name}, mean IS {rows.mean() / num_tokens:.3f}",
                x=names,
                y=(100 * np.bincount(rows, minlength=largest + 1) / draws).tolist(),
                color=color,
                kind="bars",
            )
            for name, color, rows in sides
        ],
        y_from_zero=True,
        caption=f"{draws:,} batches; every token picks {top_k} of {num_experts} experts without "
        "any preference. Top-k routing is uneven by chance alone; one pick a group is not.",
    )
