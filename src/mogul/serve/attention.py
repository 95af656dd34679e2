"""Transformers' attention interface over pages: the name `mogul_paged`.

A model asks for attention by name and hands over queries, keys and values of one flat row of
tokens; where they belong stands in the `StepState` of the running step. `mogul::attend` is one
opaque operator that finds both the state and the layer's pages by itself, so a compiled decoder
layer depends on neither and is the same for every layer and step. No mask function is registered
under the name: Transformers then builds no mask, which is what pages need.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mogul.core.errors import BackendError
from mogul.kernels.paged_attention import paged_attention
from mogul.kernels.turn import ALL_KINDS, Turn

NAME = "mogul_paged"

PLAIN = {"full_attention", "sliding_attention", "sparse", "dense"}
"""Kinds of layers, as configs name them, that keep keys and values alone; the last two are kinds of
a layer's other half."""

UNSAID = -1
"""A window that a layer's call does not name."""

NOBODY = 0
"""Owner of what is no runner's step: a token run to watch, a guesser's layer."""


@dataclass(frozen=True)
class LayerShape:
    """What one attention layer keeps of a token, as its own call showed."""

    num_heads: int
    num_kv_heads: int
    width: int
    """Of a key head; narrower values are padded to it."""

    value_width: int
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        """Numbers kept of a token."""
        return 2 * self.num_kv_heads * self.width


@dataclass(frozen=True)
class LayerCache:
    """The pages of one layer, [P, Z, N, C] each."""

    key: Tensor
    value: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None


@dataclass
class StepState:
    """Where the tokens of one step belong; views of static buffers on a device."""

    slots_T: Tensor
    tables_SB: Tensor
    starts: Tensor
    lengths_S: Tensor
    max_query_len: int
    caches: list[LayerCache]
    kinds: int = ALL_KINDS
    """Of sequences that may be there (`kernels.turn`)."""

    backend: str = "auto"
    """Of `kernels.paged_attention`."""

    owner: int = NOBODY
    """Number of the runner whose step it is; others may run the same model."""


_turn = threading.RLock()
"""Held while a model is called, so that engines in other threads wait. A plain global and a lock,
not a thread's own storage: compiled layers read neither, and guard on nothing that differs."""

_state: StepState | None = None
_seen: list[tuple[nn.Module, LayerShape]] | None = None


@contextmanager
def running(state: StepState) -> Iterator[None]:
    """Let every layer that runs inside attend by `state`; other threads wait."""
    global _state
    with _turn:
        previous, _state = _state, state
        try:
            yield
        finally:
            _state = previous


def running_slots(owner: int) -> Tensor | None:
    """Slots of the running step's tokens, -1 for padding; None outside of this owner's steps."""
    return None if _state is None or _state.owner != owner else _state.slots_T


def run_one_token(model: nn.Module, device: torch.device) -> list[tuple[nn.Module, LayerShape]]:
    """Run one token without pages through a model set to `mogul_paged`; its attention calls."""
    global _seen
    with _turn:
        previous, _seen = _seen, []
        try:
            ids = torch.zeros((1, 1), dtype=torch.int64, device=device)
            with torch.inference_mode():
                model(input_ids=ids, position_ids=ids, use_cache=False, logits_to_keep=1)
            return _seen
        finally:
            _seen = previous


def find_layers(model: nn.Module, device: torch.device) -> list[LayerShape]:
    """Number the attention layers of a model set to `mogul_paged`.

    Raises:
        BackendError: its attention does not go through the interface, so pages cannot be used, or
            it keeps more of a text than keys and values.
    """
    config: Any = model.config
    config = config.get_text_config()
    if others := sorted(set(getattr(config, "layer_types", None) or ()) - PLAIN):
        raise BackendError(
            f"{type(model).__name__} has layers of {', '.join(others)}, which keep or mask other "
            "things than the keys and values of pages",
            fix="use Transformers' generate for this family",
        )
    found = run_one_token(model, device)
    expected = getattr(model.config, "num_hidden_layers", len(found))
    if not found or len(found) != expected:
        raise BackendError(
            f"{type(model).__name__} runs {len(found)} of {expected} layers through Transformers' "
            "attention interface, so the engine's pages cannot hold its cache",
            fix="use a family whose layers all have plain attention, or Transformers' generate",
        )
    for index, (module, _) in enumerate(found):
        # A tensor, because its value then is no part of the compiled code.
        module._mogul_paged_layer = torch.tensor(index)  # pyright: ignore[reportArgumentType]
    return [shape for _, shape in found]


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = UNSAID,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend for one flat row: query [1, H, T, C], key and value [1, N, T, C] -> [1, T, H, C]."""
    if reason := _why_not_pages(module, attention_mask, options):
        raise BackendError(
            f"{type(module).__name__} {reason}, which pages do not know",
            fix="use Transformers' generate for this family",
        )
    if sliding_window == UNSAID:
        sliding_window = _window_of_mask(module)
    query_THC, key_TNC, value_TNC = (x[0].transpose(0, 1) for x in (query, key, value))
    width, value_width = query_THC.shape[-1], value_TNC.shape[-1]
    if _seen is not None:
        shape = LayerShape(query.shape[1], key.shape[1], width, value_width, key.dtype)
        _seen.append((module, shape))
        return query_THC[None, ..., :value_width].contiguous(), None
    if value_width < width:
        value_TNC = F.pad(value_TNC, (0, width - value_width))
    if _state is None and not torch.compiler.is_compiling():
        raise BackendError(
            f"{type(module).__name__} is set to an engine's pages, but no engine runs it",
            fix='close the engine, or call model.set_attn_implementation("sdpa")',
        )
    factor = width**-0.5 if scaling is None else scaling
    layer: Any = module._mogul_paged_layer
    attend: Any = torch.ops.mogul.attend if torch.compiler.is_compiling() else _attend
    out_THC = attend(query_THC, key_TNC, value_TNC, layer, factor, sliding_window, s_aux)
    return out_THC[None, ..., :value_width], None


def _why_not_pages(
    module: nn.Module, attention_mask: Tensor | None, options: dict[str, Any]
) -> str | None:
    """What a layer asks for besides causal attention in a window; None where that is all."""
    if options.get("softcap") is not None or options.get("position_bias") is not None:
        return "caps or biases its attention scores"
    if attention_mask is not None:
        return "makes a mask of its own"
    if not options.get("is_causal", getattr(module, "is_causal", True)):
        return "attends to what stands behind a token, too"
    return None


def _window_of_mask(module: nn.Module) -> int | None:
    """The window of a layer that leaves it to its mask, which is not made here."""
    config: Any = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[getattr(module, "layer_idx", 0)] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None) or None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: Tensor,
    scaling: float,
    sliding_window: int | None,
    sinks: Tensor | None,
    turn: Turn | None = None,
) -> Tensor:
    assert _state is not None, "attention over pages outside a step"
    cache = _state.caches[int(layer)]
    return paged_attention(
        query,
        key,
        value,
        cache.key,
        cache.value,
        slots_T=_state.slots_T,
        tables_SB=_state.tables_SB,
        query_starts=_state.starts,
        lengths_S=_state.lengths_S,
        max_query_len=_state.max_query_len,
        scaling=scaling,
        sliding_window=sliding_window,
        sinks=sinks,
        key_scale=cache.key_scale,
        value_scale=cache.value_scale,
        turn=turn,
        kinds=_state.kinds,
        backend=_state.backend,
    )


def _attend_turned(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    query_eps: Tensor | None,
    key_eps: Tensor | None,
    eps: list[float],
    layer: Tensor,
    scaling: float,
    sliding_window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    """Queries and keys as their products left them; a norm's eps is a number or one on the host."""
    found = zip((query_eps, key_eps), eps, strict=True)
    first, second = (number if one is None else float(one) for one, number in found)
    turn = Turn(cos[0], sin[0], query_norm, key_norm, first, second)
    return _attend(query, key, value, layer, scaling, sliding_window, sinks, turn)


_LIB = torch.library.Library("mogul", "FRAGMENT")
_LIB.define(
    "attend(Tensor query, Tensor key, Tensor value, Tensor layer, float scaling, "
    "int? sliding_window, Tensor? sinks) -> Tensor"
)
_LIB.define(
    "attend_turned(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, "
    "Tensor? query_norm, Tensor? key_norm, Tensor? query_eps, Tensor? key_eps, float[] eps, "
    "Tensor layer, float scaling, int? sliding_window, Tensor? sinks) -> Tensor"
)
_LIB.impl("attend", _attend, "CompositeExplicitAutograd")
_LIB.impl("attend_turned", _attend_turned, "CompositeExplicitAutograd")


@torch.library.register_fake("mogul::attend", lib=_LIB)
@torch.library.register_fake("mogul::attend_turned", lib=_LIB)
def _(query: Tensor, *_args: object) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def register() -> None:
    """Make the name known to Transformers; calling it again changes nothing."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)


register()
