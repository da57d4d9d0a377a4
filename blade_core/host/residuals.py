"""What a ControlNet gives, as one tensor and back: a capture has one result."""

from __future__ import annotations

from typing import NamedTuple

import torch

Residuals = dict[str, list[torch.Tensor]]
"""What the host adds to the UNet's: "output", one for each input block, and "middle"."""


class Form(NamedTuple):
    """One residual among packed ones."""

    name: str
    shape: torch.Size
    channels_last: bool


def forms_of(residuals: Residuals) -> list[Form]:
    """What is in them, in the order in which `pack` puts it."""
    return [
        Form(name, t.shape, not t.is_contiguous()) for name in residuals for t in residuals[name]
    ]


def pack(residuals: Residuals, forms: list[Form]) -> torch.Tensor:
    """All residuals one behind the other, as they lie in memory."""
    tensors = [t for name in residuals for t in residuals[name]]
    flat = [
        (t.permute(0, 2, 3, 1) if form.channels_last else t).reshape(-1)
        for t, form in zip(tensors, forms, strict=True)
    ]
    return torch.cat(flat)


def unpack(packed: torch.Tensor, forms: list[Form]) -> Residuals:
    """Residuals as views of the one tensor that holds them."""
    residuals: Residuals = {}
    parts = packed.split([form.shape.numel() for form in forms])
    for form, part in zip(forms, parts, strict=True):
        batch, channels, height, width = form.shape
        if form.channels_last:
            tensor = part.view(batch, height, width, channels).permute(0, 3, 1, 2)
        else:
            tensor = part.view(form.shape)
        residuals.setdefault(form.name, []).append(tensor)
    return residuals
