"""Speed and accuracy of the simulator, for the ledger.

Question: how long do one point, a search of 1,000 deployments, an event and the shell command
take, and do the accuracy bars hold? Times are user + system CPU, the minimum of 5 runs.

    python benchmarks/sim/bench_simulate.py [--record]
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable

from mogul.bench import ledger
from mogul.core.table import Table
from mogul.simulate.run import Setting, predict
from mogul.simulate.serve import poisson, serve
from mogul.simulate.sweep import search
from mogul.simulate.validate.scoreboard import NEEDS_WHEEL, SETS, scores
from mogul.spec.families import model_spec
from mogul.spec.hardware import hardware
from mogul.spec.presets import config
from mogul.spec.quant import scheme
from mogul.spec.workload import Workload

COMMAND = "python benchmarks/sim/bench_simulate.py --record"
SHELL = ("-m", "mogul.cli.main", "simulate", "run", "preset:qwen3-30b-a3b", "--batch", "16")


def cpu_s(work: Callable[[], object], runs: int = 5) -> float:
    """Least user + system time of some runs."""
    times = []
    for _ in range(runs):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def shell_s() -> float:
    """CPU time of the command from the shell."""
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *SHELL], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


def speeds() -> list[tuple[str, str, str, float, float]]:
    """(case, metric, unit, value, bar)."""
    model, device = model_spec(config("deepseek-v3")), hardware("h200")
    qwen = model_spec(config("qwen3-30b-a3b"))
    point = iter(range(64, 128))  # another batch each time: nothing is remembered

    def one_point() -> None:
        setting = Setting(qwen, device)
        predict(setting, Workload(batch=next(point)))

    counts: list[int] = []

    def sweep() -> None:
        quants = [scheme("fp8"), scheme("w4a8"), scheme("nvfp4")]
        load = Workload(input_tokens=4000, output_tokens=1000)
        found = search(model, device, load, device_counts=(8, 16), quants=quants)
        counts.append(len(found.points))

    sweep_s = cpu_s(sweep, runs=1)
    arrivals = poisson(8, 400, 1024, 512)
    steps = serve(Setting(qwen, device), arrivals).num_steps
    events_s = cpu_s(lambda: serve(Setting(qwen, device), arrivals), runs=3)
    return [
        ("one point, Qwen3-30B-A3B", "cpu_s", "s", cpu_s(one_point), 0.05),
        ("1,000 deployments, DeepSeek-V3", "cpu_s", "s", sweep_s / counts[-1] * 1000, 20.0),
        ("events, Qwen3-30B-A3B", "steps_per_s", "1/s", steps / events_s, 10_000),
        ("mogul simulate run, from the shell", "cpu_s", "s", shell_s(), 1.0),
    ]


def main() -> None:
    """Measure, print, record."""
    found = speeds()
    rows = [(case, metric, round(value, 4), bar) for case, metric, _, value, bar in found]
    Table("Speed of the simulator", ("case", "metric", "value", "bar"), rows).show()
    records = [
        {"bench": "simulate-speed", "case": case, "metric": metric, "unit": unit,
         "value": round(value, 5), "bar": bar, "runs": 5, "command": COMMAND}
        for case, metric, unit, value, bar in found
    ]  # fmt: skip
    names = tuple(name for name in SETS if name not in NEEDS_WHEEL)
    names += NEEDS_WHEEL if "--wheel" in sys.argv else ()
    for score in scores(names):
        for bar in score.bars:
            print(f"{bar.set_name}: {bar.metric} {bar.value:.4f}, bar {bar.limit}, {bar.holds}")
            records.append(
                {"bench": "simulate-accuracy", "case": bar.set_name, "metric": bar.metric,
                 "unit": "ratio", "value": round(bar.value, 4), "bar": bar.limit,
                 "holds": bar.holds, "runs": 1, "command": COMMAND}
            )  # fmt: skip
    if "--record" in sys.argv:
        ledger.append(ledger.row(**record) for record in records)


if __name__ == "__main__":
    main()
