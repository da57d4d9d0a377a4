"""What is changed of Inductor while it compiles; on a GPU, tests/gpu/test_compiling.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from blade_tests.unit.samples import inputs_of, request_of
from torch._higher_order_ops import triton_kernel_wrap
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.fx_passes import misc_patterns
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._subclasses import fake_tensor

from blade.blade_core.backends import BACKENDS, inductor, standalone
from blade.blade_core.backends.compiling import kernels_of, remembered, without_gpu

CHANGED: list[tuple[Any, str]] = [
    (fake_tensor, "init_gpu_context"),
    (fake_tensor.FakeTensorMode, "avoid_device_init"),
    (misc_patterns, "_misc_patterns_init"),
    (CachingAutotuner, "_make_launchers"),
    (PythonWrapperCodegen, "generate_and_run_autotune_block"),
]


def now() -> list[Any]:
    return [vars(owner)[name] for owner, name in CHANGED]


def written_by() -> Any:
    for name in ("identify_accessed_tensors", "identify_mutated_tensors"):
        if hasattr(triton_kernel_wrap, name):
            return getattr(triton_kernel_wrap, name)
    raise AssertionError("torch gave it a third name")


def test_torch_is_itself_again() -> None:
    before, find = now(), written_by()
    with pytest.raises(KeyError), without_gpu():
        during = now()
        assert written_by() is not find
        raise KeyError
    assert all(one is not other for one, other in zip(before, during, strict=True))
    assert now() == before
    assert written_by() is find


@pytest.mark.parametrize(("owner", "name"), [*CHANGED, (triton_kernel_wrap, None)])
def test_a_torch_that_lacks_something_compiles_as_always(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str | None
) -> None:
    """It changes nothing else either: kernels that are not loaded must not be run."""
    monkeypatch.delattr(owner, name or written_by().__name__)
    left = [one for one in CHANGED if one != (owner, name)]
    before = [vars(owner)[name] for owner, name in left]
    with without_gpu():
        assert [vars(owner)[name] for owner, name in left] == before


def test_the_kernels_of_a_graph_are_read_from_its_code() -> None:
    code = """
import torch
from torch._inductor.async_compile import AsyncCompile
async_compile = AsyncCompile()

# Original ATen: [aten.silu]
first_0 = async_compile.triton('first_0', '''
def first_0(x):
    return "a"
''', device_str='cuda')
meta0 = {'XBLOCK': 8}
second_1 = async_compile.triton("second_1", "def second_1(x): pass", device_str="cuda")
"""
    assert kernels_of(code) == [
        ("first_0", '\ndef first_0(x):\n    return "a"\n'),
        ("second_1", "def second_1(x): pass"),
    ]


class Asked:
    """Counts how often it has to be found out."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, kernel: str, kwargs: dict[str, Any], more: dict[str, Any]) -> list[str]:
        self.count += 1
        return [kernel, *kwargs]


@pytest.mark.parametrize(
    ("other", "count"),
    [
        (("add", {"x": torch.zeros(3), "n": 4}, {}), 1),
        (("mul", {"x": torch.zeros(2), "n": 4}, {}), 2),
        (("add", {"x": torch.zeros(2, dtype=torch.float16), "n": 4}, {}), 2),
        (("add", {"x": torch.zeros(2), "n": 5}, {}), 2),
        (("add", {"x": torch.zeros(2), "m": 4}, {}), 2),
        (("add", {"x": torch.zeros(2), "n": 4}, {"x": (1, 2)}), 2),
    ],
    ids=["size", "kernel", "dtype", "constant", "name", "descriptor"],
)
def test_what_a_kernel_writes_to_is_found_out_once_for_each_form(other: Any, count: int) -> None:
    asked = Asked()
    find = remembered(asked)
    first: Any = ("add", {"x": torch.zeros(2), "n": 4}, {})
    assert find(*first) == ["add", "x", "n"]
    assert find(*other) == [other[0], *other[1]]
    assert find(*first) == ["add", "x", "n"]
    assert asked.count == count


@pytest.mark.parametrize("side", [8, 256])
def test_either_process_compiles_with_the_same_options(
    monkeypatch: pytest.MonkeyPatch, side: int
) -> None:
    seen: list[dict[str, Any]] = []
    compile_graph = torch._inductor.standalone_compile

    def noted(*arguments: Any, options: dict[str, Any], **more: Any) -> Any:
        seen.append(options["config_patches"])
        return compile_graph(*arguments, options=options, **more)

    monkeypatch.setattr(torch._inductor, "standalone_compile", noted)
    backend = BACKENDS["inductor"]
    request = request_of(inputs=inputs_of((1, 4, side, side)))
    backend.compile(request)
    job = backend.job(request)
    assert job is not None
    backend.compile_job(job)
    monkeypatch.setitem(standalone.OPTIONS, "conv_1x1_as_mm", None)  # as that process has it
    backend.compile_job(job)
    here, *there = seen
    assert there == [here, here]
    assert here["split_reductions"] == (side == 256)
    assert here["conv_1x1_as_mm"]


def test_a_torch_that_needs_a_gpu_to_compile_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    compile_graph = torch._inductor.standalone_compile

    def compile_with_it(*arguments: Any, **options: Any) -> Any:
        if tried[-1:] == ["without"]:
            raise RuntimeError("list index out of range")
        tried.append("with")
        return compile_graph(*arguments, **options)

    @contextmanager
    def without() -> Iterator[None]:
        tried.append("without")
        try:
            yield
        finally:
            tried.append("again")

    monkeypatch.setattr(torch._inductor, "standalone_compile", compile_with_it)
    monkeypatch.setattr(inductor, "without_gpu", without)
    backend, request = BACKENDS["inductor"], request_of()
    job = backend.job(request)
    assert job is not None
    call = backend.load(backend.compile_job(job), request)
    assert tried == ["without", "again", "with"]
    expected = request.eager(request.weights, request.inputs)
    torch.testing.assert_close(call(request.weights, request.inputs), expected)
