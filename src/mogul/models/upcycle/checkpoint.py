"""Upcycle a checkpoint on disk, tensor by tensor, into the layout MogeForCausalLM saves.

Memory holds one dense FFN matrix and one expert of it at a time, whatever the size of the model:
the names, shapes and bytes of every output tensor follow from the headers, so files are planned
first and then written from front to back. The output folder appears whole or not at all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from mogul.core.errors import ArtifactError, ConfigError
from mogul.core.files import atomic_folder, check_space
from mogul.core.log import ProgressBar, progress, say
from mogul.core.units import GB, show_bytes
from mogul.models.load import find_folder, load_config
from mogul.models.upcycle.algebra import Part, expert_matrix, ffn_part, router_name, router_weight
from mogul.models.upcycle.card import COPIED_FILES, WEIGHT_FILES, UpcycleReport, model_card
from mogul.models.upcycle.plan import DENSE_MODELS, UpcyclePlan, check_dense, moge_config
from mogul.models.upcycle.tensor_file import (
    INDEX,
    NewTensor,
    StoredTensor,
    header_of,
    split_in_files,
    stored_tensors,
    write_tensor,
)

MAX_FILE_BYTES = 2 * GB


@dataclass(frozen=True, slots=True)
class _Job:
    """One output tensor and what it is made from."""

    entry: NewTensor
    source: str
    """Dense tensor it is cut from or copied from."""
    layer: int = 0
    part: Part | None = None
    """None: the dense tensor as it is."""
    expert: int = 0


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
    _check_out(source, out, force)
    dense = _dense_config(source)
    config = moge_config(dense, plan)
    places = _checked_tensors(source, dense)
    jobs = list(_jobs(places, plan))
    config.dtype = next(job.entry.dtype for job in jobs if job.part)
    report = _report(out, jobs, plan, config.moe_intermediate_size)
    with atomic_folder(out, force=force) as work:
        check_space(out, report.num_bytes)
        config.save_pretrained(work)
        _copy_files(source, work)
        (work / "README.md").write_text(model_card(source.resolve().name, report), encoding="utf-8")
        try:
            _write_weights(work, places, jobs, config, plan, max_file_bytes)
        except OSError as error:
            free_bytes = shutil.disk_usage(out.parent).free
            raise ArtifactError(
                f"writing {out} failed ({error.strerror or error}): it needs "
                f"{show_bytes(report.num_bytes)}, {show_bytes(free_bytes)} are free; nothing was "
                "kept",
                fix="free some space or choose another place",
            ) from error
    return report


def _check_out(source: Path, out: Path, force: bool) -> None:
    """Keep a forced replacement from destroying the source or anything but a checkpoint."""
    if out.resolve() in (source.resolve(), *source.resolve().parents):
        raise ConfigError(f"{out} holds the source {source}", fix="choose another --out")
    has_content = out.is_dir() and any(out.iterdir())
    if has_content and force and not (out / "config.json").exists():
        raise ConfigError(
            f"{out} is no checkpoint (it has no config.json), so --force does not replace it",
            fix="choose another --out",
        )
    if has_content and not force:
        raise ConfigError(f"{out} exists already", fix="choose another --out, or pass --force")


def _dense_config(source: Path) -> PreTrainedConfig:
    config = load_config(source)
    kind = config.model_type
    check_dense(config, (config.architectures or [DENSE_MODELS.get(kind, kind)])[0])
    return config


def _checked_tensors(source: Path, config: PreTrainedConfig) -> dict[str, StoredTensor]:
    """Find exactly the tensors the dense model has, in its order; ArtifactError otherwise."""
    places = stored_tensors(source)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    want = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    for name in sorted(places.keys() - want.keys()):
        if name.endswith("rotary_emb.inv_freq"):  # buffers of early Llama checkpoints
            del places[name]
    if config.tie_word_embeddings and "lm_head.weight" in places:
        _check_tied(places)
        del places["lm_head.weight"]
    problems = {
        "lacks": sorted(want.keys() - places.keys()),
        "has surplus": sorted(places.keys() - want.keys()),
        "has misshaped": [
            f"{name} {list(places[name].shape)} instead of {list(shape)}"
            for name, shape in want.items()
            if name in places and places[name].shape != shape
        ],
    }
    for what, names in problems.items():
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ArtifactError(
                f"{source} {what} tensors: {', '.join(names[:5])}{more}",
                fix="check that config.json and the weights belong together",
            )
    return {name: places[name] for name in want}


def _check_tied(places: dict[str, StoredTensor]) -> None:
    pair = places["lm_head.weight"], places["model.embed_tokens.weight"]
    if pair[0].num_bytes != pair[1].num_bytes or any(
        mine != other for mine, other in zip(*(place.chunks() for place in pair), strict=True)
    ):
        raise ArtifactError(
            "tie_word_embeddings is true, but lm_head.weight differs from the embeddings",
            fix="set tie_word_embeddings to false in config.json, or drop lm_head.weight",
        )


def _jobs(places: dict[str, StoredTensor], plan: UpcyclePlan) -> Iterator[_Job]:
    """List the output tensors; those of one dense matrix follow each other."""
    for name, place in places.items():
        found = ffn_part(name)
        if found is None:
            yield _Job(NewTensor(name, place.shape, place.dtype), name)
            continue
        layer, part = found
        if part is Part.GATE:
            shape = (plan.num_experts, place.shape[1])
            entry = NewTensor(router_name(layer), shape, place.dtype)
            yield _Job(entry, name, layer, Part.ROUTER)
        shape = _expert_shape(place.shape, part, plan)
        for expert in range(plan.num_experts):
            expert_name = name.replace(".mlp.", f".mlp.experts.{expert}.")
            yield _Job(NewTensor(expert_name, shape, place.dtype), name, layer, part, expert)


def _expert_shape(shape: tuple[int, ...], part: Part, plan: UpcyclePlan) -> tuple[int, int]:
    rows, columns = shape
    if part is Part.DOWN:
        return rows, plan.expert_width(columns)
    return plan.expert_width(rows), columns


def _report(out: Path, jobs: list[_Job], plan: UpcyclePlan, width: int) -> UpcycleReport:
    params = sum(prod(job.entry.shape) for job in jobs)
    routed = sum(
        prod(job.entry.shape) for job in jobs if job.part in (Part.GATE, Part.UP, Part.DOWN)
    )
    return UpcycleReport(
        folder=out,
        plan=plan,
        expert_width=width,
        params=params,
        active_params=params - routed + routed // plan.group_size,
        num_bytes=sum(job.entry.num_bytes for job in jobs),
    )


def _copy_files(source: Path, work: Path) -> None:
    """Copy tokenizer, template, generation config and licence; name what stays behind."""
    left = []
    for path in sorted(source.iterdir()):
        if path.is_file() and any(path.match(pattern) for pattern in COPIED_FILES):
            shutil.copyfile(path, work / path.name)
        elif path.is_dir() and path.name == "additional_chat_templates":
            shutil.copytree(path, work / path.name)
        elif not any(path.match(pattern) for pattern in WEIGHT_FILES):
            left.append(path.name)
    if left:
        say(f"not copied from {source}: {', '.join(left)}")


def _write_weights(
    work: Path,
    places: dict[str, StoredTensor],
    jobs: list[_Job],
    config: Any,
    plan: UpcyclePlan,
    max_file_bytes: int,
) -> None:
    job_of = {job.entry.name: job for job in jobs}
    files = split_in_files([job.entry for job in jobs], max_file_bytes)
    total_bytes = sum(job.entry.num_bytes for job in jobs)
    maker = _Maker(places, plan, config.initializer_range)
    with progress("upcycle", total=total_bytes) as bar:
        for file_name, entries in files.items():
            with (work / file_name).open("wb") as file:
                file.write(header_of(entries))
                for entry in entries:
                    maker.write(file, job_of[entry.name])
                    _advance(bar, entry)
    if len(files) > 1:
        index = {
            "metadata": {
                "total_parameters": sum(prod(job.entry.shape) for job in jobs),
                "total_size": total_bytes,
            },
            "weight_map": {entry.name: name for name, part in files.items() for entry in part},
        }
        (work / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _advance(bar: ProgressBar, entry: NewTensor) -> None:
    bar.advance(entry.num_bytes, note=entry.name.removeprefix("model."))


class _Maker:
    """Writes output tensors and holds the one dense matrix they are cut from."""

    def __init__(self, places: dict[str, StoredTensor], plan: UpcyclePlan, router_std: float):
        self.places = places
        self.plan = plan
        self.router_std = router_std
        self.held: tuple[str, Tensor] | None = None

    def write(self, file: BinaryIO, job: _Job) -> None:
        if job.part is None:
            for chunk in self.places[job.source].chunks():
                file.write(chunk)
        elif job.part is Part.ROUTER:
            hidden_size = job.entry.shape[1]
            weight = router_weight(hidden_size, self.router_std, layer=job.layer, plan=self.plan)
            write_tensor(file, weight.to(job.entry.dtype))
        else:
            dense, where = self._dense(job.source), {"layer": job.layer, "expert": job.expert}
            write_tensor(file, expert_matrix(dense, job.part, plan=self.plan, **where))

    def _dense(self, name: str) -> Tensor:
        if self.held is None or self.held[0] != name:
            self.held = None  # free the old one before the new one is read
            self.held = (name, self.places[name].read())
        return self.held[1]
