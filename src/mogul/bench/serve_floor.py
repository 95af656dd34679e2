"""The least time a decode step can take: the bytes it must read, over the measured bandwidth.

Decides what must be read: every weight but the input embedding once, of each layer's experts only
the distinct ones that its tokens picked (counted in a pass of their own, as counting slows a step
down), and the keys and values of all requests.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from mogul.bench.serve_load import Workload
from mogul.core.errors import BackendError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mogul.serve import Engine

COUNTED_TOKENS = 8
"""Output tokens of the pass that counts distinct experts."""


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights, as they lie in memory."""

    dense_bytes: int
    """Read in every step."""

    expert_bytes: tuple[int, ...]
    """Of one expert of each layer with experts."""

    num_experts: int
    picks: int

    def step_bytes(self, distinct: float) -> float:
        """Bytes of weights that a step reads with so many distinct experts a layer."""
        return self.dense_bytes + distinct * sum(self.expert_bytes)

    def uniform_distinct(self, tokens: float) -> float:
        """Distinct experts that so many tokens pick, where every expert is as likely."""
        if not self.num_experts:
            return 0.0
        return self.num_experts * (1 - (1 - self.picks / self.num_experts) ** tokens)


def weights_of(model: PreTrainedModel) -> Weights:
    """Count a model's bytes."""
    from mogul.observe.hooks import moe_blocks, num_experts_of

    try:
        blocks = moe_blocks(model)
    except BackendError:
        blocks = []
    config = model.config
    num_experts = num_experts_of(model, blocks) if blocks else 0
    per_layer = [_bytes(block.experts) // num_experts for block in blocks]
    counted = _bytes(model) - sum(size * num_experts for size in per_layer)
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    if isinstance(embedding, Tensor) and getattr(head, "weight", None) is not embedding:
        counted -= embedding.nbytes
    picks = int(getattr(config, "num_experts_per_tok", 0) or 0)
    return Weights(counted - _unused(model), tuple(per_layer), num_experts, picks)


def _unused(model: nn.Module) -> int:
    """Bytes of layers after the last, which plain decoding does not run."""
    num_layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    layers = getattr(getattr(model, "model", None), "layers", None)
    if num_layers is None or not isinstance(layers, nn.ModuleList):
        return 0
    return sum(_bytes(layer) for layer in layers[num_layers:])


def _bytes(module: nn.Module) -> int:
    tensors: dict[int, Tensor] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        tensors[id(tensor)] = tensor
    return sum(tensor.nbytes for tensor in tensors.values())


def count_distinct(engine: Engine, workload: Workload) -> float | None:
    """Distinct experts a layer while all requests decode, on the average; None without experts.

    Args:
        engine: one that records experts.
        workload: as measured; its answers are cut to `COUNTED_TOKENS`.
    """
    from mogul.serve.routed import distinct_experts

    short = replace(workload, output_tokens=min(workload.output_tokens, COUNTED_TOKENS), rate=None)
    prompts = short.prompts(engine.runner.vocab_size)
    for prompt, params in zip(prompts, short.params(), strict=True):
        engine.add(prompt, params)
    found: list[float] = []
    while engine.has_work:
        decoding = len(engine.scheduler.decoding)
        engine.step()
        picks = [_host(one) for one in engine.last_picks or [] if one is not None]
        rows = sum(len(one) for one in picks)
        if picks and rows == decoding == short.requests:
            found.append(float(distinct_experts(np.concatenate(picks), rows).mean()))
    return float(np.mean(found)) if found else None


def _host(picks: Tensor) -> np.ndarray:
    return picks.cpu().numpy() if isinstance(picks, Tensor) else picks


def device_of(name: str | None) -> torch.device:
    """The device a bench means."""
    from mogul.models.load import named_device

    return torch.device(named_device(name))
