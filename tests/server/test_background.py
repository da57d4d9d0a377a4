"""Graphs that other processes compile with Inductor while the server goes on sampling."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

from blade_tests.server.conftest import ServerFactory
from blade_tests.server.test_images import example
from blade_tests.server.workflow import TOLERANCE, Run, Runner, difference

from devtools.workflows import node_id

PATIENCE = 400.0


def test_images_come_while_graphs_are_compiled_elsewhere(
    server_factory: ServerFactory, models: dict[str, Path], tmp_path: Path
) -> None:
    variables = {
        "BLADE_CACHE_DIR": str(tmp_path / "graphs"),
        "BLADE_DISK_CACHE_MIB": "1024",
        "BLADE_COMPILE_WORKERS": "2",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
    }
    with server_factory("background", variables=variables) as server:
        runner = Runner(server, models)

        def sampled(seed: int) -> Run:
            nodes = example(runner, "sd15", "blade", seed)
            nodes[node_id(nodes, "BladeOptimizeModel")]["inputs"]["compile"] = "background"
            return runner.ok(nodes)

        def as_stock(run: Run, seed: int) -> bool:
            stock = runner.ok(example(runner, "sd15", "stock", seed))
            return difference(run.latent, stock.latent) <= TOLERANCE

        seeds = itertools.count(3001)
        run = sampled(3000)
        assert as_stock(run, 3000)
        assert run.counted["graphs_compiled"] == run.counted["blocks_compiled"] == 0
        assert "its graphs are being compiled" in run.text("BladeReport")
        end = time.monotonic() + PATIENCE
        while run.counted["blocks_eager"]:
            assert time.monotonic() < end
            time.sleep(10)  # few cores here, and sampling comes first
            run = sampled(next(seeds))
        last = sampled(2999)
        assert as_stock(last, 2999)
        assert last.counted["graphs_compiled"] == last.counted["blocks_eager"] == 0
        assert last.counted["blocks_compiled"] > 0
        counters = last.stats["counters"]
        assert counters["graphs_compiled"] == last.stats["disk"]["graphs"] > 0
        assert counters["compile_failures"] == 0
        assert "could not compile" not in server.log_text()
