"""The processes that compile: how they start, what they say, and when they end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from blade_tests.process.asking import PATIENCE, now, requests, same, soon, the_process, until
from blade_tests.unit.samples import inputs_of, request_of

from blade.blade_core.engine import Engine
from blade.blade_core.pool import Workers

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


def test_more_jobs_and_answers_than_pipes_hold() -> None:
    """A process that waits to be heard reads no jobs, and who tells it jobs hears nothing."""
    workers = Workers(2)
    try:
        payloads = [bytes([number]) * 200_000 for number in range(60)]
        results = [workers.submit("eager", payload) for payload in payloads]
        assert [result.result(PATIENCE).artifact for result in results] == payloads
    finally:
        workers.close()
