"""Graphs that other processes compile: real processes, which trace nothing and know no host."""

from __future__ import annotations

import os
import pickle
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from blade_tests.process.asking import EAGER, PATIENCE, now, requests, same, soon, until
from blade_tests.unit.samples import CPU, Unit, inputs_of, request_of

from blade.blade_core.backends import BACKENDS
from blade.blade_core.config import OptimizeConfig
from blade.blade_core.engine import Engine
from blade.blade_core.graph import GraphRequest
from blade.blade_core.key import set_switches, switches
from blade.blade_core.pool import Result, Workers
from blade.blade_core.worker import FORKS

pytestmark = pytest.mark.usefixtures("two_processes")


def test_another_process_compiles_what_is_asked_for_soon(engine: Engine) -> None:
    wanted = requests(3)
    assert [soon(engine, request) for request in wanted] == [None] * 3
    assert engine.counters["graphs_compiled"] == 0
    until(lambda: engine.jobs.finished == 3)
    with engine.counters.expect(graphs_compiled=3, graphs_loaded=0, compile_failures=0):
        graphs = [soon(engine, request) for request in wanted]
    assert all(g is not None and same(g, r) for g, r in zip(graphs, wanted, strict=True))
    with engine.counters.expect(cache_hits=1):
        assert soon(engine, wanted[0]) is graphs[0]
    other = request_of(Unit(), inputs_of((2, 4, 8, 8)))
    assert same(now(engine, other), other)  # other weights, the same graph


def test_who_cannot_go_on_waits_for_it(engine: Engine) -> None:
    (request,) = requests(1)
    assert soon(engine, request) is None
    asked = []
    with engine.counters.expect(graphs_compiled=1):
        graph = now(engine, request, checkpoint=lambda: asked.append(engine.jobs.finished))
    assert same(graph, request)
    assert 0 in asked  # a user could have cancelled meanwhile


def test_cancel_while_waiting_loses_nothing(engine: Engine) -> None:
    class Cancelled(Exception):
        pass

    def cancel() -> None:
        raise Cancelled

    (request,) = requests(1)
    assert soon(engine, request) is None
    with pytest.raises(Cancelled):
        now(engine, request, checkpoint=cancel)
    with engine.counters.expect(graphs_compiled=1):
        assert same(now(engine, request), request)
    assert engine.jobs.finished == 1


def test_few_graphs_are_not_worth_a_process(engine: Engine) -> None:
    few = requests(3)
    assert [soon(engine, request, least=4) for request in few] == [None] * 3
    assert [soon(engine, request, least=4) for request in few] == [None] * 3  # still held
    assert all(same(now(engine, request), request) for request in few)
    assert engine.jobs.finished == 0 and engine.counters["graphs_compiled"] == 3
    many = [request_of(inputs=inputs_of((1, 4, 8, 8 * (n + 1)))) for n in range(4)]
    assert [soon(engine, request, least=4) for request in many] == [None] * 4
    assert all(same(now(engine, request), request) for request in many)
    assert engine.jobs.finished == 4 and engine.counters["graphs_compiled"] == 7


def test_a_process_that_dies_costs_a_warning(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    (request,) = requests(1)
    assert soon(engine, request) is None
    workers = engine.jobs._workers
    assert workers is not None
    until(lambda: len(workers.processes()) == 1)
    for process in workers.processes():
        os.kill(process.pid, signal.SIGTERM)
    until(lambda: engine.jobs.finished == 1)
    with engine.counters.expect(graphs_compiled=1, compile_failures=0):
        graph = soon(engine, request)  # compiled here
    assert graph is not None and same(graph, request)
    assert any("the process ended" in message for message in caplog.messages)
    (other,) = [request_of(inputs=inputs_of((1, 4, 8, 8)))]
    assert soon(engine, other) is None  # and the next has a new process
    assert same(now(engine, other), other) and engine.jobs.finished == 2


class Broken(type(EAGER)):  # type: ignore[misc]
    """Leaves work to other processes that they cannot do."""

    name = "inductor"

    def job(self, request: GraphRequest) -> bytes:
        return b"no job"


def test_what_a_process_cannot_compile_is_compiled_here(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    (request,) = requests(1)
    assert soon(engine, request, Broken()) is None
    until(lambda: engine.jobs.finished == 1)
    with engine.counters.expect(graphs_compiled=1, compile_failures=0):
        assert same(now(engine, request, Broken()), request)
    assert any("UnpicklingError" in message for message in caplog.messages)


class Untraceable(type(EAGER)):  # type: ignore[misc]
    """Can say what it compiles, but not to another process."""

    def job(self, request: GraphRequest) -> bytes:
        raise TypeError("no other process has this")


def test_what_cannot_travel_is_compiled_here(engine: Engine) -> None:
    (request,) = requests(1)
    with engine.counters.expect(graphs_compiled=1, compile_failures=0):
        graph = soon(engine, request, Untraceable())
    assert graph is not None and same(graph, request)
    assert engine.jobs.finished == 0


class Deadly(type(EAGER)):  # type: ignore[misc]
    """Leaves work to other processes that they do not survive."""

    name = "inductor"

    class Job:
        def __reduce__(self) -> Any:
            return os._exit, (1,)

    def job(self, request: GraphRequest) -> bytes:
        return pickle.dumps(self.Job())


@pytest.mark.skipif(not FORKS, reason="there the process itself ends")
def test_a_child_that_dies_costs_its_own_graph_only(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, third = requests(3)
    assert soon(engine, first) is soon(engine, third) is None
    assert soon(engine, second, Deadly()) is None
    until(lambda: engine.jobs.finished == 3)
    for request in (first, third):
        assert same(now(engine, request), request)
    assert not caplog.messages
    assert same(now(engine, second, Deadly()), second)
    assert any("the process ended" in message for message in caplog.messages)


@pytest.mark.skipif(not FORKS, reason="there are as many processes as jobs")
def test_one_process_has_children_that_work_at_once() -> None:
    """As many as it was told, and each answer is its own job's."""

    class Slow:
        def __init__(self, number: int) -> None:
            self.number = number

        def __reduce__(self) -> Any:
            return exec, (f"import time; time.sleep(2); raise ValueError({self.number})",)

    workers = Workers(4)
    try:
        workers.submit("eager", b"it has started").result(PATIENCE)
        start = time.monotonic()
        slow = [workers.submit("inductor", pickle.dumps(Slow(n))) for n in range(5)]
        told = [str(job.exception(PATIENCE)) for job in slow]
        took = time.monotonic() - start
        assert told == [f"ValueError: {n}" for n in range(5)]
        assert 4 <= took < 8  # four at once, then the fifth; one by one they would take ten
        assert len(workers.processes()) == 1
    finally:
        workers.close()


def test_they_get_ready_where_nothing_was_ever_compiled(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def processes() -> int:
        assert engine.jobs._workers is not None
        return len(engine.jobs._workers.processes())

    engine.expect(OptimizeConfig(backend="eager"), CPU)  # has nothing to import
    assert processes() == 0
    (request,) = requests(1)
    now(engine, request)
    engine.expect(OptimizeConfig(), CPU)  # some are there, and perhaps all
    assert processes() == 0
    engine.cache.clear()
    monkeypatch.delenv("BLADE_COMPILE_WORKERS")
    engine.expect(OptimizeConfig(), CPU)  # they would not be used unless asked for
    assert processes() == 0
    monkeypatch.setenv("BLADE_COMPILE_WORKERS", "2")
    engine.expect(OptimizeConfig(), CPU)
    until(lambda: processes() == 1)
    assert engine.jobs.finished == 0


def test_what_only_this_process_can_compile_is_compiled_at_once(engine: Engine) -> None:
    frozen = request_of(frozen=True)
    graph = soon(engine, frozen)
    assert graph is not None and same(graph, frozen)
    assert engine.jobs.finished == 0


def test_results_are_stored_as_they_come(tmp_path: Path) -> None:
    first, second = (Engine(budget=2**30, store=(tmp_path, 2**30)) for _ in range(2))
    assert first.jobs.usable(CPU) and first.store is not None
    (request,) = requests(1)
    assert soon(first, request) is None
    until(lambda: first.jobs.finished == 1)
    assert request.key in first.store  # although nobody took it
    first.jobs.close()
    with second.counters.expect(graphs_loaded=1, graphs_compiled=0):
        graph = soon(second, request)
    assert graph is not None and same(graph, request)


def test_inductor_compiles_in_another_process(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend = BACKENDS["inductor"]
    (request,) = requests(1)
    assert soon(engine, request, backend) is None
    with monkeypatch.context() as here:
        here.delattr(torch._inductor, "standalone_compile")
        here.delattr(torch._inductor, "compile")
        with engine.counters.expect(graphs_compiled=1, compile_failures=0):
            assert same(now(engine, request, backend), request)
    assert engine.jobs.finished == 1
    said = [record for record in caplog.records if record.name == "blade"]
    assert not [record for record in said if record.levelname == "WARNING"]


class Enlarged(Unit):
    """Makes indices without any input, as the host's Upsample does where it is traced."""

    def forward(self, x: torch.Tensor, emb: torch.Tensor, scale: float) -> torch.Tensor:
        row = torch.arange(2 * x.shape[2], device=x.device) // 2
        return super().forward(x[:, :, row] * (1.0 + row[:, None]), emb, scale)


def test_what_a_graph_makes_by_itself_stays_in_it(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    backend = BACKENDS["inductor"]
    with torch.inference_mode():  # as the host samples
        request = request_of(Enlarged())
        assert soon(engine, request, backend) is None
        with engine.counters.expect(graphs_compiled=1, artifacts_dropped=0):
            assert same(now(engine, request, backend), request)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_others_are_loaded_while_one_is_waited_for(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real artifact, in the place of what processes would have finished by then."""
    backend = BACKENDS["inductor"]
    slow, broken, quick = (request_of(Unit(width)) for width in (8, 12, 16))
    jobs: dict[int, Future[Result]] = {id(r): Future() for r in (slow, broken, quick)}
    for request in (slow, broken, quick):
        engine.jobs._running[request.key] = jobs[id(request)]
    assert engine.jobs.usable(CPU)

    def made(request: GraphRequest) -> Result:
        job = backend.job(request)
        assert job is not None
        return Result(backend.compile_job(job), 1.0)

    jobs[id(broken)].set_result(Result(b"no graph", 1.0))
    jobs[id(quick)].set_result(made(quick))
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(now, engine, slow, backend)
        until(lambda: jobs[id(quick)].result().call is not None)
        assert not waiting.done()
        jobs[id(slow)].set_result(made(slow))
        assert waiting.result(PATIENCE).key == slow.key

    loaded: list[bytes] = []
    load = type(backend).load

    def noted(self: Any, artifact: bytes, request: GraphRequest) -> Any:
        loaded.append(artifact)
        return load(self, artifact, request)

    monkeypatch.setattr(type(backend), "load", noted)
    with engine.counters.expect(graphs_compiled=1):
        graph = now(engine, quick, backend)
    assert loaded == []
    expected = quick.eager(quick.weights, quick.inputs)
    torch.testing.assert_close(graph.call(quick.weights, quick.inputs), expected)
    now(engine, broken, backend)  # says so, and compiles it here
    assert loaded == [b"no graph"]


def test_switches_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    before = switches()
    try:
        for name in before:
            if name == "math-sdp":
                continue  # torch refuses attention with no kernel at all
            wanted = before | {name: not before[name]}
            set_switches(wanted)
            if name in ("fp16-accumulation", "cudnn-sdp") and switches() == before:
                continue  # this torch has no such switch
            assert switches() == wanted, name
    finally:
        set_switches(before)
    assert switches() == before


def test_what_was_cleared_is_made_anew(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    engine = Engine(budget=2**30, store=(tmp_path, 2**30))
    done, underway = requests(2)
    try:
        assert soon(engine, done) is None
        until(lambda: engine.jobs.finished == 1)
        assert soon(engine, underway) is None
        engine.jobs.clear()
        assert engine.store is not None
        engine.store.clear()
        until(lambda: engine.jobs.finished == 2)
        assert engine.store.stored().graphs == 0  # what was under way came too late
        assert soon(engine, done) is None and soon(engine, underway) is None
        assert same(now(engine, done), done) and same(now(engine, underway), underway)
        assert engine.store.stored().graphs == 2
    finally:
        engine.jobs.close()


def test_results_that_nobody_takes_do_not_pile_up(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blade.blade_core.jobs._MOST", 2)
    first, *others = requests(5)
    assert soon(engine, first) is None
    until(lambda: engine.jobs.finished == 1)
    for count, request in enumerate(others):
        assert soon(engine, request) is None
        until(lambda count=count: engine.jobs.finished == count + 2)
    assert first.key not in engine.jobs and others[-1].key in engine.jobs
    assert same(now(engine, first), first)
