"""The host's attention functions by name, for keys: chosen at its start, or by another pack."""

from __future__ import annotations

from typing import Any

import comfy.ldm.modules.attention

from ..errors import UnknownStructure
from ..key import digest
from ..structure import describe_function

_NAMES = ("optimized_attention", "optimized_attention_masked")


def attention_names() -> tuple[str, ...]:
    """The host's part of every key: the attention function, chosen at start or by another pack."""
    return tuple(_name(f) or "unknown" for f in _functions())


def unknown_attention() -> str | None:
    """Why layers with attention cannot be compiled, if another pack's function is in the way."""
    if all(_name(f) for f in _functions()):
        return None
    return "another node pack set an attention function that Blade cannot describe"


def _functions() -> list[Any]:
    return [getattr(comfy.ldm.modules.attention, name) for name in _NAMES]


_AT_IMPORT = frozenset(map(id, _functions()))


def _name(function: Any) -> str | None:
    """Packs set a new closure in each run, which is the same if it has the same code over the same
    values."""
    name = f"{function.__module__}.{getattr(function, '__qualname__', type(function).__name__)}"
    if id(function) in _AT_IMPORT:
        return name
    try:
        return f"{name}#{digest(describe_function(function))}"
    except UnknownStructure:
        return None
