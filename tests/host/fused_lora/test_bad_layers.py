"""Layers of a file that are bad: named, and the rest applied, or the file refused."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from blade_tests.host.fused_lora.inputs import Inputs, refused
from blade_tests.host.lora_files import (
    LoraFile,
    additions,
    assert_near,
    changed,
    expected,
    fuse,
    loaded,
    make,
)

from blade.blade_core.errors import LoraError
from blade.blade_core.host.model import stats

WEIGHTS = 1e-6
BOTH = pytest.mark.parametrize("on_failure", ["error", "fallback"])


def broken(
    inputs: Inputs, kind: str, change: Callable[[torch.Tensor], torch.Tensor], suffix: str
) -> tuple[LoraFile, str]:
    """A file of which one layer is changed, and the weight that this layer means."""
    file = make(inputs.model, inputs.clip, kinds=(kind,), only="attn2.to_", seed=7)
    name = next(name for name in file.tensors if name.endswith(suffix))
    file.tensors[name] = change(file.tensors[name])
    return file, file.targets[name.removesuffix(suffix)][0]


def with_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return change


def wider(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor[..., :1]], dim=-1)


NAN, INF = float("nan"), float("inf")
BROKEN: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor], str]] = {
    "NaN in up": ("lora", with_value(NAN), ".lora_up.weight"),
    "infinity in down": ("lora", with_value(INF), ".lora_down.weight"),
    "minus infinity in down": ("lora", with_value(-INF), ".lora_down.weight"),
    "NaN as alpha": ("lora", with_value(NAN), ".alpha"),
    "infinity as alpha": ("loha", with_value(INF), ".alpha"),
    "NaN in LoHa": ("loha", with_value(NAN), ".hada_w2_b"),
    "NaN in LoKr": ("lokr", with_value(NAN), ".lokr_w1"),
    "NaN in a difference": ("diff", with_value(NAN), ".diff"),
    "NaN in DoRA's scale": ("dora", with_value(NAN), ".dora_scale"),
    "NaN in OFT": ("oft", with_value(NAN), ".oft_blocks"),
    "NaN in GLoRA": ("glora", with_value(NAN), ".b1.weight"),
    "NaN in a new weight": ("set", with_value(NAN), ".set_weight"),
    "a wide down": ("lora", wider, ".lora_down.weight"),
    "another rank": ("lora", wider, ".lora_up.weight"),
    "a wide LoHa": ("loha", wider, ".hada_w1_b"),
    "a wide LoKr": ("lokr", wider, ".lokr_w2"),
    "a wide difference": ("diff", wider, ".diff"),
    "a wide DoRA": ("dora", wider, ".lora_down.weight"),
    "a wide new weight": ("set", wider, ".set_weight"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_layer_under_error(inputs: Inputs, folder: Path, what: str) -> None:
    file, key = broken(inputs, *BROKEN[what])
    message = refused(inputs, file.save(folder, "broken"), "error")
    assert "broken.safetensors" in message and key in message
    if "NaN" in what or "infinity" in what:
        assert "NaN" in message


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_layer_under_fallback(
    inputs: Inputs, folder: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    """All other layers are applied; this one is named in the log and in the report."""
    file, key = broken(inputs, *BROKEN[what])
    name = file.save(folder, "broken")
    before = loaded(inputs.model)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "blade"):
        model = fuse(inputs.model, [(name, 0.7, 0.6)], inputs.clip, on_failure="fallback")[0]
    said = [record.getMessage() for record in caplog.records if record.name == "blade"]
    assert any("broken.safetensors" in text and key in text for text in said)
    after = loaded(model)
    assert all(weight.isfinite().all() for weight in after.values())
    targets = {target for target, _ in file.targets.values() if target in before}
    assert len(targets) > 5 and changed(after, before) == targets - {key}
    rows = stats(model)["loras"]["rows"]
    assert key in str(rows[-1]["skipped"]) and not rows[0]["skipped"]
    inputs.assert_unchanged()
    if BROKEN[what][0] in ("lora", "loha", "lokr", "diff"):
        sound = file._replace(targets={k: v for k, v in file.targets.items() if v[0] != key})
        assert additions(sound).keys() & before.keys() == targets - {key}
        assert_near(after, expected(before, [(sound, 0.7)]), WEIGHTS)


@BOTH
def test_a_half_of_a_pair(inputs: Inputs, folder: Path, on_failure: str) -> None:
    """One of two factors is missing, as an interrupted conversion leaves it."""
    file = make(inputs.model, inputs.clip, only="attn2.to_", seed=8)
    name = next(name for name in file.tensors if name.endswith(".lora_down.weight"))
    del file.tensors[name]
    assert "half.safetensors" in refused(inputs, file.save(folder, "half"), on_failure)


LAYER = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
UP_DOWN = {".lora_up.weight": torch.ones(32, 4), ".lora_down.weight": torch.ones(4, 32)}
RANK_0 = {".lora_up.weight": torch.ones(32, 0), ".lora_down.weight": torch.ones(0, 32)}
MALFORMED: dict[str, dict[str, torch.Tensor]] = {
    "two alphas": UP_DOWN | {".alpha": torch.ones(2)},
    "an empty alpha": UP_DOWN | {".alpha": torch.ones(0)},
    "rank 0": RANK_0,
    "rank 0 and alpha": RANK_0 | {".alpha": torch.tensor(4.0)},
    "half a LoKr": {".lokr_w1": torch.ones(4, 2)},
    "a quarter of a LoKr": {".lokr_w1_a": torch.ones(4, 4), ".lokr_w2": torch.ones(8, 16)},
    "factors without dimensions": {name: torch.tensor(1.0) for name in UP_DOWN},
}


@BOTH
@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_layer(inputs: Inputs, folder: Path, what: str, on_failure: str) -> None:
    """Whatever it does to the file, there is no other error than that which names the file."""
    file = make(inputs.model, only="attn2.to_", seed=9)
    file.tensors.update({LAYER + suffix: tensor for suffix, tensor in MALFORMED[what].items()})
    name = file.save(folder, "malformed")
    before = loaded(inputs.model)
    try:
        model = fuse(inputs.model, [(name, 0.7, 0.0)], on_failure=on_failure)[0]
    except LoraError as error:
        assert name in str(error)
        inputs.assert_unchanged()
    else:
        after = loaded(model)
        assert all(weight.isfinite().all() for weight in after.values())
        sound = {key for key, _ in file.targets.values()}
        assert sound <= changed(after, before)
