"""What newer hosts do with a VAE: dynamic VRAM."""

import gc
import weakref
from typing import Any

import comfy.model_management
import comfy.model_patcher
import pytest
import torch
from blade_tests.host.tiny import DEVICE, relative_rms
from blade_tests.host.vaes import BOUND, decode, make_vae, optimized, used

from blade.blade_core.host.model import Session

DYNAMIC: Any = getattr(comfy.model_patcher, "ModelPatcherDynamic", None)

pytestmark = [
    pytest.mark.skipif(DYNAMIC is None, reason="this host has no dynamic VRAM"),
    pytest.mark.parametrize("session", ["captured"], indirect=True),
]


def _memory(model: Any) -> dict[str, int]:
    return {name: weight.data_ptr() for name, weight in model.named_parameters()}


def test_under_dynamic_vram_a_twin_runs(session: Session) -> None:
    """One for each model, over the same main memory."""
    vae = make_vae()
    expected = used(vae, decode())
    classic, model = vae.patcher, vae.first_stage_model
    with pytest.MonkeyPatch.context() as patch:  # pinned memory, which only a GPU has
        patch.setattr("comfy_aimdo.host_buffer.HostBuffer", lambda *_: None)
        dynamic = DYNAMIC(model, torch.device("cuda:0"), torch.device("cpu"))
    vae.patcher = dynamic
    ours, again = optimized(vae), optimized(vae)
    twin = ours.patcher
    assert twin is again.patcher is not dynamic and not twin.is_dynamic()
    assert not ours.is_dynamic() and vae.patcher is dynamic
    assert twin.model is not model and _memory(twin.model) == _memory(model)
    twin.load_device = DEVICE
    for each in (ours, again):
        assert relative_rms(used(each, decode()), expected) <= BOUND
    off = optimized(ours, enabled=False)
    assert off.patcher is dynamic and off.first_stage_model is model
    vae.patcher = classic
    assert torch.equal(used(vae, decode()), expected)
    gone = weakref.ref(twin.model)
    del vae, ours, again, off, each, model, classic, dynamic, twin
    comfy.model_management.unload_all_models()
    gc.collect()
    assert gone() is None


def test_a_file_of_another_dtype(session: Session) -> None:
    """Under dynamic VRAM weights stay as in the file, and are cast page by page."""
    vae = make_vae()
    expected = used(vae, decode())
    model = vae.first_stage_model
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("comfy_aimdo.host_buffer.HostBuffer", lambda *_: None)
        vae.patcher = DYNAMIC(model, torch.device("cuda:0"), torch.device("cpu"))
    ours = optimized(vae)
    ours.patcher.load_device = DEVICE
    assert relative_rms(used(ours, decode()), expected) <= BOUND
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def _dynamic() -> Any:
    vae = make_vae()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("comfy_aimdo.host_buffer.HostBuffer", lambda *_: None)
        device = torch.device("cuda:0")
        vae.patcher = DYNAMIC(vae.first_stage_model, device, torch.device("cpu"))
    return vae


def _used(vae: Any) -> torch.Tensor:
    ours = optimized(vae)
    ours.patcher.load_device = DEVICE
    return used(ours, decode())


def test_layers_that_a_pack_changes_later(session: Session) -> None:
    """As packs for seamless images do it in place, in a later prompt."""
    vae, stock = _dynamic(), make_vae()
    assert relative_rms(_used(vae), used(stock, decode())) <= BOUND
    twin = optimized(vae).patcher.model
    assert optimized(vae).patcher.model is twin
    for model in (vae.first_stage_model, stock.first_stage_model):
        for layer in model.modules():
            if isinstance(layer, torch.nn.Conv2d):
                layer.padding_mode = "circular"
    assert relative_rms(_used(vae), used(stock, decode())) <= BOUND


def test_patches(session: Session) -> None:
    vae, stock = _dynamic(), make_vae()
    plain = used(stock, decode())
    assert relative_rms(_used(vae), plain) <= BOUND
    delta = torch.randn_like(stock.first_stage_model.decoder.conv_in.weight)
    for each in (vae, stock):
        each.patcher.add_patches({"decoder.conv_in.weight": (delta,)}, 1.0)
    assert relative_rms(_used(vae), used(stock, decode())) <= BOUND
    vae.patcher.patches = {}
    assert relative_rms(_used(vae), plain) <= BOUND
