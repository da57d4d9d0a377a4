"""A module over again, with other children in some places: the module itself is never changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn


class Holder(nn.Module):
    """Stands for one child of a model, and calls a function instead."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = function


def shadow(module: nn.Module, stand_ins: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of `module` with `stand_ins` in the places of the children of these names.

    stand_ins: name, as named_modules gives it, to what stands there.

    Only what holds one of them is copied; all else is shared, tensors and hooks too.
    """
    twin = copy.copy(module)
    children = dict(module._modules)
    for name in {path.partition(".")[0] for path in stand_ins}:
        inside = {p.partition(".")[2]: s for p, s in stand_ins.items() if p.startswith(f"{name}.")}
        child = children[name]
        children[name] = shadow(child, inside) if inside and child else stand_ins[name]
    vars(twin)["_modules"] = children
    return twin
