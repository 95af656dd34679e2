"""The common base of mogul's records: frozen, complete, an unknown key is an error.

Pydantic reports problems in its own words; here they become one ConfigError that names the key,
the value and the nearest known name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from mogul.core.errors import ConfigError, FieldError, nearest


class Spec(BaseModel):
    """A frozen record that refuses unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    def __init__(self, /, _where: str = "", **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _as_config_error(error, type(self), _where or type(self).__name__) from None

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, where: str = "") -> Self:
        """Build the record from a mapping; `where` names its origin in errors."""
        return cls(_where=where, **values)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed, validated again; defaults stay defaults."""
        return type(self)(**{**self.model_dump(exclude_unset=True), **changes})


def _as_config_error(error: ValidationError, cls: type[Spec], where: str) -> ConfigError:
    problems = error.errors(include_url=False)
    problem = next((one for one in problems if one["type"] == "extra_forbidden"), problems[0])
    key = ".".join(str(part) for part in problem["loc"])
    if isinstance(cause := problem.get("ctx", {}).get("error"), ConfigError):
        return cause
    if problem["type"] == "extra_forbidden":
        last = str(problem["loc"][-1])
        return ConfigError(f"{where}: unknown key {key!r}", fix=nearest(last, cls.model_fields))
    if problem["type"] == "missing":
        return ConfigError(f"{where}: key {key!r} is missing", fix=f"add {key!r}")
    text = problem["msg"].removeprefix("Value error, ")
    fix = _mend(problem["type"], problem.get("ctx", {}))
    if not key:
        return ConfigError(f"{where}: {text}", fix=fix)
    told = f"{where}: {key}: {text} (given: {problem['input']!r})"
    return FieldError(told, fix=fix, key=key, reason=text)


def _mend(kind: str, limits: Mapping[str, Any]) -> str:
    """Say how to mend a value, where pydantic's kind of error tells."""
    bounds = {
        "greater_than": "use more than {gt:g}",
        "greater_than_equal": "use {ge:g} or more",
        "less_than": "use less than {lt:g}",
        "less_than_equal": "use at most {le:g}",
        "too_short": "give at least {min_length}",
        "literal_error": "use {expected}",
        "finite_number": "use a finite number",
    }
    if kind in bounds:
        return bounds[kind].format(**limits)
    name, _, end = kind.rpartition("_")
    words = {
        "int": "a whole number", "float": "a number", "bool": "true or false", "string": "a text",
        "tuple": "a list", "list": "a list", "dict": "a table of keys", "model": "a table of keys",
    }  # fmt: skip
    known = name in words and end in ("parsing", "type", "size", "from_float")
    return f"give {words[name]}" if known else "give another value"
