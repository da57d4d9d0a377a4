"""Graphs that travel to another process: whole, and named by what every process can import."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from blade_tests.unit.samples import in_new_process, request_of
from torch import nn

from blade.blade_core.graph import trace

pytest.importorskip("torch.fx._graph_pickler")

from blade.blade_core.travel import pack, unpack


class Layers(nn.Module):
    """Makes a tensor without any input, takes copies in a layout, and has a dtype and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        row = torch.arange(x.shape[2], device=x.device, dtype=torch.float32) * 0.5
        x = self.conv(x).contiguous(memory_format=torch.contiguous_format)
        x = (x * row[:, None] * scale).clone(memory_format=torch.channels_last)
        return nn.functional.softmax(x.to(torch.float64), dim=1).float()


def traced() -> Any:
    x = torch.randn(2, 4, 6, 5).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():  # as the host samples
        request = request_of(Layers(), (x,))
        return request, trace(request)


def test_a_graph_comes_back_as_it_was() -> None:
    request, module = traced()
    code, before = module.code, [node.meta.get("val") for node in module.graph.nodes]
    back = unpack(pack(module))
    assert back.code == code
    for old, node in zip(before, back.graph.nodes, strict=True):
        assert set(node.meta) <= {"val"}
        if old is not None:
            new = node.meta["val"]
            assert (new.shape, new.stride()) == (old.shape, old.stride()) and new.dtype == old.dtype
    back.recompile()
    torch.testing.assert_close(
        back(*request.weights, *request.inputs), request.eager(request.weights, request.inputs)
    )


def test_another_process_reads_it(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it has not loaded what this one did, such as a node pack that imports torch."""
    stranger = ModuleType("a_node_pack")
    stranger.torch = torch  # type: ignore[attr-defined]
    _, module = traced()
    with monkeypatch.context() as here:
        here.setattr(sys, "modules", {"a_node_pack": stranger, **sys.modules})
        (tmp_path / "graph").write_bytes(pack(module))
    code = f"""
from pathlib import Path
from blade.blade_core.travel import unpack
module = unpack(Path({str(tmp_path / "graph")!r}).read_bytes())
print(len(list(module.graph.nodes)))
"""
    assert in_new_process(code) == str(len(list(module.graph.nodes)))
