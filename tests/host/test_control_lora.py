"""A ControlLora is summed with its base once, in memory of its own, and again where it is."""

import gc
import weakref
from pathlib import Path
from typing import Any

import comfy.controlnet
import comfy.model_management
import folder_paths
import pytest
import torch
from blade_tests.host import lora_files
from blade_tests.host.control_nets import (
    BOUND,
    EAGER,
    applied,
    assert_as_stock,
    changes,
    image,
    make_control_lora,
    prompts,
    state_of,
)
from blade_tests.host.tiny import (
    SD15,
    SDXL,
    conditioning,
    make_model,
    relative_rms,
    sample,
)
from comfy.model_patcher import ModelPatcher

from blade.blade_core.config import OptimizeConfig
from blade.blade_core.errors import ControlNetError
from blade.blade_core.host import control_lora
from blade.blade_core.host.model import Session, optimize_model

KEY = "diffusion_model.input_blocks.1.0.in_layers.2.weight"
LAYER = "input_blocks.1.0.in_layers.2"


def with_lora(model: Any, scale: float = 0.05) -> Any:
    clone = model.clone()
    weight = model.model.state_dict()[KEY]
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) * scale
    clone.add_patches({KEY: ("diff", (noise,))})
    return clone


def sum_of(both: Any) -> ModelPatcher:
    """The patcher of the sum, which the host loads and unloads."""
    (patcher,) = both["positive"][0][1]["control"].get_models()
    return patcher


def where(both: Any) -> list[int]:
    return [weight.data_ptr() for weight in sum_of(both).model.parameters()]


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The bases that were summed with, one entry each time."""
    made: list[Any] = []
    own = control_lora._write

    def write(model: Any, weights: Any, base: Any) -> None:
        made.append(base)
        own(model, weights, base)

    monkeypatch.setattr(control_lora, "_write", write)
    return made


def test_one_sum_for_all_nodes_and_runs(session: Session, sd15: Any, sums: list[Any]) -> None:
    control = make_control_lora(SD15)
    assert_as_stock(sd15, lambda c: applied(control, **prompts(), config=c), control, steps=3)
    both = applied(control, **prompts())
    places, model = where(both), sum_of(both).model
    twice = applied(control, **both, hint=image(1), strength=0.5)
    stock = applied(control, **prompts(), config=None)
    stock = applied(control, **stock, config=None, hint=image(1), strength=0.5)
    expected = sample(sd15, **stock, steps=3)
    assert relative_rms(sample(sd15, **twice, steps=3), expected) <= BOUND
    assert sums == [sd15.model]
    assert sum_of(both).model is model and where(both) == places


def test_two_files_are_two_sums(session: Session, sd15: Any, sums: list[Any]) -> None:
    controls = [make_control_lora(SD15, seed=seed) for seed in (0, 1)]

    def apply(config: OptimizeConfig | None) -> Any:
        first = applied(controls[0], **prompts(), config=config)
        return applied(controls[1], **first, config=config, hint=image(1))

    assert_as_stock(sd15, apply, *controls, steps=3)
    assert len(sums) == 2


@pytest.mark.parametrize("kind", ["stock", "fused"])
def test_the_bases_lora_comes_and_goes_in_place(
    session: Session, sd15: Any, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = ([str(tmp_path)], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", folders)
    rows = [(lora_files.make(sd15, seed=1, ranks=(4,)).save(tmp_path, "one"), 0.8, 0.0)]
    other = with_lora(sd15) if kind == "stock" else lora_files.fuse(sd15, rows)[0]
    same = make_model(SD15)  # stock's own loading moves weights
    stock = with_lora(same) if kind == "stock" else lora_files.stock(same, rows)[0]
    control = make_control_lora(SD15)
    both = applied(control, **prompts())
    plain = sample(optimize_model(sd15, EAGER), **both, steps=4)
    places = where(both)
    expected = sample(stock, **applied(control, **prompts(), config=None), steps=4)
    assert relative_rms(expected, plain) > 1e-3
    with session.engine.counters.expect(graphs_compiled=0, captures=0, captures_dropped=0):
        actual = sample(optimize_model(other, EAGER), **both, steps=4)
        assert relative_rms(actual, expected) <= BOUND
        assert torch.equal(sample(optimize_model(sd15, EAGER), **both, steps=4), plain)
    assert where(both) == places


@pytest.mark.parametrize("first", ["whole", "half"])
def test_a_base_of_which_not_all_is_on_the_gpu(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """The sum has the base's LoRAs, also of layers that the host patches while they run, and does
    not depend on what was where when it was made."""
    folders = ([str(tmp_path)], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", folders)
    base, control = make_model(SD15), make_control_lora(SD15)
    lora_files.make(base, seed=1, size=1.0, only="input_blocks").save(tmp_path, "a")
    model = lora_files.stock(base, [lora_files.row("a")])[0]
    plain, ours = applied(control, **prompts(), config=None), applied(control, **prompts())
    expected = sample(model, **plain)
    assert relative_rms(sample(base, **plain), expected) > 1e-2
    load = type(model).partially_load

    def partially_load(device: Any, extra_memory: float = 0, **options: Any) -> Any:
        if model.loaded_size():  # there is no room for more of it
            return 0
        return load(model, device, model.model_size() * 0.3, **options)

    for half in (first == "half", first != "half", first == "half"):
        comfy.model_management.unload_all_models()
        with monkeypatch.context() as small:
            if half:
                small.setattr(model, "partially_load", partially_load, raising=False)
            assert relative_rms(sample(model, **ours), expected) <= BOUND
            assert bool(base.model.model_lowvram) == half


def test_bases_in_turn(session: Session, sums: list[Any]) -> None:
    bases = [make_model(SD15), make_model(SD15, seed=1)]
    control = make_control_lora(SD15)
    images = []
    for base in (bases[0], bases[1], bases[1], bases[0]):
        images.append(
            assert_as_stock(base, lambda c: applied(control, **prompts(), config=c), steps=3)
        )
    assert [base is bases[0].model for base in sums] == [True, False]
    assert relative_rms(images[0], images[1]) > 1e-3 and torch.equal(images[0], images[3])


def test_bases_in_turn_record_nothing_again(session: Session, sums: list[Any]) -> None:
    """The host cannot know which sum a run needs: it is loaded once the base is known."""
    bases = [optimize_model(make_model(SD15, seed=seed), EAGER) for seed in (0, 1)]
    both = applied(make_control_lora(SD15), **prompts())
    images = [sample(base, **both, steps=3) for base in bases]
    comfy.model_management.unload_all_models()
    ours = both["positive"][0][1]["control"]
    assert ours.get_models() == []
    assert ours.inference_memory_requirements(torch.float32) > 0
    with session.engine.counters.expect(graphs_compiled=0):
        for base, expected in zip(bases, images, strict=True):
            assert torch.equal(sample(base, **both, steps=3), expected)
    assert len(sums) == 2


def test_a_sum_goes_with_its_base(session: Session, sd15: Any) -> None:
    both = applied(make_control_lora(SD15), **prompts())
    other = make_model(SD15, seed=1)
    sample(other, **both, steps=2)
    gone = weakref.ref(sum_of(both).model)
    sample(sd15, **both, steps=2)
    del other
    comfy.model_management.unload_all_models()
    gc.collect()
    assert gone() is None
    assert sum_of(both).model is not None


def test_a_sum_shares_no_memory(session: Session, sd15: Any) -> None:
    """What runs over it changes strides within its memory; the base's and the file's stay."""
    control = make_control_lora(SD15)
    both = applied(control, **prompts())
    sample(sd15, **both)
    others = {t.data_ptr() for t in control.control_weights.values()}
    others |= {t.data_ptr() for t in sd15.model.state_dict().values()}
    names = [n for n, w in sum_of(both).model.named_parameters() if w.data_ptr() in others]
    assert names == []


@pytest.mark.parametrize("layer", ["without factors", "whole"])
@pytest.mark.parametrize("stock_too", [False, True])
def test_a_convolution_that_has_no_factors(
    session: Session, sd15: Any, layer: str, stock_too: bool
) -> None:
    """Not every file has factors for every layer: the base's weight is taken, or the file's."""
    control = make_control_lora(SD15)
    for part in ("up", "down"):
        del control.control_weights[f"{LAYER}.{part}"]
    if layer == "whole":
        whole = sd15.model.state_dict()[KEY] * 1.1
        control.control_weights[f"{LAYER}.weight"] = whole

    def apply(config: OptimizeConfig | None) -> Any:
        both = applied(control, **prompts(), config=config)
        return applied(control, **both, config=None, hint=image(1)) if stock_too else both

    before = {name: weight.clone() for name, weight in control.control_weights.items()}
    assert_as_stock(sd15, apply, control, steps=3)
    assert lora_files.same(before, control.control_weights)


def test_a_stock_one_comes_and_goes(session: Session, sd15: Any) -> None:
    """Its model reads the base's own memory, which Blade then leaves as it lies."""
    control, optimized = make_control_lora(SD15), optimize_model(sd15, EAGER)
    plain = prompts()
    stock = applied(control, **plain, config=None)
    expected = {"with": sample(sd15, **stock, steps=4), "without": sample(sd15, **plain, steps=4)}
    for both, name in ((plain, "without"), (stock, "with"), (plain, "without"), (stock, "with")):
        assert relative_rms(sample(optimized, **both, steps=4), expected[name]) <= BOUND
    assert relative_rms(expected["with"], expected["without"]) > 1e-3


def test_a_sum_that_was_not_finished_is_made_again(
    session: Session, sd15: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = make_control_lora(SD15)
    both = applied(control, **prompts())
    expected = sample(sd15, **both, steps=3)
    own, calls = control_lora._sum, iter(range(1000))

    def failing(*args: Any) -> torch.Tensor:
        if next(calls) == 60:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(*args)

    with monkeypatch.context() as patch:
        patch.setattr(control_lora, "_sum", failing)
        with pytest.raises(torch.OutOfMemoryError):
            sample(with_lora(sd15), **both, steps=3)
    assert torch.equal(sample(sd15, **both, steps=3), expected)


def test_a_file_for_another_architecture(session: Session) -> None:
    wide, both = make_model(SDXL | {"context_dim": 64, "model_channels": 64}), {}
    for name, seed in (("positive", 1), ("negative", 2)):
        both[name] = conditioning(seed=seed, width=64)
    small = make_model(SD15)
    for model, plain, config in ((wide, both, SD15), (small, prompts(), SDXL)):
        control = make_control_lora(config)
        before = state_of(control)
        with pytest.raises(ControlNetError, match="does not fit the model"):
            sample(model, **applied(control, **plain))
        assert changes(before, state_of(control)) == []
        assert sample(model, **plain).isfinite().all()


def test_memory(session: Session, sd15: Any) -> None:
    """The host is told how much it will be, then counts it as a model, and gets it back."""
    control = make_control_lora(SD15)
    both = applied(control, **prompts())
    ours = both["positive"][0][1]["control"]
    assert ours.get_models() == []
    asked = ours.inference_memory_requirements(torch.float32)
    expected = sample(sd15, **both, steps=3)
    patcher = sum_of(both)
    assert 0.8 * patcher.model_size() <= asked <= patcher.model_size()
    assert ours.inference_memory_requirements(torch.float32) == 0
    assert patcher in [loaded.model for loaded in comfy.model_management.current_loaded_models]
    comfy.model_management.unload_all_models()
    assert patcher not in [loaded.model for loaded in comfy.model_management.current_loaded_models]
    assert torch.equal(sample(sd15, **both, steps=3), expected)
    gone = [weakref.ref(patcher.model), weakref.ref(control)]
    comfy.model_management.unload_all_models()
    del control, both, ours, patcher
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_half_precision(session: Session) -> None:
    """No further from fp32 than stock, which sums in fp16."""
    exact = sample(
        make_model(SD15), **applied(make_control_lora(SD15), **prompts(), config=None), steps=3
    )
    half, control = make_model(SD15, dtype=torch.float16), make_control_lora(SD15)
    expected = sample(half, **applied(control, **prompts(), config=None), steps=3)
    for each in (half, optimize_model(half, EAGER)):
        actual = sample(each, **applied(control, **prompts()), steps=3)
        assert relative_rms(actual, exact) <= 1.2 * relative_rms(expected, exact)
