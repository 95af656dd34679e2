"""Load a checkpoint folder strictly: what is missing, surplus or misshaped is an error by name.

Any folder with a causal language model that Transformers knows, or one of ours. Only safetensors
is read and no code from the folder is run. Names and shapes are compared before any weight is
read, against the model built on the meta device with its conversions reversed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from mogul.core.errors import ArtifactError, ConfigError, HardwareError, MogulError, nearest
from mogul.core.files import read_object
from mogul.core.log import say
from mogul.models.check_tensors import check_names, raise_if_any, tell_casts
from mogul.models.compressed_tensors import method_of
from mogul.models.convert_config import SAME_TENSORS, is_grouped_elsewhere, moge_config
from mogul.models.moge.chat_template import PANGU_CHAT_TEMPLATE
from mogul.models.moge.configuration_moge import MogeConfig
from mogul.spec.carried import NAMES, carried_folder
from mogul.spec.checkpoint import TensorEntry, read_checkpoint
from mogul.spec.families import family_of

DOWNLOADED = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"]
FOREIGN_QUANTISATION = "quant_model_description.json"
WRONG_VALUE = (ValueError, TypeError, LookupError, AttributeError, StrictDataclassError)
"""What Transformers raises for a value of a JSON file that it did not expect."""
PICKLED = ("*.bin", "*.pt", "*.pth")
TOKENIZERS = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
"""Files of which a tokenizer has at least one; Transformers makes an empty one without."""
SAME_MODEL = {"kimi_k2": "deepseek_v3"}
"""Model types that Transformers lacks, and its name for the same model with the same tensors."""


def find_folder(path: str | Path) -> Path:
    """The folder of a checkpoint: itself, one that mogul carries, or the copy of a hub id."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if (carried := carried_folder(path)) is not None:
        return carried
    if folder.is_file():
        raise ArtifactError(f"{folder} is a file", fix="name the folder that holds it")
    if folder.is_absolute() or str(path).count("/") != 1 or str(path).startswith("."):
        raise ArtifactError(
            f"{folder} does not exist",
            fix=f"check the path of the checkpoint; mogul itself carries {' and '.join(NAMES)}",
        )
    try:
        return Path(snapshot_download(str(path), allow_patterns=DOWNLOADED))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise ArtifactError(
            f"{path} is no folder here and could not be fetched from the hub: {error}",
            fix="check the path or the hub id",
        ) from error


def default_device() -> str:
    """An accelerator where there is one, else the processor."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator else "cpu"


def named_device(name: str | None) -> str:
    """The device a person named, if this machine has it; None and "auto" take the default.

    Raises:
        ConfigError: no device has such a name.
        HardwareError: this machine has no such device.
    """
    if name is None or name == "auto":
        return default_device()
    here = dict.fromkeys(["cpu", default_device()])
    fix = f"use one of {', '.join(('auto', *here))}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r} is unknown", fix=fix) from None
    if device.type not in here:
        raise HardwareError(f"this machine has no device {name!r}", fix=fix)
    count = 1 if device.type == "cpu" else torch.accelerator.device_count()
    if device.index is not None and device.index >= count:
        raise HardwareError(f"{name} is not among this machine's {count} devices", fix=fix)
    return name


def load_config(path: str | Path) -> PreTrainedConfig:
    """Read `config.json`; ArtifactError for an unknown family, ConfigError for a bad value."""
    file = find_folder(path) / "config.json"
    content = read_object(file)
    if is_grouped_elsewhere(content):
        return _as_moge(file, content)
    model_type = content.get("model_type")
    if not isinstance(model_type, str | None):
        raise ArtifactError(f"{file}: model_type is {model_type!r}", fix="give its name")
    as_type = SAME_MODEL.get(str(model_type), model_type)
    if as_type not in CONFIG_MAPPING:
        raise ArtifactError(
            f"{file}: model type {model_type!r} is unknown here"
            + (", and code from the folder is never run" if "auto_map" in content else ""),
            fix=nearest(str(model_type), ["moge", "PanguProMoE", *CONFIG_MAPPING])
            if model_type
            else "give the folder of a Transformers checkpoint",
        )
    try:
        if as_type is not None and as_type != model_type:
            values = {k: v for k, v in content.items() if k not in ("model_type", "auto_map")}
            return AutoConfig.for_model(as_type, **values)
        return AutoConfig.from_pretrained(file.parent, trust_remote_code=False)
    except MogulError as error:
        error.add_note(f"in {file}")
        raise
    except WRONG_VALUE as error:
        raise ArtifactError(f"{file} cannot be used: {error}", fix="mend the value") from error


def _as_moge(file: Path, content: dict[str, Any]) -> MogeConfig:
    """A grouped model of another family; Transformers' class would ignore the groups."""
    family = family_of(content).name
    if family not in SAME_TENSORS:
        raise ArtifactError(
            f"{file}: grouped routing of the family {family!r} cannot be loaded; its tensors have "
            "other names than those of a grouped-expert model",
            fix="remove router_n_groups to load it with plain top-k routing"
            if "router_n_groups" in content
            else "",
        )
    say(f"{file.parent.name}: {family} with grouped routing, loaded as a grouped-expert model")
    return moge_config(content)


def load_model(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    experts: str = "mogul",
    device: str | torch.device | None = None,
) -> PreTrainedModel:
    """Load a causal language model for inference; call `.train()` on it to train.

    Args:
        path: a folder with `config.json` and safetensors, or a hub id.
        dtype: "auto" (as stored), or a dtype or its name.
        experts: the experts implementation; models without experts have none.
        device: where to put the model; None is the CPU.

    Raises:
        ArtifactError: a damaged file, or tensors missing, surplus or misshaped, by name.
    """
    folder = find_folder(path)
    if (folder / FOREIGN_QUANTISATION).exists():
        raise ArtifactError(
            f"{folder} is quantised ({FOREIGN_QUANTISATION}), which mogul cannot read",
            fix="use the unquantised checkpoint",
        )
    if (method := method_of(folder)) is not None:
        raise ArtifactError(
            f"{folder} is quantised ({method}); such a model is served, not trained or measured",
            fix="open it with mogul.serve.Engine, `mogul generate` or "
            "mogul.models.quantised_read.load_stored, or use the unquantised checkpoint",
        )
    config = load_config(folder)
    stored = _stored(folder)
    skeleton = _skeleton(config)
    skipped = check_names(folder, skeleton, stored)
    model = _load(folder, config, skipped, dtype=_dtype(dtype), experts=_experts(skeleton, experts))
    if dtype == "auto":
        tell_casts(model, stored)
    return (model if device is None else model.to(device)).eval()  # pyright: ignore[reportArgumentType]


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint; Pangu's gets its chat template when it has none."""
    folder = find_folder(path)
    is_pangu = read_object(folder / "config.json").get("model_type") == "PanguProMoE"
    if not any(file for pattern in TOKENIZERS for file in folder.glob(pattern)):
        raise ArtifactError(
            f"{folder} has no tokenizer that can be used: none of its files is there",
            fix="copy them there from the model it came from",
        )
    only_pieces = (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists()
    # Pangu's own tokenizer class is remote code around a plain SentencePiece model.
    loader = LlamaTokenizer if is_pangu and only_pieces else AutoTokenizer
    try:
        tokenizer = loader.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ImportError, *WRONG_VALUE) as error:  # it reads config.json, too
        raise ArtifactError(
            f"{folder} has no tokenizer that can be used: {error}",
            fix="pip install sentencepiece protobuf, which read tokenizer.model"
            if only_pieces
            else "check config.json, tokenizer.json and tokenizer_config.json",
        ) from error
    if is_pangu and not tokenizer.chat_template:
        tokenizer.chat_template = PANGU_CHAT_TEMPLATE
    return tokenizer


def _stored(folder: Path) -> Mapping[str, TensorEntry]:
    if (checkpoint := read_checkpoint(folder)) is not None:
        return checkpoint.tensors
    if any(file for pattern in PICKLED for file in folder.glob(pattern)):
        raise ArtifactError(
            f"{folder} holds pickled weights only; reading them would run code from the file",
            fix="convert them to safetensors first",
        )
    raise ArtifactError(f"{folder} holds no safetensors weights", fix="check the path")


def _skeleton(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """A model without memory; ArtifactError where the config is of no causal language model."""
    try:
        with torch.device("meta"):
            options["trust_remote_code"] = False
            return AutoModelForCausalLM.from_config(deepcopy(config), **options)
    except ValueError as error:
        raise ArtifactError(
            f"model type {config.model_type!r} is no causal language model",
            fix="give the folder of a text model",
        ) from error
    except (LookupError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"no {config.model_type} model can be built: {type(error).__name__}: {error}",
            fix="mend that value of config.json",
        ) from error


@contextmanager
def bar_on_terminals_only() -> Iterator[None]:
    """Keep Transformers' loading bar out of pipes and log files."""
    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


@bar_on_terminals_only()
def _load(
    folder: Path,
    config: PreTrainedConfig,
    skipped: set[str],
    *,
    dtype: torch.dtype | str,
    experts: dict[str, str],
) -> PreTrainedModel:
    try:
        model, report = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **experts,
        )
    except (RuntimeError, OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{folder} cannot be loaded: {error}", fix="check the files, or fetch them again"
        ) from error
    misshaped = [f"{n} {list(a)} instead of {list(b)}" for n, a, b in report["mismatched_keys"]]
    missing = sorted(report["missing_keys"])
    raise_if_any(folder, missing, sorted(set(report["unexpected_keys"]) - skipped), misshaped)
    return model


def _experts(skeleton: PreTrainedModel, experts: str) -> dict[str, str]:
    """The keyword that selects the experts implementation, for models that have one."""
    if type(skeleton)._can_set_experts_implementation():
        try:
            skeleton.get_correct_experts_implementation(experts)
        except (ValueError, ImportError) as error:
            raise ConfigError(
                f"experts {experts!r} cannot be used: {str(error).partition('. ')[0]}",
                fix=nearest(experts, {"eager", *ALL_EXPERTS_FUNCTIONS.keys()}),
            ) from error
        return {"experts_implementation": experts}
    if getattr(skeleton.config, "num_experts", None) or hasattr(
        skeleton.config, "num_local_experts"
    ):
        say(f"{type(skeleton).__name__} has no choice of experts implementation; {experts} unused")
    return {}


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise ConfigError(f"dtype {dtype!r} is unknown", fix=nearest(dtype, known))
    return known[dtype]
