"""The demo's report: a page for people, a JSON file for programs, PNGs for papers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mogul.bench.demo.balance import BalanceResult
from mogul.bench.demo.cast import DemoSettings, Name
from mogul.bench.demo.cells import Cell
from mogul.bench.demo.diagram import layer_diagram
from mogul.bench.demo.exact import ExactResult
from mogul.bench.demo.figures import figures
from mogul.bench.demo.learning import HONEST, LearningResult
from mogul.bench.demo.tables import (
    balance_table,
    exact_table,
    learning_table,
    trained_balance_table,
)
from mogul.core.files import atomic_write
from mogul.core.table import Table
from mogul.core.units import show_bytes, show_s
from mogul.draw.chart import Figure
from mogul.draw.page import Page
from mogul.draw.png import save_png

SCHEMA = "mogul.demo/1"


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo found."""

    model: str
    settings: DemoSettings
    exact: ExactResult
    balance: BalanceResult
    learning: LearningResult
    seconds: dict[str, float]
    """Wall-clock time of each act and of all."""
    cpu_seconds: float
    """User and system time of the process."""
    peak_memory_bytes: int
    """Largest resident set of the process."""
    versions: dict[str, str]
    machine: dict[str, Any]
    command: list[str]

    def as_data(self) -> dict[str, Any]:
        """What report.json holds; base units, loss in nats."""
        data = asdict(self)
        data["settings"] = self.settings.model_dump()
        return {"schema": SCHEMA, **data}


def write_report(result: DemoResult, folder: Path) -> Path:
    """Write the PNGs, report.html and, last, report.json; returns the page's path."""
    drawn = figures(result.balance, result.learning)
    for name, figure in drawn.items():
        save_png(figure, folder / f"{name}.png")
    path = page(result, drawn).write(folder / "report.html")
    atomic_write(folder / "report.json", json.dumps(result.as_data(), indent=1) + "\n")
    return path


def _cell(cells: tuple[Cell, ...], model: Name, batch: int, devices: int) -> Cell | None:
    found = (c for c in cells if (c.model, c.batch, c.devices) == (model, batch, devices))
    return next(found, None)


def page(result: DemoResult, drawn: dict[str, Figure]) -> Page:
    """Build the page."""
    made = Page(
        "A language model with grouped experts",
        f"`{result.model}`, a dense model, is turned into a mixture of grouped experts (MoGE): it "
        "computes the same function, keeps devices evenly busy, and trains on. Every number below "
        "was measured by this run on this machine, unless it says **by construction**.",
    )
    made.facts(_facts(result))
    _about(made, result.settings)
    _act_exact(made, result.exact)
    _act_balance(made, result.balance, drawn)
    _act_learning(made, result.learning, drawn)
    _small_print(made, result)
    return made


def _facts(result: DemoResult) -> list[tuple[str, str, str]]:
    exact, settings = result.exact, result.settings
    same, asked = sum(answer.same_tokens for answer in exact.answers), len(exact.answers)
    devices, batch = result.balance.example_devices, result.balance.example_batch
    twin = _cell(result.balance.cells, "twin", batch, devices)
    chance = _cell(result.balance.uniform, "twin", batch, devices)
    moge = result.learning.learners[0]
    facts = [
        (
            f"{exact.largest_logit_difference['MoGE']:.1e}",
            "largest logit difference to the dense model",
            f"fp32, logits up to {exact.largest_logit:.0f}; {same} of {asked} answers the same",
        )
    ]
    if twin and chance:
        facts.append(
            (
                f"1 against {twin.rho.mean:.2f}",
                "rho, MoGE by construction against the twin",
                f"{devices} devices, batch {batch}; uniform picks would give {chance.rho.mean:.2f}",
            )
        )
    facts.append(
        (
            f"{moge.before.nats_per_token:.2f} to {moge.after.nats_per_token:.2f}",
            "held-out loss of the MoGE, nats a token",
            f"{moge.training.tokens:,} tokens in {settings.seconds:g} s: it trains",
        )
    )
    return facts


def _about(made: Page, settings: DemoSettings) -> None:
    moge, twin = settings.grouping, settings.twin_grouping
    made.section("What is compared")
    made.prose(
        f"Every FFN of the dense model is cut into {moge.num_groups} shards. The **MoGE** holds "
        f"{moge.group_size} copies of each shard in a group of its own, and a token picks one "
        f"expert in each of the {moge.num_groups} groups. The **twin** is the honest rival: "
        f"{twin.num_experts} copies of the whole FFN, one picked, the same parameters in total "
        "and for a token (but for the router, 0.1 %). Copies are equal at the start, so that "
        "both compute the dense function whatever their routers say."
    )
    made.drawing(
        layer_diagram(moge, twin),
        "One layer. Filled: what one token computes with; pale: copies other tokens may pick. "
        "The MoGE's groups are spread over the devices, so that each device has the same number "
        "of picks.",
    )


def _act_exact(made: Page, result: ExactResult) -> None:
    made.section("Act 1: exact")
    made.prose(
        "The sum over the shards of an FFN is the FFN, so upcycling changes nothing but the "
        "order of additions. What is left is the rounding of fp32, which the table shows beside "
        "the rounding in the dense model itself."
    )
    made.table(exact_table(result))
    for answer in result.answers:
        made.prose(f"**{answer.prompt}**")
        if answer.same_tokens:
            source = f"dense and MoGE, the same {answer.new_tokens} tokens, greedy"
            made.quote(answer.moge, source)
        else:
            made.quote(answer.dense, "dense, greedy")
            made.quote(answer.moge, "MoGE, greedy")


def _act_balance(made: Page, result: BalanceResult, drawn: dict[str, Figure]) -> None:
    made.section("Act 2: balance")
    made.prose(
        "Experts are spread over devices in equal numbers, and real text is decoded. At each "
        "step every device computes one **row** for each pick that falls on its experts, and "
        "reads each **distinct expert** once. All devices wait for the busiest. Routing is a "
        "function of one token, so the picks at the last positions of a prefill are those of "
        "decoding.",
        "The routers are **random** here, at step 0. Training with a balance loss makes "
        "routers more even, so the figures also show picks drawn uniformly by chance: as even as a "
        "router that decides token by token can be expected to be.",
    )
    for name in ("rows", "devices", "experts"):
        made.figure(drawn[name])
    made.table(balance_table(result))


def _act_learning(made: Page, result: LearningResult, drawn: dict[str, Figure]) -> None:
    made.section("Act 3: it trains")
    first = result.learners[0]
    made.prose(
        f"MoGE, twin and dense model are trained on the same {first.training.tokens:,} tokens of "
        f"public-domain English ({result.train_bytes / 1e6:.2f} MB: Carroll, Shakespeare, Milton, "
        f"Newton): the MoGE for as long as asked, the others for the same {first.training.steps} "
        f"steps. Held out are the last tenths of the works; {result.held_out_bytes / 1e3:.0f} kB "
        "of them are measured. The dense model has probably met these works before.",
        f"**{HONEST}**",
    )
    table = learning_table(result)
    made.table(replace(table, notes=[note for note in table.notes if note != HONEST]))
    for name in ("loss", "held_out", "shares"):
        made.figure(drawn[name])
    made.table(trained_balance_table(result))


def _small_print(made: Page, result: DemoResult) -> None:
    made.section("How this was measured")
    rows = [(act, show_s(seconds, 0)) for act, seconds in result.seconds.items()]
    rows += [
        ("processor time, user and system", show_s(result.cpu_seconds, 0)),
        ("peak memory of the process", show_bytes(result.peak_memory_bytes)),
        ("machine", f"{result.machine['processor']}, {result.machine['threads']} threads"),
        ("system", result.machine["system"]),
        ("versions", ", ".join(f"{name} {text}" for name, text in result.versions.items())),
        ("command", "`" + " ".join(result.command) + "`"),
    ]
    made.table(Table("Time, memory, versions", ("what", "value"), rows))
    made.footer(
        f"All numbers, unrounded: `report.json` beside this page (schema `{SCHEMA}`); figures as "
        "PNG there too. Text and licences: `src/mogul/train/text/README.md`."
    )
