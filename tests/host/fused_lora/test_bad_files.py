"""Files and names that BladeFusedLoRA must refuse."""

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from blade_tests.host.fused_lora.inputs import Inputs, refused
from blade_tests.host.lora_files import (
    LoraFile,
    assert_near,
    changed,
    expected,
    fuse,
    loaded,
    make,
    make_clip,
)
from blade_tests.host.tiny import SDXL, make_model, sample

from blade.blade_core.errors import BladeError, LoraError
from blade.blade_core.host.model import Session

WEIGHTS = 1e-6
BOTH = pytest.mark.parametrize("on_failure", ["error", "fallback"])


@BOTH
def test_a_missing_file(inputs: Inputs, on_failure: str) -> None:
    assert "nowhere.safetensors" in refused(inputs, "nowhere.safetensors", on_failure)


def test_a_file_that_was_deleted(inputs: Inputs, folder: Path) -> None:
    """It is in memory still, but a prompt that names it would fail after a restart."""
    name = make(inputs.model, seed=2).save(folder, "deleted")
    fuse(inputs.model, [(name, 1.0, 1.0)])
    (folder / name).unlink()
    assert name in refused(inputs, name)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "sub/../../secret.safetensors",
        "..\\secret.safetensors",
        "{absolute}",
        "./../loras/../secret.safetensors",
        "..",
        "sub",
    ],
)
def test_a_name_that_leaves_the_folder(inputs: Inputs, folder: Path, name: str) -> None:
    """Refused, even where the host would cut the name down to one of a file that is there."""
    outside = folder.parent / "secret.safetensors"
    below = folder / outside.parent.relative_to("/")
    below.mkdir(parents=True)
    (folder / "sub").mkdir()
    for place in (outside.parent, folder, below):
        make(inputs.model, seed=2).save(place, "secret")
    name = name.format(absolute=outside)
    assert repr(name) in refused(inputs, name)


def test_a_name_in_a_folder_below(inputs: Inputs, folder: Path) -> None:
    below = folder / "style" / "old"
    below.mkdir(parents=True)
    make(inputs.model, inputs.clip, seed=2).save(below, "below")
    name = os.path.join("style", "old", "below.safetensors")
    model = fuse(inputs.model, [(name, 1.0, 1.0)], inputs.clip)[0]
    assert changed(loaded(model), loaded(inputs.model))


def header(entries: Any, data: bytes = bytes(64)) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


UP, DOWN = "lora_unet_conv_in.lora_up.weight", "lora_unet_conv_in.lora_down.weight"
HOSTILE = {
    "empty": b"",
    "a few bytes": b"\x08\x00\x00",
    "zeros": bytes(4096),
    "a huge header": struct.pack("<Q", 2**62) + b"{}",
    "a header beyond its end": struct.pack("<Q", 10**6) + b"{}",
    "no JSON": header(b'{"' + b"\xff" * 30),
    "deep JSON": header(b"[" * 10**5),
    "a list": header([1, 2]),
    "overlapping": header({UP: entry(0, 64, [4, 4]), DOWN: entry(32, 64, [2, 4])}),
    "a hole": header({UP: entry(0, 16, [2, 2]), DOWN: entry(32, 64, [2, 4])}),
    "offsets beyond its end": header({UP: entry(0, 2**40, [2**19, 2**19])}),
    "negative offsets": header({UP: entry(-64, 0, [4, 4])}),
    "another size than its shape": header({UP: entry(0, 64, [4, 5])}),
    "an unknown dtype": header({UP: entry(0, 64, [4, 4], dtype="EVIL")}),
    "a shape that overflows": header({UP: entry(0, 64, [2**32, 2**32, 2**32])}),
    "a web page": b"<!DOCTYPE html><html><body>404</body></html>" * 50,
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_hostile_file(inputs: Inputs, folder: Path, name: str, suffix: str) -> None:
    (folder / f"{name}{suffix}").write_bytes(HOSTILE[name])
    message = refused(inputs, f"{name}{suffix}")
    assert f"{name}{suffix}" in message and "cannot be read" in message


@pytest.mark.parametrize("share", [0.0005, 0.5, 0.999])
def test_a_truncated_file(inputs: Inputs, folder: Path, share: float) -> None:
    whole = (folder / make(inputs.model, seed=3).save(folder, "cut")).read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: int(share * len(whole))])
    assert "cut.safetensors" in refused(inputs, "cut.safetensors")


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin", ".safetensors"])
@pytest.mark.parametrize("plain", [True, False], ids=["pickle", "torch.save"])
def test_a_pickle_that_runs_code(inputs: Inputs, folder: Path, suffix: str, plain: bool) -> None:
    evil, path = Malicious(folder / "executed"), folder / f"evil{suffix}"
    contents = {UP: torch.ones(4, 4), DOWN: evil}
    path.write_bytes(pickle.dumps(contents, protocol=2))
    if not plain:
        torch.save(contents, path)
    message = refused(inputs, f"evil{suffix}")
    assert f"evil{suffix}" in message and "weights_only" not in message  # no advice to run it
    assert not evil.path.exists()
    evil.__reduce__()[0](*evil.__reduce__()[1])  # it would have worked
    assert evil.path.exists()


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin"])
def test_a_pickle_of_tensors(inputs: Inputs, folder: Path, suffix: str) -> None:
    file, name = make(inputs.model, inputs.clip, seed=4), f"tensors{suffix}"
    torch.save({"state_dict": file.tensors} if suffix == ".ckpt" else file.tensors, folder / name)
    for part, model in enumerate(fuse(inputs.model, [(name, 0.8, -0.6)], inputs.clip)[:2]):
        before = loaded((inputs.model, inputs.clip)[part])
        after = loaded(model)
        assert changed(after, before)
        assert_near(after, expected(before, [(file, (0.8, -0.6)[part])]), WEIGHTS)


@pytest.mark.parametrize("contents", [[], [torch.ones(2, 2)], {"a": 1}, {}, torch.ones(2), 7])
def test_a_checkpoint_of_something_else(inputs: Inputs, folder: Path, contents: Any) -> None:
    torch.save(contents, folder / "thing.pt")
    assert "thing.pt" in refused(inputs, "thing.pt")


FLUX = "transformer.single_transformer_blocks.0.attn.to_q"


@BOTH
def test_a_lora_of_another_architecture(inputs: Inputs, folder: Path, on_failure: str) -> None:
    tensors = {
        f"{FLUX}.lora_A.weight": torch.ones(4, 64),
        f"{FLUX}.lora_B.weight": torch.ones(64, 4),
    }
    LoraFile(tensors, {}).save(folder, "flux")
    message = refused(inputs, "flux.safetensors", on_failure)
    assert "flux.safetensors" in message and FLUX in message  # what was seen
    assert "expected" in message and "kohya" in message and "diffusers" in message


@BOTH
def test_no_tensors_at_all(inputs: Inputs, folder: Path, on_failure: str) -> None:
    LoraFile({}, {}).save(folder, "nothing")
    assert "nothing.safetensors" in refused(inputs, "nothing.safetensors", on_failure)


@BOTH
def test_the_right_names_in_other_shapes_only(
    inputs: Inputs, folder: Path, on_failure: str
) -> None:
    """As an SD2 LoRA on SD1.5: nothing fits, whatever the names say."""
    file = make(inputs.model, seed=5, only="attn2.to_k")
    for name in [name for name in file.tensors if name.endswith("lora_down.weight")]:
        file.tensors[name] = torch.ones(8, 47)
    file.save(folder, "wide")
    assert "wide.safetensors" in refused(inputs, "wide.safetensors", on_failure)


def test_sdxl_on_sd15(inputs: Inputs, folder: Path) -> None:
    """Some names exist in both; whatever fits by accident, nothing else may break."""
    make(make_model(SDXL), make_clip(xl=True), naming="kohya xl", seed=6).save(folder, "xl")
    assert "xl.safetensors" in refused(inputs, "xl.safetensors", "error")


@pytest.mark.parametrize("stack", [[1], "sound.safetensors", [("a", 1.0)], [("a", "x", 1.0)], 5])
def test_a_stack_that_is_none(inputs: Inputs, stack: Any) -> None:
    with pytest.raises(LoraError, match="lora_stack"):
        fuse(inputs.model, [inputs.sound], inputs.clip, stack=stack)
    inputs.assert_unchanged()


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), -float("inf")])
def test_a_strength_that_is_no_number(inputs: Inputs, strength: float) -> None:
    name = inputs.sound[0]
    with pytest.raises(LoraError, match=f"{name}.*{strength}"):
        fuse(inputs.model, [], inputs.clip, stack=[(name, 1.0, strength)])
    with pytest.raises(LoraError, match=f"{name}.*{strength}"):
        fuse(inputs.model, [(name, strength, 1.0)], inputs.clip)
    inputs.assert_unchanged()


def test_an_unknown_choice(inputs: Inputs) -> None:
    with pytest.raises(BladeError, match="on_failure"):
        fuse(inputs.model, [inputs.sound], inputs.clip, on_failure="ignore")


def test_a_failure_leaves_an_image_as_it_was(
    session: Session, inputs: Inputs, folder: Path
) -> None:
    before = sample(inputs.model)
    (folder / "bad.safetensors").write_bytes(HOSTILE["overlapping"])
    refused(inputs, "bad.safetensors")
    assert torch.equal(sample(inputs.model), before)
