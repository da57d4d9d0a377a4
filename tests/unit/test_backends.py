"""Which compiler is used, and what is said where it cannot be the chosen one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from blade_tests.unit.fake_backend import Fake
from blade_tests.unit.samples import CPU

from blade.blade_core.backends import BACKENDS
from blade.blade_core.config import OptimizeConfig
from blade.blade_core.engine import Engine
from blade.blade_core.errors import BackendUnavailable
from blade.blade_core.log import forget_said


@pytest.fixture
def engine() -> Iterator[Engine]:
    forget_said()
    yield Engine(budget=1000)
    forget_said()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let each backend have this reason for not being available."""

    def install(**reasons: str | None) -> None:
        for name, reason in reasons.items():
            monkeypatch.setitem(BACKENDS, name, Fake(name, reason=reason))

    return install


BOTH = ("torch_blade", "inductor")


@pytest.mark.parametrize(
    ("chosen", "on_failure", "absent", "used"),
    [
        ("auto", "fallback", (), BOTH),
        ("auto", "error", (), ("torch_blade",)),
        ("auto", "fallback", ("torch_blade",), ("inductor",)),
        ("auto", "error", ("torch_blade",), ("inductor",)),
        ("auto", "fallback", ("inductor",), ("torch_blade",)),
        ("torch_blade", "fallback", (), BOTH),
        ("torch_blade", "error", (), ("torch_blade",)),
        ("torch_blade", "fallback", ("torch_blade",), ("inductor",)),
        ("torch_blade", "fallback", ("inductor",), ("torch_blade",)),
        ("inductor", "fallback", (), ("inductor",)),
        ("inductor", "error", ("torch_blade",), ("inductor",)),
        ("eager", "fallback", BOTH, ("eager",)),
        ("eager", "error", (), ("eager",)),
    ],
)
def test_the_backends_that_are_used(
    chosen: str,
    on_failure: str,
    absent: tuple[str, ...],
    used: tuple[str, ...],
    engine: Engine,
    install: Callable[..., None],
) -> None:
    install(**{name: "absent" if name in absent else None for name in BACKENDS})
    config = OptimizeConfig(backend=chosen, on_failure=on_failure)
    assert engine.backends(config, CPU) == tuple(BACKENDS[name] for name in used)


@pytest.mark.parametrize(
    ("chosen", "on_failure", "message"),
    [
        ("auto", "fallback", "torch_blade: no engine; inductor: no Triton."),
        ("auto", "error", "torch_blade: no engine; inductor: no Triton."),
        ("torch_blade", "fallback", "torch_blade: no engine; inductor: no Triton."),
        ("torch_blade", "error", "torch_blade: no engine."),
        ("inductor", "fallback", "inductor: no Triton."),
        ("inductor", "error", "inductor: no Triton."),
    ],
)
def test_without_a_compiler_every_reason_is_told(
    chosen: str, on_failure: str, message: str, engine: Engine, install: Callable[..., None]
) -> None:
    install(torch_blade="no engine", inductor="no Triton")
    with pytest.raises(BackendUnavailable) as caught:
        engine.backends(OptimizeConfig(backend=chosen, on_failure=on_failure), CPU)
    assert str(caught.value) == f'Blade cannot use backend "{chosen}" here. {message}'


def test_a_compiler_that_cannot_even_be_asked_is_none(
    engine: Engine, install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As packages that two threads imported at once can be."""

    def ask(_: Any, device: torch.device) -> str:
        raise AttributeError(
            "partially initialized module 'torch._dynamo' has no attribute 'utils'"
        )

    install(torch_blade="no engine", inductor=None)
    monkeypatch.setattr(type(BACKENDS["inductor"]), "available", ask)
    with pytest.raises(BackendUnavailable, match=r"cannot be asked \(AttributeError: part"):
        engine.backends(OptimizeConfig(), CPU)


def test_another_backend_than_chosen_is_said_once(
    engine: Engine, install: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    install(torch_blade="no engine", inductor=None)
    for _ in range(3):
        engine.backends(OptimizeConfig(backend="torch_blade"), CPU)
        engine.backends(OptimizeConfig(backend="auto"), CPU)
    assert [(r.levelno, r.getMessage()) for r in caplog.records] == [
        (
            logging.WARNING,
            'Blade cannot use backend "torch_blade" here. torch_blade: no engine. '
            "Blade uses inductor instead.",
        )
    ]
