"""The kinds of LoRA: what trainers call their tensors, how to make them, and what they add."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

Tensors = dict[str, torch.Tensor]


class Naming(NamedTuple):
    """How a trainer calls the layers, and the two halves of a LoRA."""

    stems: tuple[str, ...]
    up: str = ".lora_up.weight"
    down: str = ".lora_down.weight"


_DIFFUSERS = ("unet.", "text_encoder.", "text_encoder_2.")
NAMINGS = {
    "kohya": Naming(("lora_unet_", "lora_te_")),
    "kohya xl": Naming(("lora_unet_", "lora_te1_", "lora_te2_")),
    "lycoris": Naming(("lycoris_", "lora_te_")),
    "peft": Naming(("diffusion_model.", "text_encoders."), ".lora_B.weight", ".lora_A.weight"),
    "peft default": Naming(_DIFFUSERS, ".lora_B.default.weight", ".lora_A.default.weight"),
    "bare": Naming(("diffusion_model.", "text_encoders."), ".lora_B", ".lora_A"),
    "diffusers": Naming(_DIFFUSERS, "_lora.up.weight", "_lora.down.weight"),
    "diffusers, dots": Naming(_DIFFUSERS, ".lora.up.weight", ".lora.down.weight"),
    "transformers": Naming(
        _DIFFUSERS, ".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"
    ),
}
LINEAR = (
    "lora",
    "flat",  # a convolution's LoRA as matrices, a matrix's as 1x1 convolutions
    "locon",
    "loha",
    "loha tucker",
    "lokr",
    "lokr factored",
    "lokr tucker",
    "diff",
)
VECTORS = ("norm", "bias")  # linear too, for weights of one dimension
OTHERS = ("dora", "dora in", "dora loha", "dora lokr", "glora", "oft", "boft", "set", "reshape")


class Maker:
    """Makes the tensors of one layer after another."""

    def __init__(self, naming: Naming, alpha: float | None, size: float, seed: int) -> None:
        self.naming = naming
        self.alpha = alpha
        self.size = size
        self._generator = torch.Generator().manual_seed(seed)

    def noise(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator)

    def parts(self, kind: str, rank: int, weight: torch.Tensor) -> Tensors:
        """By suffix; they change `weight` by `size` of itself."""
        rms = float(weight.square().mean().sqrt())
        out, inner, *kernel = weight.shape
        if kind == "set":
            return {".set_weight": self.noise(*weight.shape) * rms}
        if kind in ("oft", "boft"):
            blocks = self.noise(2 if out % 8 == 0 else 1, out // 4, 4, 4) * self.size / 2
            if kind == "oft":
                return {".oft_blocks": blocks[0]}
            # Its alpha is a limit, without which the host cannot do it.
            return {".oft_blocks": blocks, ".alpha": torch.tensor(4.0)}
        if kind == "glora":
            a = (self.size / (inner * rank) ** 0.5) ** 0.5
            b = (self.size * rms / rank**0.5) ** 0.5
            return {
                ".a1.weight": self.noise(inner, rank) * a,
                ".a2.weight": self.noise(rank, inner) * a,
                ".b1.weight": self.noise(out, rank) * b,
                ".b2.weight": self.noise(rank, inner, *kernel) * b,
            }
        if kind == "reshape":
            whole = {".reshape_weight": torch.tensor(weight.shape)}
            return self.parts("lora", rank, weight) | whole
        if kind.startswith("dora"):
            other = kind.removeprefix("dora").strip()
            dims = [d for d in range(weight.ndim) if d != (1 if other == "in" else 0)]
            norms = torch.linalg.vector_norm(weight, dim=dims, keepdim=True)
            scale = norms * (1 + self.size * self.noise(*norms.shape))
            linear = "lora" if other in ("", "in") else other
            return self.parts(linear, rank, weight) | {".dora_scale": scale}
        parts = _LINEAR_PARTS[kind](self, rank, out, inner, kernel)
        first = next(iter(parts))
        if self.alpha is not None and kind != "diff":
            parts[".alpha"] = torch.tensor(self.alpha)
        # All are products: to scale one factor is to scale the whole.
        parts[first] *= self.size * rms / float(delta(parts).square().mean().sqrt())
        return parts


def _lora(make: Maker, rank: int, out: int, inner: int, kernel: list[int]) -> Tensors:
    ones = [1] * len(kernel)
    return {
        make.naming.up: make.noise(out, rank, *ones),
        make.naming.down: make.noise(rank, inner, *kernel),
    }


def _flat(make: Maker, rank: int, out: int, inner: int, kernel: list[int]) -> Tensors:
    ones = [] if kernel else [1, 1]
    return {
        make.naming.up: make.noise(out, rank, *ones),
        make.naming.down: make.noise(rank, inner * math.prod(kernel), *ones),
    }


def _locon(make: Maker, rank: int, out: int, inner: int, kernel: list[int]) -> Tensors:
    if not kernel:
        return _lora(make, rank, out, inner, kernel)
    return {  # the host knows a mid by kohya's naming only
        ".lora_up.weight": make.noise(out, rank, 1, 1),
        ".lora_mid.weight": make.noise(rank, rank, *kernel),
        ".lora_down.weight": make.noise(rank, inner, 1, 1),
    }


def _loha(make: Maker, rank: int, out: int, inner: int, kernel: list[int]) -> Tensors:
    columns = inner * math.prod(kernel)
    return {
        ".hada_w1_a": make.noise(out, rank),
        ".hada_w1_b": make.noise(rank, columns),
        ".hada_w2_a": make.noise(out, rank),
        ".hada_w2_b": make.noise(rank, columns),
    }


def _loha_tucker(make: Maker, rank: int, out: int, inner: int, kernel: list[int]) -> Tensors:
    if not kernel:
        return _loha(make, rank, out, inner, kernel)
    return {
        ".hada_t1": make.noise(rank, rank, *kernel),
        ".hada_w1_a": make.noise(rank, out),
        ".hada_w1_b": make.noise(rank, inner),
        ".hada_t2": make.noise(rank, rank, *kernel),
        ".hada_w2_a": make.noise(rank, out),
        ".hada_w2_b": make.noise(rank, inner),
    }


def _lokr(make: Maker, rank: int, out: int, inner: int, kernel: list[int]) -> Tensors:
    return {".lokr_w1": make.noise(4, 2), ".lokr_w2": make.noise(out // 4, inner // 2, *kernel)}


def _lokr_factored(make: Maker, rank: int, out: int, inner: int, kernel: list[int]) -> Tensors:
    return {
        ".lokr_w1_a": make.noise(4, rank),
        ".lokr_w1_b": make.noise(rank, 2),
        ".lokr_w2_a": make.noise(out // 4, rank),
        ".lokr_w2_b": make.noise(rank, inner // 2 * math.prod(kernel)),
    }


def _lokr_tucker(make: Maker, rank: int, out: int, inner: int, kernel: list[int]) -> Tensors:
    if not kernel:
        return _lokr_factored(make, rank, out, inner, kernel)
    return {
        ".lokr_w1": make.noise(4, 2),
        ".lokr_t2": make.noise(rank, rank, *kernel),
        ".lokr_w2_a": make.noise(rank, out // 4),
        ".lokr_w2_b": make.noise(rank, inner // 2),
    }


def _diff(make: Maker, rank: int, out: int, inner: int, kernel: list[int]) -> Tensors:
    return {".diff": make.noise(out, inner, *kernel)}


_LINEAR_PARTS: dict[str, Callable[[Maker, int, int, int, list[int]], Tensors]] = {
    "lora": _lora,
    "flat": _flat,
    "locon": _locon,
    "loha": _loha,
    "loha tucker": _loha_tucker,
    "lokr": _lokr,
    "lokr factored": _lokr_factored,
    "lokr tucker": _lokr_tucker,
    "diff": _diff,
}


def delta(parts: Tensors) -> torch.Tensor:
    """A linear layer's addition, by the definition of its kind."""
    alpha = float(parts.get(".alpha", torch.tensor(torch.nan)))

    def scaled(value: torch.Tensor, rank: int) -> torch.Tensor:
        return value if alpha != alpha else value * (alpha / rank)

    for name in (".diff", ".w_norm"):
        if name in parts:
            return parts[name]
    if ".hada_w1_a" in parts:
        halves = [
            _tucker(parts.get(f".hada_t{n}"), parts[f".hada_w{n}_a"], parts[f".hada_w{n}_b"])
            for n in (1, 2)
        ]
        return scaled(halves[0] * halves[1], parts[".hada_w1_b"].shape[0])
    if ".lokr_w1" in parts or ".lokr_w1_a" in parts:
        w1, w2 = parts.get(".lokr_w1"), parts.get(".lokr_w2")
        rank = None
        if w1 is None:
            w1, rank = parts[".lokr_w1_a"] @ parts[".lokr_w1_b"], parts[".lokr_w1_b"].shape[0]
        if w2 is None:
            w2 = _tucker(parts.get(".lokr_t2"), parts[".lokr_w2_a"], parts[".lokr_w2_b"])
            rank = parts[".lokr_w2_b"].shape[0]
        product = torch.einsum("ab,cd...->acbd...", w1, w2).flatten(2, 3).flatten(0, 1)
        return product if rank is None else scaled(product, rank)
    up, down = next(
        (parts[naming.up], parts[naming.down]) for naming in NAMINGS.values() if naming.up in parts
    )
    if ".lora_mid.weight" in parts:
        core = parts[".lora_mid.weight"]
        product = torch.einsum("or,rshw,si->oihw", up[..., 0, 0], core, down[..., 0, 0])
    else:
        product = up.flatten(1) @ down.flatten(1)
    return scaled(product, down.shape[0])


def _tucker(core: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b if core is None else torch.einsum("ijkl,io,jn->onkl", core, a, b)
