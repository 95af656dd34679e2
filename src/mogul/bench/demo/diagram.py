"""A drawing of one layer of the three models: shards, copies and what one token picks."""

from __future__ import annotations

from mogul.draw.chart import BLUE, GREY, ORANGE
from mogul.spec.grouping import Grouping

_WIDTH, _HEIGHT, _GAP = 272, 26, 4


def layer_diagram(moge: Grouping, twin: Grouping) -> str:
    """SVG: the dense FFN in shards, the MoGE's copies by group, the twin's whole copies."""
    picked = [(3 * group + 1) % moge.group_size for group in range(moge.num_groups)]
    shards, copies = moge.num_groups, moge.group_size
    panels = [
        _panel("dense: one FFN", GREY, 1, shards, [0] * shards, joined=True),
        _panel(
            f"MoGE: {shards} groups of {copies} copies, one pick in each",
            BLUE, copies, shards, picked, joined=False,
        ),
        _panel(
            f"twin: {twin.num_experts} copies of the whole FFN, one pick",
            ORANGE, twin.num_experts, shards, [picked[0]] * shards, joined=True,
        ),
    ]  # fmt: skip
    # One below the other: a phone shows them whole.
    tops, height = [], 0
    for drawn, rows in panels:
        tops.append(f'<g transform="translate(0,{height})">{drawn}</g>')
        height += 24 + rows * (_HEIGHT + _GAP) + 18
    return (
        f'<svg viewBox="0 0 {_WIDTH + 90} {height}" width="100%" style="max-width:34rem" '
        'role="img" aria-label="one layer of the three models" fill="currentColor" '
        f'font-size="10.5" font-family="system-ui,sans-serif">{"".join(tops)}</svg>'
    )


def _panel(
    title: str, color: str, rows: int, columns: int, picked: list[int], *, joined: bool
) -> tuple[str, int]:
    width = _WIDTH / columns
    parts = [f'<text x="0" y="12" font-weight="600">{title}</text>']
    for row in range(rows):
        top = 22 + row * (_HEIGHT + _GAP)
        for column in range(columns):
            gap = 0 if joined else _GAP
            fill = 0.9 if picked[column] == row else 0.16
            parts.append(
                f'<rect x="{column * width:.1f}" y="{top}" width="{width - gap:.1f}" '
                f'height="{_HEIGHT}" rx="{0 if joined else 3}" fill="{color}" '
                f'fill-opacity="{fill}" stroke="{color}" stroke-opacity=".6" '
                f'stroke-width="{0.4 if joined else 0.8}"/>'
            )
        name = "" if rows == 1 else f"copy {row + 1}"
        parts.append(f'<text x="{_WIDTH + 8}" y="{top + 17}" fill-opacity=".7">{name}</text>')
    return "".join(parts), rows
