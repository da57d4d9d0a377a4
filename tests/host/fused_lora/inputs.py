"""A model and a text encoder that no bad file may change."""

from pathlib import Path
from typing import Any

import pytest
from blade_tests.host.lora_files import Row, fuse, loaded, make, make_clip, same

from blade.blade_core.errors import BladeError, LoraError


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


def refused(inputs: Inputs, name: str, on_failure: str = "fallback") -> str:
    """The message with which a node refuses `name` between two sound files."""
    rows = [inputs.sound, (name, 0.7, 0.6), inputs.sound]
    for stack, own in ((None, rows), (rows, [])):
        with pytest.raises(LoraError) as caught:
            fuse(inputs.model, own, inputs.clip, stack=stack, on_failure=on_failure)
        assert isinstance(caught.value, BladeError)
        inputs.assert_unchanged()
    return str(caught.value)
