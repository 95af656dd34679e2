"""The tables that end each act, on the terminal and in the report."""

from __future__ import annotations

from mogul.bench.demo.balance import BalanceResult
from mogul.bench.demo.cells import Cell
from mogul.bench.demo.exact import ExactResult
from mogul.bench.demo.learning import HONEST, LearningResult
from mogul.core.table import Table

BY_CONSTRUCTION = "1 by construction"
_MEANINGS = (
    "rho = rows, busiest device over mean: time where arithmetic decides. "
    "delta = distinct experts, busiest over mean: time where reading weights decides, as in "
    "small-batch decode. IS = (max - min rows) / tokens."
)
_PICKS = (
    "Routers are random at step 0. 'Uniform picks' are drawn by chance: as even as a router that "
    "decides token by token can be expected to be."
)
_WIDTHS = (
    "An expert of the twin is a whole FFN, one of the MoGE a shard of it; one row of the twin "
    "costs as much as the picks of a token in all groups. Compare ratios, not rows."
)


def exact_table(result: ExactResult) -> Table:
    """Act 1 as a table."""
    rows: list[tuple[object, ...]] = [
        (
            f"largest logit difference, {name} to dense (fp32)",
            f"{value:.1e}",
            f"of logits up to {result.largest_logit:.0f}; {result.tokens_compared} tokens",
        )
        for name, value in result.largest_logit_difference.items()
    ]
    rows += [
        (f"same most likely next token, {name}", f"{share:.1%}", "of these positions")
        for name, share in result.top_token_agrees.items()
    ]
    same = sum(answer.same_tokens for answer in result.answers)
    tokens = sum(answer.new_tokens for answer in result.answers)
    rows.append(
        (
            "same greedy answer, token by token",
            f"{same} of {len(result.answers)}",
            f"{tokens} new tokens of the MoGE",
        )
    )
    return Table("Act 1, exact: dense against upcycled", ("what", "value", "measured on"), rows)


def _pair(mean: float, busiest: float) -> str:
    return f"{mean:.4g} / {busiest:.4g}"


def balance_table(result: BalanceResult) -> Table:
    """Act 2 as a table; a cell beside its uniform counterpart."""
    rows = []
    cells = list(zip(result.cells, result.uniform, strict=True))
    for cell, chance in sorted(cells, key=lambda pair: (pair[0].batch, pair[0].model != "MoGE")):
        rows.append(
            (
                cell.batch,
                cell.model,
                cell.devices,
                _pair(cell.mean_rows, cell.busiest_rows),
                show_rho(cell),
                "1" if cell.by_construction else f"{chance.rho.mean:.2f}",
                _pair(cell.mean_distinct, cell.busiest_distinct),
                f"{cell.delta.mean:.2f}",
                f"{chance.delta.mean:.2f}",
                f"{cell.imbalance.mean:.2f}",
            )
        )
    columns = (
        "batch", "model", "devices", "rows mean / busiest", "rho", "rho, uniform picks",
        "distinct experts mean / busiest", "delta", "delta, uniform picks", "IS",
    )  # fmt: skip
    return Table(
        "Act 2, balance: one decode step, mean over steps and layers",
        columns,
        rows,
        (_MEANINGS, _PICKS, _WIDTHS),
    )


def learning_table(result: LearningResult) -> Table:
    """Act 3 as a table."""
    rows = []
    for one in result.learners:
        routing = one.routing_after
        rows.append(
            (
                one.model,
                f"{one.params / 1e6:.0f} M",
                one.training.steps,
                one.training.tokens,
                f"{one.training.seconds:.0f}",
                f"{one.training.tokens_per_s:.0f}",
                f"{one.before.nats_per_token:.4f}",
                f"{one.after.nats_per_token:.4f}",
                f"{one.before.bits_per_byte:.3f} -> {one.after.bits_per_byte:.3f}",
                "-" if one.copy_distance is None else f"{one.copy_distance:.2%}",
                "-" if routing is None else f"{routing.smallest_share:.1%}",
            )
        )
    columns = (
        "model", "parameters", "steps", "tokens", "seconds", "tokens/s", "held-out before",
        "held-out after", "bits a byte", "distance of copies", "smallest share",
    )  # fmt: skip
    even = f"{1 / result.copies:.0%}"
    notes = (
        HONEST,
        "Held-out loss: cross-entropy alone, nats a token. All parameters are trained.",
        "Distance of copies: mean |a - b| / |a| over pairs in a group; 0 at step 0.",
        f"Smallest share: the least used expert in the picks of its group; even use is {even}.",
    )
    return Table("Act 3, it trains: the same tokens for all three", columns, rows, notes)


def trained_balance_table(result: LearningResult) -> Table:
    """Act 2's numbers once more, with the routers that act 3 trained."""
    cells = [cell for one in result.learners for cell in one.balance_after]
    rows = [
        (
            cell.batch,
            cell.model,
            cell.devices,
            show_rho(cell),
            f"{cell.delta.mean:.2f}",
            f"{cell.imbalance.mean:.2f}",
        )
        for cell in sorted(cells, key=lambda cell: (cell.batch, cell.model, cell.devices))
    ]
    columns = ("batch", "model", "devices", "rho", "delta", "IS")
    return Table("Balance again, with the trained routers, on the held-out text", columns, rows)


def show_rho(cell: Cell) -> str:
    """Rho as measured, or the label that it could not be otherwise."""
    return BY_CONSTRUCTION if cell.by_construction else f"{cell.rho.mean:.2f}"
