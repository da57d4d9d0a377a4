"""Interrupting a compile, and unloading models between runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy
from blade_tests.server.conftest import ServerFactory
from blade_tests.server.workflow import TOLERANCE, Blade, Runner, Text2Image, difference

from devtools.client import Event

SECONDS = 30.0
"""How long a cancel may take: as long as one graph takes to compile on a busy machine."""


def test_interrupt_while_compiling(
    server_factory: ServerFactory, models: dict[str, Path], inductor_cache: dict[str, str]
) -> None:
    with server_factory("cancel", variables=inductor_cache) as server:
        runner = Runner(server, models)
        workflow = Text2Image(seed=2000, width=128, blades=(Blade("inductor"),))
        expected = runner.stock(workflow)
        asked: list[float] = []

        def interrupt(event: Event) -> None:
            if event.kind == "progress_text" and not asked:
                asked.append(event.at)
                runner.client.interrupt()

        stopped = runner.run(workflow, interrupt)
        assert stopped.result.status == "interrupted"
        (end,) = stopped.result.of_kind("execution_interrupted")
        assert end.at - asked[0] < SECONDS
        # The graph that was being compiled is kept; no other was begun.
        assert stopped.counted["graphs_compiled"] <= 1
        assert stopped.counted["compile_failures"] == 0
        assert numpy.array_equal(runner.stock(workflow), expected)

        again = runner.ok(workflow)
        assert difference(again.latent, expected) <= TOLERANCE
        assert again.counted["blocks_eager"] == again.counted["compile_failures"] == 0
        assert again.stats["counters"]["graphs_compiled"] == again.stats["cache"]["graphs"]


def test_free_between_runs_keeps_graphs_and_no_models(runner: Runner) -> None:
    workflow = Text2Image(seed=2100)
    runner.ok(workflow)
    assert runner.stats()["models"]
    runner.free()

    again = replace(workflow, seed=2101)
    run = runner.ok(again)
    assert run.counted["graphs_compiled"] == run.counted["blocks_eager"] == 0
    assert run.counted["cache_hits"] > 0
    assert difference(run.latent, runner.stock(again)) <= TOLERANCE
