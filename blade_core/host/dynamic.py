"""Models under dynamic VRAM, the default on NVIDIA since ComfyUI 0.16.

Their weights are pages that the host fills while a layer runs; a graph cannot wait for that.
The host offers a non-dynamic twin of such a model, but reloads the checkpoint for each: so one
twin is kept per base model, as long as that model lives.
"""

from __future__ import annotations

import weakref
from typing import Any

from comfy.model_patcher import ModelPatcher

from ..errors import BladeError

_twins: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""BaseModel -> what ModelPatcher.get_clone_model_override returned for its twin."""


def non_dynamic_clone(model: ModelPatcher) -> ModelPatcher:
    """Return a clone of `model` whose weights are loaded the classic way.

    Raises:
        BladeError: the model came from a loader that cannot load it a second time.
    """
    if not getattr(model, "is_dynamic", lambda: False)():
        return model.clone()
    try:
        clone = model.clone(disable_dynamic=True, model_override=_twins.get(model.model))
    except RuntimeError as error:
        raise BladeError(
            f"Blade cannot take this model out of dynamic VRAM: {error} Load it with one of "
            "ComfyUI's own loaders, or start ComfyUI with --disable-dynamic-vram."
        ) from error
    _twins[model.model] = clone.get_clone_model_override()
    return clone
