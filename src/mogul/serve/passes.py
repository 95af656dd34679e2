"""A change of compiled code that no model needs to know: its `torch.topk` in one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from mogul.kernels.triton import topk


class FewPicks(CustomGraphPass):
    """Replaces top-k over short rows [T, E] by `mogul::topk`."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        """Change the graph in place."""
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.topk.default):
            if _fits(*node.args):
                with graph.inserting_before(node):
                    short = graph.call_function(torch.ops.mogul.topk.default, node.args[:2])
                short.meta = dict(node.meta)
                node.replace_all_uses_with(short)
                graph.erase_node(node)

    def uuid(self) -> Any:
        """Names this pass in the caches of compiled code."""
        return get_hash_for_files((__file__,))


def _fits(rows: Any, k: Any, dim: int = -1, largest: bool = True, *_: Any) -> bool:
    shape = rows.meta["val"].shape
    columns = shape[-1]
    return (
        len(shape) == 2
        and dim in (-1, 1)
        and largest
        and isinstance(k, int)
        and k <= topk.MOST_PICKS
        and isinstance(columns, int)
        and columns <= topk.MOST_COLUMNS
        and rows.meta["val"].dtype in (torch.float32, torch.bfloat16, torch.float16)
    )
