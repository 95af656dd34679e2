"""Per-token Parquet beside a trace: one row a token, a column pair a layer.

Columns: seq, pos (uint32), token_id (int32), task (dictionary), and for layer l `e{l}` (ids, K of
uint8 or uint16) and `w{l}` (weights, K of float16), so a reader loads only the layers it needs.
Facts of the model stand in the schema's metadata. Needs pyarrow (`pip install 'mogul[trace]'`).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from mogul.core.errors import BackendError
from mogul.spec.trace import ModelStamp

FOLDER = "tokens"
DRAFT_FOLDER = "tokens-unfinished"
_ROWS_PER_PART = 32_768


def require_pyarrow() -> Any:
    """Import pyarrow, or say how to get it."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise BackendError(
            "per-token files need pyarrow, which is not installed",
            fix="pip install 'mogul[trace]'",
        ) from error
    return pyarrow


class TokenWriter:
    """Collects tokens and writes parts of 32768 rows, each whole or absent.

    Parts stand in `tokens-unfinished` until the run ends; then they replace those in `tokens`.
    """

    def __init__(
        self, folder: Path, model: ModelStamp, layers: tuple[int, ...], tasks: tuple[str, ...]
    ) -> None:
        self.arrow = require_pyarrow()
        self.final = folder / FOLDER
        self.folder = folder / DRAFT_FOLDER
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.layers, self.tasks, self.model = layers, tasks, model
        self.id_type = np.uint8 if model.num_experts < 256 else np.uint16
        self.num_parts = self.num_rows = 0
        self._held: list[dict[str, np.ndarray]] = []

    def add(
        self,
        ids_LNK: np.ndarray,
        weights_LNK: np.ndarray | None,
        *,
        seq: np.ndarray,
        pos: np.ndarray,
        token_id: np.ndarray,
        task: np.ndarray,
    ) -> None:
        """Add N tokens."""
        rows = {"seq": seq, "pos": pos, "token_id": token_id, "task": task}
        rows["ids"] = ids_LNK.transpose(1, 0, 2).astype(self.id_type)
        if weights_LNK is not None:
            rows["weights"] = weights_LNK.transpose(1, 0, 2).astype(np.float16)
        self._held.append(rows)
        if sum(len(one["seq"]) for one in self._held) >= _ROWS_PER_PART:
            self.flush()

    def flush(self) -> None:
        """Write what is held as one part."""
        if not self._held:
            return
        rows = {name: np.concatenate([one[name] for one in self._held]) for name in self._held[0]}
        self._held = []
        table = self._table(rows)
        part = self.folder / f"part-{self.num_parts:05d}.parquet"
        draft = part.with_suffix(".draft")
        # Parquet has no integer below 32 bits: a dictionary packs ids in as many bits as they need.
        packed = ["task", *(f"e{layer}.list.element" for layer in self.layers)]
        self.arrow.parquet.write_table(table, draft, compression="zstd", use_dictionary=packed)
        draft.replace(part)
        self.num_parts += 1
        self.num_rows += table.num_rows

    def finish(self) -> None:
        """Write the rest, and let the new parts take the place of an earlier run's."""
        self.flush()
        shutil.rmtree(self.final, ignore_errors=True)
        self.folder.rename(self.final)

    def _table(self, rows: dict[str, np.ndarray]) -> Any:
        pa = self.arrow
        columns: dict[str, Any] = {
            "seq": pa.array(rows["seq"].astype(np.uint32)),
            "pos": pa.array(rows["pos"].astype(np.uint32)),
            "token_id": pa.array(rows["token_id"].astype(np.int32)),
            "task": pa.DictionaryArray.from_arrays(
                pa.array(rows["task"].astype(np.int32)), list(self.tasks)
            ),
        }
        for position, layer in enumerate(self.layers):
            for letter, name in (("e", "ids"), ("w", "weights")):
                if name in rows:
                    flat = np.ascontiguousarray(rows[name][:, position]).reshape(-1)
                    columns[f"{letter}{layer}"] = pa.FixedSizeListArray.from_arrays(
                        pa.array(flat), self.model.top_k
                    )
        return pa.table(columns, metadata={"mogul.model": self.model.model_dump_json()})
