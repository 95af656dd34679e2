"""`mogul VERB [OPTIONS]`: find the verb first, then import only what it needs.

Every verb is a module with a frozen dataclass `Options` (fields become flags), `run(options)`
that returns an exit code, and `EXAMPLES`, shown in its help. Results go to standard
output, talk to standard error. Exit codes: 0 good, 1 failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from importlib import import_module
from inspect import cleandoc
from typing import Any

VERBS = {
    "info": ("mogul.cli.info", "parameters, memory and balanced device counts of a model"),
    "generate": ("mogul.cli.generate", "continue a prompt, streaming"),
    "chat": ("mogul.cli.chat", "talk to a model in the terminal"),
    "calibrate": ("mogul.cli.calibrate", "measure what quantising wants to know of a checkpoint"),
    "quantise": ("mogul.cli.quantise", "write a checkpoint with weights in 8-bit floats"),
    "upcycle": ("mogul.cli.upcycle", "turn a dense checkpoint into grouped experts, exactly"),
    "data": ("mogul.cli.data", "text -> token shards to train on"),
    "train": ("mogul.cli.train", "train a model as a recipe says"),
    "trace": ("mogul.cli.trace", "record once what the experts of a model do"),
    "report": ("mogul.cli.report", "see which experts the devices wait for"),
    "place": ("mogul.cli.place", "choose which device holds which expert"),
    "regroup": ("mogul.cli.regroup", "turn a top-k model into grouped experts"),
    "simulate": ("mogul.cli.simulate", "predict time, memory and price of a model on machines"),
    "bench": ("mogul.cli.bench", "measure this machine: kernels against their floors"),
    "demo": ("mogul.cli.demo", "see on this machine what grouping does, in five minutes"),
}

# Libraries outside the base installation, and the extra that brings them.
EXTRA_OF = {
    "torch": "models",
    "transformers": "models",
    "tokenizers": "models",
    "pyarrow": "trace",
    "plotly": "draw",
    "matplotlib": "draw",
    "gguf": "demo",
}

NO_MEMORY = ("out of memory", "allocate memory")
"""Words of torch's errors where memory was short."""

_HELP = """\
usage: mogul VERB [OPTIONS]

Train, size, shrink and serve mixture-of-experts language models.

verbs:
{verbs}

options:
  -h, --help   show this help; `mogul VERB --help` shows a verb's options and examples
  --version    show mogul's version
  --debug      show the traceback of an error (after the verb or before it)

examples:
  mogul info preset:pangu-pro-moe-72b
  mogul upcycle ./SmolLM2-135M-Instruct --experts 32 --groups 8 --out ./moge
  mogul chat ./moge
"""


def main(args: list[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    given = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in given
    words = [word for word in given if word != "--debug"]
    if not words or words[0] in ("-h", "--help", "help"):
        return _show(_HELP.format(verbs=_verb_lines()), failed=not words)
    if words[0] in ("--version", "-V"):
        from mogul import __version__

        return _show(f"mogul {__version__}\n")
    if words[0] not in VERBS:
        return _unknown(words[0])
    return _guarded(words[0], words[1:], debug=debug)


def _verb_lines() -> str:
    return "\n".join(f"  {verb:<10} {text}" for verb, (_, text) in VERBS.items())


def _show(text: str, *, failed: bool = False) -> int:
    (sys.stderr if failed else sys.stdout).write(text)
    return 2 if failed else 0


def _unknown(word: str) -> int:
    from mogul.core.errors import nearest

    kind = "option" if word.startswith("-") else "verb"
    known = VERBS if kind == "verb" else ("--help", "--version", "--debug")
    sys.stderr.write(f"mogul: unknown {kind} {word!r}\nfix: {nearest(word, known)}\n")
    return 2


def _guarded(verb: str, args: list[str], *, debug: bool) -> int:
    """Run a verb; every way it can end becomes an exit code and a clean message."""
    from mogul.core.errors import ConfigError, MogulError

    try:
        code = _run_verb(verb, args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        sys.stderr.write("\nmogul: interrupted\n")
        return 130
    except BrokenPipeError:  # the reader of our output has left: nobody to tell
        _drop_output()
        return 0
    except SystemExit as stop:  # tyro: 0 after help, 2 after wrong usage
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except MogulError as error:
        if debug:
            raise
        _report(verb, error)
        return 2 if isinstance(error, ConfigError) else 1
    except Exception as error:
        if debug:
            raise
        told = f"{type(error).__name__}: {error}"
        if isinstance(error, OSError) and error.filename is not None:
            told = f"{error.filename}: {error.strerror}"
        sys.stderr.write(f"mogul {verb}: {told}\nfix: {_advice(error)}\n")
        return 1


def _advice(error: Exception) -> str:
    """Say how to mend an error nobody foresaw."""
    library = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and library in EXTRA_OF:
        return f"pip install 'mogul[{EXTRA_OF[library]}]'"
    if isinstance(error, OSError) and error.filename is not None:
        return "check that the path is right and may be read or written"
    if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
        return "it takes more memory than there is: smaller batches, shorter texts or fewer at once"
    return "this is unexpected; run again with --debug and report the traceback"


def _drop_output() -> None:
    """Point standard output at nothing, so that the interpreter's last flush stays quiet."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report(verb: str, error: Exception) -> None:
    notes = "".join(f"{note}\n" for note in getattr(error, "__notes__", ()))
    sys.stderr.write(f"mogul {verb}: {error}\n{notes}")


def _yield_on_a_busy_machine() -> None:
    """Let torch's threads sleep where they wait, if others work here: before torch is loaded.

    They spin by default, and take the turns of the very thread they wait for: on two busy cores a
    forward took four times as long. On a rested machine spinning is a quarter faster.
    """
    with suppress(OSError, AttributeError):  # no load average on this system
        if os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1):
            os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _run_verb(verb: str, args: list[str]) -> int:
    _yield_on_a_busy_machine()
    module = import_module(VERBS[verb][0])
    if hasattr(module, "SUBVERBS"):
        return _run_subverb(verb, args, module)
    return module.run(_parse(module, verb, args))


def _run_subverb(verb: str, args: list[str], module: Any) -> int:
    """Run a verb that has verbs of its own: `mogul simulate run ...`."""
    subverbs: dict[str, tuple[str, str]] = module.SUBVERBS
    if not args or args[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:<10} {text}" for name, (_, text) in subverbs.items())
        usage = f"usage: mogul {verb} VERB [OPTIONS]\n\nverbs:\n{lines}\n{module.EXAMPLES}"
        return _show(usage, failed=not args)
    if args[0] not in subverbs:
        from mogul.core.errors import nearest

        sys.stderr.write(f"mogul {verb}: unknown verb {args[0]!r}\n")
        sys.stderr.write(f"fix: {nearest(args[0], subverbs)}\n")
        return 2
    chosen = import_module(subverbs[args[0]][0])
    return chosen.run(_parse(chosen, f"{verb} {args[0]}", args[1:]))


def _parse(module: Any, verb: str, args: list[str]) -> Any:
    from mogul.cli.flags import parse

    about = cleandoc(module.Options.__doc__ or "")
    description = f"{about}\n\n{getattr(module, 'EXAMPLES', '').strip()}"
    options = parse(module.Options, args, prog=f"mogul {verb}", description=description)
    if getattr(options, "seed", 0) < 0:
        from mogul.core.errors import ConfigError

        raise ConfigError(f"--seed {options.seed} is below 0", fix="use 0 or more")
    return options


if __name__ == "__main__":
    sys.exit(main())
