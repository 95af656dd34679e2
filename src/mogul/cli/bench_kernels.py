"""`mogul bench kernels`: time the experts layer of this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

EXAMPLES = """
examples:
  mogul bench kernels                                     a small layer, at every batch size
  mogul bench kernels --shape preset:qwen3-30b-a3b        the experts of a model
  mogul bench kernels --shape 64x8x5120x1344 --tokens 1 64 4096 --train
  mogul bench kernels --shape 64x8x5120x1344 --quant fp8 --tokens 64 456
  mogul bench kernels --shape 60x4x2048x1408 --tune --out plans    on a GPU: measure tile sizes
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time one experts layer: milliseconds, floor, ratio, TFLOP/s, GB/s, kept memory, peers.

    The floor is the larger of arithmetic and bytes at the limits measured in the same run.
    """

    shape: str = "32x8x576x192"
    """ExKxDxF (experts, picks, model width, expert width; a fifth number are groups), or a model
    as `mogul info` takes it."""

    tokens: tuple[int, ...] = ()
    """Tokens of a call. Default: 1, 8, 64, 456, 4096 (a processor: to 456)."""

    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """Default: bf16 on a GPU, fp32 on a processor."""

    quant: Literal["none", "fp8", "fp8-w8a16", "int4-32", "int4-64", "int4-128"] = "none"
    """Also time the layer with quantised experts."""

    train: bool = False
    """Forward and backward, and the memory kept between them."""

    tune: bool = False
    """First measure tile sizes for this shape; they are used here and written under `--out`."""

    peers: tuple[str, ...] | None = None
    """Only these of grouped_mm, eager, vllm, triton_kernels and sonicmoe beside mogul. Default:
    all that are installed; SonicMoE compiles for minutes."""

    backend: str = "auto"
    """A backend of `moe_forward` to insist on."""

    out: Path | None = None
    """Folder for the results, and for what `--tune` finds."""

    record: bool = False
    """Append the results to the ledger."""

    format: Literal["table", "json", "csv"] = "table"
    """How to print."""


def run(options: Options) -> int:
    """Measure and print one table."""
    from mogul.bench.kernels import PEERS, Request, layer_shape, measure, table

    shape = layer_shape(options.shape, _model_shape)
    request = Request(
        shape=shape,
        tokens=options.tokens,
        dtype=options.dtype,
        train=options.train,
        backend=options.backend,
        quant=None if options.quant == "none" else options.quant,
        peers=PEERS if options.peers is None else options.peers,
    )
    if options.tune:
        from mogul.bench.kernels_tune import tune

        tune(request, options.out)
    result = measure(request)
    table(result).show(options.format)
    if options.out is not None or options.record:
        result.write(options.out, record=options.record)
    return 0


def _model_shape(model: str) -> tuple[int, int, int, int, int]:
    """Experts, picks, width, expert width and groups of a model's config."""
    from mogul.cli.find_config import find_config
    from mogul.core.errors import ConfigError
    from mogul.spec.families import model_spec

    spec = model_spec(find_config(model).config)
    if spec.moe is None:
        raise ConfigError(f"{model} has no experts", fix="give a mixture-of-experts model")
    grouping = spec.moe.grouping
    width = spec.hidden_size
    return grouping.num_experts, grouping.top_k, width, spec.moe.expert_width, grouping.num_groups
