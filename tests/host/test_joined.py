"""Q, K and V weights one behind the other, and what others see of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import pytest
import torch
from blade_tests.host.tiny import SD15, SDXL, make_model, relative_rms, sample

from blade.blade_core.backends.eager import EagerBackend
from blade.blade_core.config import OptimizeConfig
from blade.blade_core.host.joined import attentions as attentions_in
from blade.blade_core.host.joined import join_weights
from blade.blade_core.host.model import Session, optimize_model
from blade.blade_core.kernels.joint_linear import as_one

BOUND = 1e-4
EAGER = OptimizeConfig(backend="eager", on_failure="error")
CPU = torch.device("cpu")


def attentions(model: Any) -> dict[str, list[torch.Tensor]]:
    """The weights of each attention, by its name."""
    unet = model.model.diffusion_model
    return {
        name: [getattr(module, f"to_{part}").weight for part in "qkv"]
        for name, module in unet.named_modules()
        if hasattr(module, "to_q")
    }


def attentions_of(unet: Any) -> list[Any]:
    return attentions_in(unet.modules())


def are_joined(model: Any) -> set[bool]:
    return {as_one(weights) is not None for weights in selfs(model)}


def selfs(model: Any) -> list[list[torch.Tensor]]:
    return [weights for name, weights in attentions(model).items() if name.endswith("attn1")]


@pytest.fixture(params=[SD15, SDXL], ids=["sd15", "sdxl"])
def model(request: pytest.FixtureRequest) -> Any:
    with torch.inference_mode():  # as the host's worker loads it
        return make_model(request.param)


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_each_weight_is_what_it_was(loaded: bool, inference: bool) -> None:
    """In inference mode or not, when the model is loaded and when it runs."""
    with torch.inference_mode(loaded):
        model = make_model(SDXL)
    unet = model.model.diffusion_model
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    parameters = dict(unet.named_parameters())
    expected = sample(model)
    assert are_joined(model) == {False}
    with torch.inference_mode(inference):
        join_weights(attentions_of(unet), CPU)
    assert are_joined(model) == {True}
    crossed = [w for name, w in attentions(model).items() if name.endswith("attn2")]
    assert all((as_one(w) is not None) == (w[0].shape == w[1].shape) for w in crossed)
    after = unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(after[name].stride() == before[name].stride() for name in before)
    assert all(now is parameters[name] for name, now in unet.named_parameters())
    assert torch.equal(sample(model), expected)


def test_a_second_time_nothing_moves(model: Any) -> None:
    unet = model.model.diffusion_model
    join_weights(attentions_of(unet), CPU)
    places = [w.data_ptr() for weights in selfs(model) for w in weights]
    join_weights(attentions_of(unet), CPU)
    assert [w.data_ptr() for weights in selfs(model) for w in weights] == places


def test_memory_that_others_hold_is_left(model: Any) -> None:
    held = selfs(model)[0][1].detach()
    join_weights(attentions_of(model.model.diffusion_model), CPU)
    joined = [as_one(weights) is not None for weights in selfs(model)]
    assert joined == [False, *[True] * (len(joined) - 1)]
    assert held.data_ptr() == selfs(model)[0][1].data_ptr()


def test_layers_of_other_packs_are_left(model: Any) -> None:
    unet = model.model.diffusion_model
    first = attentions_of(unet)[0]
    first.to_k = torch.nn.Identity()
    join_weights([first], CPU)
    assert first.to_q.weight.untyped_storage().nbytes() == first.to_q.weight.nbytes


def test_weights_elsewhere_are_left(model: Any) -> None:
    join_weights(attentions_of(model.model.diffusion_model), torch.device("meta"))
    assert are_joined(model) == {False}


def test_checkpoints_are_saved_and_loaded(model: Any, tmp_path: Path) -> None:
    unet = model.model.diffusion_model
    join_weights(attentions_of(unet), CPU)
    file = str(tmp_path / "model.safetensors")
    comfy.sd.save_checkpoint(file, model)
    read = comfy.utils.load_torch_file(file)
    name = next(name for name in read if name.endswith("attn1.to_k.weight"))
    saved = name.removeprefix("model.diffusion_model.")
    assert torch.equal(read[name], unet.state_dict()[saved])
    torch.save(unet.state_dict(), tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(torch.equal(again[key], value) for key, value in unet.state_dict().items())


def test_a_run_joins_them_for_a_compiler_that_asks(
    session: Session, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And they stay so while LoRAs come and go, with the images of stock."""
    monkeypatch.setattr(EagerBackend, "joins", lambda self, device: True)
    lora = model.clone()
    patches = {
        f"diffusion_model.{name}.to_{part}.weight": (
            "diff",
            (torch.randn_like(weights[0]) * 0.1,),
        )
        for name, weights in attentions(model).items()
        if name.endswith("attn1")
        for part in "qv"
    }
    lora.add_patches(patches)
    stock, with_lora = sample(model), sample(lora)
    assert relative_rms(with_lora, stock) > 1e-3
    optimized = optimize_model(model, EAGER)
    assert relative_rms(sample(optimized), stock) <= BOUND
    assert are_joined(model) == {True}
    places = [w.data_ptr() for weights in selfs(model) for w in weights]
    patched = optimized.clone()
    patched.add_patches(patches)
    for _ in range(2):
        assert relative_rms(sample(patched), with_lora) <= BOUND
        assert relative_rms(sample(optimized), stock) <= BOUND
    assert [w.data_ptr() for weights in selfs(model) for w in weights] == places
    assert relative_rms(sample(model), stock) <= BOUND
    assert relative_rms(sample(lora), with_lora) <= BOUND
