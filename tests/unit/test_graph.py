"""Requests, skeletons and traces: no data is copied, nothing is computed, results are equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from blade_tests.unit.samples import Unit, inputs_of, request_of, weights_of
from torch import nn

from blade.blade_core.graph import Positional, Static, skeleton, trace

NHWC = torch.channels_last


# --- skeleton -----------------------------------------------------------------------------------


def test_skeleton_holds_no_data() -> None:
    unit = Unit()
    bare = skeleton(unit)
    assert [t.device.type for t in bare.state_dict().values()] == ["meta"] * 7
    assert {k: (t.shape, t.dtype, t.stride()) for k, t in bare.state_dict().items()} == {
        k: (t.shape, t.dtype, t.stride()) for k, t in unit.state_dict().items()
    }
    assert not any(p.requires_grad for p in bare.parameters())
    assert isinstance(bare.get_parameter("conv.weight"), nn.Parameter)
    assert not isinstance(bare.get_buffer("shift"), nn.Parameter)


def test_skeleton_copies_no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy on the way to the meta device would need the weights' memory once more."""

    def copied(*_: Any) -> None:
        raise AssertionError("a tensor was copied")

    monkeypatch.setattr(torch.Tensor, "__deepcopy__", copied)
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", copied)
    monkeypatch.setattr(torch.Tensor, "clone", copied)
    skeleton(Unit())


def test_skeleton_leaves_the_module_alone() -> None:
    unit = Unit()
    unit.conv.extra = [1]
    before = weights_of(unit)
    bare = skeleton(unit, drop=["extra"])
    bare.get_submodule("conv").padding = (0, 0)  # type: ignore[assignment]
    assert unit.training and unit.conv.training and unit.conv.padding == (1, 1)
    assert unit.conv.extra == [1]
    assert all(p.requires_grad for p in unit.parameters())
    assert [w.data_ptr() for w in weights_of(unit)] == [w.data_ptr() for w in before]


def test_skeleton_is_in_eval_mode() -> None:
    assert not any(child.training for child in skeleton(Unit()).modules())


class Cast(Unit):
    """As ComfyUI's layers: a class attribute, set on the instance by a model patcher."""

    casts: Any = False


def test_dropped_attributes_show_the_class_again() -> None:
    unit = Cast()
    unit.casts = True
    unit.conv.hidden = object()
    bare = skeleton(unit, drop=["casts", "hidden", "never there"])
    assert bare.casts is False
    assert not hasattr(bare.conv, "hidden")
    assert skeleton(unit).casts is True


class Uncopyable:
    """Like a host's patch, which may hold every LoRA of a model."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise AssertionError("copied, though it is dropped")


def test_dropped_attributes_are_not_copied() -> None:
    unit = Cast()
    unit.__dict__["casts"] = [Uncopyable()]
    unit.__dict__["hidden"] = True  # the one True of the process must not become None
    unit.__dict__["kept"] = True
    bare = skeleton(unit, drop=["casts", "hidden"])
    assert bare.kept is True and bare.training is False


def test_shared_weights_stay_shared() -> None:
    unit = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    unit[1].weight = unit[0].weight
    bare = skeleton(unit)
    assert bare.get_parameter("0.weight") is bare.get_parameter("1.weight")


# --- Positional ---------------------------------------------------------------------------------


class Arguments(nn.Module):
    """Gives back what it was called with."""

    def forward(self, *args: Any) -> Any:
        self.seen = args
        return args[0]


def test_statics_are_put_between_the_tensors() -> None:
    unit = Arguments()
    x, y = torch.zeros(2, 3), torch.ones(3)
    form = Positional(unit, (None, Static(None), Static((0, 2)), None), channels_last=True)
    form(x, y)
    seen_x, none, pair, seen_y = unit.seen
    assert seen_x is x and none is None and pair == (0, 2) and seen_y is y


@pytest.mark.parametrize("channels_last", [True, False])
def test_only_4d_results_get_channels_last_strides(channels_last: bool) -> None:
    form = Positional(Arguments(), (None,), channels_last=channels_last)
    image, tokens = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 8)
    out = form(image)
    assert out.is_contiguous(memory_format=NHWC) is channels_last
    assert torch.equal(out, image)
    assert form(tokens) is tokens


# --- trace --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (1, 4, 6, 4)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_a_trace_gives_the_module_s_result(shape: tuple[int, ...], channels_last: bool) -> None:
    request = request_of(inputs=inputs_of(shape), channels_last=channels_last)
    expected = request.eager(request.weights, request.inputs)
    actual = trace(request)(*request.weights, *request.inputs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert actual.stride() == expected.stride()
    assert actual.is_contiguous(memory_format=NHWC) or not channels_last


def test_eager_is_the_unit_itself() -> None:
    unit = Unit()
    request = request_of(unit, static=0.25)
    expected = unit(*request.inputs, 0.25)
    torch.testing.assert_close(request.eager(request.weights, request.inputs), expected)
    other = tuple(w * 2 for w in request.weights)
    assert not torch.allclose(request.eager(other, request.inputs), expected)


def test_a_static_is_constant_in_the_trace() -> None:
    one, two = (request_of(Unit(), inputs_of(), static=s) for s in (1.0, 2.0))
    results = [trace(r)(*one.weights, *one.inputs) for r in (one, two)]
    shift = one.weights[one.names.index("unit.shift")]
    torch.testing.assert_close(results[1] - shift, (results[0] - shift) * 2)


def test_a_trace_takes_the_weights_first_and_holds_none() -> None:
    request = request_of()
    module = trace(request)
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    assert len(placeholders) == len(request.weights) + len(request.inputs)
    assert not [n for n in module.graph.nodes if n.op == "get_attr"]
    assert not list(module.parameters()) and not list(module.buffers())


class Loud(nn.Module):
    """Counts how often Python runs, and sees what it runs on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        CALLS.append(type(x).__name__)
        return self.linear(x) * scale


CALLS: list[str] = []


def test_tracing_computes_nothing_and_python_runs_once() -> None:
    CALLS.clear()
    request = request_of(Loud(), (torch.randn(2, 4),))
    module = trace(request)
    assert len(CALLS) == 1 and CALLS != ["Tensor"]
    module(*request.weights, *request.inputs)
    assert len(CALLS) == 1


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_strides_of_weights_and_inputs_are_traced(memory_format: torch.memory_format) -> None:
    unit, (x, emb) = Unit().to(memory_format=memory_format), inputs_of()
    request = request_of(unit, (x.contiguous(memory_format=memory_format), emb))
    places = [n for n in trace(request).graph.nodes if n.op == "placeholder"]
    strides = [t.stride() for t in (*request.weights, *request.inputs)]
    assert [node.meta["val"].stride() for node in places] == strides


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_is_what_the_key_says(frozen: bool) -> None:
    request = request_of(frozen=frozen)
    assert request.frozen is frozen
    assert request.device == torch.device("cpu")
