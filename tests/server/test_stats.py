"""What Blade tells about itself: the route, the report node, the node definitions, the log."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import requests
from blade_tests.server.workflow import Blade, Runner, Text2Image

from blade.blade_core.counters import NAMES

WORKFLOW = Text2Image(seed=4000, report=True)


def test_route_has_this_shape(runner: Runner) -> None:
    runner.ok(WORKFLOW)
    answer = requests.get(f"{runner.client.url}/blade/stats", timeout=30)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith("application/json")
    stats = answer.json()
    assert set(stats) == {"counters", "cache", "models"}
    assert set(stats["counters"]) == {*NAMES, "compile_seconds"}
    assert all(isinstance(stats["counters"][name], int) for name in NAMES)
    cache = stats["cache"]
    assert set(cache) == {"graphs", "bytes", "budget_bytes", "keys"}
    assert cache["graphs"] == len(cache["keys"]) > 0
    assert 0 < cache["bytes"] <= cache["budget_bytes"] == 4096 * 2**20
    for model in stats["models"]:
        assert set(model) == {
            "model",
            "backend",
            "freeze_weights",
            "on_failure",
            "runs_as_stock",
            "blocks",
        }
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
    (model,) = [m for m in report["models"] if m["backend"] == "eager" and not m["freeze_weights"]]
    assert model in run.stats["models"]
    assert {block["state"] for block in model["blocks"]} == {"compiled"}


def test_report_is_made_anew_for_each_prompt(runner: Runner) -> None:
    nodes = replace(WORKFLOW, seed=4200).build(runner.models)
    first = runner.ok(nodes)
    # Another seed in another branch: what the report is wired to is in the host's cache.
    nodes = {
        **nodes,
        "a": {
            "class_type": "EmptyImage",
            "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 1},
        },
    }
    again = runner.run(nodes)
    assert again.result.ok
    assert again.text("BladeReport") == first.text("BladeReport")
    (report,) = [id for id, node in nodes.items() if node["class_type"] == "BladeReport"]
    executed = [event.data["node"] for event in again.result.of_kind("executed")]
    assert report in executed


def test_report_without_blade_says_so(runner: Runner) -> None:
    """Also where Blade ran the same checkpoint a moment ago: the report is about this model."""
    runner.ok(replace(WORKFLOW, seed=4300))
    for blade in (None, Blade(enabled=False)):
        run = runner.ok(replace(WORKFLOW, seed=4301, blades=(blade,)))
        assert "does not run through Blade Optimize Model" in run.text("BladeReport")
        assert json.loads(run.text("PreviewAny"))["models"] == []


def test_nodes_explain_themselves(runner: Runner) -> None:
    for name in ("BladeOptimizeModel", "BladeReport"):
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
    imports = re.findall(
        r"^ *([\d.]+) seconds( \(IMPORT FAILED\))?: .*custom_nodes.blade$", log, re.M
    )
    assert len(imports) == 1 and not imports[0][1]
    assert float(imports[0][0]) < 5
    assert "Traceback" not in log
    others = [line for line in log.splitlines() if re.search("blade", line, re.I)]
    assert [line for line in others if re.search("error|warn|fail|cannot", line, re.I)] == []
