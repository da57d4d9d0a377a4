"""The host's attention functions by name, for keys: chosen at its start, or by another pack."""

from __future__ import annotations

from typing import Any

import comfy.ldm.modules.attention


def attention_names() -> tuple[str, ...]:
    """The host's part of every key: the attention function, chosen at start or by another pack."""
    attention = comfy.ldm.modules.attention
    names = ("optimized_attention", "optimized_attention_masked")
    functions = [getattr(attention, name) for name in names]
    return tuple(_function_name(f) for f in functions)


_AT_IMPORT = frozenset(
    id(getattr(comfy.ldm.modules.attention, name))
    for name in ("optimized_attention", "optimized_attention_masked")
)
_others: list[Any] = []
"""Attention functions that other packs have set since then; kept, so that ids stay theirs."""


def _function_name(function: Any) -> str:
    """Functions of others may be closures, which only their identity tells apart."""
    name = f"{function.__module__}.{getattr(function, '__qualname__', type(function).__name__)}"
    if id(function) in _AT_IMPORT:
        return name
    known = next((i for i, other in enumerate(_others) if other is function), None)
    if known is None:
        known = len(_others)
        _others.append(function)
    return f"{name}#{known}"
