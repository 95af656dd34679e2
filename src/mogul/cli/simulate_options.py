"""What the verbs of `mogul simulate` share: the flags of a deployment, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mogul.core.table import Table
    from mogul.simulate.run import Setting
    from mogul.spec.hardware import Hardware
    from mogul.spec.model import ModelSpec
    from mogul.spec.quant import QuantScheme
    from mogul.spec.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A model on devices under a load."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """Checkpoint folder, config.json, preset:NAME or hub id."""

    device: str = "h100"
    """A name from `mogul simulate hw`, or the path of your own .toml."""

    tp: int = 1
    """Devices one copy of the attention is cut over."""

    dp: int = 1
    """Copies of the attention."""

    pp: int = 1
    """Pipeline stages."""

    ep: int | None = None
    """Ranks the experts are spread over; by default all devices of a stage."""

    moe_tp: int | None = None
    """Devices one expert is cut over."""

    shared_tp: int | None = None
    """Devices the shared expert is cut over; by default tp."""

    quant: str = "bf16"
    """bf16, fp8, w8a8, w8a8-kv8, w4a8, w4a16, nvfp4, mxfp4, fp8-kv16."""

    input: int = 2048
    """Prompt tokens a request."""

    output: int = 512
    """Output tokens a request."""

    batch: int = 64
    """Requests in flight, all copies together."""

    prefix_hit: float = 0.0
    """Share of prompt tokens found in the prefix cache."""

    together: bool = False
    """All prompts first, then decode; otherwise prompts fall between decode steps."""

    drafts: int = 0
    """Draft tokens verified a step."""

    acceptance: float = 0.7
    """Chance that a draft token is right."""

    max_ttft_ms: float | None = None
    """Most milliseconds to the first token; what is slower is marked or left out."""

    max_tpot_ms: float | None = None
    """Most milliseconds between tokens, likewise."""

    engine: str = "mogul"
    """mogul, vllm, sglang, trtllm, transformers, ascend."""

    overlap: Literal["none", "chunked", "fine"] = "none"
    """How communication hides behind arithmetic."""

    skew: float = 0.0
    """Popularity of experts falls like rank^-skew; 0 is uniform."""

    trace: str | None = None
    """Popularity from a `trace/` folder."""

    placement: str | None = None
    """placement.json instead of contiguous blocks."""

    measured: Path | None = None
    """Folder of tables that `mogul simulate calibrate` wrote; they come before all others."""

    machine: Path | None = None
    """machine.json of `mogul simulate calibrate`: tables beside it, launches and collectives."""

    tables: Literal["own", "aiconfigurator"] = "own"
    """Measured kernels: mogul's own, or AIConfigurator's too (its wheel must be installed)."""


def refuse_unused(options: Deployment, verb: str, *names: str) -> None:
    """Raise ConfigError if a flag was given that the verb does not use."""
    from mogul.core.errors import ConfigError

    defaults = {field.name: field.default for field in fields(Deployment)}
    for name in names:
        if getattr(options, name) != defaults[name]:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} does nothing in `mogul simulate {verb}`", fix="leave it out")


def model_of(options: Deployment) -> ModelSpec:
    """The model's shape; families that are only approximated say so on standard error."""
    from mogul.cli.find_config import find_config
    from mogul.core.log import say
    from mogul.simulate.approximate import spec_to_price

    model, note = spec_to_price(find_config(options.model).config)
    if note:
        say(f"approximated: {note}")
    return model


def setting_of(options: Deployment) -> Setting:
    """The setting the flags describe."""
    from mogul.cli.find_config import PRESET
    from mogul.cli.flags import named_by_flags
    from mogul.simulate.engines import Overlap, engine
    from mogul.simulate.routing import Routing
    from mogul.simulate.run import Setting
    from mogul.spec.parallel import Parallel

    device = _device(options)
    kind = "trace" if options.trace else ("power_law" if options.skew else "uniform")
    with named_by_flags(options, alpha="skew", file="trace"):
        layout = Parallel(
            tp=options.tp,
            dp=options.dp,
            pp=options.pp,
            ep=options.ep,
            moe_tp=options.moe_tp,
            shared_tp=options.shared_tp,
        )
        routing = Routing(
            kind=kind, alpha=options.skew, file=options.trace, placement=options.placement
        )
    chosen = engine(options.engine).replace(overlap=Overlap(kind=options.overlap))
    measured = _measured(options, device.name, chosen.kernels)
    model, quant = model_of(options), quant_of(options)
    name = options.model.removeprefix(PRESET)
    return Setting(model, device, layout, quant, routing, chosen, **measured, model_name=name)


def quant_of(options: Deployment) -> QuantScheme:
    """The formats the flags name."""
    from mogul.spec.quant import scheme

    return scheme(options.quant)


def _device(options: Deployment) -> Hardware:
    from mogul.spec.hardware import hardware

    device = hardware(options.device)
    if options.machine is None:
        return device
    from mogul.core.errors import ConfigError
    from mogul.simulate.machine import read_machine

    machine = read_machine(options.machine)
    if machine.device != device.name:
        raise ConfigError(
            f"{options.machine} was measured on {machine.device!r}, not on {device.name!r}",
            fix=f"use --device {machine.device}",
        )
    return machine.applied(device)


def _measured(options: Deployment, device: str, kernels: str) -> dict[str, Any]:
    if options.machine:
        from mogul.simulate.calibration import with_measured
        from mogul.simulate.machine import read_machine

        folder = options.machine if options.machine.is_dir() else options.machine.parent
        collectives = read_machine(options.machine).collective_tables()
        return {"calibration": with_measured(folder, kernels), "collectives": collectives}
    if options.measured:
        from mogul.simulate.calibration import with_measured

        return {"calibration": with_measured(options.measured, kernels)}
    if options.tables == "own":
        return {}
    from mogul.simulate.aiconfigurator import DEVICES, collective_tables
    from mogul.simulate.calibration import with_aiconfigurator

    if device not in DEVICES:
        return {}
    engine = options.engine if options.engine in ("vllm", "sglang", "trtllm") else "vllm"
    return {
        "calibration": with_aiconfigurator(device),
        "collectives": collective_tables(device, engine),
    }


OPTION_OF_LOAD = {
    "input_tokens": "input",
    "output_tokens": "output",
    "draft_tokens": "drafts",
    "max_ttft_s": "max_ttft_ms",
    "max_tpot_s": "max_tpot_ms",
}


def workload_of(options: Deployment) -> Workload:
    """The load the flags describe."""
    from mogul.cli.flags import named_by_flags
    from mogul.core.errors import ConfigError
    from mogul.spec.workload import Speculation, Workload

    if not options.drafts and options.acceptance != Deployment.acceptance:
        raise ConfigError("--acceptance does nothing without --drafts", fix="give --drafts N")
    with named_by_flags(options, **OPTION_OF_LOAD):
        drafts = None
        if options.drafts:
            drafts = Speculation(draft_tokens=options.drafts, acceptance=options.acceptance)
        return Workload(
            input_tokens=options.input,
            output_tokens=options.output,
            batch=options.batch,
            prefix_hit=options.prefix_hit,
            arrival="together" if options.together else "steady",
            speculation=drafts,
            max_ttft_s=_seconds(options.max_ttft_ms),
            max_tpot_s=_seconds(options.max_tpot_ms),
        )


def _seconds(given_ms: float | None) -> float | None:
    return None if given_ms is None else given_ms * 1e-3


def write_page(path: Path | None, title: str, tables: Sequence[Table]) -> None:
    """Write a page of tables where one was asked for."""
    if path is None:
        return
    from mogul.core.log import say
    from mogul.simulate.report import tables_page

    say(f"wrote {tables_page(title, tables).write(path)}")
