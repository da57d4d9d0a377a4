"""The LoRA node as the server offers it, and the example workflows of LoRAs and ControlNets."""

from __future__ import annotations

import io
import itertools
import json
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy
import pytest
import requests
from blade_tests.server.workflow import (
    CLEAR,
    TOLERANCE,
    Runner,
    as_stock,
    difference,
    example,
    place_control_files,
)
from PIL import Image
from safetensors.numpy import load_file, save_file

from devtools import ROOT
from devtools.workflows import FOLDER, load_workflow, node_id

EXAMPLES = ("sd15-two-loras-blade", "sd15-lora-stack-blade")
CONTROL_EXAMPLES = ("sd15-controlnet-blade", "sd15-controlnets-loras-blade")
BOTH_FORMS = sorted(path.stem for path in FOLDER.parent.glob("*.json"))
SEED = 6000

LORAS = {"blindbox_v1_mix.safetensors": 0.8, "MoXinV1.safetensors": 0.6}
"""The examples' files, with their strengths."""


@pytest.fixture(scope="module", autouse=True)
def controlnets(base_directory: Path, host_path: Path) -> None:
    place_control_files(base_directory, host_path)


@pytest.fixture(scope="module", autouse=True)
def loras(models: dict[str, Path]) -> None:
    """Write the examples' LoRAs, which change UNet and text encoder."""
    shapes = {key: tensor.shape for key, tensor in load_file(models["sd15-lora"]).items()}
    layer = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    shapes |= {f"{layer}.lora_up.weight": (768, 8), f"{layer}.lora_down.weight": (8, 768)}
    for seed, name in enumerate(LORAS):
        random = numpy.random.default_rng(seed)
        tensors = {
            key: random.normal(0, 0.1, shape).astype("f4") if shape else numpy.ones((), "f4")
            for key, shape in shapes.items()
        }
        save_file(tensors, models["sd15-lora"].with_name(name))


def widgets(definition: dict[str, Any]) -> dict[str, Any]:
    """Name to options of a node's fields, in the order in which the interface saves them."""
    fields = definition["input"]["required"] | definition["input"].get("optional", {})
    return {
        name: spec[1] if len(spec) > 1 else {}
        for name, spec in fields.items()
        if isinstance(spec[0], list) or spec[0] in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
    }


def test_server_serves_the_extension(runner: Runner) -> None:
    path = "/extensions/blade/fused_lora.js"
    assert path in runner.client.get_json("/extensions")
    answer = requests.get(runner.client.url + path, timeout=30)
    assert "javascript" in answer.headers["Content-Type"]
    assert answer.content == (ROOT / "web" / "fused_lora.js").read_bytes()


def test_rows_are_what_the_extension_takes_them_for(runner: Runner) -> None:
    """It reads rows off the names of the fields, and the file off a row's first field."""
    definition = runner.client.object_info("BladeFusedLoRA")
    row = ("lora", "strength_model", "strength_clip", "enabled")
    rows = [f"{name}_{number}" for number in range(1, 9) for name in row]
    assert list(widgets(definition)) == ["on_failure", *rows]
    for number in range(1, 9):
        names, options = definition["input"]["optional"][f"lora_{number}"]
        assert options["default"] == names[0] == "None"
        assert set(LORAS) <= set(names)


@pytest.mark.parametrize("name", BOTH_FORMS)
def test_both_forms_of_an_example_say_the_same(runner: Runner, name: str) -> None:
    """In the values of all nodes and in what they are wired to; node ids may differ."""
    api = {
        id: node for id, node in load_workflow(name).items() if node["class_type"] != "SaveLatent"
    }
    drawn = json.loads((FOLDER.parent / f"{name}.json").read_text(encoding="utf-8"))
    classes = {node["id"]: node["type"] for node in drawn["nodes"]}
    links = {link[0]: (classes[link[1]], link[2]) for link in drawn["links"]}
    for class_type in {node["class_type"] for node in api.values()}:
        fields = widgets(runner.client.object_info(class_type))
        defaults = {
            key: options["default"] for key, options in fields.items() if "default" in options
        }
        expected = [
            defaults
            | {
                key: (api[value[0]]["class_type"], value[1]) if isinstance(value, list) else value
                for key, value in node["inputs"].items()
            }
            for node in api.values()
            if node["class_type"] == class_type
        ]
        names = list(fields)
        if "seed" in names:  # the interface has a field of its own there
            names.insert(names.index("seed") + 1, "control_after_generate")
        found = [
            # Fields that a node got since then are not saved.
            defaults
            | dict(zip(names, node["widgets_values"], strict=False))
            | {wire["name"]: links[wire["link"]] for wire in node["inputs"] if wire["link"]}
            for node in drawn["nodes"]
            if node["type"] == class_type
        ]
        for values in found:
            values.pop("control_after_generate", None)
        assert found == expected, class_type


@pytest.fixture(scope="module")
def expected(runner: Runner) -> numpy.ndarray:
    """The latent of stock loaders, in which both LoRAs tell."""
    nodes = example(runner, EXAMPLES[0], SEED)
    latent = runner.ok(as_stock(nodes, LORAS)).latent
    for name, strength in LORAS.items():
        alone = runner.ok(as_stock(nodes, {name: strength})).latent
        assert difference(alone, latent) > CLEAR
    return latent


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_gives_what_stock_loaders_give(
    runner: Runner, expected: numpy.ndarray, name: str
) -> None:
    run = runner.ok(example(runner, name, SEED))
    assert difference(run.latent, expected) <= TOLERANCE
    assert run.counted["blocks_eager"] == 0
    report = run.text("BladeReport")
    assert [name for name in LORAS if f"LoRA {name} " in report] == list(LORAS)


@pytest.mark.parametrize("name", CONTROL_EXAMPLES)
def test_example_gives_what_stock_controlnets_give(runner: Runner, name: str) -> None:
    nodes = example(runner, name, SEED + 2)
    loras = LORAS if "loras" in name else {}
    stock = as_stock(nodes, loras)
    expected = runner.ok(stock).latent
    applied = [id for id, node in stock.items() if node["class_type"] == "ControlNetApplyAdvanced"]
    for id in applied:
        without = deepcopy(stock)
        without[id]["inputs"]["strength"] = 0.0
        assert difference(runner.ok(without).latent, expected) > CLEAR
    run = runner.ok(nodes)
    assert difference(run.latent, expected) <= TOLERANCE
    assert run.counted["blocks_eager"] == 0
    assert run.counted["control_runs"] == run.counted["hint_embeddings"] == len(applied)
    report = run.text("BladeReport")
    headings = re.findall(r"^ControlNet(?: \d of \d)? \(backend eager", report, re.MULTILINE)
    assert len(headings) == len(applied)
    assert [name for name in loras if f"LoRA {name} " in report] == list(loras)


def sweep(runner: Runner, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "style_sweep.py"), "--server", runner.client.url]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True)


def test_style_sweep_makes_an_image_for_each_combination(runner: Runner, tmp_path: Path) -> None:
    short = tmp_path / "short.json"
    short.write_text(json.dumps(example(runner, EXAMPLES[0], SEED + 1)))
    loras = list(reversed(LORAS))
    before = set(runner.client.get_json("/history"))
    done = sweep(
        runner,
        "--workflow",
        short,
        "--loras",
        *loras,
        "--strengths",
        "0",
        "0.75",
        "--save",
        tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")

    history = runner.client.get_json("/history")
    prompts = [entry["prompt"][2] for id, entry in history.items() if id not in before]
    rows = [prompt[node_id(prompt, "BladeFusedLoRA")]["inputs"] for prompt in prompts]
    assert all([row["lora_1"], row["lora_2"], row["lora_3"]] == [*loras, "None"] for row in rows)
    combinations = list(itertools.product((0, 0.75), repeat=2))
    for kind in ("model", "clip"):
        used = [(row[f"strength_{kind}_1"], row[f"strength_{kind}_2"]) for row in rows]
        assert used == combinations

    pictures = set()
    for line, (first, second) in zip(done.stdout.splitlines(), combinations, strict=True):
        name = f"MoXinV1 {first:g}, blindbox_v1_mix {second:g}"
        assert line.startswith(f"{name}: ")
        with Image.open(io.BytesIO((tmp_path / f"{name}.png").read_bytes())) as image:
            assert image.size == (64, 64)
            pictures.add(image.tobytes())
    assert len(pictures) == len(combinations)


def test_style_sweep_says_what_the_server_refuses(runner: Runner) -> None:
    done = sweep(runner, "--checkpoint", runner.models["sd15"].name, "--loras", "missing.st")
    assert done.returncode == 1
    assert "lora_1: 'missing.st' not in" in done.stderr


def test_style_sweep_says_that_no_server_answers(runner: Runner) -> None:
    done = sweep(runner, "--server", "http://127.0.0.1:9")
    assert done.returncode == 1
    assert done.stderr.startswith("No ComfyUI answers at http://127.0.0.1:9 ")
    assert "Traceback" not in done.stderr
