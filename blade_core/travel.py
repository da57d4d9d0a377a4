"""Traced graphs on their way to another process, with what tracing has noted for each node.

Torch's own graph pickler does it. Python's would write a graph as code, and trace that once more
where it is read: what is made without any input would be a constant then.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch


def pack(module: torch.fx.GraphModule) -> bytes:
    """A graph as bytes for `unpack`, in this process or another of the same torch.

    All that its nodes note besides their values' forms is taken off them: stacks and the like do
    not travel.
    """
    from torch.fx._graph_pickler import Options

    for node in module.graph.nodes:
        node.meta = {key: noted for key, noted in node.meta.items() if key == "val"}
    packed: bytes = _pickler().dumps(module, Options(ops_filter=None))
    return packed


def unpack(content: bytes) -> torch.fx.GraphModule:
    """The graph that `pack` was given, on fake tensors. Runs code: never for bytes of others."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # Without an environment for shapes, torch would not store what it compiles.
    module = _pickler().loads(content, FakeTensorMode(shape_env=ShapeEnv()))
    assert isinstance(module, torch.fx.GraphModule)
    return module


@lru_cache
def _pickler() -> Any:
    from torch.fx._graph_pickler import GraphPickler

    class Pickler(GraphPickler):
        """Names memory formats as torch's: Python would look for any module that has a `torch`,
        and name that, which another process may not find."""

        def reducer_override(self, obj: object) -> Any:
            if isinstance(obj, torch.memory_format):
                return getattr, (torch, str(obj).removeprefix("torch."))
            if obj is torch:
                return __import__, ("torch",)
            return super().reducer_override(obj)

    return Pickler
