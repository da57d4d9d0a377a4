"""LoRA files of every kind for tiny models, what the linear ones add, and stock's way with them."""

import functools
import importlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import comfy.lora
import comfy.model_management
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import safetensors.torch
import torch
from blade_tests.host.lora_kinds import NAMINGS, VECTORS, Maker, Tensors, delta
from blade_tests.host.tiny import SD15
from comfy.model_patcher import ModelPatcher

from blade.nodes.fused_lora import BladeFusedLoRA

HOST_NODES: Any = importlib.import_module("nodes")  # the checkout has another folder `nodes`
SMALL = SD15 | {"channel_mult": [1], "num_res_blocks": [1], "transformer_depth": [1]}
SMALL |= {"transformer_depth_output": [1, 1]}  # SD1.5 of one level: as many kinds, fewer layers
Row = tuple[Any, ...]
"""A LoRA's name, its strength for the model and for the text encoder, and whether it is on."""


class LoraFile(NamedTuple):
    tensors: Tensors
    targets: dict[str, tuple[str, torch.Size]]
    """For each layer's name in the file: the weight that it means, and its shape."""

    def save(self, folder: Path, name: str) -> str:
        """Write it and return its name, as the node's list shows it."""
        name = f"{name}.safetensors"
        safetensors.torch.save_file(self.tensors, folder / name)
        return name


def make(
    *models: Any,
    kinds: Sequence[str] = ("lora",),
    ranks: Sequence[int] = (8,),
    naming: str = "kohya",
    dtype: torch.dtype = torch.float32,
    alpha: float | None = 4.0,
    seed: int = 0,
    only: str = "",
    size: float = 0.2,
) -> LoraFile:
    """A file for the layers of `models` whose names hold `only`; kinds and ranks take turns.

    What a layer of it adds is `size` times as large as the weight, and never the same for two
    seeds.
    """
    maker = Maker(NAMINGS[naming], alpha, size, seed)
    tensors: Tensors = {}
    targets = {}
    matrix_kinds = [kind for kind in kinds if kind not in VECTORS]
    turns = zip(itertools.cycle(matrix_kinds), itertools.cycle(ranks), strict=False)
    pairs = itertools.islice(turns, seed, None)  # other kinds meet in each pair of files
    for prefix, (key, weight, bias) in _layers(models, naming).items():
        if only not in key:
            continue
        parts: Tensors = {}
        if weight.ndim in (2, 4) and matrix_kinds:
            parts = maker.parts(*next(pairs), weight.float())
            if bias is not None and "bias" in kinds:
                parts[".diff_b"] = size * maker.noise(*bias.shape)
        elif weight.ndim == 1 and "norm" in kinds:
            parts[".w_norm"] = size * maker.noise(*weight.shape)
            if bias is not None:
                parts[".b_norm"] = size * maker.noise(*bias.shape)
        if parts:
            targets[prefix] = (key, weight.shape)
        for suffix, tensor in parts.items():
            whole = not tensor.is_floating_point()
            tensors[prefix + suffix] = tensor if whole else tensor.to(dtype).contiguous()
    assert tensors, f"no layer holds {only!r}"
    return LoraFile(tensors, targets)


def additions(file: LoraFile) -> Tensors:
    """What `file` adds to each weight at strength 1, in fp64, from its tensors alone."""
    result = {}
    for prefix, (key, shape) in file.targets.items():
        parts = {
            name.removeprefix(prefix): tensor.double()
            for name, tensor in file.tensors.items()
            if name.startswith((prefix + ".", prefix + "_lora."))
        }
        bias = parts.pop(".diff_b", None)
        if bias is None:
            bias = parts.pop(".b_norm", None)
        if bias is not None:
            result[key.removesuffix("weight") + "bias"] = bias
        result[key] = delta(parts).reshape(shape)
    return result


def expected(base: Tensors, rows: Iterable[tuple[LoraFile, float]]) -> Tensors:
    """`base` with the linear files of `rows` at their strengths, in fp64."""
    result = {key: weight.double() for key, weight in base.items()}
    for file, strength in rows:
        for key, addition in additions(file).items():
            if key in result:
                result[key] = result[key] + strength * addition
    return result


def make_clip(xl: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """The host's CLIP with few and narrow layers of random weights."""

    tokenizer = comfy.sdxl_clip.SDXLTokenizer if xl else comfy.sd1_clip.SD1Tokenizer
    target = SimpleNamespace(
        clip=comfy.sdxl_clip.SDXLClipModel if xl else comfy.sd1_clip.SD1ClipModel,
        tokenizer=lambda **_: _once(tokenizer),
        params={},
    )
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
    }
    options = {"clip_l_model_config": small, "clip_g_model_config": small, "dtype": dtype}
    clip = comfy.sd.CLIP(target, model_options=options)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in clip.cond_stage_model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.1
        is_norm = "norm" in name and name.endswith("weight")
        parameter.data = (noise + is_norm).to(parameter.dtype)
    return clip


@functools.cache
def _once(make_it: Callable[[], Any]) -> Any:
    return make_it()


def row(name: str, model: float = 1.0, clip: float = 1.0, *rest: Any) -> Row:
    """A row of the node: a file by its name without suffix, and its strengths."""
    return f"{name}.safetensors", model, clip, *rest


def stock(model: Any, rows: Sequence[Row], clip: Any = None) -> tuple[Any, Any]:
    """`rows` as a chain of the host's own nodes."""
    for name, strength_model, strength_clip, *on in rows:
        if all(on):
            loader = HOST_NODES.LoraLoader()
            model, clip = loader.load_lora(model, clip, name, strength_model, strength_clip)
    return model, clip


def fuse(
    model: Any,
    rows: Sequence[Row],
    clip: Any = None,
    *,
    stack: Any = None,
    on_failure: str = "error",
) -> tuple[Any, Any, Any]:
    """`rows` as one node, called as the host calls it."""
    result = BladeFusedLoRA().fuse(
        model, on_failure=on_failure, clip=clip, lora_stack=stack, **widgets(rows)
    )
    assert isinstance(result, tuple) and len(result) == 3
    return result


def widgets(rows: Sequence[Row]) -> dict[str, Any]:
    assert len(rows) <= 8
    names = ("lora", "strength_model", "strength_clip", "enabled")
    return {
        f"{name}_{number}": value
        for number, row in enumerate(rows, start=1)
        for name, value in zip(names, row, strict=False)
    }


def patcher(model: Any) -> ModelPatcher:
    """The patcher of a MODEL or of a CLIP."""
    return model if isinstance(model, ModelPatcher) else model.patcher


def state(model: Any) -> Tensors:
    """The weights as they are now."""
    return {key: weight.clone() for key, weight in patcher(model).model.state_dict().items()}


def loaded(model: Any) -> Tensors:
    """The weights that the host computes with once it has loaded `model`."""
    comfy.model_management.load_models_gpu([patcher(model)])
    return state(model)


def effective(model: Any) -> Tensors:
    """The weights that layers compute with: offloaded ones are patched in each call."""
    result = state(model)
    for name, layer in model.model.named_modules():
        for key in ("weight", "bias"):
            for function in getattr(layer, f"{key}_function", ()):
                result[f"{name}.{key}"] = function(result[f"{name}.{key}"])
    return result


def addresses(model: Any) -> list[int]:
    return [weight.data_ptr() for weight in patcher(model).model.state_dict().values()]


def same(one: Tensors, other: Tensors) -> bool:
    """Whether all weights are equal, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def changed(one: Tensors, other: Tensors) -> set[str]:
    assert one.keys() == other.keys()
    return {key for key in one if not torch.equal(one[key], other[key])}


def distance(actual: Tensors, reference: Tensors, keys: Iterable[str] | None = None) -> float:
    """Relative RMS over all of `keys` together."""
    keys = list(reference if keys is None else keys)
    off = sum(float((actual[k].double() - reference[k].double()).square().sum()) for k in keys)
    whole = sum(float(reference[k].double().square().sum()) for k in keys)
    return (off / whole) ** 0.5


def assert_near(actual: Tensors, reference: Tensors, bound: float) -> None:
    """Each weight by itself is within `bound` of its reference, relative RMS."""
    off = {key: distance(actual, reference, [key]) for key in reference if reference[key].any()}
    far = {key: value for key, value in off.items() if not value <= bound}
    seen = dict(sorted(far.items(), key=lambda item: -item[1])[:3])
    assert not far, f"{len(far)} of {len(off)} weights are further off than {bound}: {seen}"


def _layers(
    models: Iterable[Any], naming: str
) -> dict[str, tuple[str, torch.Tensor, torch.Tensor | None]]:
    """What the host's own map calls the layers in this naming, one name for each weight."""
    stems = NAMINGS[naming].stems
    result = {}
    for model in models:
        inner = patcher(model).model
        weights = inner.state_dict()
        if isinstance(model, ModelPatcher):
            names = comfy.lora.model_lora_keys_unet(inner, {})
        else:
            names = comfy.lora.model_lora_keys_clip(inner, {})
        # Last come diffusers' names, which trainers use.
        by_key = {key: prefix for prefix, key in names.items() if prefix.startswith(stems)}
        for key, prefix in by_key.items():
            if key in weights and key.endswith("weight") and "embedding.weight" not in key:
                bias = weights.get(key.removesuffix("weight") + "bias")
                result[prefix] = (key, weights[key], bias)
    return result
