"""What captures may hold, when they give it back, and captures that fail."""

import gc
from typing import Any

import comfy.model_management
import pytest
import torch
from blade_tests.host.recorder import TapeRecorder
from blade_tests.host.test_capture import BOUND, EAGER, report
from blade_tests.host.tiny import SD15, make_model, relative_rms, sample

from blade.blade_core.capture import CaptureBudget
from blade.blade_core.config import OptimizeConfig
from blade.blade_core.host.model import Session, optimize_model

FALLBACK = OptimizeConfig(backend="eager")

pytestmark = pytest.mark.parametrize("session", ["captured"], indirect=True)


def test_detaching_gives_the_memory_back(session: Session, sd15: Any) -> None:
    optimized = optimize_model(sd15, EAGER)
    expected = sample(optimized, steps=3)
    assert session.captures.used() == 2**20
    with session.engine.counters.expect(captures_dropped=1):
        comfy.model_management.unload_all_models()
    assert session.captures.used() == 0
    assert torch.equal(sample(optimized, steps=3), expected)


def test_the_captures_die_with_the_model(session: Session) -> None:
    model = make_model(SD15)
    sample(optimize_model(model, EAGER), steps=3)
    assert session.captures.used() > 0
    del model
    gc.collect()
    assert session.captures.used() == 0


def test_a_budget_too_small_for_one(session: Session, sd15: Any) -> None:
    session.captures = CaptureBudget(session.engine.counters, TapeRecorder, 2**19)
    optimized = optimize_model(sd15, EAGER)
    for _ in range(2):
        assert relative_rms(sample(optimized, steps=4), sample(sd15, steps=4)) <= BOUND
    assert session.engine.counters["captures"] == 0
    (reason,) = report(session)["not_captured"]
    assert "needs 1 MiB" in reason and "BLADE_CAPTURE_MIB" in reason


def test_a_budget_for_one_model_of_two(session: Session, sd15: Any, sdxl: Any) -> None:
    session.captures = CaptureBudget(session.engine.counters, TapeRecorder, 2**20)
    for model in (sd15, sdxl, sd15):
        with session.engine.counters.expect(captures=1):
            sample(optimize_model(model, EAGER), steps=3)
        assert session.captures.used() <= 2**20


def test_capturing_turned_off(session: Session, sd15: Any) -> None:
    sample(optimize_model(sd15, OptimizeConfig(backend="eager", capture=False)), steps=3)
    session.captures = CaptureBudget(session.engine.counters, TapeRecorder, 0)
    sample(optimize_model(make_model(SD15), EAGER), steps=3)
    assert session.engine.counters["captures"] == 0


class Failing(TapeRecorder):
    """Records like the other one, and then fails as a GPU may."""

    error: BaseException

    def record(self, function: Any) -> Any:
        super().record(function)
        raise self.error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("operation not permitted when stream is capturing"), "not permitted"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
    ],
)
def test_a_failing_capture_costs_no_image(
    session: Session, sd15: Any, error: BaseException, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    Failing.error = error
    session.captures = CaptureBudget(session.engine.counters, Failing, 2**30)
    optimized = optimize_model(sd15, FALLBACK)
    assert relative_rms(sample(optimized, steps=5), sample(sd15, steps=5)) <= BOUND
    assert text in str(report(session)["not_captured"])
    assert caplog.text.count("runs on without a CUDA graph") == 1
    assert session.captures.used() == 0


def test_a_failing_capture_stops_the_prompt_under_error(session: Session, sd15: Any) -> None:
    Failing.error = RuntimeError("operation not permitted when stream is capturing")
    session.captures = CaptureBudget(session.engine.counters, Failing, 2**30)
    with pytest.raises(RuntimeError, match="could not be captured"):
        sample(optimize_model(sd15, EAGER), steps=5)
    assert torch.equal(sample(sd15), sample(sd15))


def test_memory_comes_back_when_the_host_frees_the_weights(session: Session, sd15: Any) -> None:
    """Whichever patcher does it: the clone that was optimized may be gone by then."""
    sample(optimize_model(sd15, EAGER), steps=3)
    assert session.captures.used() > 0
    with session.engine.counters.expect(captures_dropped=1):
        for parameter in sd15.model.diffusion_model.parameters():
            parameter.data = parameter.data.clone()
    assert session.captures.used() == 0
