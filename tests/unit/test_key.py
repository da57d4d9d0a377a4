"""Keys: every field counts, ids are equal in every process, and a key can be read."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blade_tests.unit.samples import CPU

from blade.blade_core.key import GraphKey, TensorSpec, digest, environment

SPEC = TensorSpec.of(torch.empty(2, 4, 8, 8))
KEY = GraphKey("structure", (SPEC, 0.5, None), "layout", "inductor 2.8 a=1", "env", None, "Unit")
OTHER: dict[str, Any] = {
    "structure": "another",
    "signature": (SPEC, 0.5, 1),
    "layout": "another",
    "backend": "inductor 2.8 a=2",
    "environment": "another",
    "frozen": "0123",
    "label": "another",
}
FIELDS = [field.name for field in dataclasses.fields(GraphKey)]


# --- equal in every process ---------------------------------------------------------------------


def test_digest_tells_values_apart() -> None:
    values = [(1, 2), (12,), ("1", 2), (1.0, 2), ((1,), 2), (True, 2), None, "None"]
    assert len({digest(value) for value in values}) == len(values)
    assert all(len(digest(value)) == 16 for value in values)


# --- what counts --------------------------------------------------------------------------------


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_but_the_label_counts(field: str) -> None:
    changed = dataclasses.replace(KEY, **{field: OTHER[field]})
    counts = field != "label"
    assert (changed != KEY) is counts
    assert (changed.id != KEY.id) is counts
    assert ({KEY: "graph"}.get(changed) is None) is counts


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shape", (2, 4, 8, 9)),
        ("stride", (256, 1, 32, 4)),
        ("dtype", torch.float16),
        ("device", "cuda:0"),
    ],
)
def test_everything_of_a_tensor_counts(field: str, value: Any) -> None:
    spec = dataclasses.replace(SPEC, **{field: value})
    changed = dataclasses.replace(KEY, signature=(spec, *KEY.signature[1:]))
    assert spec != SPEC
    assert changed != KEY and changed.id != KEY.id


@pytest.mark.parametrize(("one", "other"), [(1, 1.0), (1, True), (0.0, -0.0), (None, "None")])
def test_statics_that_are_traced_differently_are_different(one: object, other: object) -> None:
    """An integer and a float promote dtypes differently, though Python calls them equal."""
    first = dataclasses.replace(KEY, signature=(SPEC, one))
    second = dataclasses.replace(KEY, signature=(SPEC, other))
    assert first.id != second.id
    assert first != second


def test_stride_of_a_dimension_of_size_1_does_not_count() -> None:
    plain = torch.empty(1, 4, 8, 1)
    strange = plain.as_strided(plain.shape, (999, *plain.stride()[1:3], 77))
    assert strange.stride() != plain.stride()
    assert TensorSpec.of(strange) == TensorSpec.of(plain)
    nhwc = torch.empty(1, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    assert TensorSpec.of(nhwc) != TensorSpec.of(torch.empty(1, 4, 8, 8))


# --- for reading --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (torch.empty(2, 77, 768, dtype=torch.float16), "f16[2,77,768]"),
        (torch.empty(2, 4, 8, 8), "f32[2,4,8,8]"),
        (
            torch.empty(2, 4, 8, 8, dtype=torch.bfloat16, memory_format=torch.channels_last),
            "bf16[2,4,8,8] nhwc",
        ),
        (torch.empty(1, 2, 3, 4, 5, dtype=torch.int64), "int64[1,2,3,4,5]"),
        (torch.empty(()), "f32[]"),
    ],
)
def test_a_spec_can_be_read(tensor: torch.Tensor, text: str) -> None:
    assert str(TensorSpec.of(tensor)) == text


def test_a_key_can_be_read() -> None:
    assert str(KEY) == f"Unit | f32[2,4,8,8] 0.5 None | inductor | {KEY.id}"
    frozen = dataclasses.replace(KEY, frozen="0123")
    assert str(frozen) == f"Unit | f32[2,4,8,8] 0.5 None | inductor | frozen 0123 | {frozen.id}"


# --- environment --------------------------------------------------------------------------------


cuda = torch.backends.cuda


def switch(owner: Any, name: str) -> tuple[Callable[[bool], None], Callable[[], bool]]:
    return functools.partial(setattr, owner, name), functools.partial(getattr, owner, name)


SWITCHES: dict[str, tuple[Callable[[bool], None], Callable[[], bool]]] = {
    "tf32": switch(cuda.matmul, "allow_tf32"),
    "cudnn-tf32": switch(torch.backends.cudnn, "allow_tf32"),
    "fp16-reduction": switch(cuda.matmul, "allow_fp16_reduced_precision_reduction"),
    "fp16-accumulation": switch(cuda.matmul, "allow_fp16_accumulation"),
    "flash-sdp": (cuda.enable_flash_sdp, cuda.flash_sdp_enabled),
    "efficient-sdp": (cuda.enable_mem_efficient_sdp, cuda.mem_efficient_sdp_enabled),
    "math-sdp": (cuda.enable_math_sdp, cuda.math_sdp_enabled),
    "cudnn-sdp": (cuda.enable_cudnn_sdp, cuda.cudnn_sdp_enabled),
    "deterministic": (
        torch.use_deterministic_algorithms,
        torch.are_deterministic_algorithms_enabled,
    ),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_of_torch_counts(name: str) -> None:
    turn, is_on = SWITCHES[name]
    before, was = environment(CPU), is_on()
    try:
        turn(not was)
        assert environment(CPU) != before
    finally:
        turn(was)
    assert environment(CPU) == before


def test_versions_and_the_host_count() -> None:
    assert f"torch={torch.__version__}" in environment(CPU).split()
    assert "format=1" in environment(CPU).split()
    assert environment(CPU, ("attention_sage",)) != environment(CPU, ("attention_pytorch",))
