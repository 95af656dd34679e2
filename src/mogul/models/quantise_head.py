"""Quantise a model's output head: whole numbers of 8 bits with one scale a token of the vocabulary.

A head is read whole for every token that is drawn, so its bytes count in decoding. Its input is not
rounded. A head that is tied to the embedding gets numbers of its own; the embedding stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mogul.core.errors import ConfigError
from mogul.core.log import say
from mogul.core.units import show_bytes
from mogul.kernels.triton.byte_linear import linear_bytes, pack_bytes
from mogul.models.quantise import Packed, refuse_saving


class PackedHead(Packed):
    """Stands where the output head stood; see `kernels.triton.byte_linear`."""

    words: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, words: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = len(words), 2 * words.shape[1]
        self.register_buffer("words", words)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Float[Tensor, "*B C"]) -> Float[Tensor, "*B V"]:
        """As the layer it replaced."""
        out = linear_bytes(x.reshape(-1, self.in_features), self.words, self.scale)
        out = out if self.bias is None else out + self.bias
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"8 bits, {self.in_features} -> {self.out_features}"


@torch.no_grad()
def quantise_head(model: Any) -> PackedHead:
    """Replace the output head of a causal language model.

    Raises:
        ConfigError: it has none, or one that is no plain linear layer.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise ConfigError(
            f"the output head is {type(head).__name__}, not a linear layer",
            fix="quantise to fp8, which leaves it as it is",
        )
    packed = PackedHead(*pack_bytes(head.weight), head.bias)
    after = packed.words.nbytes + packed.scale.nbytes
    say(f"output head in 8 bits: {show_bytes(head.weight.nbytes)} became {show_bytes(after)}")
    model.set_output_embeddings(packed)
    refuse_saving(model)
    return packed
