"""Files and names that BladeFusedLoRA must refuse, and files that are sound in part."""

import json
import logging
import os
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import folder_paths
import pytest
import torch
from blade_tests.host.lora_files import (
    SMALL,
    LoraFile,
    Row,
    additions,
    assert_near,
    changed,
    expected,
    fuse,
    loaded,
    make,
    make_clip,
    same,
)
from blade_tests.host.tiny import SDXL, make_model, sample

from blade.blade_core.errors import BladeError, LoraError
from blade.blade_core.host.model import Session, stats

WEIGHTS = 1e-6
BOTH = pytest.mark.parametrize("on_failure", ["error", "fallback"])


class Inputs:
    """A model and a text encoder with a LoRA each, and how they were."""

    def __init__(self, model: Any, folder: Path) -> None:
        clip = make_clip()
        make(model, clip, seed=1).save(folder, "sound")
        self.sound: Row = ("sound.safetensors", 0.5, 0.5)
        self.model, self.clip, _ = fuse(model, [self.sound], clip)
        self._patchers = (self.model, self.clip.patcher, model, clip.patcher)
        self._before = [self._look(patcher) for patcher in self._patchers]
        self._weights = loaded(self.model), loaded(self.clip)

    def _look(self, patcher: Any) -> Any:
        patches = {key: list(map(id, those)) for key, those in patcher.patches.items()}
        return type(patcher), patcher.patches_uuid, patches, dict(patcher.attachments)

    def assert_unchanged(self) -> None:
        assert [self._look(patcher) for patcher in self._patchers] == self._before
        assert same(loaded(self.model), self._weights[0])
        assert same(loaded(self.clip), self._weights[1])


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Inputs]]:
    folder = tmp_path_factory.mktemp("loras")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(folder)], {""}))
        yield folder, Inputs(make_model(SMALL), folder)
    comfy.model_management.unload_all_models()


@pytest.fixture
def folder(shared: tuple[Path, Inputs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of ComfyUI's for this test alone, beside that of the sound file."""
    own = tmp_path / "loras"
    own.mkdir()
    folders = ([str(own), str(shared[0])], folder_paths.supported_pt_extensions)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", folders)
    return own


@pytest.fixture
def inputs(shared: tuple[Path, Inputs], folder: Path) -> Inputs:
    return shared[1]


def refused(inputs: Inputs, name: str, on_failure: str = "fallback") -> str:
    """The message with which a node refuses `name` between two sound files."""
    rows = [inputs.sound, (name, 0.7, 0.6), inputs.sound]
    for stack, own in ((None, rows), (rows, [])):
        with pytest.raises(LoraError) as caught:
            fuse(inputs.model, own, inputs.clip, stack=stack, on_failure=on_failure)
        assert isinstance(caught.value, BladeError)
        inputs.assert_unchanged()
    return str(caught.value)


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


@pytest.mark.parametrize("stack", [[1], "sound.safetensors", [("a", 1.0)], [("a", "x", 1.0)], 5])
def test_a_stack_that_is_none(inputs: Inputs, stack: Any) -> None:
    with pytest.raises(LoraError, match="lora_stack"):
        fuse(inputs.model, [inputs.sound], inputs.clip, stack=stack)
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
