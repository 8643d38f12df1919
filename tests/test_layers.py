"""A package imports from lines below its own alone, lazily or not; torch's private parts are named in two places."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).parents[1]
HOMES = {"xconv_fx.passes": "passes", "xconv_fx.cost_model": "cost_model", "xconv_fx": "xconv_fx"}
# Lowest first. Packages of one line do not import each other.
LAYERS = (
    {"units", "codec_spec", "fingerprint", "reproducible", "progress", "moved", "stack_room"},
    {"errors"},
    {"cost_model", "hooks"},
    {"options", "plan"},
    {"measure", "ops"},
    {"device"},
    {"passes", "noise"},
    {"planner"},
    {"runtime"},
    {"compiler"},
    {"step"},
    {"nn"},
    {"tools", "testing"},
    {"cli", "pytest_plugin"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Who may name what is private to torch.
PRIVATE = ("hooks", "ops.lowering")


def modules() -> dict[str, Path]:
    """All modules of the package, by the name they are imported by."""
    found: dict[str, Path] = {}
    for home, folder in HOMES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([home, *(part for part in parts if part != "__init__")])] = path
    return found


MODULES = modules()


def imports(module: str, tree: ast.AST) -> Iterator[str]:
    """What a module imports, in functions too, but not for type checkers alone."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    skipped = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for part in node.body
        for inner in ast.walk(part)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield inner if inner in MODULES else source


def top(module: str) -> str:
    """The package, or module, directly below `xconv_fx` that a module is of; "" for `xconv_fx` itself."""
    return [*module.split("."), ""][1]


IMPORTS = {module: set(imports(module, ast.parse(path.read_text()))) for module, path in MODULES.items()}


def test_every_package_has_its_place() -> None:
    assert {top(module) for module in MODULES} - {""} == set(LEVEL)


def test_imports_point_down() -> None:
    wrong = [
        f"{module} -> {other}"
        for module, found in IMPORTS.items()
        for other in found
        if top(module) and other.startswith("xconv_fx.") and top(other) != top(module)
        and LEVEL[top(other)] >= LEVEL[top(module)]
    ]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = nx.DiGraph((module, other) for module, found in IMPORTS.items() for other in found if other in MODULES)
    # A package and its modules: what `__init__` re-exports is defined below it.
    graph.remove_edges_from([(a, b) for a, b in graph.edges if a.startswith(f"{b}.")])
    graph.remove_node("xconv_fx")
    circles = [sorted(circle) for circle in nx.strongly_connected_components(graph) if len(circle) > 1]
    assert not circles, circles


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined(tree: ast.AST) -> Iterator[str]:
    """Names of functions, and of what is assigned or annotated, also as attributes."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def torch_privates(tree: ast.AST) -> Iterator[str]:
    """Private names that a source reads of something, as attributes or by `getattr`, and does not define itself.

    Names of operators are not private, whatever they begin with.
    """
    ours = {*defined(tree), "_public"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in ours:
            owner = ast.unparse(node.value)
            if owner.split(".")[-1] not in ("aten", "prims", "sys"):
                yield f"{owner}.{node.attr}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and private(str(name.value)) and name.value not in ours:
                yield f"{ast.unparse(node.args[0])}.{name.value}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                if any(map(private, f"{node.module}.{alias.name}".split("."))):
                    yield f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if any(map(private, alias.name.split("."))))


def test_what_is_private_to_torch_stays_in_its_place() -> None:
    wrong = [
        f"{module} names {name}"
        for module, path in MODULES.items()
        if not module.removeprefix("xconv_fx.").startswith(PRIVATE)
        for name in torch_privates(ast.parse(path.read_text()))
    ]
    assert not wrong, "\n".join(wrong)


def test_private_names_are_seen() -> None:
    source = """
import torch._a, torch.b
from torch.utils import _c, d
from torch.utils._e import f
torch.nn._g.h; layer._hooks; torch.ops.aten._operator; self.__class__
getattr(model, "_orig_mod", model); getattr(model, "shown")
def _own(): other._own()
"""
    assert sorted(torch_privates(ast.parse(source))) == [
        "layer._hooks", "model._orig_mod", "torch._a", "torch.nn._g", "torch.utils._c", "torch.utils._e.f",
    ]  # fmt: skip
