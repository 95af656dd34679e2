"""DeepGEMM: its two grouped fp8 products alone, and itself for Transformers' `deepgemm` experts.

The products come without sort, gather, rounding, activation and sum, which are the caller's in
DeepGEMM: a whole layer is slower than this bound. Their masked layout holds 128 rows an expert, of
which the routed ones count; scales are per 128 channels and token, and per 128 x 128 block of the
weights. Kernels are compiled with nvcc at first use.
"""

from __future__ import annotations

from typing import Any

import torch
from common import Case, rel
from torch import Tensor

ROWS = 128


class Products:
    """Callable with a layer's inputs; returns the second product's padded output."""

    def __init__(self, case: Case):
        import deep_gemm

        self.library: Any = deep_gemm
        self.case = case
        self.gate_up, self.down = (self._blocks(w) for w in (case.gate_up, case.down))
        self.prepared: dict[Any, Any] = {}
        self.error = float("nan")
        """Of the first product against bf16, on one expert's rows."""

    def _blocks(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        pairs = [self.library.utils.math.per_block_cast_to_fp8(w, False) for w in weight]
        return torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])

    def _rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """[E, ROWS, K] in fp8, scales in the order that the products read them."""
        experts, _, width = rows.shape
        value, scale = self.library.utils.math.per_token_cast_to_fp8(rows.flatten(0, 1), False)
        scale = scale.view(experts, ROWS, -1)
        return value.view(experts, ROWS, width), self.library.get_mn_major_tma_aligned_tensor(scale)

    def _prepare(self, x: Tensor, ids: Tensor) -> tuple[Any, ...]:
        experts, width, inner = self.case.dims
        rows = x.new_zeros(experts, ROWS, width)
        count = torch.zeros(experts, dtype=torch.int32, device=x.device)
        for expert in range(experts):
            token = (ids == expert).any(-1).nonzero()[:, 0]
            rows[expert, : len(token)] = x[token]
            count[expert] = len(token)
        up = x.new_empty(experts, ROWS, 2 * inner)
        act = torch.randn_like(up[..., :inner]).contiguous()
        return self._rows(rows), up, self._rows(act), x.new_empty(experts, ROWS, width), count, rows

    def _run(self, rows: Any, up: Tensor, act: Any, out: Tensor, count: Tensor, mean: int) -> None:
        product = self.library.m_grouped_fp8_gemm_nt_masked
        product(rows, self.gate_up, up, count, mean)
        product(act, self.down, out, count, mean)

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Both products on inputs made before the first call."""
        key = (x.data_ptr(), ids.data_ptr(), x.shape)
        if key not in self.prepared:
            made = self.prepared[key] = self._prepare(x, ids)
            mean = max(1, ids.numel() // self.case.dims[0])
            self._run(*made[:5], mean)
            busy = int(made[4].argmax())
            live = int(made[4][busy])
            want = made[5][busy, :live].float() @ self.case.gate_up[busy].float().T
            self.error = rel(made[1][busy, :live], want)
            self.prepared[key] = (*made[:5], mean)
        self._run(*self.prepared[key])
        return self.prepared[key][3]


def give_transformers() -> None:
    """Let Transformers' experts_implementation="deepgemm" use the installed library."""
    import deep_gemm
    from transformers.integrations import deepgemm as place

    library: Any = deep_gemm
    place._DEEPGEMM = place.DeepGEMM(
        fp8_fp4_matmul=library.fp8_fp4_gemm_nt,
        grouped_fp8_fp4_matmul_nt=library.m_grouped_fp8_fp4_gemm_nt_contiguous,
        grouped_fp8_fp4_matmul_nn=library.m_grouped_fp8_fp4_gemm_nn_contiguous,
        grouped_bf16_matmul_nt=library.m_grouped_bf16_gemm_nt_contiguous,
        grouped_bf16_matmul_nn=library.m_grouped_bf16_gemm_nn_contiguous,
        per_token_cast_to_fp8=library.utils.math.per_token_cast_to_fp8,
        transform_sf_into_required_layout=library.transform_sf_into_required_layout,
        transform_weights_for_mega_moe=library.transform_weights_for_mega_moe,
        get_symm_buffer_for_mega_moe=library.get_symm_buffer_for_mega_moe,
        fp8_fp4_mega_moe=library.fp8_fp4_mega_moe,
        m_alignment=library.get_mk_alignment_for_contiguous_layout(),
    )
