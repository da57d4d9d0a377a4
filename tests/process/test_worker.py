"""A process that only compiles: its children, and how long they live."""

import ast

import pytest
from blade_tests.unit.samples import in_new_process

from blade.blade_core.worker import FORKS

pytestmark = pytest.mark.skipif(not FORKS, reason="processes cannot fork here")

_CHILDREN = """
import os, pickle, threading, time
from blade.blade_core import worker
from blade.blade_core.backends import BACKENDS

class Tells:
    name = "tells"
    def preload(self):
        pass
    def compile_job(self, job):
        kind, seconds = job.decode().split()
        time.sleep(float(seconds))
        if kind == "die":
            os._exit(3)
        if kind == "raise":
            raise ValueError("no")
        return str(os.getpid()).encode() + bytes(300_000)  # more than a pipe holds

BACKENDS["tells"] = Tells()
(jobs, to_worker), (answers, from_worker) = os.pipe(), os.pipe()
told = {}

def talk():
    number = 0
    with os.fdopen(to_worker, "wb") as todo:
        for burst in BURSTS:
            for job in burst:
                worker.write(todo, worker.Job(number, "tells", job.encode() + b" " * 300_000))
                number += 1
            while len(told) < number:
                time.sleep(0.02)
            time.sleep(0.3)

def listen():
    with os.fdopen(answers, "rb") as done:
        for _ in range(sum(map(len, BURSTS))):
            answer = worker.Answer(*worker.read(done))
            told[answer.number] = (answer.artifact or answer.error.encode()).rstrip(bytes(1))

threading.Thread(target=listen, daemon=True).start()
talker = threading.Thread(target=talk)
talker.start()
worker._by_children(os.fdopen(jobs, "rb", buffering=0), os.fdopen(from_worker, "wb"), 2)
talker.join()
print([told[number].decode() for number in sorted(told)])
try:
    while True:
        os.waitpid(-1, 0)
except ChildProcessError:
    pass
"""


def children(*bursts: list[str]) -> list[str]:
    """What two children make of jobs that come in bursts, in the order of the jobs: the id of the
    process, or the error."""
    found = in_new_process(f"BURSTS = {bursts!r}\n{_CHILDREN}")
    result: list[str] = ast.literal_eval(found)
    return result


_IDLE = """
import os, time
from blade.blade_core import worker
from blade.blade_core.backends import BACKENDS

BACKENDS.clear()
worker._PARENT_SECONDS = 0.3
jobs, to_worker = os.pipe()
start = time.monotonic()
worker._by_children(os.fdopen(jobs, "rb", buffering=0), open(os.devnull, "wb"), 2)
print(0.3 <= time.monotonic() - start < 10)
"""


def test_a_process_without_work_ends() -> None:
    assert in_new_process(_IDLE) == "True"


def test_a_child_goes_on_while_there_is_work() -> None:
    assert len(set(children(["ok 0.2"] * 6))) == 2


def test_a_child_without_work_ends() -> None:
    told = children(["ok 0.1"] * 2, ["ok 0.1"] * 2)
    assert not set(told[:2]) & set(told[2:])


def test_what_failed_or_died_costs_its_own_job_only() -> None:
    told = children(["raise 0", "die 0", "ok 0.1", "ok 0.1", "die 0.1", "ok 0"])
    assert told[:2] == ["ValueError: no", "the process ended"]
    assert told[4] == "the process ended"
    assert all(told[n].isdigit() for n in (2, 3, 5))
