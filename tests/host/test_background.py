"""Graphs compiled by other processes: while sampling goes on, or all at once before it does."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from blade_tests.host.control_nets import image, make_controlnet, prompts
from blade_tests.host.tiny import DEVICE, SD15, SDXL, make_model, relative_rms, sample

from blade.blade_core.config import OptimizeConfig
from blade.blade_core.engine import Engine
from blade.blade_core.host import unit
from blade.blade_core.host.controlnet import apply_controlnet, optimize_controlnet
from blade.blade_core.host.model import Session, optimize_model
from blade.blade_core.host.warm_up import warm_up
from blade.blade_core.worker import FORKS

BOUND = 1e-4
PATIENCE = 120.0
BACKGROUND = OptimizeConfig(backend="eager", on_failure="error", compile="background")
FIRST = OptimizeConfig(backend="eager", on_failure="error")

# Launched is what every first run here is.
pytestmark = pytest.mark.parametrize("session", ["captured"], indirect=True)


@pytest.fixture(autouse=True)
def _two_processes(monkeypatch: pytest.MonkeyPatch, session: Session) -> Iterator[None]:
    monkeypatch.setenv("BLADE_COMPILE_WORKERS", "2")
    yield
    session.engine.jobs.close()


@contextmanager
def stopped(session: Session) -> Iterator[None]:
    """While others take their time to compile."""
    assert session.engine.jobs.usable(DEVICE) and session.engine.jobs._workers is not None
    session.engine.jobs._workers.submit("eager", b"so that they run").result(PATIENCE)
    (process,) = session.engine.jobs._workers.processes()
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def until_done(session: Session, sampled: Callable[[], Any], *, runs: int = 200) -> int:
    """Sample until nothing is left to compile; return how many runs that took."""
    end = time.monotonic() + PATIENCE
    for run in range(runs):
        before = session.engine.counters.snapshot()
        sampled()
        if session.engine.counters["blocks_eager"] == before["blocks_eager"]:
            return run
        assert time.monotonic() < end
    raise AssertionError("it never ended")


@pytest.mark.skipif(not FORKS, reason="processes cannot be stopped there")
@pytest.mark.parametrize("config", [SD15, SDXL], ids=["sd15", "sdxl"])
def test_nobody_waits_and_every_image_is_right(session: Session, config: dict[str, Any]) -> None:
    model = make_model(config)
    expected = sample(model, steps=4)
    optimized = optimize_model(model, BACKGROUND)
    images = []

    def sampled() -> None:
        images.append(sample(optimized, steps=4))

    nothing = {"blocks_compiled": 0, "graphs_compiled": 0, "compile_failures": 0}
    with stopped(session), session.engine.counters.expect(**nothing):
        sampled()
    (report,) = session.stats(model.model.diffusion_model, BACKGROUND)["models"]
    assert {reason for block in report["blocks"] for reason in block["reasons"]} == {
        "its graphs are being compiled"
    }
    until_done(session, sampled)
    assert max(relative_rms(image, expected) for image in images) <= BOUND
    graphs = session.engine.counters["graphs_compiled"]
    assert graphs == len(session.engine.cache)
    with session.engine.counters.expect(graphs_compiled=0, blocks_eager=0, blocks_compiled=10):
        sampled()


def test_a_step_is_captured_when_all_its_graphs_are_there(session: Session, sd15: Any) -> None:
    optimized = optimize_model(sd15, BACKGROUND)
    with session.engine.counters.expect(captures=0, replays=0):
        sample(optimized, steps=4)
    until_done(session, lambda: sample(optimized, steps=4))
    (report,) = session.stats(sd15.model.diffusion_model, BACKGROUND)["models"]
    assert report["captures"] == 1 and report["not_captured"] == []
    with session.engine.counters.expect(replays=4):
        sample(optimized, steps=4)


def test_the_same_graphs_as_one_after_another(session: Session, sd15: Any) -> None:
    """`first` with processes: the first step as stock, the second waits for all of them."""
    expected = sample(sd15, steps=3)
    optimized = optimize_model(sd15, FIRST)
    assert relative_rms(sample(optimized, steps=3), expected) <= BOUND
    assert session.engine.jobs.finished == session.engine.counters["graphs_compiled"] > 4
    keys = {key.id for key in session.engine.cache.all_keys()}
    session.engine, one_by_one = Engine(), session.engine
    session.engine.jobs.usable = lambda device: False  # type: ignore[method-assign]
    try:
        sample(optimize_model(make_model(SD15), FIRST), steps=3)
        assert {key.id for key in session.engine.cache.all_keys()} == keys
    finally:
        session.engine = one_by_one
    with session.engine.counters.expect(graphs_compiled=0, blocks_eager=0):
        sample(optimized, steps=3)


def test_what_was_cleared_is_compiled_by_others_again(session: Session, sd15: Any) -> None:
    expected, optimized = sample(sd15, steps=3), optimize_model(sd15, FIRST)
    sample(optimized, steps=3)
    count = session.engine.jobs.finished
    session.clear(disk=True, memory=True)
    with session.engine.counters.expect(graphs_compiled=count):
        assert relative_rms(sample(optimized, steps=3), expected) <= BOUND
    assert session.engine.jobs.finished >= count + 4  # fewer are not worth asking others


def test_other_sizes_meanwhile(session: Session, sd15: Any) -> None:
    optimized = optimize_model(sd15, BACKGROUND)
    for size in ((16, 16), (8, 24)):
        expected = sample(sd15, size=size, batch=2)
        sampled = sample(optimized, size=size, batch=2)
        assert relative_rms(sampled, expected) <= BOUND
    for size in ((16, 16), (8, 24)):
        until_done(session, partial(sample, optimized, size=size, batch=2))


def test_controlnets_too(session: Session, sd15: Any) -> None:
    control, hint = make_controlnet(SD15), image()
    positive, negative = prompts().values()

    def apply(control_net: Any) -> dict[str, Any]:
        both = apply_controlnet(positive, negative, control_net, hint, 0.8, 0.0, 1.0)
        return {"positive": both[0], "negative": both[1], "steps": 3}

    expected = sample(sd15, **apply(control))
    model = optimize_model(sd15, BACKGROUND)
    images = []

    def sampled() -> None:
        net = optimize_controlnet(control, BACKGROUND)
        images.append(sample(model, **apply(net)))

    sampled()
    until_done(session, sampled)
    assert max(relative_rms(image, expected) for image in images) <= BOUND
    with session.engine.counters.expect(graphs_compiled=0, blocks_eager=0, control_runs=1):
        sampled()


def test_warming_up_waits(session: Session, sd15: Any) -> None:
    """With ControlNets: a later image finds all graphs, and records them as one step."""
    control, hint = make_controlnet(SD15), image()
    positive, negative = prompts().values()
    stock, both = (
        apply_controlnet(positive, negative, net, hint, 0.8, 0.0, 1.0)
        for net in (control, optimize_controlnet(control, BACKGROUND))
    )
    expected = sample(sd15, positive=stock[0], negative=stock[1])
    model = optimize_model(sd15, BACKGROUND)
    with torch.inference_mode():
        (line,) = warm_up(model, *both, [(128, 128)], [1], 5.0)
    graphs = len(session.engine.cache)
    assert line.startswith(f"128x128, batch 1: {graphs} graphs compiled, 0 loaded, ") and graphs > 4
    with session.engine.counters.expect(
        blocks_eager=0, graphs_compiled=0, captures=0, runs_pending=0
    ):
        sampled = sample(model, positive=both[0], negative=both[1])
    assert relative_rms(sampled, expected) <= BOUND


def test_a_slow_step_leaves_no_graph_without_its_turn(
    session: Session, sd15: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, slow = unit.Unit.__call__, iter([2.5])

    def first_is_slow(self: Any, *args: Any) -> Any:
        time.sleep(next(slow, 0.0))
        return run(self, *args)

    monkeypatch.setattr(unit, "_PATIENCE_SECONDS", 2.0)
    monkeypatch.setattr(unit.Unit, "__call__", first_is_slow)
    sample(optimize_model(sd15, BACKGROUND), steps=1)
    assert len(session.engine.jobs._running) > 4


def test_few_that_wait_for_more_do_not_wait_for_ever(session: Session, sd15: Any) -> None:
    """`first` found few missing, and ended before it compiled them itself."""
    sample(optimize_model(sd15, FIRST), steps=3)
    for key in session.engine.cache.all_keys()[:3]:
        session.engine.cache.discard(key)
    again = make_model(SD15)
    sample(optimize_model(again, FIRST), steps=1)
    assert len(session.engine.jobs._held) == 3
    optimized = optimize_model(again, BACKGROUND)
    until_done(session, lambda: sample(optimized, steps=3))


def test_what_is_on_disk_is_not_given_away(session: Session, sd15: Any, tmp_path: Path) -> None:
    for compiled in (True, False):
        session.engine.jobs.close()
        session.engine = Engine(store=(tmp_path, 2**30))
        session.captures.counters = session.engine.counters
        optimized = optimize_model(make_model(SD15), BACKGROUND)
        sample(optimized)
        assert (session.engine.counters["graphs_loaded"] == 0) is compiled
        until_done(session, partial(sample, optimized))
        assert (session.engine.jobs.finished > 0) is compiled


def test_frozen_weights_are_compiled_here(session: Session, sd15: Any) -> None:
    expected = sample(sd15)
    config = OptimizeConfig(backend="eager", freeze_weights=True, compile="background")
    with session.engine.counters.expect(blocks_eager=0, blocks_compiled=10):
        assert relative_rms(sample(optimize_model(sd15, config)), expected) <= BOUND
    assert session.engine.jobs.finished == 0
