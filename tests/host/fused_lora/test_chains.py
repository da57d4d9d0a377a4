"""BladeFusedLoRA behind itself, behind and before stock's loaders, and with stacks of rows."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import pytest
from blade_tests.host.lora_files import (
    SMALL,
    LoraFile,
    assert_near,
    expected,
    fuse,
    loaded,
    make,
    make_clip,
    row,
    state,
    stock,
)
from blade_tests.host.tiny import make_model

WEIGHTS = 1e-6


@pytest.fixture
def loras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, LoraFile]]:
    """Files for a model and its text encoder, by name; they are all that ComfyUI finds."""
    both = (make_model(SMALL), make_clip())
    files = {
        "lora": make(*both, ranks=(4, 16), seed=1),
        "kron": make(*both, kinds=("lokr", "lokr factored", "diff"), ranks=(4, 8), seed=3),
        "peft": make(*both, ranks=(16, 8), naming="peft", seed=4),
        "few": make(*both, only="attn", alpha=1.0, seed=8),
    }
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"})
    )
    yield {file.save(tmp_path, name): file for name, file in files.items()}
    comfy.model_management.unload_all_models()


A, B = row("lora", 0.8, 0.6), row("kron", -0.5, 0.0)
C, D = row("peft", 0.0, 0.7), row("few", 1.2, -0.4)


def by_model(model: Any, clip: Any) -> Any:
    first, text, _ = fuse(model, [A, B], clip)
    return fuse(first, [C, D], text)


def by_stack(model: Any, clip: Any) -> Any:
    stack = fuse(model, [A, B, C], clip)[2]
    return fuse(model, [D], clip, stack=stack)


def by_both(model: Any, clip: Any) -> Any:
    first, text, stack = fuse(model, [A, B], clip)
    return fuse(first, [C, D], text, stack=stack)


def by_both_thrice(model: Any, clip: Any) -> Any:
    stack: Any = None
    for rows in ([A], [B, C], [D]):
        model, clip, stack = fuse(model, rows, clip, stack=stack)
    return model, clip, stack


def by_both_after_a_node_without_the_stack(model: Any, clip: Any) -> Any:
    """Its stack holds its own rows, which are not the first that the model got."""
    first, text, _ = fuse(model, [A], clip)
    second, text, stack = fuse(first, [B, C], text)
    return fuse(second, [D], text, stack=stack)


def by_both_with_another_packs_rows_behind(model: Any, clip: Any) -> Any:
    first, text, _ = fuse(model, [A], clip)
    second, text, stack = fuse(first, [B], text)
    return fuse(second, [], text, stack=[*stack, C, D])


def by_stacks_put_together(model: Any, clip: Any) -> Any:
    first, text, one = fuse(model, [A], clip)
    second, text, other = fuse(first, [B, C], text)
    return fuse(second, [D], text, stack=[*one, *other])


def by_an_earlier_nodes_stack(model: Any, clip: Any) -> Any:
    """Two nodes add to the first one's stack, and the last gets what the second made of it."""
    first, text, stack = fuse(model, [A], clip)
    second, text, _ = fuse(first, [B], text, stack=stack)
    third, text, stack = fuse(second, [C], text, stack=stack)
    return fuse(third, [D], text, stack=stack)


def by_both_one_by_one(model: Any, clip: Any) -> Any:
    """The nodes in between change one of the two only."""
    stack: Any = None
    for one in (A, B, C, D):
        model, clip, stack = fuse(model, [one], clip, stack=stack)
    return model, clip, stack


def by_both_with_the_last_for_one(model: Any, clip: Any) -> Any:
    """The stack's last row changes nothing but the text encoder."""
    first, text, stack = fuse(model, [A, B, C], clip)
    return fuse(first, [D], text, stack=stack)


def by_model_and_stack(model: Any, clip: Any) -> Any:
    """The text encoder comes from the loader: for it the stack is new."""
    first, _, stack = fuse(model, [A, B, C], clip)
    return fuse(first, [D], clip, stack=stack)


def by_another_packs_stack(model: Any, clip: Any) -> Any:
    stack = [list(A), list(B), ("None", 1.0, 1.0), row("lora", 0, 0), C]
    return fuse(model, [D], clip, stack=stack)


def by_stack_alone(model: Any, clip: Any) -> Any:
    return fuse(model, [], clip, stack=[A, B, C, D])


def through_a_clone(model: Any, clip: Any) -> Any:
    first, text, _ = fuse(model, [A, B], clip)
    return fuse(first.clone(), [C, D], text.clone())


def after_stock(model: Any, clip: Any) -> Any:
    first, text = stock(model, [A, B], clip)
    return fuse(first, [C, D], text)


def before_stock(model: Any, clip: Any) -> Any:
    first, text, _ = fuse(model, [A, B], clip)
    return stock(first, [C, D], text)


def around_stock(model: Any, clip: Any) -> Any:
    first, text, stack = fuse(model, [A], clip)
    first, text = stock(first, [B, C], text)
    return fuse(first, [D], text, stack=stack)


CHAINS: list[Callable[[Any, Any], Any]] = [
    by_model,
    by_stack,
    by_both,
    by_both_thrice,
    by_both_after_a_node_without_the_stack,
    by_both_with_another_packs_rows_behind,
    by_stacks_put_together,
    by_an_earlier_nodes_stack,
    by_both_one_by_one,
    by_both_with_the_last_for_one,
    by_model_and_stack,
    by_another_packs_stack,
    by_stack_alone,
    through_a_clone,
    after_stock,
    before_stock,
    around_stock,
]


@pytest.mark.parametrize("chain", CHAINS)
def test_chains(loras: dict[str, LoraFile], small: Any, chain: Callable[[Any, Any], Any]) -> None:
    clip = make_clip()
    bases = state(small), state(clip)
    models = chain(small, clip)
    for part, model in enumerate(models[:2], start=1):
        used = [(loras[row[0]], row[part]) for row in (A, B, C, D) if row[part]]
        assert_near(loaded(model), expected(bases[part - 1], used), WEIGHTS)
    if "stock" not in chain.__name__:
        for patches in (models[0].patches, models[1].patcher.patches):
            assert set(map(len, patches.values())) == {1}
    assert not small.patches and not clip.patcher.patches


def test_a_stack_with_the_same_rows_again(loras: dict[str, LoraFile], small: Any) -> None:
    """Another pack has added to it what it held already: that is meant."""
    first, _, stack = fuse(small, [A], None)
    second, _, stack = fuse(first, [B], None, stack=stack)
    for again in ([A], [A, B], [B]):
        base = state(small)
        model = fuse(second, [], stack=[*stack, *again])[0]
        used = [(loras[row[0]], row[1]) for row in (A, B, *again)]
        assert_near(loaded(model), expected(base, used), WEIGHTS)
        comfy.model_management.unload_all_models()
