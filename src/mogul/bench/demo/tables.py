"""The tables that end each act, on the terminal and in the report."""

from __future__ import annotations

from mogul.bench.demo.balance import BalanceResult
from mogul.bench.demo.cells import Cell
from mogul.bench.demo.exact import ExactResult
from mogul.bench.demo.learning import HONEST, LearningResult
from mogul.core.table import Table

_MEANINGS = (
    "rho = rows, busiest device / mean: time where arithmetic decides. delta = distinct experts, "
    "busiest / mean: time where reading weights decides, as in small-batch decode. "
    "IS = (max - min rows) / tokens."
)
_CONSTRUCTED = (
    "1* is 1 by construction, for any router: the devices hold whole groups. "
    "Delta is not, except the MoGE's at batch 1."
)
_PICKS = (
    "Routers are random at step 0. 'Uniform' picks are drawn by chance: as even as a router that "
    "decides token by token can be expected to be."
)
_WIDTHS = (
    "Rows and experts: mean over devices / busiest. An expert of the twin is a whole FFN, one of "
    "the MoGE a shard of it: compare ratios, not rows."
)


def exact_table(result: ExactResult) -> Table:
    """Act 1 as a table."""
    tokens = f"{result.tokens_compared} tokens, logits up to {result.largest_logit:.0f}"
    rows: list[tuple[object, ...]] = [
        (f"largest logit difference, {name} to dense", f"{value:.1e}", f"fp32, {tokens}")
        for name, value in result.largest_logit_difference.items()
    ]
    rows.append(
        (
            "to compare: dense to itself with fp64 products",
            f"{result.rounding:.1e}",
            "what rounding in fp32 does to the dense model",
        )
    )
    rows += [
        (f"same most likely next token, {name}", f"{share:.1%}", "of these positions")
        for name, share in result.top_token_agrees.items()
    ]
    same = sum(answer.same_tokens for answer in result.answers)
    new = sum(answer.new_tokens for answer in result.answers)
    answers = f"{same} of {len(result.answers)}"
    rows.append(("same greedy answer, token by token", answers, f"{new} new tokens"))
    return Table("Act 1, exact: dense against upcycled", ("what", "value", "measured on"), rows)


def show_rho(cell: Cell) -> str:
    """Rho as measured, or starred where it could not be otherwise."""
    return "1*" if cell.by_construction else f"{cell.rho.mean:.2f}"


def _pair(mean: float, busiest: float) -> str:
    return f"{mean:.3g} / {busiest:.3g}"


def balance_table(result: BalanceResult) -> Table:
    """Act 2 as a table; a cell beside its uniform counterpart."""
    pairs = list(zip(result.cells, result.uniform, strict=True))
    rows = [
        (
            cell.batch,
            cell.model,
            cell.devices,
            _pair(cell.mean_rows, cell.busiest_rows),
            show_rho(cell),
            show_rho(chance),
            _pair(cell.mean_distinct, cell.busiest_distinct),
            f"{cell.delta.mean:.2f}",
            f"{chance.delta.mean:.2f}",
            f"{cell.imbalance.mean:.2f}",
        )
        for cell, chance in sorted(pairs, key=lambda pair: (pair[0].batch, pair[0].model))
    ]
    columns = (
        "batch", "model", "devices", "rows", "rho", "uniform rho", "experts", "delta",
        "uniform delta", "IS",
    )  # fmt: skip
    return Table(
        "Act 2, balance: one decode step, mean over steps and layers",
        columns,
        rows,
        (_CONSTRUCTED, _MEANINGS, _PICKS, _WIDTHS),
    )


def learning_table(result: LearningResult) -> Table:
    """Act 3 as a table."""
    rows = []
    for one in result.learners:
        before, after = one.routing_before, one.routing_after
        rows.append(
            (
                one.model,
                f"{one.params / 1e6:.0f} M",
                one.training.tokens,
                one.training.steps,
                f"{one.training.seconds:.0f}",
                f"{one.before.nats_per_token:.3f} > {one.after.nats_per_token:.3f}",
                f"{one.before.bits_per_byte:.3f} > {one.after.bits_per_byte:.3f}",
                "-" if one.copy_distance is None else f"0 > {one.copy_distance:.2%}",
                f"{before.smallest_share:.2%} > {after.smallest_share:.2%}"
                if before and after
                else "-",
            )
        )
    columns = (
        "model", "params", "tokens", "steps", "seconds", "held-out loss", "bits a byte",
        "copies apart", "smallest share",
    )  # fmt: skip
    even = f"{1 / result.copies:.0%}"
    notes = (
        HONEST,
        "Before > after. Held-out loss: cross-entropy alone, nats a token. All parameters train.",
        "Copies apart: mean |a - b| / |a| over pairs of experts in a group.",
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
    title = "Balance again, with the routers after training, on the held-out text"
    return Table(title, columns, rows, (_CONSTRUCTED,))
