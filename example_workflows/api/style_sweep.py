#!/usr/bin/env python3
"""Make one image for every combination of LoRA strengths, through the API of a running ComfyUI.

    python style_sweep.py --loras ink.safetensors clay.safetensors --strengths 0 0.5 1

queues sd15-two-loras-blade.json nine times with nothing changed but the strengths, which Blade
writes into the weights in milliseconds. Needs nothing but Python.
"""

import argparse
import itertools
import json
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

WORKFLOW = Path(__file__).with_name("sd15-two-loras-blade.json")
ROWS = 8
"""How many LoRAs a BladeFusedLoRA node takes."""


def main() -> int:
    """Parse the command line and return the exit code of the sweep."""
    options = parse()
    try:
        workflow = read(options.workflow)
        if options.checkpoint:
            inputs_of(workflow, "CheckpointLoaderSimple")["ckpt_name"] = options.checkpoint
        node = inputs_of(workflow, "BladeFusedLoRA")
        rows = [f"lora_{number}" for number in range(1, ROWS + 1)]
        loras = options.loras or [node[row] for row in rows if row in node]
        for strengths in itertools.product(options.strengths, repeat=len(loras)):
            set_rows(node, loras, strengths)
            seconds, images = run(options.server, workflow)
            values = [f"{Path(lora).stem} {s:g}" for lora, s in zip(loras, strengths, strict=True)]
            print(f"{', '.join(values)}: {seconds:.2f} s, {' '.join(map(path_of, images))}")
            if options.save:
                save(options.server, images, options.save / ", ".join(values))
    except SweepError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--server", default="http://127.0.0.1:8188", help="default: %(default)s")
    parser.add_argument(
        "--workflow", type=Path, default=WORKFLOW, help="in API format, with one BladeFusedLoRA"
    )
    parser.add_argument("--checkpoint", help="file name, as the loader shows it")
    parser.add_argument("--loras", nargs="+", help="file names, as the node shows them")
    parser.add_argument("--strengths", nargs="+", type=float, default=[0.0, 0.5, 1.0])
    parser.add_argument("--save", type=Path, help="folder to save the images to, as well")
    options = parser.parse_args()
    if options.loras and len(options.loras) > ROWS:
        parser.error(f"--loras takes up to {ROWS} files")
    return options


class SweepError(Exception):
    """Why the sweep ended early."""


def read(path: Path) -> dict[str, Any]:
    """The nodes of a workflow in API format, by id."""
    try:
        workflow = json.loads(path.read_text(encoding="utf-8"))
        assert all("class_type" in node and "inputs" in node for node in workflow.values())
    except OSError as error:
        raise SweepError(f"The workflow cannot be read: {error}") from error
    except (ValueError, AttributeError, TypeError, AssertionError) as error:
        raise SweepError(
            f"{path} is no workflow in API format. Save it in ComfyUI by Export (API)."
        ) from error
    return workflow


def inputs_of(workflow: dict[str, Any], class_type: str) -> dict[str, Any]:
    """The inputs of the one node of a class."""
    nodes = [node for node in workflow.values() if node["class_type"] == class_type]
    if len(nodes) != 1:
        raise SweepError(f"The workflow has {len(nodes)} nodes {class_type}; expected one.")
    return nodes[0]["inputs"]


def set_rows(node: dict[str, Any], loras: list[str], strengths: tuple[float, ...]) -> None:
    """Have these rows and no others in use."""
    for number in range(1, ROWS + 1):
        node[f"lora_{number}"] = "None"
    for number, (lora, strength) in enumerate(zip(loras, strengths, strict=True), 1):
        node[f"lora_{number}"] = lora
        node[f"strength_model_{number}"] = node[f"strength_clip_{number}"] = strength
        node[f"enabled_{number}"] = True


def run(server: str, workflow: dict[str, Any]) -> tuple[float, list[dict[str, str]]]:
    """Run a workflow; return the seconds it took and the images it saved."""
    prompt_id = json.loads(request(server, "/prompt", {"prompt": workflow}))["prompt_id"]
    while not (history := json.loads(request(server, f"/history/{prompt_id}"))):
        time.sleep(0.2)
    entry = history[prompt_id]
    messages = dict(entry["status"]["messages"])
    if "execution_success" not in messages:
        failed = messages.get("execution_error", {})
        raise SweepError(f"The prompt failed: {failed.get('exception_message', 'interrupted')}")
    times = [messages[name]["timestamp"] for name in ("execution_start", "execution_success")]
    outputs = entry["outputs"].values()
    images = [image for output in outputs for image in output.get("images", [])]
    return (times[1] - times[0]) / 1000, images


def save(server: str, images: list[dict[str, str]], name: Path) -> None:
    """Download images as `name`.png, numbered from the second on."""
    name.parent.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images, 1):
        end = f" {number}.png" if number > 1 else ".png"
        data = request(server, f"/view?{urllib.parse.urlencode(image)}")
        name.with_name(name.name + end).write_bytes(data)


def path_of(image: dict[str, str]) -> str:
    """Where an image is, in the server's output folder."""
    return f"{image['subfolder']}/{image['filename']}".lstrip("/")


def request(server: str, path: str, body: Any = None) -> bytes:
    """GET, or POST `body` as JSON."""
    data = None if body is None else json.dumps(body).encode()
    url = server.rstrip("/") + path
    headers = {"Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        raise SweepError(f"The server refused {path}: {error.read().decode()}") from error
    except urllib.error.URLError as error:
        raise SweepError(f"No ComfyUI answers at {server} ({error.reason}).") from error


if __name__ == "__main__":
    sys.exit(main())
