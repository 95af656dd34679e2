"""Whether paged attention can run on Triton or FlashInfer; both are loaded at the first call."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from mogul.kernels import triton as room
from mogul.kernels.paged_call import PagedCall
from mogul.kernels.reference.attention import FP8

_FP8_CAPABILITY = (8, 9)


def why_not_triton_attention(
    *,
    device: torch.device,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_width: int,
    **_facts: object,
) -> str | None:
    """The reason why a call cannot run on these kernels, or None."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"the tensors are on {device}, not on an NVIDIA GPU"
    if reason := room._device_reason(device.index):
        return reason
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the queries are {dtype}; bfloat16 and float16 are supported"
    if cache_dtype == FP8 and torch.cuda.get_device_capability(device) < _FP8_CAPABILITY:
        return "fp8 pages need compute capability 8.9"
    if head_width % 8 or head_width > 256:
        return f"head width {head_width} is not a multiple of 8 up to 256"
    if num_heads // num_kv_heads > 128:
        return f"{num_heads // num_kv_heads} query heads share a key head; at most 128 may"
    return None


def paged_attention_triton(given: PagedCall) -> Tensor:
    """See `mogul.kernels.paged_attention`."""
    from mogul.kernels.triton.paged import paged_attention_triton as run

    return run(given)


FLASHINFER_WIDTHS = (64, 128, 256)


def why_not_flashinfer(*, head_width: int, **facts: Any) -> str | None:
    """The reason why FlashInfer's kernels cannot attend, or None; mogul's own write the pages."""
    if reason := why_not_triton_attention(head_width=head_width, **facts):
        return reason
    if find_spec("flashinfer") is None:
        return "flashinfer is not installed: pip install 'mogul[flashinfer]'"
    if head_width not in FLASHINFER_WIDTHS:
        return f"head width {head_width} is none of {FLASHINFER_WIDTHS}"
    return None


def paged_attention_flashinfer(given: PagedCall) -> Tensor:
    """See `mogul.kernels.paged_attention`."""
    from mogul.kernels.triton.flashinfer_paged import paged_attention_flashinfer as run

    return run(given)
