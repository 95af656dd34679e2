"""How the fields of a verb's `Options` become flags: what tyro shows of values that may be absent.

`int | None` is shown as INT, since leaving the flag out says None; a flag that is off by default
has no second name that turns it off. A record made from flags that refuses a value speaks of the
flag, and of the value as it was typed.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, Union, get_args, get_origin

import tyro
from tyro import constructors

T = TypeVar("T")
REGISTRY = constructors.ConstructorRegistry()
MARKERS = (tyro.conf.FlagCreatePairsOff,)


@REGISTRY.primitive_rule
def _may_be_absent(info: constructors.PrimitiveTypeInfo) -> Any:
    """`X | None` reads what X reads; None where it is left out."""
    kinds = [kind for kind in get_args(info.type) if kind is not type(None)]
    is_optional = get_origin(info.type) in (Union, types.UnionType) and len(kinds) == 1
    if not is_optional:
        return None
    inner = constructors.PrimitiveTypeInfo.make(kinds[0], info.markers)
    found: Any = constructors.ConstructorRegistry.get_primitive_spec(inner)
    if not isinstance(found, constructors.PrimitiveConstructorSpec):
        return found
    return constructors.PrimitiveConstructorSpec(
        nargs=found.nargs,
        metavar=found.metavar,
        instance_from_str=found.instance_from_str,
        is_instance=lambda value: value is None or found.is_instance(value),
        str_from_instance=lambda value: (
            ["none"] if value is None else found.str_from_instance(value)
        ),
        choices=found.choices,
    )


@contextmanager
def named_by_flags(options: object, **option_of: str) -> Iterator[None]:
    """Say of a record's field that cannot be which flag gave it, and the value as it was typed.

    A field has the name of its option, or that in `option_of`.
    """
    from mogul.core.errors import ConfigError, FieldError

    try:
        yield
    except FieldError as error:
        field = error.key.partition(".")[0]
        option = option_of.get(field, field)
        if not hasattr(options, option):
            raise
        value = getattr(options, option)
        flag = f"--{option.replace('_', '-')} {value}"
        reason = error.reason.replace("Input should", "it should", 1)
        raise ConfigError(f"{flag} cannot be: {reason}", fix=error.fix) from None


def parse(kind: type[T], args: list[str], *, prog: str, description: str) -> T:
    """Read a command line as `kind`; tyro ends the program after help and wrong usage."""
    return tyro.cli(
        kind, prog=prog, description=description, args=args, registry=REGISTRY, config=MARKERS
    )
