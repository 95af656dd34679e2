"""Upcycle a checkpoint on disk, tensor by tensor, into the layout MogeForCausalLM saves.

Memory holds one dense FFN matrix and one expert of it at a time, whatever the size of the model:
the names, shapes and bytes of every output tensor follow from the headers, so files are planned
first and then written from front to back. The output folder appears whole or not at all.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

from mogul.core.errors import ArtifactError
from mogul.core.files import atomic_folder, check_space
from mogul.core.units import GB, show_bytes
from mogul.models.load import find_folder
from mogul.models.moge.configuration_moge import MogeConfig
from mogul.models.new_checkpoint import check_out, copy_files, write_weights
from mogul.models.upcycle.card import UpcycleReport, model_card
from mogul.models.upcycle.jobs import Job, Maker, list_jobs
from mogul.models.upcycle.plan import UpcyclePlan, moge_config
from mogul.models.upcycle.source import dense_config, dense_tensors
from mogul.spec.families import model_spec

MAX_FILE_BYTES = 2 * GB


def upcycle_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    num_experts: int,
    num_groups: int,
    top_k: int | None = None,
    seed: int = 0,
    noise: float = 0.0,
    max_file_bytes: int = MAX_FILE_BYTES,
    force: bool = False,
) -> UpcycleReport:
    """Stream a dense checkpoint folder into a MoGE checkpoint folder of the same dtypes.

    The tensors equal those of `upcycle` on the loaded model with the same arguments. Tokenizer,
    chat template, generation config and licence are copied along.

    Args:
        source: folder with config.json and safetensors, or a hub id.
        out: new folder; an existing one is refused unless `force`.
        num_experts: experts in every layer (E).
        num_groups: groups (M).
        top_k: picks a token; only `num_groups` is possible.
        seed: seed of router rows and noise.
        noise: share of each expert's inner columns drawn anew; above 0 equality is lost.
        max_file_bytes: largest weight file, unless one tensor is larger.
        force: replace an existing checkpoint folder at the end.

    Raises:
        ConfigError: the model or the numbers do not fit.
        ArtifactError: the source is damaged or incomplete, or the disk is full; nothing is kept.
    """
    source, out = find_folder(source), Path(out)
    plan = UpcyclePlan(
        num_experts=num_experts, num_groups=num_groups, top_k=top_k, seed=seed, noise=noise
    )
    check_out(source, out, force)
    dense = dense_config(source)
    config = moge_config(dense, plan)
    stored = dense_tensors(source, dense)
    jobs = list(list_jobs(stored, plan))
    config.dtype = next(job.entry.dtype for job in jobs if job.is_routed)
    report = _report(out, jobs, plan, config)
    with atomic_folder(out, force=force) as work, _full_disk_named(report):
        check_space(out, report.num_bytes)
        config.save_pretrained(work)
        copy_files(source, work)
        (work / "README.md").write_text(model_card(source.resolve().name, report), encoding="utf-8")
        maker = Maker(stored, plan, config.initializer_range)
        job_of = {job.entry.name: job for job in jobs}
        write_weights(
            work,
            [job.entry for job in jobs],
            lambda file, entry: maker.write(file, job_of[entry.name]),
            title="upcycle",
            num_params=report.params,
            max_file_bytes=max_file_bytes,
        )
    return report


@contextmanager
def _full_disk_named(report: UpcycleReport) -> Iterator[None]:
    """Turn a full disk into an error that names the bytes needed and free."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free_bytes = shutil.disk_usage(report.folder.parent).free
        raise ArtifactError(
            f"writing {report.folder} failed ({error.strerror or error}): it needs "
            f"{show_bytes(report.num_bytes)}, {show_bytes(free_bytes)} are free; nothing was kept",
            fix="free some space or choose another place",
        ) from error


def _report(out: Path, jobs: list[Job], plan: UpcyclePlan, config: MogeConfig) -> UpcycleReport:
    return UpcycleReport(
        folder=out,
        plan=plan,
        expert_width=config.moe_intermediate_size,
        params=sum(prod(job.entry.shape) for job in jobs),
        active_params=model_spec(config.to_dict()).active_params(),
        num_bytes=sum(job.entry.num_bytes for job in jobs),
    )
