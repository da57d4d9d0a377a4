"""The host's attention functions by name, for keys: chosen at its start, or by another pack."""

from __future__ import annotations

from typing import Any

import comfy.ldm.modules.attention
import comfy.ops
import torch

from ..errors import UnknownStructure
from ..key import digest
from ..structure import describe_function

_NAMES = ("optimized_attention", "optimized_attention_masked")
_CALLED = "scaled_dot_product_attention"
_ASKS = ("attention_split", "attention_sub_quad")
"""Of the host's, those that ask for free memory, which a traced graph would never do again."""


def attention_names() -> tuple[str, ...]:
    """The host's part of every key: the attention function, chosen at start or by another pack,
    what it calls, and the precision it is told."""
    precision = comfy.ldm.modules.attention.get_attn_precision  # of flags of the command line
    upcast = [str(precision(asked, torch.float16)) for asked in (None, torch.float32)]
    return (*(_name(f) or "unknown" for f in _functions()), *upcast)


def unknown_attention() -> str | None:
    """Why layers with attention cannot be compiled, if the host's or another pack's function is in
    the way."""
    host = comfy.ldm.modules.attention
    for name in _ASKS:
        if getattr(host, name) in (getattr(host, chosen) for chosen in _NAMES):
            return f"its attention is {name}, which asks for free memory while it runs"
    return _unknown(_functions())


def unknown_call() -> str | None:
    """Why attention that calls torch's own by name cannot be compiled, if a pack's is in its
    place."""
    return _unknown(_called())


def _unknown(functions: list[Any]) -> str | None:
    if all(_name(f) for f in functions):
        return None
    return "another node pack sets an attention function in each run that Blade cannot tell apart"


def _functions() -> list[Any]:
    return [*(getattr(comfy.ldm.modules.attention, name) for name in _NAMES), *_called()]


def _called() -> list[Any]:
    """What the host's attention functions call by name, in whose place some packs put theirs."""
    return [getattr(owner, _CALLED) for owner in (torch.nn.functional, comfy.ops)]


_AT_IMPORT = frozenset(map(id, _functions()))
_others: dict[str, dict[str, Any]] = {}
"""Functions that other packs have set since then, by name and label, the newest of each: one that
stays keeps its label, though what it holds may change."""
_MOST = 4
"""Of one name. More are made anew in each run, and hold something else each time."""


def _name(function: Any) -> str | None:
    """Packs set a new closure in each run, which is the same if it has the same code over the same
    values. What cannot be described is the same as long as it is the same object."""
    name = f"{function.__module__}.{getattr(function, '__qualname__', type(function).__name__)}"
    if id(function) in _AT_IMPORT:
        return name
    known = _others.setdefault(name, {})
    for label, other in known.items():
        if other is function:
            return label
    try:
        label = f"{name}#{digest(describe_function(function))}"
    except (UnknownStructure, RecursionError):  # the latter of what holds itself
        label = f"{name}#{len(known)}"
    if label not in known and len(known) == _MOST:
        return None
    known[label] = function
    return label
