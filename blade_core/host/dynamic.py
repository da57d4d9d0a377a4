"""Models under dynamic VRAM, the default on NVIDIA since ComfyUI 0.16.

Their weights are pages that the host fills while a layer runs; a graph cannot wait for that.
The host offers a non-dynamic twin of such a model, but reloads the checkpoint for each: so one
twin is kept per base model, as long as that model lives.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from ..errors import BladeError
from .weights import HOST_STATE

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


_patchers: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""The model of a ControlNet or a VAE -> the patcher of its twin."""


def non_dynamic_control_model(control: Any) -> tuple[nn.Module, ModelPatcher]:
    """The model of a ControlNet and the patcher that loads it, the classic way."""
    return _twin(control.control_model, control.control_model_wrapped)


def non_dynamic_vae(vae: Any) -> tuple[nn.Module, ModelPatcher]:
    """The model of a VAE and the patcher that loads it, the classic way."""
    return _twin(vae.first_stage_model, vae.patcher, vae.vae_dtype)


def _twin(
    model: nn.Module, patcher: Any, dtype: torch.dtype | None = None
) -> tuple[nn.Module, ModelPatcher]:
    """Under dynamic VRAM a twin over the same main memory: nothing is read again.

    dtype: what the host casts its weights to page by page, where that is not their own.
    """
    if not getattr(patcher, "is_dynamic", lambda: False)():
        return model, patcher
    twin = _patchers.get(model)
    if twin is not None and _attributes(model) != _attributes(twin.model):
        twin = None  # a pack has changed a layer since then
    if twin is None:
        twin = _patchers[model] = ModelPatcher(
            _without_pages(model).to(dtype=dtype), patcher.load_device, patcher.offload_device
        )
    if twin.patches != patcher.patches:
        twin = twin.clone()  # a VAE's LoRAs, say
        twin.patches = {key: list(each) for key, each in patcher.patches.items()}
        twin.patches_uuid = patcher.patches_uuid
    return twin.model, twin


def _without_pages(model: nn.Module) -> nn.Module:
    """A copy of `model` over the same tensors, without what dynamic VRAM keeps on it."""
    memo: dict[int, Any] = {
        id(t): nn.Parameter(t.data, requires_grad=False) if isinstance(t, nn.Parameter) else t
        for t in (*model.parameters(), *model.buffers())
    }
    kept = [
        (vars(m), {k: v for k, v in vars(m).items() if _is_of_pages(k)}) for m in model.modules()
    ]
    try:
        for own, pages in kept:
            for name in pages:
                del own[name]
        return copy.deepcopy(model, memo)
    finally:
        for own, pages in kept:
            own.update(pages)


def _is_of_pages(name: str) -> bool:
    return name in HOST_STATE or name.startswith(("dynamic_", "_v", "_prefetch", "_pin"))


def _attributes(model: nn.Module) -> list[dict[str, Any]]:
    """The settings of its layers: what the host counts on the model itself is none."""
    return [
        {k: v for k, v in vars(m).items() if _is_plain(v) and not _is_of_pages(k)}
        for m in [*model.modules()][1:]
    ]


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str))
