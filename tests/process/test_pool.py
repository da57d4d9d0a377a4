"""The processes that compile: how they start, what they say, and when they end."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from blade_tests.process.asking import PATIENCE, now, requests, same, soon, the_process, until
from blade_tests.unit.samples import inputs_of, request_of

from blade.blade_core.engine import Engine
from blade.blade_core.pool import WorkerFailed, Workers
from blade.blade_core.worker import FORKS

pytestmark = pytest.mark.usefixtures("two_processes")


@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM is another thing there")
def test_processes_do_not_outlive_the_engine(engine: Engine) -> None:
    (request,) = requests(1)
    now(engine, request)
    assert soon(engine, request_of(inputs=inputs_of((1, 4, 8, 8)))) is None
    process = the_process(engine)
    engine.jobs.close()
    process.wait(timeout=PATIENCE)


def test_a_process_that_prints_something_else_costs_a_warning(
    engine: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('welcome to this machine', flush=True)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (request,) = requests(1)
    assert soon(engine, request) is None
    assert same(now(engine, request), request)
    assert "(the process ended); this one will." in caplog.text


def test_what_imports_print_is_no_answer(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = """
import sys

class Talkative:
    def find_spec(self, name, *_):
        if name == "torch":
            print("here is torch", flush=True)

sys.meta_path.insert(0, Talkative())
"""
    (tmp_path / "sitecustomize.py").write_text(hook)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (request,) = requests(1)
    assert soon(engine, request) is None
    until(lambda: engine.jobs.finished == 1)
    with engine.counters.expect(graphs_compiled=1):
        assert same(now(engine, request), request)
    assert the_process(engine).poll() is None  # it goes on


def test_another_process_looks_for_packages_where_this_one_does(engine: Engine) -> None:
    (request,) = requests(1)
    now(engine, request)
    assert soon(engine, request_of(inputs=inputs_of((1, 4, 8, 8)))) is None
    command = the_process(engine).args
    assert isinstance(command, list) and ("-s" in command) == bool(sys.flags.no_user_site)


def test_nothing_is_imported_from_where_the_server_was_started(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "selectors.py").write_text("open('executed', 'w')")
    monkeypatch.chdir(tmp_path)
    (request,) = requests(1)
    assert soon(engine, request) is None
    until(lambda: engine.jobs.finished == 1)
    assert not (tmp_path / "executed").exists()
    with engine.counters.expect(graphs_compiled=1):
        assert same(now(engine, request), request)


class Slow:
    """A job that takes so long."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __reduce__(self) -> Any:
        return time.sleep, (self.seconds,)


@pytest.mark.skipif(not FORKS, reason="none has children there")
def test_the_end_of_a_process_is_noticed_while_its_children_work() -> None:
    workers = Workers(2)
    try:
        workers.submit("eager", b"it runs").result(PATIENCE)
        job = workers.submit("inductor", pickle.dumps(Slow(PATIENCE)))
        time.sleep(1.0)  # a child has it
        (process,) = workers.processes()
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(WorkerFailed, match="the process ended"):
            job.result(PATIENCE / 4)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the child, which has its group still
    finally:
        workers.close()


@pytest.mark.skipif(not FORKS, reason="there is no such signal there")
def test_children_end_though_the_server_ignores_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that start others may leave SIGCHLD ignored, which those inherit."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    workers = Workers(2)
    try:
        for _ in range(3):
            job = workers.submit("inductor", b"no job")
            with pytest.raises(WorkerFailed, match="Unpickling"):
                job.result(PATIENCE)
            assert workers.submit("eager", b"sound").result(PATIENCE).artifact == b"sound"
            time.sleep(0.5)
    finally:
        workers.close()
        signal.signal(signal.SIGCHLD, before)


def test_none_is_started_again_once_they_are_closed() -> None:
    workers = Workers(2)
    workers.submit("eager", b"it runs").result(PATIENCE)
    (process,) = workers.processes()
    jobs = [workers.submit("eager", bytes(200_000)) for _ in range(60)]
    workers.close()
    process.wait(PATIENCE)
    until(lambda: all(job.done() for job in jobs))
    assert workers.processes() == []


def test_more_jobs_and_answers_than_pipes_hold() -> None:
    """A process that waits to be heard reads no jobs, and who tells it jobs hears nothing."""
    workers = Workers(2)
    try:
        payloads = [bytes([number]) * 200_000 for number in range(60)]
        results = [workers.submit("eager", payload) for payload in payloads]
        assert [result.result(PATIENCE).artifact for result in results] == payloads
    finally:
        workers.close()
