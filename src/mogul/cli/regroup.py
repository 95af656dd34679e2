"""`mogul regroup`: a top-k model and its trace in, a MoGE out, with what that cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mogul.cli.generation import TORCH_NAMES, Dtype

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mogul.core.table import Table
    from mogul.observe.agreement import Agreement
    from mogul.spec.trace import Trace

EXAMPLES = """
examples:
  mogul regroup ./Qwen3-30B-A3B --trace trace/ --devices 8 --out ./qwen3-moge
  mogul regroup ./Qwen3-235B-A22B --trace trace/ --devices 8 --stream --out ./qwen3-moge
  mogul regroup ./Qwen3-30B-A3B --trace trace/ --devices 4 --groups 8 --heal 200 --out ./moge
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Put the experts of a top-k model in groups, so that devices get equal rows by construction.

    Each token's picks fall into different groups as often as possible; experts are renumbered
    group by group and nothing else changes. Prints how much of the routing survives.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder of the checkpoint (Qwen3-MoE, Mixtral or MoGE without groups), or a hub id."""
    trace: Path
    """Its trace (`mogul trace`)."""
    devices: int
    """Devices that shall be balanced."""
    out: Path
    """Folder to write; it appears whole or not at all."""
    groups: int | None = None
    """Groups, where they are to be another multiple of the devices."""
    stream: bool = False
    """Write tensor by tensor without loading the model: nothing is compared or healed."""
    heal: int = 0
    """Steps that train the routers alone to answer like the original."""
    lr: float = 3e-4
    """Learning rate of the healing."""
    labels: float = 0.5
    """The text's own loss beside the distance to the original; 0 asks for its answers only."""
    data: tuple[str, ...] = ("builtin:english",)
    """Files to heal with; the last tenth of the windows is held out, and compared on."""
    length: int = 256
    """Tokens in a window."""
    batch: int = 4
    """Windows in a forward."""
    compare_tokens: int = 8192
    """Held-out tokens to compare the models on."""
    device: str = "auto"
    """Device to run on, for example cpu; auto takes an accelerator where there is one."""
    dtype: Dtype = "auto"
    """Compute in this dtype; auto takes the checkpoint's."""
    seed: int = 0
    """Seed of the search for groups and of the batches."""
    force: bool = False
    """Replace an existing checkpoint folder."""
    format: Literal["table", "json", "csv"] = "table"
    """How the result is printed."""


def run(options: Options) -> int:
    """Group, compare, heal, write and print."""
    from mogul.core.files import atomic_folder
    from mogul.core.log import say

    groups = _checked_groups(options)
    say(f"loading {options.model}")
    from mogul.models.load import find_folder, load_model, named_device
    from mogul.models.regroup import find_groups, regroup
    from mogul.spec.fingerprint import stamp_of_folder
    from mogul.spec.trace import load_trace
    from mogul.train.export import copy_tokenizer

    folder = find_folder(options.model)
    trace = load_trace(options.trace)
    stamp_of_folder(folder).check_same(trace.meta.model, what="the trace")
    group_of = find_groups(trace, groups, seed=options.seed)
    if options.stream:
        return _stream(options, folder, trace, group_of, groups)
    with atomic_folder(options.out, force=options.force) as work:
        device = named_device(options.device)
        original = load_model(folder, dtype=TORCH_NAMES[options.dtype], device=device)
        grouped = regroup(original, group_of, groups)
        train_ids, held_out_ids = _windows(options, folder, original)
        before = _compare(options, original, grouped, held_out_ids, group_of, groups)
        healed = None
        if options.heal:
            _heal(options, original, grouped, train_ids)
            healed = _compare(options, original, grouped, held_out_ids, group_of, groups)
        balance = _balance(options, original, grouped, held_out_ids)
        grouped.save_pretrained(work)
        copy_tokenizer(folder, work)
    _table(options, trace, group_of, groups, before, healed).show(options.format)
    balance.show(options.format)
    return 0


def _checked_groups(options: Options) -> int:
    """How many groups the flags ask for; numbers that cannot be are refused before loading."""
    from mogul.core.errors import ConfigError

    groups = options.groups or options.devices
    if options.devices < 1 or groups < 1:
        raise ConfigError(
            f"{groups} groups on {options.devices} devices cannot be", fix="use 1 or more of each"
        )
    if options.heal < 0 or not 0 <= options.labels <= 1:
        raise ConfigError(
            f"--heal {options.heal} --labels {options.labels:g} cannot be",
            fix="heal for 0 or more steps; --labels is a share from 0 to 1",
        )
    if groups % options.devices:
        raise ConfigError(
            f"{groups} groups do not stand on {options.devices} devices in equal numbers",
            fix="make the groups a multiple of the devices",
        )
    return groups


def _stream(
    options: Options, folder: Path, trace: Trace, group_of: dict[int, np.ndarray], groups: int
) -> int:
    from mogul.core.errors import ConfigError
    from mogul.core.table import Table
    from mogul.models.regroup import regroup_checkpoint
    from mogul.place.spread import random_kept

    if options.heal:
        raise ConfigError("--stream loads no model that could be healed", fix="leave out --heal")
    regroup_checkpoint(folder, options.out, group_of, groups, force=options.force)
    mine, plain = _kept_on_trace(trace, group_of, groups)
    model = trace.meta.model
    rows = [
        ("this grouping", round(mine, 4)),
        ("contiguous groups", round(plain, 4)),
        ("random groups", round(random_kept(model.top_k, groups, model.num_experts), 4)),
    ]
    title = f"{options.model} in {groups} groups -> {options.out}"
    Table(title, ("picks kept, trace", "share"), rows).show(options.format)
    return 0


def _kept_on_trace(
    trace: Trace, group_of: dict[int, np.ndarray], groups: int
) -> tuple[float, float]:
    """Share of the trace's picks kept: by these groups, and by contiguous ones."""
    import numpy as np

    from mogul.place.spread import kept_share

    experts, ids = trace.meta.model.num_experts, trace.get("sample_ids")
    plain = [np.arange(experts) * groups // experts] * len(trace.meta.layers)
    mine, even = (
        float(np.mean([kept_share(ids[:, i], g, groups) for i, g in enumerate(parts)]))
        for parts in (group_of.values(), plain)
    )
    return mine, even


def _windows(options: Options, folder: Path, model: Any) -> tuple[np.ndarray, np.ndarray]:
    """(to train on, held out): windows [N, L], every tenth held out."""
    import numpy as np

    from mogul.cli.trace import read_sources
    from mogul.core.errors import ConfigError
    from mogul.models.load import load_tokenizer
    from mogul.observe.data import calibration, check_ids

    tokenizer = load_tokenizer(folder)
    data = calibration(
        read_sources(options.data),
        lambda text: tokenizer.encode(text, add_special_tokens=False),
        length=options.length,
        seed=options.seed,
    )
    check_ids(data, model)
    full = [window.ids for window in data.windows if window.num_real == options.length]
    if len(full) < 2:
        raise ConfigError(
            f"the data fills {len(full)} windows of {options.length} tokens; two are needed",
            fix="give more text, or shorter windows (--length)",
        )
    ids_NL = np.stack(full)
    is_held_out = np.arange(len(ids_NL)) % 10 == 0
    limit = max(1, options.compare_tokens // options.length)
    return ids_NL[~is_held_out], ids_NL[is_held_out][:limit]


def _batches(ids_NL: np.ndarray, size: int) -> Iterator[torch.Tensor]:
    import torch

    for first in range(0, len(ids_NL), size):
        yield torch.from_numpy(ids_NL[first : first + size])


def _compare(
    options: Options, original: Any, grouped: Any, ids_NL: np.ndarray, group_of: Any, groups: int
) -> Agreement:
    from mogul.observe.agreement import agreement

    return agreement(original, grouped, _batches(ids_NL, options.batch), group_of, groups)


def _heal(options: Options, original: Any, grouped: Any, ids_NL: np.ndarray) -> None:
    import numpy as np

    from mogul.models.heal import BestRouters, Healing
    from mogul.train.loop import train
    from mogul.train.optimizer import TrainSettings

    rng = np.random.default_rng(options.seed)
    is_kept = np.arange(len(ids_NL)) % 10 == 1  # to choose the best routers by
    chosen = ids_NL[is_kept][: 4 * options.batch]
    chosen, ids_NL = (chosen, ids_NL[~is_kept]) if len(chosen) else (ids_NL, ids_NL)

    def endless() -> Iterator[torch.Tensor]:
        while True:
            yield from _batches(rng.permutation(ids_NL), options.batch)

    settings = TrainSettings(
        lr=options.lr,
        weight_decay=0.0,
        schedule="cosine",
        warmup_steps=options.heal // 20,
        max_steps=options.heal,
    )
    healing = Healing(grouped, original, options.labels)
    best = BestRouters(
        healing, lambda: _batches(chosen, options.batch), every=max(10, options.heal // 10)
    )
    train(healing, best.batches(endless()), settings, description="healing the routers")
    best.restore()
    healing.finish()


def _balance(options: Options, original: Any, grouped: Any, ids_NL: np.ndarray) -> Table:
    """Tabulate rho and delta of both models on the held-out text, for each legal device count."""
    import torch

    from mogul.core.table import Table
    from mogul.observe import numbers
    from mogul.observe.tracer import Tracer

    traces = []
    for model in (original, grouped):
        with Tracer(model) as tracer, torch.no_grad():
            for ids in _batches(ids_NL, options.batch):
                model(input_ids=ids.to(model.device), use_cache=False)
            traces.append(tracer.trace())
    rows = []
    for devices in traces[1].meta.model.grouping.legal_devices():
        rho = [round(numbers.whole_rho(trace, devices)[0], 4) for trace in traces]
        delta = [round(numbers.device_balance(trace, devices, 16).delta, 4) for trace in traces]
        rows.append((devices, *rho, *delta))
    return Table(
        "Balance on held-out text",
        ("devices", "rho before", "rho now", "delta before, batch 16", "delta now"),
        rows,
        ("contiguous placement, means over layers; rho now is 1 by construction",),
    )


def _table(
    options: Options,
    trace: Trace,
    group_of: dict[int, np.ndarray],
    groups: int,
    before: Agreement,
    healed: Agreement | None,
) -> Table:
    from mogul.core.table import Table
    from mogul.place.spread import random_kept

    model = trace.meta.model
    on_trace = _kept_on_trace(trace, group_of, groups)
    rows: list[tuple[Any, ...]] = [
        ("kept picks, held-out text", before.kept, None),
        ("kept picks, trace", on_trace[0], None),
        ("kept picks, contiguous groups (trace)", on_trace[1], None),
        ("kept picks, random groups", random_kept(model.top_k, groups, model.num_experts), None),
        ("kept routing mass", before.mass, None),
        ("KL to the original, nats a token", before.kl, healed and healed.kl),
        ("same likeliest next token", before.same_top1, healed and healed.same_top1),
        ("held-out loss of the original, nats", before.loss_before, None),
        ("held-out loss, nats", before.loss_after, healed and healed.loss_after),
    ]
    columns = ("", "regrouped", f"healed {options.heal} steps")[: 3 if healed else 2]
    return Table(
        f"{options.model} in {groups} groups of {model.num_experts // groups} -> {options.out}",
        columns,
        [
            tuple(round(v, 4) if isinstance(v, float) else v for v in row[: len(columns)])
            for row in rows
        ],
        (f"compared on {before.num_tokens:,} held-out tokens",),
    )
