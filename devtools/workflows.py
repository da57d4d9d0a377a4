"""Loads the example workflows and sets what differs between runs."""

import json
from typing import Any

from devtools import ROOT

FOLDER = ROOT / "example_workflows" / "api"


def load_workflow(
    name: str,
    *,
    checkpoint: str | None = None,
    width: int | None = None,
    height: int | None = None,
    batch: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
    backend: str | None = None,
) -> dict[str, Any]:
    """The example `name` (such as `sd15-txt2img-blade`) in API format; None keeps a value."""
    text = (FOLDER / f"{name}.json").read_text(encoding="utf-8")
    workflow: dict[str, Any] = json.loads(text)
    wanted: dict[str, dict[str, Any]] = {
        "CheckpointLoaderSimple": {"ckpt_name": checkpoint},
        "EmptyLatentImage": {"width": width, "height": height, "batch_size": batch},
        "KSampler": {"steps": steps, "seed": seed},
        "BladeControlNetApply": {"backend": backend},
        "BladeOptimizeModel": {"backend": backend},
    }
    for node in workflow.values():
        values = wanted.get(node["class_type"], {})
        node["inputs"] |= {key: value for key, value in values.items() if value is not None}
    return workflow


def node_id(workflow: dict[str, Any], class_type: str) -> str:
    """The id of the one node of a class."""
    (found,) = [key for key, node in workflow.items() if node["class_type"] == class_type]
    return str(found)
