"""ControlLora: a ControlNet stored as a low-rank difference from the base model's own encoder.

The host makes its model anew for each run and adds the product of the factors to each weight in
each call. Here the sums are made once a base, into a ControlNet that the host keeps like any
other, and written again in place when the base's LoRAs have changed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.ops
import torch
from comfy.cldm.cldm import ControlNet as ControlModel
from comfy.controlnet import ControlBase, ControlLora
from comfy.model_patcher import ModelPatcher
from torch import nn

from ..config import OptimizeConfig
from ..errors import ControlNetError
from ..log import warn_once
from .compiled_control import CompiledControlNet
from .control_proxy import Proxy, check_fits

_PARTS = frozenset({"up", "down", "weight", "bias"})
"""The tensors of a layer in a file, by the host's names."""
_HINT = "input_hint_block.0.weight"
_UNFINISHED = object()
"""The mark of a sum that is no one's until all of it is written."""

Weights = dict[str, torch.Tensor]
"""A ControlLora's file: whole weights by name, and factors as NAME.up and NAME.down."""

_Patch = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class _Sum:
    """The ControlNet that is the sum of one ControlLora and one base."""

    patcher: ModelPatcher
    dtype: torch.dtype
    loras: Any
    """The host's mark of the base's LoRAs that are in the sum."""


class Sums:
    """The sums of one ControlLora, for each base that is alive and was sampled with it."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._made: weakref.WeakKeyDictionary[nn.Module, _Sum] = weakref.WeakKeyDictionary()

    @property
    def patcher(self) -> ModelPatcher | None:
        """What the host is to load for a run; None if nobody can say before the base is known."""
        made = list(self._made.values())
        return made[0].patcher if len(made) == 1 else None

    def model(self, base: Any) -> nn.Module:
        """The sum with `base`, the host's BaseModel, which is loaded.

        Raises:
            ControlNetError: the file was made for another kind of model.
        """
        unet, loras = base.diffusion_model, base.current_weight_patches_uuid
        dtype = base.manual_cast_dtype or base.get_dtype()
        found, known = self._made.get(unet), self.patcher
        if found is None or found.dtype != dtype:
            model = self._build(base, dtype)
            _write(model, self._weights, base)
            device = comfy.model_management.get_torch_device()
            offload = comfy.model_management.unet_offload_device()
            patcher = ModelPatcher(model, load_device=device, offload_device=offload)
            found = self._made[unet] = _Sum(patcher, dtype, loras)
        elif found.loras != loras:
            found.loras = _UNFINISHED
            _write(found.patcher.model, self._weights, base)
            found.loras = loras
        if found.patcher is not known:
            # From now on the host counts it, and takes it off the GPU when it wants to.
            memory = comfy.model_management
            in_use = memory.loaded_models(only_currently_used=True)
            memory.load_models_gpu([*in_use, found.patcher])
        result: nn.Module = found.patcher.model
        return result

    def _build(self, base: Any, dtype: torch.dtype) -> nn.Module:
        config = {k: v for k, v in base.model_config.unet_config.items() if k != "out_channels"}
        config["hint_channels"] = self._weights[_HINT].shape[1]
        config |= {"dtype": dtype, "operations": comfy.ops.disable_weight_init}
        # Its weights come one by one, on the device.
        return ControlModel(**config, device="meta").requires_grad_(False).eval()


def _write(model: nn.Module, weights: Weights, base: Any) -> None:
    """Give `model` the sums; tensors that are there are written in place."""
    check_fits(model, base)
    modules, kind = dict(model.named_modules()), type(base.model_config).__name__
    for name in weights:
        layer, _, part = name.rpartition(".")
        if part in _PARTS and "__" not in name and layer not in modules:
            raise ControlNetError(
                f"This ControlLora does not fit the model: {kind} has no {layer}. Load one that "
                "was made for this kind of model."
            )
    device = comfy.model_management.get_torch_device()
    there, late = base.diffusion_model.state_dict(), _late_patches(base.diffusion_model)
    with torch.no_grad():
        for owner, name, full in _parameters(model):
            old = owner._parameters[name]
            assert old is not None
            new = _sum(full, weights, there, late, old.shape, device)
            if old.is_meta:
                owner._parameters[name] = nn.Parameter(new.to(old.dtype), requires_grad=False)
            else:
                old.data.copy_(new)


def _sum(
    name: str,
    weights: Weights,
    base: Weights,
    late: dict[str, list[_Patch]],
    shape: torch.Size,
    device: torch.device,
) -> torch.Tensor:
    whole = weights.get(name, base.get(name))
    if whole is None or whole.shape != shape:
        seen = "nothing" if whole is None else f"shape {tuple(whole.shape)}"
        raise ControlNetError(
            f"This ControlLora does not fit the model: for {name} there is {seen}, expected shape "
            f"{tuple(shape)}. Load one that was made for this kind of model."
        )
    # A copy always: it becomes a weight, whose memory is the ControlNet's own.
    total = whole.to(device=device, dtype=torch.float32, copy=True)
    for patch in late.get(name, ()) if name not in weights else ():
        total = patch(total)
    stem = name.removesuffix(".weight")
    up, down = weights.get(f"{stem}.up"), weights.get(f"{stem}.down")
    if stem == name or up is None or down is None:
        return total
    up, down = (t.to(device=device, dtype=torch.float32).flatten(1) for t in (up, down))
    if (up.shape[0], up.shape[1], down.shape[1]) != (shape[0], down.shape[0], shape[1:].numel()):
        raise ControlNetError(
            f"This ControlLora does not fit the model: the factors of {name} make "
            f"{up.shape[0]}x{down.shape[1]}, expected {shape[0]}x{shape[1:].numel()}. Load one "
            "that was made for this kind of model."
        )
    return total.add_((up @ down).view(shape))


def _late_patches(unet: nn.Module) -> dict[str, list[_Patch]]:
    """By the names of weights that the host keeps off the GPU: their LoRAs, which it applies in
    each call. (It forgets them for a ControlLora: it has the base's LoRAs where they fit.)"""
    found = {}
    for prefix, layer in unet.named_modules():
        for name in ("weight", "bias"):
            patches = [*getattr(layer, f"{name}_function", ())]
            newer = getattr(layer, f"{name}_lowvram_function", None)
            found[f"{prefix}.{name}"] = patches if newer is None else [*patches, newer]
    return found


def _parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    for prefix, module in model.named_modules():
        for name in module._parameters:
            if module._parameters[name] is not None:
                yield module, name, f"{prefix}.{name}" if prefix else name


_sums: weakref.WeakKeyDictionary[ControlLora, Sums] = weakref.WeakKeyDictionary()
"""The sums of each ControlLora that is loaded, by the object that its loader gave."""


class FusedControlLora(CompiledControlNet, ControlLora):
    """The host's ControlLora over its sum with the base."""

    _own: Sums
    _config: OptimizeConfig
    _node_id: str | None

    @classmethod
    def of(
        cls, control: ControlLora, config: OptimizeConfig, node_id: str | None
    ) -> FusedControlLora:
        """A copy of `control`; all copies share their sums."""
        if control not in _sums:
            _sums[control] = Sums(control.control_weights)
        return cls._take(control.copy(), _sums[control], config, node_id)

    @classmethod
    def _take(
        cls, control: Any, sums: Sums, config: OptimizeConfig, node_id: str | None
    ) -> FusedControlLora:
        control.__class__ = cls  # the host's copy() makes its own class
        control._own, control._config, control._node_id = sums, config, node_id
        control.control_model = None
        fused: FusedControlLora = control
        return fused

    @property
    def hint_channels(self) -> int:
        return int(self.control_weights[_HINT].shape[1])

    def copy(self) -> FusedControlLora:
        return self._take(ControlLora.copy(self), self._own, self._config, self._node_id)

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        patcher = model.current_patcher
        if patcher is not None and patcher.hook_patches:
            # Hooks change the base within a step; stock's model is over the base's own weights.
            warn_once("A ControlLora runs as stock where LoRA hooks change the model's weights.")
            ControlLora.pre_run(self, model, percent_to_timestep_function)
            return
        self.manual_cast_dtype = model.manual_cast_dtype
        self.control_model = Proxy(self._own.model(model), self._config, self._node_id)
        super().pre_run(model, percent_to_timestep_function)

    def cleanup(self) -> None:
        super().cleanup()
        self.control_model = None

    def get_models(self) -> list[Any]:
        models: list[Any] = ControlBase.get_models(self)
        patcher = self._own.patcher
        return models if patcher is None else [*models, patcher]

    def inference_memory_requirements(self, dtype: torch.dtype) -> float:
        """Bytes: where the host is not told of the sum as a model, it has to leave room for it."""
        size = 0
        if self._own.patcher is None:
            sizes = (
                _full_size(k, v, self.control_weights) for k, v in self.control_weights.items()
            )
            size = sum(sizes) * comfy.model_management.dtype_size(dtype)
        return size + ControlBase.inference_memory_requirements(self, dtype)


def _full_size(name: str, tensor: torch.Tensor, weights: Weights) -> int:
    """How many elements the sum has for one tensor of the file."""
    if name.endswith(".up"):
        return 0
    if name.endswith(".down"):
        up = weights[f"{name.removesuffix('.down')}.up"]
        return up.shape[0] * tensor[0].numel()
    return tensor.numel()
