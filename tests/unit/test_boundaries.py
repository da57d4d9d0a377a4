"""Who may import what, and what no file of the pack does: read from the source itself."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path, PurePath

import pytest
from blade_tests.unit.samples import ROOT, in_new_process

CORE = ROOT / "blade_core"
HOST = CORE / "host"
BACKENDS = CORE / "backends"
NODES = ROOT / "nodes"
PACK = [ROOT / "__init__.py", *sorted(CORE.rglob("*.py")), *sorted(NODES.rglob("*.py"))]
NOT_HOST = [path for path in PACK if HOST not in path.parents]

OTHERS = {"torch", "blade"}
"""What any file may import besides the standard library."""

ALSO = {
    "blade_core/key.py": {"triton"},
    "blade_core/backends/inductor.py": {"triton"},
    "blade_core/kernels/flash_attention_triton.py": {"triton"},
    "blade_core/kernels/geglu_triton.py": {"triton"},
    "blade_core/kernels/group_norm_triton.py": {"triton"},
    "blade_core/kernels/grouped_linear_triton.py": {"triton"},
    "blade_core/kernels/launch.py": {"triton"},
    "blade_core/kernels/layer_norm_triton.py": {"triton"},
    "blade_core/kernels/short_attention_triton.py": {"triton"},
    "nodes/routes.py": {"aiohttp"},
}
"""Inside of functions, and there for what they ask: a version, whether it is there, a route."""

COMFY = {"comfy", "comfy_api", "comfy_execution", "execution", "folder_paths", "server"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> set[str]:
    """Full names of what `path` imports; the pack's own start with `blade.`."""
    found = set()
    package = ("blade", *PurePath(name_of(path)).parts[:-1])
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            # `from . import x` names a module only with what it imports.
            names = {f"{module}.{a.name}" for a in node.names} if not node.module else {module}
            found |= names
    return found


def outside(path: Path, allowed: tuple[str, ...]) -> list[str]:
    """The pack's modules that `path` imports although they are not below `allowed`."""
    own = {name for name in imports(path) if name.split(".")[0] == "blade"}
    return sorted(n for n in own if not any(f"{n}.".startswith(f"{a}.") for a in allowed))


def offending(paths: list[Path], allowed: tuple[str, ...]) -> dict[str, list[str]]:
    assert paths
    return {name_of(path): found for path in paths if (found := outside(path, allowed))}


def nodes_in_pack() -> Iterator[tuple[str, ast.AST]]:
    assert len(PACK) > 20
    for path in PACK:
        for node in ast.walk(tree_of(path)):
            yield f"{name_of(path)}:{getattr(node, 'lineno', 0)}", node


# --- imports ------------------------------------------------------------------------------------


def test_only_the_host_adapter_imports_the_host() -> None:
    standard = sys.stdlib_module_names | {"__future__"}
    found = {
        name_of(path): sorted(strange)
        for path in PACK
        if (
            strange := {name.split(".")[0] for name in imports(path)}
            - standard
            - OTHERS
            - ALSO.get(name_of(path), set())
            - (COMFY if HOST in path.parents else set())
        )
    }
    assert found == {}


def test_the_host_adapter_does_import_the_host() -> None:
    """Or the test before would prove nothing."""
    seen = {name.split(".")[0] for path in HOST.glob("*.py") for name in imports(path)}
    assert "comfy" in seen


def test_nodes_see_four_modules_of_the_core() -> None:
    seen = ("host", "config", "errors", "report")
    allowed = ("blade.nodes", *(f"blade.blade_core.{name}" for name in seen))
    assert offending(sorted(NODES.glob("*.py")), allowed) == {}


def test_the_entry_point_sees_the_nodes_only() -> None:
    assert offending([ROOT / "__init__.py"], ("blade.nodes",)) == {}


def test_the_core_sees_neither_nodes_nor_host() -> None:
    paths = [path for path in NOT_HOST if CORE in path.parents]
    modules = [path.stem for path in CORE.glob("*.py")]
    allowed = tuple(f"blade.blade_core.{name}" for name in (*modules, "backends", "kernels"))
    assert offending(paths, allowed) == {}


def test_the_host_adapter_does_not_see_the_nodes() -> None:
    assert offending(sorted(HOST.glob("*.py")), ("blade.blade_core",)) == {}


@pytest.mark.parametrize("path", sorted(BACKENDS.glob("*.py")), ids=lambda path: path.stem)
def test_backends_see_little_and_not_each_other(path: Path) -> None:
    allowed = tuple(
        f"blade.blade_core.{name}"
        for name in ("graph", "errors", "log", "key", "private", "travel")
    )
    allowed += tuple(
        f"blade.blade_core.{name}"
        for name in ("backends.base", "backends.compiling", "backends.standalone", "kernels")
    )
    if path.stem == "__init__":
        allowed = ("blade.blade_core.backends",)
    assert offending([path], allowed) == {}


def test_three_modules_are_imported_by_name() -> None:
    """`import_module` would get around every rule above. By name come torch_blade, the host's
    `nodes`, because the pack's own folder is called the same, and torch in another process."""
    ways = {"import_module", "__import__", "find_spec", "run_path", "exec", "eval"}
    found = {
        where.split(":")[0]
        for where, node in nodes_in_pack()
        if (isinstance(node, ast.Attribute) and node.attr in ways - {"eval"})
        or (isinstance(node, ast.Name) and node.id in ways)
    }
    own = {"blade_core/backends/torch_blade.py", "blade_core/host/controlnet.py"}
    assert found == {*own, "blade_core/travel.py"}


# --- in a process without ComfyUI ---------------------------------------------------------------


def test_the_core_can_be_imported_without_host_gpu_and_compilers() -> None:
    code = """
import importlib, json, pkgutil
import torch, torch.func

def asked(*args, **kwargs):
    raise AssertionError("importing asks for the GPU")

for name in ("is_available", "device_count", "get_device_properties", "_lazy_init"):
    setattr(torch.cuda, name, asked)
before = set(sys.modules)
import blade.blade_core
found = pkgutil.walk_packages(blade.blade_core.__path__, "blade.blade_core.")
names = [m.name for m in found if ".host" not in m.name and not m.name.endswith("_triton")]
for name in names:
    importlib.import_module(name)
new = sorted({".".join(name.split(".")[:2]) for name in set(sys.modules) - before})
print(json.dumps([names, new]))
"""
    names, new = json.loads(in_new_process(code, CUDA_VISIBLE_DEVICES=""))
    assert {"blade.blade_core.engine", "blade.blade_core.backends.torch_blade"} <= set(names)
    expected = [p for p in NOT_HOST if CORE in p.parents and not p.stem.endswith("_triton")]
    assert len(names) == len(expected) - 1  # less blade_core
    unwanted = {"torch._inductor", "torch._dynamo", "triton", "torch_blade", "aiohttp", *COMFY}
    assert unwanted.isdisjoint(new)


# --- what no file does --------------------------------------------------------------------------


def test_nothing_touches_sys_path() -> None:
    found = [
        where
        for where, node in nodes_in_pack()
        if (isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.path", "site"))
        or (isinstance(node, ast.ImportFrom) and node.module in ("sys", "site"))
    ]
    assert found == []


def test_no_bare_except() -> None:
    handlers = [(w, node) for w, node in nodes_in_pack() if isinstance(node, ast.ExceptHandler)]
    assert handlers
    assert [where for where, handler in handlers if handler.type is None] == []


def test_nothing_prints() -> None:
    names = [(w, node.id) for w, node in nodes_in_pack() if isinstance(node, ast.Name)]
    assert names
    assert [where for where, name in names if name == "print"] == []
