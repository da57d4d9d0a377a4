"""BladeControlNetApply on a real server: posted as stock's node, switched, and given bad input."""

from __future__ import annotations

import itertools
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy
import pytest
from blade_tests.server.workflow import (
    CLEAR,
    CONTROLNETS,
    TOLERANCE,
    Run,
    Runner,
    as_stock,
    difference,
    example,
    place_control_files,
)

from devtools.client import PromptRejected, Workflow
from devtools.fixtures import make_fixtures
from devtools.workflows import node_id

ONE, TWO = "sd15-controlnet-blade", "sd15-controlnets-loras-blade"
NODE = "BladeControlNetApply"
SEED = 8000
OTHER_SEEDS = itertools.count(SEED + 100)

# The node to change, and what to change in it.
SWITCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "file": ("ControlNetLoader", {"control_net_name": list(CONTROLNETS)[1]}),
    "image": ("LoadImage", {"image": "depth.png"}),
    "strength": (NODE, {"strength": 2.0}),
    "strength 0": (NODE, {"strength": 0.0}),
    "start": (NODE, {"start_percent": 0.5}),
    "end": (NODE, {"end_percent": 0.4}),
    "start and end": (NODE, {"start_percent": 0.3, "end_percent": 0.6}),
}

# Input, value, the host's error; None leaves the input out.
REFUSED: dict[str, tuple[str, Any, str]] = {
    "strength above 10": ("strength", 20, "value_bigger_than_max"),
    "strength below 0": ("strength", -1, "value_smaller_than_min"),
    "start below 0": ("start_percent", -0.1, "value_smaller_than_min"),
    "end above 1": ("end_percent", 1.5, "value_bigger_than_max"),
    "unknown backend": ("backend", "tensorrt", "value_not_in_list"),
    "no image": ("image", None, "required_input_missing"),
    "no ControlNet": ("control_net", None, "required_input_missing"),
    "a latent for an image": ("image", ["8", 0], "return_type_mismatch"),
}


@pytest.fixture(scope="module", autouse=True)
def controlnets(base_directory: Path, host_path: Path) -> None:
    place_control_files(base_directory, host_path)


@pytest.fixture(scope="module")
def first(runner: Runner) -> Run:
    """The example, run; what comes after it has graphs."""
    return runner.ok(example(runner, ONE, SEED, steps=3))


def inputs(nodes: Workflow, class_type: str) -> dict[str, Any]:
    """The inputs of the one node of a class."""
    found: dict[str, Any] = nodes[node_id(nodes, class_type)]["inputs"]
    return found


@pytest.mark.parametrize(("class_type", "changes"), SWITCHES.values(), ids=SWITCHES)
def test_switch_compiles_nothing(
    runner: Runner, first: Run, class_type: str, changes: dict[str, Any]
) -> None:
    nodes = deepcopy(first.nodes)
    inputs(nodes, class_type).update(changes)
    run = runner.ok(nodes)
    assert run.counted["graphs_compiled"] == run.counted["cache_misses"] == 0
    assert run.counted["blocks_eager"] == 0
    used = 0 if changes == {"strength": 0.0} else 1
    assert run.counted["control_runs"] == run.counted["hint_embeddings"] == used
    assert difference(run.latent, first.latent) > CLEAR
    assert difference(run.latent, runner.ok(as_stock(nodes)).latent) <= TOLERANCE


def test_second_of_its_architecture_compiles_nothing(runner: Runner, first: Run) -> None:
    nodes = example(runner, TWO, SEED + 1, steps=3)
    inputs(nodes, "BladeFusedLoRA").update(lora_1="None", lora_2="None")
    run = runner.ok(nodes)
    assert run.counted["graphs_compiled"] == run.counted["blocks_eager"] == 0
    assert run.counted["control_runs"] == run.counted["hint_embeddings"] == 2
    assert difference(run.latent, runner.ok(as_stock(nodes)).latent) <= TOLERANCE


def test_posted_for_stock_it_needs_another_class_type_only(runner: Runner) -> None:
    """Without Blade Optimize Model, and with the real compiler, for `auto` finds Inductor here."""
    stock = as_stock(example(runner, TWO, SEED + 2))
    expected = runner.ok(stock).latent
    posted = deepcopy(stock)
    for node in posted.values():
        if node["class_type"] == "ControlNetApplyAdvanced":
            node["class_type"] = NODE
    run = runner.ok(posted)
    assert difference(run.latent, expected) <= TOLERANCE
    assert run.counted["control_runs"] == run.counted["hint_embeddings"] == 2
    assert run.counted["runs"] == run.counted["blocks_eager"] == 0
    assert run.counted["graphs_compiled"] == len(run.new_keys) > 0
    assert all(" | inductor | " in key for key in run.new_keys)


def test_stock_node_on_the_same_controlnet_is_bit_identical(runner: Runner) -> None:
    """Before and after: the object that the loader gave is as it was."""
    nodes = example(runner, ONE, SEED + 3)
    stock = as_stock(nodes)
    before = runner.ok(stock).latent
    assert runner.ok(nodes).counted["control_runs"] == 1
    again = runner.ok(stock)
    (cached,) = again.result.of_kind("execution_cached")
    assert node_id(stock, "ControlNetLoader") in cached.data["nodes"]
    assert not any(again.counted.values())
    assert numpy.array_equal(again.latent, before)


def test_disabled_is_stock_bit_for_bit(runner: Runner) -> None:
    nodes = example(runner, ONE, SEED + 4)
    for class_type in (NODE, "BladeOptimizeModel"):
        inputs(nodes, class_type)["enabled"] = False
    run = runner.ok(nodes)
    assert not any(run.counted.values())
    assert numpy.array_equal(run.latent, runner.ok(as_stock(nodes)).latent)


def test_report_and_stats_tell_of_the_controlnet(runner: Runner) -> None:
    runner.free()
    run = runner.ok(example(runner, ONE, SEED + 5))
    (net,) = run.stats["controlnets"]
    (model,) = run.stats["models"]
    assert set(net) == set(model)
    assert (net["model"], net["backend"], net["compilers"]) == ("ControlNet", "eager", ["eager"])
    assert {block["state"] for block in net["blocks"]} == {"compiled"}
    names = {re.sub(r"\.\d+$", "", block["block"]) for block in net["blocks"]}
    assert names == {"input_blocks", "zero_convs", "middle_block", "middle_block_out"}
    _, told = run.text("BladeReport").split("ControlNet (backend eager: eager; on_failure fallback")
    assert f"- {len(net['blocks'])} blocks: {len(net['blocks'])} compiled" in told


def good_one_works(runner: Runner) -> None:
    """A good prompt after a bad one is as if that had not been."""
    nodes = example(runner, ONE, next(OTHER_SEEDS))
    run = runner.ok(nodes)
    assert run.counted["control_runs"] == 1
    assert run.counted["blocks_eager"] == 0
    assert difference(run.latent, runner.ok(as_stock(nodes)).latent) <= TOLERANCE


@pytest.mark.parametrize(("name", "value", "kind"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_by_name(runner: Runner, name: str, value: Any, kind: str) -> None:
    nodes = example(runner, ONE, next(OTHER_SEEDS))
    assert nodes["8"]["class_type"] == "EmptyLatentImage"
    inputs(nodes, NODE)[name] = value
    if value is None:
        del inputs(nodes, NODE)[name]
    with pytest.raises(PromptRejected) as caught:
        runner.client.queue(nodes, "tests")
    node = caught.value.node_errors[node_id(nodes, NODE)]
    assert node["class_type"] == NODE
    (error,) = node["errors"]
    assert error["type"] == kind
    assert error["extra_info"]["input_name"] == name
    good_one_works(runner)


def failed(runner: Runner, nodes: Workflow, class_type: str) -> str:
    """The message of a prompt that has to fail in the one node of a class, from the history."""
    run = runner.run(nodes)
    assert run.result.status == "error"
    entry = runner.client.get_json(f"/history/{run.result.prompt_id}")[run.result.prompt_id]
    assert entry["status"]["status_str"] == "error"
    error = dict(entry["status"]["messages"])["execution_error"]
    assert error["node_type"] == class_type
    assert error["exception_type"].endswith("ControlNetError")
    return str(error["exception_message"]).strip()


def test_image_of_four_channels_is_named(runner: Runner) -> None:
    nodes = example(runner, ONE, next(OTHER_SEEDS))
    image = node_id(nodes, "LoadImage")
    joined = {"image": [image, 0], "alpha": [image, 1]}
    nodes["100"] = {"class_type": "JoinImageWithAlpha", "inputs": joined}
    inputs(nodes, NODE)["image"] = ["100", 0]
    message = failed(runner, nodes, NODE)
    assert message.startswith(
        "The control image has 4 channels; this ControlNet expects 3. Convert the image"
    )
    good_one_works(runner)


def test_image_with_nan_is_named(runner: Runner, base_directory: Path, host_path: Path) -> None:
    """By stock's nodes: a latent that was multiplied beyond what a float holds, decoded by a VAE
    that does not bound its values."""
    file = make_fixtures(base_directory, ["vae"], host=host_path)["vae"].name
    nodes = example(runner, ONE, next(OTHER_SEEDS))
    nodes["99"] = {"class_type": "VAELoader", "inputs": {"vae_name": file}}
    image = [node_id(nodes, "LoadImage"), 0]
    nodes["100"] = {"class_type": "VAEEncode", "inputs": {"pixels": image, "vae": ["99", 0]}}
    for id in range(101, 145):
        multiplied = {"samples": [str(id - 1), 0], "multiplier": 10.0}
        nodes[str(id)] = {"class_type": "LatentMultiply", "inputs": multiplied}
    nodes["145"] = {"class_type": "VAEDecode", "inputs": {"samples": ["144", 0], "vae": ["99", 0]}}
    inputs(nodes, NODE)["image"] = ["145", 0]
    message = failed(runner, nodes, NODE)
    assert message.startswith("The control image holds NaN or infinite values")
    good_one_works(runner)


def test_controlnet_of_another_architecture_is_named(
    runner: Runner, base_directory: Path, host_path: Path
) -> None:
    file = make_fixtures(base_directory, ["sdxl-control"], host=host_path)["sdxl-control"]
    nodes = example(runner, ONE, next(OTHER_SEEDS))
    inputs(nodes, "ControlNetLoader")["control_net_name"] = file.name
    message = failed(runner, nodes, "KSampler")
    assert message == (
        "This ControlNet does not fit the model. It was made for a UNet with 320 channels and "
        "prompts of width 2048, and a label of width 2816; the model is SD15, with 320 channels "
        "and prompts of width 768. Load a ControlNet that was made for SD15."
    )
    good_one_works(runner)
