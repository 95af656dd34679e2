"""Ask AIConfigurator for the rows of its own sample: the peer of `simulate validate`.

Question: what does AIConfigurator 0.12.0 predict for the first N aggregated MoE rows (in the order
of a hash of their ids)? Each row is asked as the file writes it and, where mogul reads its layout
differently, in that reading too; a row it refuses is asked again with its default formats, so that
its best answer counts. Needs `pip install aiconfigurator==0.12.0`. Writes JSON lines; rows already
there are kept.

    python benchmarks/sim/run_aiconfigurator.py 1000 benchmarks/sim/aiconfigurator_answers.jsonl
"""

from __future__ import annotations

import copy
import json
import logging
import signal
import sys
from pathlib import Path
from typing import Any

from mogul.simulate.validate import silicon

PATHS = {"zhipuai/GLM-5": "zai-org/GLM-5"}
LIMIT_S = 60


def number(text: str) -> int:
    """An empty cell counts as 1."""
    return int(float(text)) if text else 1


def ask(row: dict[str, str], layout: dict[str, int], *, with_formats: bool) -> dict[str, Any]:
    """One answer, or why there is none."""
    from aiconfigurator.cli.api import cli_estimate  # type: ignore[import-not-found]

    formats = {}
    if with_formats:
        formats = {key: row[key] or None for key in ("gemm_quant_mode", "moe_quant_mode")}
    signal.alarm(LIMIT_S)
    try:
        found = cli_estimate(
            PATHS.get(row["model_path"], row["model_path"]),
            row["system"],
            backend_name=row["backend"],
            isl=number(row["isl"]),
            osl=number(row["osl"]),
            pp_size=1,
            **layout,
            **formats,
        )
        return {"tpot_ms": round(float(found.tpot), 4), "ttft_ms": round(float(found.ttft), 3)}
    except (Exception, SystemExit) as error:
        signal.alarm(0)
        return {"error": f"{type(error).__name__}: {str(error)[:100]}"}
    finally:
        signal.alarm(0)


def as_written(row: dict[str, str]) -> dict[str, int]:
    """The layout as the file has it."""
    keys = ("tp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size", "batch_size")
    return {key: number(row[key]) for key in keys}


def as_read(row: dict[str, str]) -> dict[str, int] | None:
    """The layout in mogul's reading."""
    found = silicon.reading(row)
    if found is None:
        return None
    return {
        "tp_size": found.tp,
        "attention_dp_size": found.dp,
        "moe_tp_size": found.moe_tp,
        "moe_ep_size": found.ep,
        "batch_size": max(1, round(found.batch / found.dp)),
    }


def parse_once() -> None:
    """Keep parsed YAML files: the peer reads the same 160 of them again for every question."""
    import yaml

    parse, known = yaml.safe_load, {}

    def remembered(stream: Any) -> Any:
        text = stream if isinstance(stream, str | bytes) else stream.read()
        if text not in known:
            known[text] = parse(text)
        return copy.deepcopy(known[text])

    yaml.safe_load = remembered


def main() -> None:
    """Ask for every row that has no answer yet."""
    parse_once()
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("60 s")))
    count, path = int(sys.argv[1]), Path(sys.argv[2])
    known = set()
    if path.exists():
        known = {json.loads(line)["id"] for line in path.read_text().splitlines()}
    with path.open("a", encoding="utf-8") as out:
        for row in silicon.rows()[:count]:
            if row["id"] in known:
                continue
            written, read = as_written(row), as_read(row)
            answer = {"id": row["id"], "file": ask(row, written, with_formats=True)}
            if read is None:
                answer["read"] = {"error": "no legal reading"}
            else:
                is_same = read == written
                answer["read"] = answer["file"] if is_same else ask(row, read, with_formats=True)
                if "error" in answer["read"]:
                    answer["default"] = ask(row, read, with_formats=False)
            out.write(json.dumps(answer) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
