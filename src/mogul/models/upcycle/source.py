"""The dense checkpoint folder: is it one that can be upcycled, and are all its tensors there?"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from mogul.core.errors import ArtifactError
from mogul.models.load import load_config
from mogul.models.tensor_file import StoredTensor, stored_tensors
from mogul.models.upcycle.plan import DENSE_MODELS, check_dense


def dense_config(source: Path) -> PreTrainedConfig:
    """Read config.json and refuse what upcycling does not keep exactly."""
    config = load_config(source)
    kind = config.model_type
    check_dense(config, (config.architectures or [DENSE_MODELS.get(kind, kind)])[0])
    return config


def dense_tensors(source: Path, config: PreTrainedConfig) -> dict[str, StoredTensor]:
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
