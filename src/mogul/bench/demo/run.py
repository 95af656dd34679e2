"""Run the three acts one after the other and write the report."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

import mogul.models  # noqa: F401  # registers the "mogul" experts implementation
from mogul.bench.demo.balance import BalanceResult, act_balance
from mogul.bench.demo.cast import DemoSettings, Name, free_memory, load_dense, with_experts
from mogul.bench.demo.exact import ExactResult, act_exact
from mogul.bench.demo.learning import act_learning
from mogul.bench.demo.report import DemoResult, write_report
from mogul.bench.demo.tables import balance_table, exact_table, learning_table
from mogul.core.files import check_space, check_writable
from mogul.core.log import say
from mogul.core.table import Table
from mogul.core.units import MB, show_bytes, show_s
from mogul.train.data import shipped_text, token_windows

Show = Callable[[Table], None]

REPORT_BYTES = 8 * MB
"""Room for page, numbers and figures."""


def run_demo(
    checkpoint: Path,
    folder: Path,
    settings: DemoSettings | None = None,
    *,
    show: Show = Table.show,
    model: str = "",
) -> DemoResult:
    """Play the three acts on a dense checkpoint and write `folder`/report.html and report.json.

    Args:
        checkpoint: Folder of a dense model that can be upcycled, with its tokenizer.
        folder: Where the report goes; files of the same names are replaced.
        settings: How large the demo is.
        show: Gets the table of each act when it ends.
        model: The model's name in the report; the folder's name by default.
    """
    settings = settings or DemoSettings()
    _check_folder(folder)
    seconds: dict[str, float] = {}
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with _quiet(), _clock(seconds, "all"):
        exact, balance = _first_two_acts(checkpoint, tokenizer, settings, seconds, show)
        free_memory()
        say("\nAct 3, it trains")
        with _clock(seconds, "act 3"):
            learning = act_learning(checkpoint, tokenizer, settings)
        show(learning_table(learning))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    result = DemoResult(
        model=model or checkpoint.name,
        settings=settings,
        exact=exact,
        balance=balance,
        learning=learning,
        seconds=seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_memory_bytes=peak_memory_bytes(),
        versions={name: version(name) for name in ("mogul", "torch", "transformers", "numpy")},
        machine=_machine(),
        command=["mogul", *sys.argv[1:]],
    )
    path = write_report(result, folder)
    say(
        f"\n{show_s(seconds['all'], 0)}, peak memory {show_bytes(result.peak_memory_bytes)}. "
        f"The report: {path} (numbers: {path.with_name('report.json')})"
    )
    return result


def _check_folder(folder: Path) -> None:
    """Find out before five minutes of work whether the report can be written."""
    check_writable(folder / "report.html")
    check_space(folder, REPORT_BYTES)


def _first_two_acts(
    checkpoint: Path,
    tokenizer: Any,
    settings: DemoSettings,
    seconds: dict[str, float],
    show: Show,
) -> tuple[ExactResult, BalanceResult]:
    """Acts 1 and 2 share the untrained models, which are gone when this returns."""
    grouping, twin_grouping = settings.grouping, settings.twin_grouping
    say(
        f"Act 1, exact: upcycling to {grouping.num_experts} experts in {grouping.num_groups} "
        f"groups, and to the twin, {twin_grouping.num_experts} copies of the FFN"
    )
    with _clock(seconds, "act 1"):
        dense = load_dense(checkpoint)
        moge = with_experts(dense, "MoGE", settings)
        twin = with_experts(dense, "twin", settings)
        exact = act_exact(dense, moge, twin, tokenizer, settings)
    show(exact_table(exact))
    say("\nAct 2, balance")
    with _clock(seconds, "act 2"):
        windows = token_windows(shipped_text().held_out, tokenizer, settings.context_tokens)
        models: dict[Name, Any] = {"MoGE": moge, "twin": twin}
        balance = act_balance(models, windows.spread(settings.sequences), settings)
    show(balance_table(balance))
    return exact, balance


@contextmanager
def _clock(seconds: dict[str, float], name: str) -> Iterator[None]:
    start_s = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start_s


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Transformers' own progress bars; ours say what happens."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _machine() -> dict[str, Any]:
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
