"""The structure of a module: equal for other weights, another one for every other difference."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from blade.blade_core.errors import UnknownStructure
from blade.blade_core.key import digest
from blade.blade_core.structure import describe, reads_training

Change = Callable[["Layer"], Any]


class Mode(enum.Enum):
    SLOW = 1
    FAST = 2


class Norm(nn.Module):
    """A child with a patchable everything."""

    factor = 1.0

    def forward(self, x: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
        return self.scaled(x / (x.abs().amax() + eps)) * self.offset

    @staticmethod
    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @property
    def offset(self) -> float:
        return 1.0


class OtherNorm(Norm):
    """Computes the same thing under another name."""


class Layer(nn.Module):
    def __init__(self, channels: int = 4, *, groups: int = 2) -> None:
        super().__init__()
        self.groups = groups
        self.eps = 1e-5
        self.mode = Mode.SLOW
        self.sizes: Any = (1, 2)
        self.options: dict[str, Any] = {"a": 1, "b": [True, None, torch.float16]}
        self.names = {"x", "y"}
        self.act: Any = nn.functional.silu
        self.pool: Any = functools.partial(nn.functional.avg_pool2d, kernel_size=2)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = Norm()
        self.register_buffer("shift", torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.act(self.conv(x)))


def structure(module: nn.Module) -> str:
    return digest(describe(module))


def told_apart(one: nn.Module, other: nn.Module) -> bool:
    """Whether no graph of `one` can be taken for `other`: refused is as good as different."""
    try:
        return structure(one) != structure(other)
    except UnknownStructure:
        return True


# --- what counts --------------------------------------------------------------------------------


def test_weights_do_not_count() -> None:
    torch.manual_seed(0)
    one, other = Layer(), Layer()
    other.get_buffer("shift").fill_(7)
    assert not torch.equal(one.conv.weight, other.conv.weight)
    assert structure(one) == structure(other)
    assert structure(one) == structure(one.requires_grad_(False).to("meta"))


CHANGES: dict[str, Change] = {
    "number": lambda m: setattr(m, "eps", 1e-6),
    "type of a number": lambda m: setattr(m, "groups", 2.0),
    "text": lambda m: setattr(m.conv, "padding_mode", "circular"),
    "tuple": lambda m: setattr(m, "sizes", (1, 3)),
    "tuple or list": lambda m: setattr(m, "sizes", [1, 2]),
    "enum": lambda m: setattr(m, "mode", Mode.FAST),
    "value in a dict": lambda m: m.options.update(a=2),
    "dtype in a list in a dict": lambda m: setattr(m, "options", {"a": 1, "b": [True, None, 1]}),
    "set": lambda m: m.names.add("z"),
    "function": lambda m: setattr(m, "act", nn.functional.gelu),
    "builtin function": lambda m: setattr(m, "act", torch.sigmoid),
    "argument of a partial": lambda m: m.pool.keywords.update(kernel_size=3),
    "function of a partial": lambda m: setattr(m, "pool", functools.partial(torch.relu)),
    "class as a value": lambda m: setattr(m, "act", Norm),
    "new attribute": lambda m: setattr(m, "extra", None),
    "attribute gone": lambda m: delattr(m, "eps"),
    "name of a parameter": lambda m: m.conv.register_parameter("w", m.conv._parameters.pop("bias")),
    "shape of a parameter": lambda m: setattr(m.conv, "bias", nn.Parameter(torch.zeros(5))),
    "dtype of a parameter": lambda m: m.conv.half(),
    "no parameter": lambda m: setattr(m.conv, "bias", None),
    "dtype of a buffer": lambda m: setattr(m, "shift", torch.zeros(4).half()),
    "buffer to parameter": lambda m: setattr(m, "shift", nn.Parameter(torch.zeros(4))),
    "place of a buffer": lambda m: m.register_buffer("more", None),
    "class of a child": lambda m: setattr(m, "norm", OtherNorm()),
    "new child": lambda m: m.add_module("more", nn.Identity()),
    "order of children": lambda m: m.add_module("conv", m._modules.pop("conv")),
    "training": lambda m: m.eval(),
    "training of a child": lambda m: m.conv.eval(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_counts(change: Change) -> None:
    layer = Layer()
    change(layer)
    assert structure(layer) != structure(Layer())


def test_ignored_attributes_do_not_count() -> None:
    layer = Layer()
    layer.patches = object()  # type: ignore[assignment]
    layer.conv.seed_key = 3  # type: ignore[assignment]
    ignore = {"patches", "seed_key"}
    assert describe(layer, ignore=ignore) == describe(Layer(), ignore=ignore)
    with pytest.raises(UnknownStructure):
        describe(layer, ignore={"seed_key"})


def test_code_and_constants_of_a_function_count() -> None:
    one, constant, operation, same = (Layer() for _ in range(4))
    one.act = lambda x: x * 2
    constant.act = lambda x: x * 3
    operation.act = lambda x: x + 2
    same.act = lambda x: x * 2
    assert structure(constant) != structure(one) != structure(operation)
    assert structure(one) == structure(same)


def test_defaults_of_a_function_count() -> None:
    """`lambda x, n=n: ...` is how a value gets into a function without a closure."""
    one, other = Layer(), Layer()
    one.act, other.act = (lambda x, n=n: x * n for n in (2, 3))
    assert told_apart(one, other)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("forward", lambda self, x: x),
        ("forward", lambda self, x, eps=1e-2: x),
        ("extra", lambda self: None),
        ("scaled", staticmethod(lambda x: x * 3)),
        ("offset", property(lambda self: 3.0)),
        ("factor", 3.0),
    ],
    ids=["forward", "default", "new", "staticmethod", "property", "attribute"],
)
def test_a_patched_class_counts(name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = structure(Layer())
    monkeypatch.setattr(Norm, name, value, raising=False)
    assert structure(Layer()) != before


def test_a_changed_default_of_a_method_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = structure(Layer())
    monkeypatch.setattr(Norm.forward, "__defaults__", (1e-2,))
    assert structure(Layer()) != before


def test_a_patched_class_of_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs for tiling replace `nn.Conv2d._conv_forward`."""
    before = structure(Layer())
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda self, x, weight, bias: x)
    assert structure(Layer()) != before


def test_code_that_is_changed_where_it_is_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(x: torch.Tensor) -> torch.Tensor:
        return x * 3

    def getter(self: Any) -> float:
        return 2.0

    before = structure(Layer())
    changed = [(Norm.scaled, other), (Norm.__dict__["offset"].fget, getter)]
    for function, new in changed:
        with monkeypatch.context() as patch:
            patch.setattr(function, "__code__", new.__code__)
            assert structure(Layer()) != before
        assert structure(Layer()) == before


def test_a_list_of_a_class_that_grows_counts() -> None:
    class Listed(Norm):
        sizes: ClassVar[list[int]] = [1]

    before = structure(Listed())
    assert structure(Listed()) == before
    Listed.sizes.append(2)
    assert structure(Listed()) != before


def test_classes_made_by_one_function_count() -> None:
    """Their methods' code is the same, what it closes over is not."""

    def made(factor: float) -> type[nn.Module]:
        class Made(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x * factor

        return Made

    assert told_apart(made(2.0)(), made(3.0)())


def test_which_children_are_one_and_the_same_counts() -> None:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    assert told_apart(nn.Sequential(a, b, a), nn.Sequential(a, b, b))


def test_which_weights_are_one_and_the_same_counts() -> None:
    one, other = (nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))) for _ in range(2))
    one[2].weight = one[0].weight
    other[2].weight = other[1].weight
    assert told_apart(one, other)


# --- what cannot be described -------------------------------------------------------------------


class Quantized(torch.Tensor):
    """A tensor that computes otherwise than its dtype says."""


def closing_over(value: object) -> Callable[[], object]:
    return lambda: value


TENSOR = torch.zeros(4, 4, 3, 3)
UNKNOWN: list[tuple[Change, str]] = [
    (
        lambda m: m.conv.register_forward_hook(lambda *_: None),
        "conv (Conv2d) has forward or backward hooks",
    ),
    (
        lambda m: m.register_forward_pre_hook(lambda *_: None),
        "the layer (Layer) has forward or backward hooks",
    ),
    (
        lambda m: m.norm.register_full_backward_hook(lambda *_: None),
        "norm (Norm) has forward or backward hooks",
    ),
    (
        lambda m: setattr(m.norm, "forward", lambda x: x),
        "norm (Norm) has a replaced forward",
    ),
    (
        lambda m: m.conv.register_buffer("weight_q", TENSOR.as_subclass(Quantized)),
        "conv (Conv2d).weight_q is a Quantized, not a plain tensor",
    ),
    (
        lambda m: setattr(m.conv, "state", SimpleNamespace()),
        "conv (Conv2d).state is a SimpleNamespace, which Blade cannot describe",
    ),
    (
        lambda m: m.options["b"].append(SimpleNamespace()),
        "the layer (Layer).options is a SimpleNamespace, which Blade cannot describe",
    ),
    (
        lambda m: setattr(m, "mask", TENSOR),
        "the layer (Layer).mask is a Tensor, which Blade cannot describe",
    ),
    (
        lambda m: setattr(m.conv, "_conv_forward", m.norm.forward),
        "conv (Conv2d)._conv_forward is a method, which Blade cannot describe",
    ),
    (
        lambda m: setattr(m, "act", closing_over(2)),
        "the layer (Layer).act is a function that closes over other objects",
    ),
    (
        lambda m: setattr(m, "pool", functools.partial(closing_over(2))),
        "the layer (Layer).pool is a function that closes over other objects",
    ),
]


@pytest.mark.parametrize(("change", "problem"), UNKNOWN, ids=[text for _, text in UNKNOWN])
def test_what_cannot_be_described_is_named(change: Change, problem: str) -> None:
    layer = Layer()
    change(layer)
    with pytest.raises(UnknownStructure) as caught:
        describe(layer)
    assert str(caught.value) == problem


def test_builtin_method_of_a_tensor_cannot_be_described() -> None:
    one, other = Layer(), Layer()
    one.act, other.act = torch.tensor(2.0).mul, torch.tensor(3.0).mul
    assert told_apart(one, other)


# --- what computes something else in training mode ------------------------------------------------


class Reads(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.5, self.training)


class Inherits(Reads):
    """Reads it in its parent's code."""


class ReadsInside(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([row * (2 if self.training else 1) for row in x])


class ReadsInFunction(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def factor() -> int:
            return 2 if self.training else 1

        return x * factor()


class ReadsInProperty(nn.Module):
    @property
    def factor(self) -> int:
        return 2 if self.training else 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


@pytest.mark.parametrize(
    ("module", "reads"),
    [
        (nn.Dropout(0.1), True),
        (nn.Dropout(0.0), False),  # what ComfyUI's layers hold
        (nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Dropout(0.0), nn.SiLU())), False),
        (nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Dropout(0.5))), True),
        (nn.BatchNorm2d(4), True),
        (nn.GroupNorm(2, 4), False),
        (Layer(), False),
        (Reads(), True),
        (Inherits(), True),
        (ReadsInside(), True),
        (ReadsInFunction(), True),
        (ReadsInProperty(), True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_modules_that_read_their_mode(module: nn.Module, reads: bool) -> None:
    assert reads_training(module) == reads


def test_a_dropout_that_is_turned_on_later() -> None:
    module = nn.Sequential(nn.Dropout(0.0))
    assert not reads_training(module)
    module[0].p = 0.5  # type: ignore[assignment]
    assert reads_training(module)


def test_a_class_that_is_patched_later(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not reads_training(Norm())
    monkeypatch.setattr(Norm, "forward", Reads.forward)
    assert reads_training(Norm())
