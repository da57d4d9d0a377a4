"""What a prompt lets begin before its first node runs."""

from typing import Any

import pytest
import torch

from blade.blade_core.host.model import Session, started
from blade.nodes.optimize_model import BladeOptimizeModel
from blade.nodes.optimize_vae import BladeOptimizeVAE

pytestmark = pytest.mark.parametrize("session", ["launched"], indirect=True)
# Another process would have to be waited for.
INPUTS: dict[str, Any] = {
    "backend": "inductor",
    "compile": "first",
    "enabled": True,
    "unique_id": "1",
}


def imported(session: Session) -> bool:
    """Whether the compiler is there, or on its way."""
    session.engine._preload.wait()
    return session.engine._preload._thread is not None


@pytest.mark.parametrize("missing", [(), ("backend",), ("compile",), ("enabled",), INPUTS])
def test_a_model(session: Session, missing: tuple[str, ...]) -> None:
    """What comes from other nodes is missing."""
    BladeOptimizeModel.IS_CHANGED(**{k: v for k, v in INPUTS.items() if k not in missing})
    assert imported(session)


def test_a_vae(session: Session) -> None:
    BladeOptimizeVAE.IS_CHANGED(backend="auto", freeze_weights=False)
    assert imported(session)


@pytest.mark.parametrize(
    "other",
    [
        {"enabled": False},
        {"backend": "eager"},
        {"compile": "background"},  # the first image needs no compiler here
        {"backend": "tvm"},
        {"compile": "never"},
        {"backend": None},
    ],
    ids=repr,
)
def test_what_compiles_nothing(session: Session, other: dict[str, Any]) -> None:
    BladeOptimizeModel.IS_CHANGED(**INPUTS | other)
    assert not imported(session)


def test_the_answer_is_always_the_same(session: Session) -> None:
    others = (INPUTS, {"enabled": False}, {"backend": "tvm"}, {"freeze_weights": True})
    assert {BladeOptimizeModel.IS_CHANGED(**inputs) for inputs in others} == {""}


def test_a_bad_variable_is_left_to_the_node(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLADE_COMPILE_WORKERS", "many")
    assert BladeOptimizeModel.IS_CHANGED(**INPUTS) == ""
    assert not imported(session)


def test_a_start_that_fails_is_no_error(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: torch.device) -> None:
        raise OSError("the folder is gone")

    monkeypatch.setattr(session.engine, "started", fails)
    started()
