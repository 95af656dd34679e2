"""Ranks: how a process joins the others, how ranks are started here, and how all end when one dies.

Under torchrun the environment says who this rank is; `launch` sets the same variables for ranks of
this machine. A rank that fails tells the others why through the store; one that dies without a word
stops its heartbeat. Either way every other rank ends with a message, also from inside a collective
that would never return.
"""

from __future__ import annotations

import faulthandler
import itertools
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from mogul.core.errors import ConfigError, MogulError
from mogul.parallel.watch import WAIT_LIMIT_S, Watch, is_left
from mogul.parallel.window import why_lost

HOST = "127.0.0.1"
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
"""Torch's word for a store that lives outside the ranks."""
_starts = itertools.count()
"""How often this process has joined others; all of them have as often."""


@dataclass(frozen=True)
class World:
    """This rank among the others."""

    rank: int
    size: int
    device: torch.device
    watch: Watch | None = None


def start(*, patience_s: float = 40.0) -> World:
    """Join the ranks that the environment names (torchrun's RANK, WORLD_SIZE, MASTER_ADDR...).

    NCCL on NVIDIA GPUs, Gloo on CPUs, or what torch names for the accelerator.

    Args:
        patience_s: how long a rank may show no sign of life before the others end.

    Raises:
        ConfigError: The environment names no rank.
    """
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except KeyError as missing:
        raise ConfigError(
            f"{missing} is not set: this process is no rank",
            fix="start it with torchrun, or mogul.parallel.launch",
        ) from None
    device = torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and not os.environ.get("MOGUL_CPU_RANKS"):
        index = int(os.environ.get("LOCAL_RANK", rank)) % torch.accelerator.device_count()
        device = torch.device(accelerator.type, index)
        torch.accelerator.set_device_index(index)
    wait = timedelta(seconds=WAIT_LIMIT_S)
    store = _common_store(rank, size, wait, patience_s)
    watch = Watch(rank, size, patience_s, store) if size > 1 else None  # joining can hang, too
    dist.init_process_group(
        dist.get_default_backend_for_device(device),
        store=PrefixStore("mogul", store),
        rank=rank,
        world_size=size,
        timeout=wait,
        device_id=device if device.type != "cpu" else None,
    )
    return World(rank, size, device, watch)


def _common_store(rank: int, size: int, wait: timedelta, patience_s: float) -> Store:
    """The store that all ranks of this run ask; that of an earlier run at this port is outwaited.

    It ends when its last rank has parted, which may be after the first of them has started again.
    One outside the ranks stays, and has a part for each start; one of an earlier run that outlives
    the patience is given as it is: the watch then says why.
    """
    end_s, number = time.monotonic() + patience_s, next(_starts)
    is_outside = os.environ.get(AGENT_STORE) == "True"
    while True:
        try:
            store, _, _ = next(rendezvous("env://", rank=rank, world_size=size, timeout=wait))
            if is_outside:
                return PrefixStore(f"start{number}", store)
            if rank == 0 or time.monotonic() > end_s or not is_left(store, size):
                return store
        except (dist.DistNetworkError, dist.DistStoreError):  # taken, or it ended while asked
            if time.monotonic() > end_s:
                raise
        time.sleep(0.1)


def stop(world: World) -> None:
    """Leave in order: the others are not alarmed. Who waits for them watches until they come."""
    dist.barrier()
    if world.watch is not None:
        world.watch.leave()
    dist.destroy_process_group()
    if world.watch is not None:
        world.watch.part()


def launch(
    function: Callable[..., Any],
    ranks: int,
    *args: Any,
    on_cpu: bool = False,
    threads: int | None = None,
    patience_s: float = 40.0,
    timeout_s: float | None = None,
) -> list[Any]:
    """Run `function(world, *args)` on `ranks` processes of this machine; returns their results.

    `function` and `args` must be importable and picklable. When one rank fails the others are
    ended.

    Raises:
        MogulError: A rank failed, with its traceback, or did not end in `timeout_s`.
    """
    context = multiprocessing.get_context("spawn")
    if on_cpu:  # one process imports the libraries, the ranks are forked from it
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["mogul.parallel", "mogul.models", "torch._dynamo"])
    # The store lives here, at a port that it found free itself: no rank's end takes it away.
    # libuv's server can end its process without a word.
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False, use_libuv=False)
    environment = {
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(store.port),
        AGENT_STORE: "True",
        "WORLD_SIZE": str(ranks),
        **({"MOGUL_CPU_RANKS": "1"} if on_cpu else {}),
    }
    with tempfile.TemporaryDirectory() as folder:
        work = (function, args, threads, patience_s, folder)
        processes = [
            context.Process(target=_run_rank, args=(rank, environment, *work), daemon=True)
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, Path(folder), timeout_s)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [
            torch.load(Path(folder) / f"{rank}.result", weights_only=False) for rank in range(ranks)
        ]


def _run_rank(
    rank: int,
    environment: dict[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
    threads: int | None,
    patience_s: float,
    folder: str,
) -> None:
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    if threads is not None:
        torch.set_num_threads(threads)
    world = None
    stack = (Path(folder) / f"{rank}.stack").open("w", encoding="utf-8")
    faulthandler.enable(stack)  # one that dies by a signal leaves where it stood
    try:
        world = start(patience_s=patience_s)
        result = function(world, *args)
        torch.save(result, Path(folder) / f"{rank}.result")
        stop(world)
    except BaseException as error:
        words = _explained(error)
        text = "".join(traceback.format_exception(error))
        (Path(folder) / f"{rank}.error").write_text(text, encoding="utf-8")
        if world is not None and world.watch is not None:
            world.watch.tell(words)
        sys.stderr.flush()
        os._exit(1)  # destroying the group would wait for collectives that never end


def _explained(error: BaseException) -> str:
    """What others are told of an error; what a lost device may mean goes to its notes, too."""
    words = f"{type(error).__name__}: {error}"
    if (hint := why_lost(error)) is None:
        return words
    error.add_note(hint)
    return f"{words.splitlines()[0]} ({hint})"


def _wait(processes: list[Any], folder: Path, timeout_s: float | None) -> None:
    """Until all ranks ended well; MogulError as soon as one did not."""
    end_s = None if timeout_s is None else time.monotonic() + timeout_s
    while any(process.is_alive() for process in processes):
        bad = [r for r, process in enumerate(processes) if process.exitcode not in (None, 0)]
        if bad:
            time.sleep(1.0)  # time for the others to say what they saw
            break
        if end_s is not None and time.monotonic() > end_s:
            raise MogulError(f"the ranks did not end in {timeout_s:.0f} s")
        processes[0].join(0.02)
    failed = [r for r, process in enumerate(processes) if process.exitcode not in (None, 0)]
    if not failed:
        return
    who, reason = _why(processes, folder, failed)
    raise MogulError(
        f"rank {who} of {len(processes)} failed (exit code {processes[who].exitcode}):\n{reason}",
        fix="mend the error of that rank; the others were ended",
    )


def _why(processes: list[Any], folder: Path, failed: list[int]) -> tuple[int, str]:
    """The rank to look at and what it left: those that died by a signal before who missed them."""
    told = sorted(folder.glob("*.error"), key=lambda file: file.stat().st_mtime)
    words = [file.read_text(encoding="utf-8") for file in told]
    died = [r for r in failed if processes[r].exitcode < 0 and not _left(folder, r, "error")]
    if not died and told:
        return int(told[0].stem), words[0]
    who = died[0] if died else failed[0]
    return who, "\n".join([_left(folder, who, "stack") or "it died without a word", *words[:1]])


def _left(folder: Path, rank: int, kind: str) -> str:
    """What a rank wrote of how it ended, if anything."""
    file = folder / f"{rank}.{kind}"
    return file.read_text(encoding="utf-8") if file.exists() else ""
