"""The rules no linter knows, and the code lines of every room.

python tools/house_rules.py            code lines a room
python tools/house_rules.py --check    fail on a file or function that is too long, and on the
                                       word `cuda` outside the places that may know it
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "mogul"
MAX_LINES = 500
MAX_LINES_LONG = 700  # a modeling file, a file of GPU kernels
MAX_FUNCTION_LINES = 40  # of its body, without the docstring
MAY_SAY_CUDA = ("kernels/triton/", "serve/graph", "bench/")
SILENT_TOKENS = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def docstring_lines(tree: ast.Module) -> set[int]:
    """Line numbers that docstrings (and attribute docstrings) take."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            continue
        if isinstance(node.value.value, str):
            lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def code_lines(text: str) -> int:
    """Lines that hold code: no comments, no docstrings, no blank lines."""
    used: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in SILENT_TOKENS:
            used.update(range(token.start[0], token.end[0] + 1))
    return len(used - docstring_lines(ast.parse(text)))


def is_long_kind(name: str) -> bool:
    """Whether a file is of the two kinds that may be longer."""
    return name.startswith("kernels/triton/") or Path(name).name.startswith("modeling_")


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from a function's first statement behind its docstring to its last."""
    first = node.body[min(ast.get_docstring(node) is not None, len(node.body) - 1)]
    return (node.end_lineno or first.lineno) - first.lineno + 1


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a function is a Triton kernel, which cannot be split freely."""
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def problems_in(path: Path) -> list[str]:
    """Every broken rule in one file."""
    name = path.relative_to(SOURCE).as_posix()
    text = path.read_text(encoding="utf-8")
    found = []
    limit = MAX_LINES_LONG if is_long_kind(name) else MAX_LINES
    if (count := len(text.splitlines())) > limit:
        found.append(f"{name}: {count} lines, at most {limit}: split it where an idea ends")
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or is_kernel(node):
            continue
        if (length := body_lines(node)) > MAX_FUNCTION_LINES:
            found.append(f"{name}:{node.lineno}: {node.name} has {length} lines of body")
    if not name.startswith(MAY_SAY_CUDA):
        for number, line in enumerate(text.splitlines(), 1):
            if re.search(r"\bcuda\b", line.split("#")[0]):
                found.append(f"{name}:{number}: `cuda` here: devices go through torch.accelerator")
    return found


def main() -> int:
    """Print the table of rooms, or check every file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail on broken rules")
    check = parser.parse_args().check
    files = sorted(SOURCE.rglob("*.py"))
    if check:
        problems = [problem for path in files for problem in problems_in(path)]
        print("\n".join(problems) or f"house rules: {len(files)} files kept them", file=sys.stderr)
        return 1 if problems else 0
    rooms: Counter[str] = Counter()
    for path in files:
        parts = path.relative_to(SOURCE).parts
        room = parts[0] if len(parts) > 1 else "(root)"
        rooms[room] += code_lines(path.read_text(encoding="utf-8"))
    for room, lines in rooms.most_common():
        print(f"{room:12} {lines:6,}")
    print(f"{'all':12} {sum(rooms.values()):6,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
