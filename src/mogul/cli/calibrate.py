"""`mogul calibrate`: some text in, what quantising wants to know of a checkpoint out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from mogul.cli.generation import TORCH_NAMES, Dtype
from mogul.cli.trace import BUILTIN, read_sources

if TYPE_CHECKING:
    from torch import Tensor

    from mogul.core.table import Table
    from mogul.observe.data import Calibration

EXAMPLES = """
examples:
  mogul calibrate ./moge                                  on the text mogul ships
  mogul calibrate ./Qwen3-30B-A3B --data chat.jsonl --max-tokens 20000
  mogul generate ./moge --quantise fp8 --prompt "Once"    now rounds by what was measured
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure what experts and linear layers multiply, and how large keys and values are.

    Two small files are written beside the checkpoint: `input_stats.safetensors`, by which
    `--quantise` rounds weights better, and `kv_scales.safetensors`, the scales of an fp8 cache.
    """

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """Checkpoint folder, or hub id; unquantised."""

    data: tuple[str, ...] = (BUILTIN,)
    """Files of text like that to be served (.jsonl with "text", or plain); `builtin:english` is the
    text mogul ships."""

    max_tokens: int = 8192
    """Tokens to run at most."""

    length: int = 512
    """Tokens in a sequence."""

    batch: int = 4
    """Sequences in a forward."""

    kv_scales: bool = True
    """Measure scales of an fp8 cache too, where the engine runs the family."""

    out: Path | None = None
    """Folder for the files; by default the checkpoint's own."""

    dtype: Dtype = "auto"
    """Compute in this dtype; auto takes the checkpoint's."""

    device: str = "auto"
    """Device to run on, for example cpu; auto takes an accelerator where there is one."""

    seed: int = 0
    """Seed of the order of the text."""

    format: Literal["table", "json", "csv"] = "table"
    """How the result is printed."""


def run(options: Options) -> int:
    """Measure, write, and print what was written."""
    from mogul.core.errors import ConfigError
    from mogul.core.log import say

    say(f"loading {options.model}")
    from mogul.models import load_model, load_tokenizer
    from mogul.models.input_stats import measure_stats
    from mogul.models.load import find_folder, named_device
    from mogul.observe.data import calibration, check_ids

    if options.batch < 1:
        raise ConfigError(f"{options.batch} sequences in a forward", fix="use --batch 1 or more")
    folder = find_folder(options.model)
    out = _folder_to_write(options, folder)
    tokenizer: Any = load_tokenizer(folder)
    data = calibration(
        read_sources(options.data),
        lambda text: tokenizer.encode(text, add_special_tokens=False),
        length=options.length,
        max_tokens=options.max_tokens,
        seed=options.seed,
    )
    model = load_model(
        folder, dtype=TORCH_NAMES[options.dtype], device=named_device(options.device)
    )
    check_ids(data, model)
    stats = measure_stats(
        model, batches(data, options.batch), checkpoint=folder, sources=data.names
    )
    scales = _measure_scales(model, data, folder) if options.kv_scales else None
    out.mkdir(parents=True, exist_ok=True)
    written = {"inputs of layers": (stats.save(out), len(stats.importance))}
    if scales is not None:
        written["keys and values"] = (scales.save(out), len(scales.keys))
    _table(options, stats.num_tokens, written).show(options.format)
    return 0


def _folder_to_write(options: Options, folder: Path) -> Path:
    """Where the files go: --out, or the checkpoint's own folder unless mogul carries it."""
    from mogul.core.errors import ConfigError
    from mogul.core.files import check_writable
    from mogul.spec.carried import NAMES, carried_folder

    carried = [path.resolve() for name in NAMES if (path := carried_folder(name))]
    if options.out is None and folder.resolve() in carried:
        raise ConfigError(
            f"{options.model} is part of mogul's installation, which stays as it is",
            fix="name a folder for the files with --out, and read them with --statistics",
        )
    out = options.out or folder
    check_writable(out)
    return out


def batches(data: Calibration, size: int) -> Iterator[Tensor]:
    """Token ids [B, L] without padding: whole windows together, shorter ones alone."""
    import numpy as np
    import torch

    whole = [one.ids for one in data.windows if one.num_real == len(one.ids)]
    for first in range(0, len(whole), size):
        yield torch.from_numpy(np.stack(whole[first : first + size]))
    for one in data.windows:
        if 1 < one.num_real < len(one.ids):
            yield torch.from_numpy(one.ids[None, : one.num_real])


def _measure_scales(model: Any, data: Calibration, folder: Path) -> Any:
    """Scales of an fp8 cache; None, with a line, for a family that the engine refuses."""
    from mogul.core.errors import BackendError
    from mogul.core.log import say
    from mogul.serve import Engine
    from mogul.serve.kv_scales import measure_scales
    from mogul.serve.options import EngineOptions

    prompts = [one.ids[: one.num_real].tolist() for one in data.windows if one.num_real]
    length = max(map(len, prompts)) + 1
    sizes = {"max_length": length, "max_sequences": 4, "reuse_prefix": False}
    room = len(prompts) * (length + 64)
    plain = EngineOptions(**sizes, cache_tokens=room, graphs=False, compile=False, fuse=False)
    try:
        engine = Engine(model, None, plain)
    except BackendError as error:
        say(f"no scales of keys and values: {error}")
        return None
    try:
        return measure_scales(engine, prompts, checkpoint=folder)
    finally:
        engine.close()


def _table(options: Options, num_tokens: int, written: dict[str, tuple[Path, int]]) -> Table:
    from mogul.core.table import Table

    rows = [
        (what, layers, num_tokens, path.stat().st_size, str(path))
        for what, (path, layers) in written.items()
    ]
    columns = ("measured", "layers", "tokens", "bytes", "file")
    return Table(f"Calibration of {options.model}", columns, rows)
