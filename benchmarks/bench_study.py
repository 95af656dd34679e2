"""What grouped routing costs or gains against plain top-k at equal budget: runs and their table.

python benchmarks/bench_study.py run --tokens tokens --seeds 0 1 2          the missing runs
python benchmarks/bench_study.py run --scale recipes/study-mini.toml ...    at another scale
python benchmarks/bench_study.py table                                     what is known so far

Runs that stand in `benchmarks/study.jsonl` are not run again, a run that was cut off resumes from
its last checkpoint: the study can be done in pieces. Several runs share one device with `--jobs`;
tokens/s is then left out. Started once a device with one `--out`, it divides the runs among them.
All variants of a seed see the same batches in the same order.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import NormalDist, mean, stdev
from typing import Any, TextIO

RESULTS = Path("benchmarks/study.jsonl")
VARIANTS = ("topk-aux", "topk-bias", "moge2", "moge4", "moge8")
TURN = ("topk-aux", "moge8", "moge4", "topk-bias", "moge2")  # what matters most comes first
SECOND = ("smollm2-dense", "smollm2-moge2", "smollm2-moge4")  # continued dense or upcycled
DEVICES = (2, 4, 8)
BATCHES = (16, 64, 512)  # tokens of a forward for which device balance is told
SAMPLED = 16_384  # held-out tokens whose picks are looked at
POWER = 0.8
TRIES = 2  # of a run whose process died, with --in-process


def main() -> int:
    """Run, or show the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "one", "table"))
    parser.add_argument("--variants", nargs="+", default=TURN, choices=VARIANTS + SECOND)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--scale", type=Path, help="a recipe laid over every variant")
    parser.add_argument("--tokens", help="token folder; default: the recipe's")
    parser.add_argument("--dense", help="dense checkpoint of the second question; the recipe's")
    parser.add_argument("--set", action="append", default=[], help="section.key=value")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time on one device")
    parser.add_argument("--in-process", action="store_true", help="one after the other, in here")
    parser.add_argument("--windows", type=int, help="held-out windows, evenly spread; all")
    parser.add_argument("--record", action="store_true", help="add the table to the ledger")
    parser.add_argument("--picture", type=Path, help="PNG of the first question's runs")
    parser.add_argument("--deadline-s", type=float, help="begin no run after this many seconds")
    parser.add_argument("--stop-s", type=float, help="stop every run after this many seconds")
    options = parser.parse_args()
    if options.what == "table":
        results = read_results(options.results)
        show(results)
        if options.picture:
            draw(results, options.picture)
        if options.record:
            record(results)
        return 0
    if options.what == "one":
        return run_one(options, options.variants[0], options.seeds[0])
    return run_all(options)


def scale_name(options: argparse.Namespace, variant: str) -> str:
    """The name under which results are kept."""
    if variant in SECOND:
        return "study-smollm2"
    return options.scale.stem if options.scale else "study"


def read_results(file: Path) -> list[dict[str, Any]]:
    """Every finished run."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------------------------- many runs


def run_all(options: argparse.Namespace) -> int:
    """Start what is missing, `--jobs` at a time, seed after seed; what was begun comes first."""
    options.out.mkdir(parents=True, exist_ok=True)
    waiting = [(variant, seed) for seed in options.seeds for variant in options.variants]
    waiting.sort(
        key=lambda key: not (options.out / run_name(options, *key) / "checkpoints").exists()
    )
    if options.in_process:
        return run_here(options, waiting)
    start_s, failed = time.monotonic(), 0
    running: dict[tuple[str, int], tuple[subprocess.Popen[bytes], TextIO]] = {}
    while waiting or running:
        elapsed_s = time.monotonic() - start_s
        if options.deadline_s is not None and elapsed_s > options.deadline_s and waiting:
            print(f"{len(waiting)} runs are left for another time", flush=True)
            waiting.clear()
        while waiting and len(running) < options.jobs:
            key = waiting.pop(0)
            if (lock := claim(options, *key)) is not None:
                running[key] = start(options, *key), lock
        for key, (process, lock) in list(running.items()):
            if options.stop_s is not None and elapsed_s > options.stop_s:
                process.terminate()  # it saves and stops
            if (code := process.poll()) is not None:
                print(f"{elapsed_s:.0f} s: {key} ended with {code}", flush=True)
                failed += code != 0
                lock.close()
                del running[key]
        time.sleep(0.5)
    return 1 if failed else 0


def run_here(options: argparse.Namespace, waiting: list[tuple[str, int]]) -> int:
    """One run after the other in this process: its start and its compiler are paid for once."""
    import gc

    import torch

    start_s, stopped = time.monotonic(), threading.Event()

    def stop() -> None:
        stopped.set()
        os.kill(os.getpid(), signal.SIGTERM)  # the running step ends, is saved, and that is all

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))  # between two runs
    timer = threading.Timer(options.stop_s or 1e9, stop)
    timer.daemon = True
    timer.start()
    for variant, seed in waiting:
        is_late = time.monotonic() - start_s > (options.deadline_s or math.inf)
        if is_late or stopped.is_set() or (lock := claim(options, variant, seed)) is None:
            continue
        with lock:
            print("begun", file=lock, flush=True)
            code = run_one(options, variant, seed)
            print("ended", file=lock, flush=True)
        print(
            f"{time.monotonic() - start_s:.0f} s: {(variant, seed)} ended with {code}", flush=True
        )
        gc.collect()
        torch.compiler.reset()
        torch.accelerator.empty_cache() if torch.accelerator.is_available() else None
    timer.cancel()
    return 0


def run_name(options: argparse.Namespace, variant: str, seed: int) -> str:
    """Of a run's folder and its log."""
    return f"{scale_name(options, variant)}-{variant}-{seed}"


def claim(options: argparse.Namespace, variant: str, seed: int) -> TextIO | None:
    """A lock on a run that is missing; None where it is done, fails always, or another has it."""
    lock = (options.out / f"{run_name(options, variant, seed)}.lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    lock.seek(0)
    history = lock.read().split()
    fails = history.count("begun") - history.count("ended") >= TRIES
    done = {(r["scale"], r["variant"], r["seed"]) for r in read_results(options.results)}
    if fails or (scale_name(options, variant), variant, seed) in done:
        lock.close()
        return None
    return lock


def start(options: argparse.Namespace, variant: str, seed: int) -> subprocess.Popen[bytes]:
    """One run as a process of its own."""
    command = [
        sys.executable, __file__, "one", "--variants", variant, "--seeds", str(seed),
        "--out", str(options.out), "--results", str(options.results),
        "--jobs", str(options.jobs),
    ]  # fmt: skip
    command += ["--scale", str(options.scale)] if options.scale else []
    command += ["--tokens", options.tokens] if options.tokens else []
    command += ["--dense", options.dense] if options.dense else []
    command += ["--windows", str(options.windows)] if options.windows else []
    command += [word for change in options.set for word in ("--set", change)]
    with (options.out / f"{run_name(options, variant, seed)}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


# ------------------------------------------------------------------------------------ one run


def changes_of(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """A recipe's tables as `section.key=value`."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from changes_of(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={json.dumps(value)}"


def run_one(options: argparse.Namespace, variant: str, seed: int) -> int:
    """Train one variant (or go on with it), look at it, add a line of results."""
    from mogul.core.errors import ArtifactError
    from mogul.train.metrics import METRICS_FILE, read_lines
    from mogul.train.recipe_file import read_recipe
    from mogul.train.session import Session

    changes = [f"run.seed={seed}"]
    if variant in SECOND:
        place = "model.upcycle" if "moge" in variant else "model"
        changes += [f"{place}.checkpoint={options.dense}"] if options.dense else []
        changes += [f"{place}.seed={seed}"] if "moge" in variant else []
    if options.tokens:
        changes.append(f"data.sources={json.dumps([options.tokens])}")
    if options.scale:
        changes += changes_of(tomllib.loads(options.scale.read_text(encoding="utf-8")))
    recipe = read_recipe(f"recipes/study-{variant}.toml", [*changes, *options.set])
    folder = options.out / run_name(options, variant, seed)
    try:
        session = Session(recipe, folder, resume=folder.exists())
    except ArtifactError:  # cut off before its first checkpoint
        session = Session(recipe, folder)
    with session:
        if not session.run():
            return 3
        config: Any = session.model.config
        found = {
            "scale": scale_name(options, variant),
            "variant": variant,
            "seed": seed,
            "steps": session.step,
            "tokens": session.tokens,
            "epochs": round(session.tokens / session.stream.tokens_per_epoch, 3),
            "parameters": session.model.num_parameters(),
            **held_out(session.model, recipe, config, options.windows),
        }
    lines = read_lines(folder / METRICS_FILE)
    speeds = sorted(line["tokens_per_s"] for line in lines[len(lines) // 4 :])
    found["tokens_per_s"] = round(speeds[len(speeds) // 2]) if options.jobs == 1 else None
    found["runs_at_a_time"] = options.jobs
    found |= provenance(session.device)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with options.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(found) + "\n")
    return 0


def provenance(device: Any) -> dict[str, Any]:
    """Device, versions, commit."""
    import torch

    from mogul.bench.ledger import row

    name = ""
    if device.type != "cpu":
        name = str(torch.get_device_module(device).get_device_name(device))
    known = row(device=name, bench="study", case="", metric="", unit="", value=0, runs=1)
    return {key: known[key] for key in ("date", "commit", "device", "versions")}


def held_out(model: Any, recipe: Any, config: Any, count: int | None) -> dict[str, Any]:
    """Bits per byte and the balance of the experts on held-out text."""
    import torch

    from mogul.observe.recorder import record_routing
    from mogul.train.data import held_out_windows
    from mogul.train.evaluate import held_out_loss

    windows = held_out_windows(recipe.data, recipe.run.sequence_length, count=count)
    with torch.compiler.set_stance("force_eager"):
        loss = held_out_loss(model, windows, batch_size=16)
        found = {"bits_per_byte": loss.bits_per_byte, "held_out_tokens": loss.tokens}
        if not getattr(config, "num_experts", 0):
            return found
        few = windows.spread(min(len(windows), max(1, SAMPLED // windows.length)))
        with record_routing(model) as recording:
            held_out_loss(model, few, batch_size=16)
    return found | balance_numbers(recording.ids(), config.num_experts, config.router_n_groups)


def balance_numbers(ids: Any, num_experts: int, num_groups: int) -> dict[str, Any]:
    """MaxVio over all tokens; rho and delta by devices and batch; means over layers [l, T, K]."""
    import numpy as np

    from mogul.spec import balance

    rows = [balance.rows_per_expert(layer, num_experts) for layer in ids]
    found: dict[str, Any] = {
        "max_vio": mean(balance.max_violation(one) for one in rows),
        "max_vio_in_groups": mean(balance.max_violation_in_groups(o, num_groups) for o in rows),
        "dead_experts": int(sum((one == 0).sum() for one in rows)),
        "rho": {},
        "delta": {},
    }
    # A decode step holds tokens of many sequences: windows are interleaved, not cut.
    for batch in BATCHES:
        if not (steps := ids.shape[1] // batch):
            continue  # fewer held-out tokens than one such step
        cut = ids[:, : steps * batch].reshape(len(ids), batch, steps, -1)
        some = cut[:, :, :: max(1, steps // 64)].swapaxes(1, 2).reshape(-1, batch, ids.shape[2])
        for devices in DEVICES:
            owner = np.arange(num_experts) // (num_experts // devices)
            loads = [balance.rows_per_device(one, owner, devices) for one in some]
            reads = [balance.distinct_per_device(one, owner, devices) for one in some]
            key = f"D{devices} T{batch}"
            found["rho"][key] = mean(balance.rho(one) for one in loads)
            found["delta"][key] = mean(balance.delta(one) for one in reads)
    return found


# -------------------------------------------------------------------------------------- table


def t_quantile(share: float, freedom: int) -> float:
    """Student's t by the expansion of Cornish and Fisher; within 1 % from 4 degrees on."""
    z = NormalDist().inv_cdf(share)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def detectable(values: Mapping[str, list[float]]) -> tuple[float, float] | None:
    """Pooled sd of the seeds, and the difference of two means found at 5 % with 80 % power."""
    groups = [found for found in values.values() if len(found) > 1]
    freedom = sum(len(found) - 1 for found in groups)
    if not freedom:
        return None
    pooled = (sum((len(f) - 1) * stdev(f) ** 2 for f in groups) / freedom) ** 0.5
    seeds = min(len(found) for found in groups)
    factor = t_quantile(0.975, freedom) + t_quantile(POWER, freedom)
    return pooled, factor * pooled * (2 / seeds) ** 0.5


def show(results: list[dict[str, Any]]) -> None:
    """One table a scale."""
    from mogul.core.table import Table

    for scale in dict.fromkeys(result["scale"] for result in results):
        runs = [result for result in results if result["scale"] == scale]
        names = dict.fromkeys((*VARIANTS, *SECOND, *(r["variant"] for r in runs)))
        by = {v: [r for r in runs if r["variant"] == v] for v in names}
        bits = {v: [r["bits_per_byte"] for r in found] for v, found in by.items() if found}
        first = runs[0]
        size = f"{first['parameters'] / 1e6:.1f}M parameters, {first['tokens'] / 1e6:.0f}M tokens"
        notes = [
            f"{size} ({first['epochs']} epochs), {first['device']}",
            "rho and delta: D devices, T tokens a step, held-out text",
        ]
        if spread := detectable(bits):
            notes.append(
                f"sd over seeds {spread[0]:.4f}; smallest detectable difference {spread[1]:.4f} "
                f"bits a byte (5 %, power {POWER:.0%})"
            )
        notes += differences(runs)
        columns = (
            *("variant", "seeds", "bits/byte", "sd", "MaxVio", "dead"),
            *("rho D8 T16", "rho D8 T512", "delta D8 T16", "tokens/s"),
        )
        rows = [summary(variant, found) for variant, found in by.items() if found]
        Table(title=scale, columns=columns, rows=rows, notes=notes).show()


def gaps_by_seed(runs: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Each variant less the first, seed by seed: both saw the same batches."""
    by: dict[str, dict[int, float]] = {}
    for run in runs:
        by.setdefault(run["variant"], {})[run["seed"]] = run["bits_per_byte"]
    names = [name for name in (*VARIANTS, *SECOND) if name in by]
    found = {}
    for name in names[1:]:
        common = sorted(set(by[name]) & set(by[names[0]]))
        if common:
            found[f"{name} less {names[0]}"] = [by[name][s] - by[names[0]][s] for s in common]
    return found


def differences(runs: list[dict[str, Any]]) -> list[str]:
    """What the gaps say, and the smallest mean gap that would be found."""
    gaps = gaps_by_seed(runs)
    found = []
    for name, each in gaps.items():
        spread = f", sd {stdev(each):.4f}" if len(each) > 1 else ""
        found.append(f"{name}: {mean(each):+.4f}{spread} ({len(each)} common seeds)")
    if spread := detectable(gaps):
        smallest = spread[1] / 2**0.5  # one mean against 0, not two against each other
        found.append(
            f"seed by seed: pooled sd {spread[0]:.4f}, smallest detectable difference "
            f"{smallest:.4f} bits a byte"
        )
    return found


def draw(results: list[dict[str, Any]], file: Path) -> None:
    """Every run of the largest scale of the first question as a dot."""
    from mogul.draw.chart import Chart, Series
    from mogul.draw.png import save_png

    first = [r for r in results if r["variant"] in VARIANTS]
    largest = max(first, key=lambda run: (run["parameters"], run["tokens"]))["scale"]
    runs = [run for run in first if run["scale"] == largest]
    names = [v for v in VARIANTS if any(run["variant"] == v for run in runs)]
    series = []
    for seed in sorted({run["seed"] for run in runs}):
        bits = {run["variant"]: run["bits_per_byte"] for run in runs if run["seed"] == seed}
        there = [name for name in names if name in bits]
        dots = [bits[name] for name in there]
        series.append(Series(name=f"seed {seed}", x=there, y=dots, kind="dots"))
    size = f"{runs[0]['parameters'] / 1e6:.0f}M parameters, {runs[0]['tokens'] / 1e6:.0f}M tokens"
    chart = Chart(
        title="What grouping costs",
        x_label=f"routing ({size})",
        y_label="held-out bits per byte",
        series=series,
        caption="Every dot is a training; the same seed, the same batches.",
    )
    save_png(chart, file)


def record(results: list[dict[str, Any]]) -> None:
    """One ledger row a scale and variant, with device, versions and commit of the runs."""
    from mogul.bench.ledger import append, row

    rows = []
    for scale, variant in dict.fromkeys((r["scale"], r["variant"]) for r in results):
        runs = [r for r in results if (r["scale"], r["variant"]) == (scale, variant)]
        bits = [run["bits_per_byte"] for run in runs]
        is_laid = scale != "study" and variant not in SECOND
        laid = f" --scale recipes/{scale}.toml" if is_laid else ""
        rows.append(
            row(
                **{key: runs[-1][key] for key in ("device", "date", "commit", "versions")},
                bench="study",
                case=f"{scale} {variant}, {runs[0]['tokens'] / 1e6:.3g}M tokens",
                metric="held-out bits per byte",
                unit="bits/byte",
                value=round(mean(bits), 5),
                spread=[round(min(bits), 5), round(max(bits), 5)],
                runs=len(runs),
                max_vio=[round(run["max_vio"], 3) for run in runs if "max_vio" in run],
                command=f"python benchmarks/bench_study.py run{laid} --variants {variant}",
            )
        )
    append(rows)


def summary(variant: str, found: list[dict[str, Any]]) -> tuple[Any, ...]:
    """One row: means over seeds."""
    bits = [run["bits_per_byte"] for run in found]
    speeds = [run["tokens_per_s"] for run in found if run["tokens_per_s"]]
    spread = f"{stdev(bits):.4f}" if len(bits) > 1 else None
    balance: tuple[str | None, ...] = (None,) * 5  # a dense model has none
    if seen := [run for run in found if "rho" in run]:  # lacks where a run was cut off at its end
        vio = f"{mean(run['max_vio'] for run in seen):.2f}"
        dead = f"{mean(run['dead_experts'] for run in seen):.1f}"
        asked = (("rho", "D8 T16"), ("rho", "D8 T512"), ("delta", "D8 T16"))
        balance = (vio, dead, *(mean_of(seen, what, key) for what, key in asked))
    speed = round(mean(speeds)) if speeds else None
    return (variant, len(found), f"{mean(bits):.4f}", spread, *balance, speed)


def mean_of(runs: list[dict[str, Any]], what: str, key: str) -> str | None:
    """Mean over the runs that know it: too few held-out tokens tell nothing of large steps."""
    found = [run[what][key] for run in runs if key in run[what]]
    return f"{mean(found):.3f}" if found else None


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
