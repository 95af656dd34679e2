"""`mogul train`: a recipe in, a run folder with checkpoints, metrics and a model out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

EXAMPLES = """
examples:
  mogul train tiny --out runs/tiny
  mogul train tiny --out runs/hot --set optimizer.lr=0.003 --set run.seed=1
  mogul train tiny --out runs/tiny --resume
"""

STOPPED = 143
"""Exit code after SIGTERM, as shells and schedulers know it."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train a model as a TOML recipe says, on a CPU or a GPU.

    The run folder holds checkpoints (safetensors and JSON), metrics.jsonl, report.html and, at
    the end, the model in Transformers' layout. SIGTERM saves and stops; --resume goes on.
    """

    recipe: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RECIPE")]
    """A TOML file (`extends = "other.toml"` in it names one to start from), or tiny (carried)."""
    out: Path
    """Folder of the run."""
    set: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Change one value: section.key=value; may be given several times."""
    resume: bool = False
    """Go on from the newest checkpoint in the folder, or start if there is none."""
    with_code: bool = False
    """Give the model auto_map files, for tools that load with trust_remote_code."""


def run(options: Options) -> int:
    """Train; 0 when the recipe was run to its end."""
    from mogul.core.log import say

    say(f"loading what {options.recipe} names")
    from mogul.train.recipe_file import read_recipe
    from mogul.train.report import REPORT_FILE
    from mogul.train.session import MODEL, Session

    recipe = read_recipe(options.recipe, options.set)
    with Session(recipe, options.out, resume=options.resume) as session:
        if not session.run():
            return STOPPED
        if options.with_code:
            from mogul.train.export import add_code

            add_code(session.model, options.out / MODEL)
    if (options.out / REPORT_FILE).exists():
        say(f"curves and loads: {options.out / REPORT_FILE}")
    print(options.out / MODEL)  # noqa: T201
    return 0
