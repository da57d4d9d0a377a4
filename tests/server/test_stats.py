"""What Blade tells about itself: the route, the report node, the node definitions, the log."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import requests
from blade_tests.server.workflow import Blade, Runner, Text2Image

from blade.blade_core.counters import NAMES
from devtools.workflows import node_id

WORKFLOW = Text2Image(seed=4000, report=True)


def test_route_has_this_shape(runner: Runner) -> None:
    runner.ok(WORKFLOW)
    answer = requests.get(f"{runner.client.url}/blade/stats", timeout=30)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith("application/json")
    stats = answer.json()
    parts = {"counters", "cache", "disk", "lora_files", "models", "controlnets", "vaes"}
    assert set(stats) == parts
    assert set(stats["lora_files"]) == {"reads", "bytes", "budget_bytes"}
    assert stats["lora_files"]["bytes"] <= stats["lora_files"]["budget_bytes"] == 4096 * 2**20
    assert set(stats["counters"]) == {
        *NAMES,
        "compile_seconds",
        "capture_seconds",
        "load_seconds",
    }
    assert all(isinstance(stats["counters"][name], int) for name in NAMES)
    cache = stats["cache"]
    assert set(cache) == {"graphs", "bytes", "budget_bytes", "keys"}
    assert cache["graphs"] == len(cache["keys"]) > 0
    assert 0 < cache["bytes"] <= cache["budget_bytes"] == 4096 * 2**20
    for model in stats["models"]:
        assert set(model) == {
            "model",
            "backend",
            "compilers",
            "freeze_weights",
            "on_failure",
            "runs_as_stock",
            "captures",
            "capture_mib",
            "replays",
            "not_captured",
            "blocks",
        }
        assert model["captures"] == model["replays"] == 0  # there is no GPU here
        for block in model["blocks"]:
            assert set(block) == {"block", "state", "reasons", "layers"}
            assert block["state"] in ("compiled", "eager", "mixed", "idle")
            assert bool(block["reasons"]) == (block["state"] in ("eager", "mixed"))
            assert block["layers"]


def test_report_as_json_is_the_same_data(runner: Runner) -> None:
    run = runner.ok(replace(WORKFLOW, seed=4100))
    report = json.loads(run.text("PreviewAny"))
    assert report["counters"] == run.stats["counters"]
    assert report["cache"] == run.stats["cache"]
    assert all(model in run.stats["models"] for model in report["models"])
    model = report["models"][-1]
    assert (model["backend"], model["on_failure"]) == ("eager", "error")
    assert {block["state"] for block in model["blocks"]} == {"compiled"}


def test_report_is_made_anew_for_each_prompt(runner: Runner) -> None:
    nodes = replace(WORKFLOW, seed=4200).build(runner.models)
    runner.ok(nodes)
    again = runner.run(nodes)
    assert again.result.ok
    kept = {id for event in again.result.of_kind("execution_cached") for id in event.data["nodes"]}
    assert node_id(nodes, "KSampler") in kept
    assert node_id(nodes, "BladeReport") not in kept


def test_report_without_blade_says_so(runner: Runner) -> None:
    """Also where Blade ran the same checkpoint a moment ago: the report is about this model."""
    runner.ok(replace(WORKFLOW, seed=4300))
    for seed, blade in ((4301, None), (4302, Blade(enabled=False))):
        run = runner.ok(replace(WORKFLOW, seed=seed, blades=(blade,)))
        assert "does not run through Blade Optimize Model" in run.text("BladeReport")
        assert json.loads(run.text("PreviewAny"))["models"] == []


def test_report_leaves_out_other_nodes(runner: Runner) -> None:
    """Of two Blade nodes over one checkpoint, a report shows the one that it is wired to."""
    for seed, blade in ((4400, Blade()), (4401, Blade(on_failure="fallback"))):
        run = runner.ok(replace(WORKFLOW, seed=seed, blades=(blade,)))
        shown = [model["on_failure"] for model in json.loads(run.text("PreviewAny"))["models"]]
        assert shown == [blade.on_failure]


def test_nodes_explain_themselves(runner: Runner) -> None:
    for name in ("BladeOptimizeModel", "BladeControlNetApply", "BladeOptimizeVAE", "BladeReport"):
        info = runner.client.object_info(name)
        assert info["category"] == "Blade"
        assert info["description"]
        assert len(info["output_tooltips"]) == len(info["output"])
        for kind in ("required", "optional"):
            for input_name, definition in info["input"].get(kind, {}).items():
                assert definition[1].get("tooltip"), f"{name}.{input_name} has no tooltip"
    inputs = runner.client.object_info("BladeOptimizeModel")["input"]["required"]
    defaults = {name: definition[1].get("default") for name, definition in inputs.items()}
    assert defaults == {
        "model": None,
        "backend": "auto",
        "freeze_weights": False,
        "on_failure": "fallback",
        "enabled": True,
    }


def test_import_prints_nothing_bad(runner: Runner) -> None:
    log = runner.server.log_text().split("Starting server")[0]
    assert re.search(r"seconds: .*custom_nodes.blade$", log, re.MULTILINE)
    assert "Traceback" not in log
    ours = [line for line in log.splitlines() if re.search("blade", line, re.IGNORECASE)]
    assert [line for line in ours if re.search("error|warn|fail|cannot", line, re.I)] == []
