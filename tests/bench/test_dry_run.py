"""The whole benchmark on tiny models: every kind of scenario, through the real host."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.rows import FROM_RUN, ROOT, empty
from devtools.host import check_host, default_host_path

SCENARIOS = (
    "sd15-512-b1",
    "sd15-512-b1-cn1",
    "sd15-512-b1-s20-lora9",
    "lora-switch-sd15-2",
    "lora-strength-sd15-2",
    "lora-cold-sd15-1",
    "vae-512-b1",
    "vae-512-b4",
)
SYSTEMS = ("eager", "blade-traced-fast")
WHERE_APPLIES = [(s, x) for s in SCENARIOS for x in SYSTEMS]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("bench")
    host = check_host(Path(os.environ.get("BLADE_COMFY") or default_host_path()))
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--dry-run"]
    command += ["--comfy", str(host), "--out", str(folder)]
    command += ["--scenarios", ",".join(SCENARIOS), "--systems", ",".join(SYSTEMS)]
    # As in an image for containers that keeps its files few.
    bytecode = str(tmp_path_factory.mktemp("bytecode"))
    variables = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": bytecode}
    done = subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = folder.glob("*.jsonl")
    found = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {(row["scenario"], row["system"]): row for row in found}


def test_there_is_a_row_for_every_scenario_and_system(
    rows: dict[tuple[str, str], dict[str, Any]],
) -> None:
    assert sorted(rows) == sorted(WHERE_APPLIES)
    assert len({row["run"] for row in rows.values()}) == 1
    for row in rows.values():
        assert set(row) == {*empty("", ""), *FROM_RUN}
        assert row["error"] is None and row["warnings"] is None
        assert row["dry_run"] and row["gpu"] == "CPU"
        assert row["bytecode"]


def test_rows_hold_what_their_kind_measures(
    rows: dict[tuple[str, str], dict[str, Any]],
) -> None:
    image = ("step_ms", "step_kernel_ms", "host_ms", "first_image_s", "image_s", "tflop_per_step")
    times = ("chain_ms", "switch_ms", "worst_switch_ms", "step_ms", "switched_step_ms")
    switch = (*times, "switched_image_s", "warm_first_image_s", "touched_mib")
    decode = ("step_ms", "step_kernel_ms", "tflop_per_step", "peak_share")
    for (scenario, _), row in rows.items():
        if scenario.startswith("lora"):
            fields: tuple[str, ...] = switch
            fields += ("read_ms",) if "cold" in scenario else ()
            parts = row["chain_ms"] + row["switch_ms"]
            assert row["total_switch_ms"] == pytest.approx(parts) and row["switches"] >= 3
        elif scenario.startswith("vae"):
            fields = decode
        else:
            fields = image if "-s20" not in scenario else ("step_ms", "image_s")
        assert all(row[field] > 0 for field in fields), (scenario, fields)


def test_every_process_measures_the_same_thing(
    rows: dict[tuple[str, str], dict[str, Any]],
) -> None:
    """The same weights, LoRAs, ControlNets and noise: latents differ by rounding."""
    for (_, system), row in rows.items():
        assert row["rel_rms"] == 0.0 if system == "eager" else row["rel_rms"] < 1e-3


def test_a_switch_leaves_the_weights_that_the_files_say(
    rows: dict[tuple[str, str], dict[str, Any]],
) -> None:
    """In fp32, as they are here. A strength that is wrong by a hundredth is off by 1e-3."""
    switches = {key: row for key, row in rows.items() if key[0].startswith("lora")}
    assert len(switches) == 6
    for (_, system), row in switches.items():
        assert row["weights_rel_rms"] < 1e-6
        counted = 0 if system.startswith("blade") else None
        assert row["switch_graphs"] == row["switch_captures"] == counted
        assert row["switch_captures_dropped"] == counted


def test_blade_says_what_it_did(rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    first = rows["sd15-512-b1", "blade-traced-fast"]
    assert first["cold"] and first["graphs"] > 0 and first["blocks_eager"] == 0
    later = rows["sd15-512-b1-s20-lora9", "blade-traced-fast"]
    assert not later["cold"] and later["graphs"] == 0
    assert rows["sd15-512-b1", "eager"]["graphs"] is None
    decode = rows["vae-512-b1", "blade-traced-fast"]
    assert decode["cold"] and decode["graphs"] > 0 and decode["blocks_eager"] == 0
    assert decode["captures"] == decode["replays"] == 0


def test_without_a_gpu_the_dry_run_is_named(tmp_path: Path) -> None:
    host = check_host(Path(os.environ.get("BLADE_COMFY") or default_host_path()))
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--comfy", str(host)]
    command += ["--out", str(tmp_path)]
    variables = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert done.returncode == 2
    assert "--dry-run" in done.stdout
    assert list(tmp_path.iterdir()) == []
