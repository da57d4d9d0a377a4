"""What has to be seen in a process that has just begun: imports, variables, switches of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from blade_tests.unit.samples import Choosy, Unit, in_new_process, request_of

from blade.blade_core.key import digest
from blade.blade_core.structure import describe

_IN_ORDER = """
import sys, threading
import torch
from blade.blade_core.config import OptimizeConfig
from blade.blade_core.engine import Engine
engine, config = Engine(), OptimizeConfig(backend="inductor", on_failure="error")
before = "torch._inductor.compile_fx" in sys.modules
engine.expect(config, torch.device("cpu"))
running = [t.name for t in threading.enumerate() if t.name == "blade-import"]
engine.backends(config, torch.device("cpu"))
print(before, running, "torch._inductor.compile_fx" in sys.modules)
"""

_REMEMBERED = """
import hashlib
from blade.blade_core.backends import BACKENDS
BACKENDS["inductor"].preload()
from torch._inductor.codecache import torch_key
hashlib.sha256 = None
print(len(torch_key()))
"""


def test_a_model_that_is_going_to_run_has_its_compiler_imported() -> None:
    assert in_new_process(_IN_ORDER, BLADE_COMPILE_WORKERS="0") == "False ['blade-import'] True"


def test_torch_has_read_its_own_files() -> None:
    """A first graph, loaded or compiled, would wait for that."""
    assert in_new_process(_REMEMBERED) == "32"


def test_inductor_names_the_compiler_that_is_missing() -> None:
    """In a process of its own: torch reads CXX once, at import."""
    code = """
import torch
from blade.blade_core.backends import BACKENDS
print(BACKENDS["inductor"].available(torch.device("cpu")))
"""
    reason = in_new_process(code, CXX="no-such-compiler")
    assert reason.startswith("no working C++ compiler was found (CXX is 'no-such-compiler'): ")
    assert reason.endswith("Install g++ or clang (Windows: Visual Studio Build Tools), or set CXX")


@pytest.mark.parametrize("seed", ["1", "2"])
def test_digests_are_equal_in_every_process(
    seed: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = """
import torch
from blade_tests.unit.samples import Choosy, Unit, request_of
from blade.blade_core.key import digest
from blade.blade_core.structure import describe
request = request_of(Unit())
print(request.key.id, request.key.structure, digest(describe(Choosy())), request.key.layout)
"""
    seen = in_new_process(code, PYTHONHASHSEED=seed, HOME=str(tmp_path)).split()
    key = request_of(Unit()).key
    assert seen == [key.id, key.structure, digest(describe(Choosy())), key.layout]


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9"
)
@pytest.mark.parametrize("owner", ["torch.backends.cuda.matmul", "torch.backends"])
def test_precision_set_by_the_newer_switch_counts(owner: str) -> None:
    """Once it was set, torch raises when the older `allow_tf32` is read."""
    code = f"""
import torch
from blade.blade_core.key import environment
before = environment(torch.device("cpu"))
{owner}.fp32_precision = "tf32"
print(environment(torch.device("cpu")) != before)
"""
    assert in_new_process(code) == "True"


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9"
)
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_a_graph_is_compared_after_the_newer_precision_switch_was_used(precision: str) -> None:
    """From then on torch raises when the older `allow_tf32` is read."""
    code = f"""
import torch
from blade.blade_core.backends import BACKENDS
from blade.blade_core.engine import Engine
from blade_tests.unit.samples import request_of
request, engine = request_of(), Engine()
torch.backends.fp32_precision = {precision!r}
engine.graph(request.key, BACKENDS["eager"], lambda: request, checkpoint=int, announce=str)
print(engine.counters["graphs_compiled"])
"""
    assert in_new_process(code) == "1"


def test_a_process_after_it_loads_without_tracing(tmp_path: Path) -> None:
    # With Inductor: tests/server/test_restart.py.
    code = """
import os
from pathlib import Path
import torch
from torch.fx.experimental import proxy_tensor
from blade_tests.unit.samples import request_of
from blade.blade_core.backends import BACKENDS
from blade.blade_core.engine import Engine
def no_tracing(*_):
    raise AssertionError("traced")
if os.environ["LOADS"] == "1":
    proxy_tensor.make_fx = no_tracing
engine = Engine(store=(Path(os.environ["FOLDER"]), 2**30))
request = request_of()
graph = engine.graph(request.key, BACKENDS["eager"], lambda: request,
                     checkpoint=lambda: None, announce=lambda key: None)
graph.call(request.weights, request.inputs)
print(engine.counters["graphs_compiled"], engine.counters["graphs_loaded"])
"""
    for loads, expected in (("0", "1 0"), ("1", "0 1")):
        assert in_new_process(code, FOLDER=str(tmp_path), LOADS=loads) == expected
