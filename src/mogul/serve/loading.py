"""Where an engine's weights come from: a checkpoint, or random numbers made on the device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from mogul.core.errors import ArtifactError, ConfigError
from mogul.core.log import say
from mogul.models import load_config, load_model, load_tokenizer
from mogul.models.input_stats import FILE, InputStats, read_stats
from mogul.models.load import _skeleton, find_folder
from mogul.models.quantise_head import quantise_head
from mogul.models.quantise_load import load_quantised, quantised_as_built, weight_format
from mogul.models.quantised_read import is_quantised, load_stored
from mogul.serve.kv_scales import KvScales, find_scales

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Load = Literal["checkpoint", "random"]


def open_model(
    path: str | Path,
    *,
    load: Load,
    dtype: str | torch.dtype,
    device: str,
    experts: str,
    quantise: str | None = None,
    statistics: str | Path | None = None,
) -> PreTrainedModel:
    """Load a checkpoint, or make a model of the shape of its `config.json` with random weights.

    Args:
        path: a folder, or hub id.
        load: where the weights come from.
        dtype: of what is not quantised.
        device: where the model goes.
        experts: implementation of unquantised experts.
        quantise: a name of `quantise_load.WEIGHTS`; each layer is quantised while it is loaded.
            None opens a checkpoint as it is, also one in fp8.
        statistics: of the inputs of what is quantised: a file or its folder; None takes the file
            beside the checkpoint where there is one.

    Raises:
        ArtifactError: a damaged checkpoint, or statistics of another one.
        ConfigError: an unknown format, or statistics that nothing needs.
    """
    if statistics is not None and (quantise is None or load == "random"):
        raise ConfigError(
            "input statistics are for quantising a checkpoint", fix="name a format, or leave them"
        )
    if load == "random":
        return random_model(path, dtype=dtype, device=device, experts=experts, quantise=quantise)
    if load != "checkpoint":
        raise ConfigError(f"load {load!r} is unknown", fix="use checkpoint or random")
    if quantise is None:
        if is_quantised(path):
            if experts not in ("mogul", "auto"):
                say(f"{path} is quantised: its experts run on mogul's kernels, not {experts}")
            return load_stored(path, dtype=dtype, device=device)
        return load_model(path, dtype=dtype, experts=experts, device=device)
    what = weight_format(quantise)
    stats = find_stats(path, statistics)
    return load_quantised(
        path, what.experts, dtype=dtype, device=device, importance=stats, linears=what.linears,
        head=what.head,
    )  # fmt: skip


def open_with_scales(
    path: str | Path,
    *,
    kv_dtype: str,
    load: Load,
    quantise: str | None,
    statistics: str | Path | None,
    **more: Any,
) -> tuple[PreTrainedModel, KvScales | None]:
    """What `open_model` opens, and scales for a checkpoint's cache in fp8.

    Args:
        path: a folder, or hub id.
        kv_dtype: of the cache.
        load: where the weights come from.
        quantise: a name of `quantise_load.WEIGHTS`.
        statistics: for what is quantised, for the cache, or for both.
        more: what else `open_model` takes.

    Raises:
        ArtifactError: see `open_model` and `find_scales`.
        ConfigError: see `open_model`.
    """
    needs_scales = kv_dtype == "fp8" and load == "checkpoint"
    of_inputs = None if needs_scales and quantise is None else statistics
    model = open_model(path, load=load, quantise=quantise, statistics=of_inputs, **more)
    return model, find_scales(path, statistics) if needs_scales else None


def find_stats(path: str | Path, statistics: str | Path | None) -> InputStats | None:
    """The statistics that were named, or lie beside the checkpoint; a line says which."""
    stats = read_stats(statistics or path, checkpoint=path)
    if stats is not None:
        say(f"rounding by the inputs of {stats.num_tokens:,} tokens")
    elif statistics is not None:
        raise ArtifactError(f"{statistics} holds no {FILE}", fix=f"mogul calibrate {path}")
    else:
        say(f"no {FILE} beside the checkpoint, rounding is coarser (mogul calibrate {path})")
    return stats


def random_model(
    path: str | Path,
    *,
    dtype: str | torch.dtype,
    device: str,
    experts: str,
    quantise: str | None = None,
) -> PreTrainedModel:
    """A model of a config's shape; weights are drawn where they stay, never elsewhere."""
    config = load_config(path)
    if isinstance(dtype, str):
        dtype = getattr(config, "dtype", None) or torch.bfloat16 if dtype == "auto" else dtype
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    on_paper = _skeleton(config, dtype=dtype)
    if type(on_paper)._can_set_experts_implementation():
        config._experts_implementation = experts
    packing: AbstractContextManager[None] = nullcontext()
    what = None if quantise is None else weight_format(quantise)
    if what is not None:
        packing = quantised_as_built(on_paper, what.experts, linears=what.linears)
    with packing, torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    if what is not None and what.head:
        quantise_head(model)
    count = sum(weight.numel() for weight in on_paper.parameters())
    kind = f"{model.dtype}, {quantise}" if quantise else f"{model.dtype}"
    say(f"{count / 1e9:.2f} billion random weights in {kind} on {device}")
    return model.eval()


def open_tokenizer(path: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a folder; None where it has none."""
    folder = find_folder(path)
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    try:
        return load_tokenizer(folder)
    except ArtifactError as error:
        say(f"no tokenizer: {error}")
        return None
