"""How long does the command line keep a person waiting before it answers?

Minimum of 5 runs, user + system CPU time of the whole process, against the limits promised.
Exits 1 when one is broken. `--record` adds rows to the ledger.
"""

from __future__ import annotations

import resource
import subprocess
import sys

from mogul.bench import ledger
from mogul.cli.main import VERBS
from mogul.core.table import Table

RUNS = 5
CASES = {
    "bare interpreter": (["-c", "pass"], None),
    "import mogul": (["-c", "import mogul"], 0.1),
    "mogul --help": (["-m", "mogul.cli.main", "--help"], 0.2),
    **{f"mogul {verb} --help": (["-m", "mogul.cli.main", verb, "--help"], 0.5) for verb in VERBS},
    "mogul info preset:pangu-pro-moe-72b": (
        ["-m", "mogul.cli.main", "info", "preset:pangu-pro-moe-72b"],
        1.0,
    ),
}


def cpu_s(args: list[str]) -> float:
    """User and system time of one run of the interpreter."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *args], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    """Measure every case in turn, RUNS times."""
    seen: dict[str, list[float]] = {case: [] for case in CASES}
    for _ in range(RUNS):
        for case, (args, _limit) in CASES.items():
            seen[case].append(cpu_s(args))
    least = {case: min(times) for case, times in seen.items()}
    rows = [(case, least[case], limit) for case, (_, limit) in CASES.items()]
    Table("CPU seconds, minimum of 5", ("command", "s", "limit"), rows).show()
    if "--record" in sys.argv:
        ledger.append(
            ledger.row(
                bench="cli",
                case=case,
                metric="cpu_time_min",
                unit="s",
                value=round(value, 4),
                limit=limit,
                runs=RUNS,
            )
            for case, value, limit in rows
        )
    return int(any(limit is not None and value > limit for _, value, limit in rows))


if __name__ == "__main__":
    sys.exit(main())
