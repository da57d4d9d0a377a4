"""Graphs that other processes compile with Inductor while the server goes on sampling."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
from blade_tests.server.conftest import ServerFactory
from blade_tests.server.test_images import example
from blade_tests.server.workflow import TOLERANCE, Run, Runner, difference

from devtools.server import ComfyServer
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
        gets_ready_before_a_node_runs(server, runner)

        def sampled(seed: int) -> Run:
            nodes = example(runner, "sd15", "blade", seed)
            nodes[node_id(nodes, "BladeOptimizeModel")]["inputs"]["compile"] = "background"
            run = runner.ok(nodes)
            stock = runner.ok(example(runner, "sd15", "stock", seed))
            assert difference(run.latent, stock.latent) <= TOLERANCE
            return run

        first = sampled(3000)
        # Who waits for graphs runs no block as stock. A small one may be there before the end.
        assert first.counted["blocks_eager"] > 0
        assert "its graphs are being compiled" in first.text("BladeReport")
        # Not until all are there: they give way to whatever else runs on this machine.
        end = time.monotonic() + PATIENCE
        while runner.stats()["disk"]["graphs"] < 2:
            assert time.monotonic() < end
            time.sleep(1)
        stored = runner.stats()["disk"]["graphs"]
        second = sampled(3001)
        assert first.counted["graphs_compiled"] + second.counted["graphs_compiled"] >= stored
        assert second.counted["compile_failures"] == 0
        assert "could not compile" not in server.log_text()


def gets_ready_before_a_node_runs(server: ComfyServer, runner: Runner) -> None:
    """The process that compiles is there although the first node fails."""
    broken = server.base / "models" / "checkpoints" / "broken.safetensors"
    broken.write_bytes(b"no checkpoint")
    nodes = example(runner, "sd15", "blade")
    nodes[node_id(nodes, "CheckpointLoaderSimple")]["inputs"]["ckpt_name"] = broken.name
    assert not psutil.Process(server.pid).children()
    result = runner.client.run(nodes)
    broken.unlink()
    assert result.error is not None
    assert result.error["node_type"] == "CheckpointLoaderSimple"
    assert not result.of_kind("executed")
    end = time.monotonic() + 20
    while not psutil.Process(server.pid).children():
        assert time.monotonic() < end
        time.sleep(0.1)
