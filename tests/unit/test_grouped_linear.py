"""Grouped linear layers: the eager twin, when the kernel may be used, and what it is told."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from blade.blade_core.kernels import grouped_linear
from blade.blade_core.kernels.grouped_linear import (
    GroupedLinear,
    Linear,
    _tiles,
    reference,
    usable,
)


def layers_of(
    widths: Sequence[int],
    k: int,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float16,
) -> list[Linear]:
    return [
        (torch.randn(n, k).to(dtype), torch.randn(n).to(dtype) if bias else None) for n in widths
    ]


# --- the eager twin -----------------------------------------------------------------------------


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 16), (2, 5, 16)])
def test_the_twin_is_what_the_layers_give(silu: bool, bias: bool, shape: tuple[int, ...]) -> None:
    modules = [nn.Linear(16, n, bias=bias) for n in (8, 3, 1)]
    x = torch.randn(shape)
    results = reference(x, [(m.weight, m.bias) for m in modules], silu=silu)
    expected = [m(nn.functional.silu(x)) if silu else m(x) for m in modules]
    assert [r.shape for r in results] == [(*shape[:-1], n) for n in (8, 3, 1)]
    assert all(map(torch.equal, results, expected))


# --- when the kernel may be used ----------------------------------------------------------------


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


def on_gpu(*shape: int, dtype: torch.dtype = torch.float16) -> Any:
    return torch.zeros(shape, dtype=dtype).as_subclass(OnGpu)


@pytest.fixture
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_linear, "_kernels", object)


def good(dtype: torch.dtype = torch.float16) -> list[Linear]:
    weights = [(on_gpu(n, 32, dtype=dtype), on_gpu(n, dtype=dtype)) for n in (64, 33)]
    return [*weights, (on_gpu(7, 32, dtype=dtype), None)]


@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_usable(dtype: torch.dtype) -> None:
    assert usable(on_gpu(2, 5, 32, dtype=dtype), good(dtype))


@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize(
    ("x", "layer"),
    {
        "cpu": (torch.zeros(2, 32).half(), None),
        "fp32": (on_gpu(2, 32, dtype=torch.float32), None),
        "odd width": (on_gpu(2, 40), (on_gpu(8, 40), None)),
        "a weight of fp32": (None, (on_gpu(8, 32, dtype=torch.float32), None)),
        "a bias of fp32": (None, (on_gpu(8, 32), on_gpu(8, dtype=torch.float32))),
        "a weight elsewhere": (None, (torch.zeros(8, 32, device="meta").half(), None)),
        "a bias elsewhere": (None, (on_gpu(8, 32), torch.zeros(8, device="meta").half())),
        "a transposed weight": (None, (on_gpu(32, 8).t(), None)),
        "every other bias": (None, (on_gpu(8, 32), on_gpu(16)[::2])),
        "a weight off the grid": (None, (on_gpu(8 * 32 + 1)[1:].view(8, 32), None)),
    }.values(),
    ids=lambda value: "",
)
def test_not_usable(x: torch.Tensor | None, layer: Linear | None) -> None:
    x = on_gpu(2, 32) if x is None else x
    layers = good(x.dtype) if x.shape[-1] == 32 else []
    assert not usable(x, [*layers, *([layer] if layer is not None else [])])


def test_not_usable_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_linear, "_kernels", nothing)
    assert not usable(on_gpu(2, 32), good())


def nothing() -> None:
    return None


def test_no_triton_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "grouped_linear_triton"
    monkeypatch.setitem(sys.modules, "triton", None)  # what makes importing it fail
    monkeypatch.delitem(sys.modules, f"blade.blade_core.kernels.{name}", raising=False)
    monkeypatch.delattr(f"blade.blade_core.kernels.{name}", raising=False)
    grouped_linear._kernels.cache_clear()
    try:
        assert grouped_linear._kernels() is None
    finally:
        grouped_linear._kernels.cache_clear()


# --- the table ----------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("rows", [1, 2, 154])
def test_each_column_is_in_one_tile(rows: int, block: int) -> None:
    widths = (80, 33, 64, 1, 32)
    layers = layers_of(widths, 16)
    layers[1] = (layers[1][0], None)
    covered = torch.zeros(rows * sum(widths), dtype=torch.int64)
    tiles = _tiles(layers, rows, block)
    for weight, bias, offset, n, start in tiles:
        index = [w.data_ptr() for w, _ in layers].index(weight)
        known = layers[index][1]
        assert bias == (0 if known is None else known.data_ptr())
        assert n == widths[index]
        assert offset == rows * sum(widths[:index])
        assert 0 <= start < n
        columns = torch.arange(start, min(start + block, n))
        for row in range(rows):
            covered[offset + row * n + columns] += 1
    assert covered.eq(1).all()
    assert len(tiles) == sum(-(-n // block) for n in widths)


# --- what the kernels are told ------------------------------------------------------------------


class Kernels:
    """The two kernels in Python: the table's addresses are looked up among `layers`."""

    def __init__(self, layers: Sequence[Linear]) -> None:
        self.products = 0
        self.compared = 0
        tensors = [t for layer in layers for t in layer if t is not None]
        self._at = {t.data_ptr(): t for t in tensors}

    @property
    def compare(self) -> Launcher:
        return Launcher(self._compare)

    @property
    def grouped_linear(self) -> Launcher:
        return Launcher(self._grouped_linear)

    def _compare(
        self, program: tuple[int, ...], x: Any, last: Any, changed: Any, count: int, **sizes: int
    ) -> None:
        self.compared += 1
        block = sizes["BLOCK"]
        part = slice(program[0] * block, min(count, (program[0] + 1) * block))
        new, old = x.view(-1)[part], last.view(-1)[part]
        if (new != old).any():
            changed.fill_(1)
            old.copy_(new)

    def _grouped_linear(
        self,
        program: tuple[int, ...],
        x: Any,
        table: Any,
        changed: Any,
        out: Any,
        rows: int,
        **sizes: int,
    ) -> None:
        if not changed.item():
            return
        self.products += 1
        weight, bias, offset, n, start = table[program[0]].tolist()
        flat = x.view(-1, sizes["K"])
        assert flat.shape[0] == rows
        m = slice(program[1] * sizes["BLOCK_M"], min(rows, (program[1] + 1) * sizes["BLOCK_M"]))
        columns = slice(start, min(n, start + sizes["BLOCK_N"]))
        layer = self._at[weight][columns], self._at[bias][columns] if bias else None
        (result,) = reference(flat[m], [layer], silu=bool(sizes["SILU"]))
        out[offset : offset + rows * n].view(rows, n)[m, columns] = result


class Launcher:
    def __init__(self, kernel: Callable[..., None]) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            for first in range(grid[0]):
                for second in range(grid[1] if len(grid) > 1 else 1):
                    self._kernel((first, second), *args, **kwargs)

        return launch


CASES = [((2, 32), True, False), ((2, 77, 48), False, True), ((1, 16), False, True)]


@pytest.fixture(params=CASES, ids=["embedding", "prompt", "one row"])
def case(request: pytest.FixtureRequest) -> tuple[tuple[int, ...], bool, bool]:
    return request.param


@pytest.fixture
def make(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[GroupedLinear, list[Linear], Kernels]]:
    def make(
        x: torch.Tensor, widths: Sequence[int], *, silu: bool, skip_unchanged: bool
    ) -> tuple[GroupedLinear, list[Linear], Kernels]:
        layers = layers_of(widths, x.shape[-1], bias=silu, dtype=x.dtype)
        kernels = Kernels(layers)
        monkeypatch.setattr(grouped_linear, "_kernels", lambda: kernels)
        group = GroupedLinear(x, layers, silu=silu, skip_unchanged=skip_unchanged)
        return group, layers, kernels

    return make


def agrees(group: GroupedLinear, x: torch.Tensor, layers: list[Linear], silu: bool) -> bool:
    expected = reference(x, layers, silu=silu)
    assert [o.shape for o in group.outputs] == [e.shape for e in expected]
    return all(
        torch.allclose(o, e, atol=1e-4) for o, e in zip(group.outputs, expected, strict=True)
    )


def test_each_call_brings_the_outputs_up_to_date(
    case: tuple[tuple[int, ...], bool, bool], make: Callable[..., Any]
) -> None:
    shape, silu, skip = case
    x = torch.randn(shape)
    group, layers, _ = make(x, (80, 33, 64), silu=silu, skip_unchanged=skip)
    for _ in range(3):
        group(x)
        assert agrees(group, x, layers, silu)
        x = torch.randn(shape)


def test_unchanged_inputs_are_skipped(make: Callable[..., Any]) -> None:
    x = torch.randn(2, 77, 48)
    group, layers, kernels = make(x, (80, 33), silu=False, skip_unchanged=True)
    group(x)
    assert kernels.compared == -(-x.numel() // 2048) > 1
    products = kernels.products
    for output in group.outputs:
        output.fill_(7.0)
    group(x.clone())  # by its values
    assert kernels.products == products
    assert all(output.eq(7.0).all() for output in group.outputs)
    for position in (0, -1):  # one value, in the first part that is compared or in the last
        x.view(-1)[position] += 1
        group(x)
        assert agrees(group, x, layers, False)
    assert kernels.products == 3 * products


def test_the_first_call_computes_whatever_its_input(make: Callable[..., Any]) -> None:
    for value in (0.0, float("nan")):
        x = torch.full((1, 2, 16), value)
        group, _, kernels = make(x, (8,), silu=False, skip_unchanged=True)
        group(x)
        assert kernels.products == 1


def test_what_is_forgotten_is_computed_again(make: Callable[..., Any]) -> None:
    """The weights have changed in place."""
    x = torch.randn(1, 3, 16)
    group, layers, _ = make(x, (8, 8), silu=False, skip_unchanged=True)
    group(x)
    layers[0][0].mul_(2)
    group(x)
    assert not agrees(group, x, layers, False)
    group.forget()
    group(x)
    assert agrees(group, x, layers, False)


def test_weights_changed_in_place_are_seen_where_nothing_is_skipped(
    make: Callable[..., Any],
) -> None:
    x = torch.randn(2, 16)
    group, layers, kernels = make(x, (8, 8), silu=True, skip_unchanged=False)
    group(x)
    layers[1][0].mul_(2)
    group(x)
    assert agrees(group, x, layers, True)
    assert kernels.compared == 0


def test_the_input_is_left_alone_and_not_kept(make: Callable[..., Any]) -> None:
    x = torch.randn(2, 3, 16)
    before = x.clone()
    group, layers, _ = make(x, (8,), silu=False, skip_unchanged=True)
    group(x)
    assert torch.equal(x, before)
    x.add_(1)  # the same tensor, other values: the host's buffers are written again
    group(x)
    assert agrees(group, x, layers, False)


@pytest.mark.parametrize("inference", [True, False], ids=["inference", "normal"])
def test_it_works_in_inference_mode_and_out_of_it(
    inference: bool, make: Callable[..., Any]
) -> None:
    x = torch.randn(1, 3, 16)
    with torch.inference_mode(inference):
        group, layers, _ = make(x, (8,), silu=False, skip_unchanged=True)
        group(x)
    with torch.inference_mode(not inference):
        group.forget()
        group(x + 1)
        assert agrees(group, x + 1, layers, False)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_neighbours_lie_one_behind_the_other(count: int, make: Callable[..., Any]) -> None:
    x = torch.randn(2, 5, 16)
    group, _, _ = make(x, (7, 24, 24, 24, 9), silu=False, skip_unchanged=True)
    group(x)
    both = group.adjacent(group.outputs[1], count)
    assert torch.equal(both, torch.cat(group.outputs[1 : 1 + count]))
    assert both.data_ptr() == group.outputs[1].data_ptr()
    assert both.is_contiguous()
