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


def test_what_is_private_to_torch_stays_in_its_place() -> None:
    wrong = [
        f"{module}:{node.lineno} names torch.{node.attr}"
        for module, path in MODULES.items()
        if not module.removeprefix("xconv_fx.").startswith(PRIVATE)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch"
        and node.attr.startswith("_") and not node.attr.startswith("__")
    ]  # fmt: skip
    wrong += [
        f"{module} imports {other}"
        for module, found in IMPORTS.items()
        if not module.removeprefix("xconv_fx.").startswith(PRIVATE)
        for other in found
        if other.startswith("torch._")
    ]
    assert not wrong, "\n".join(wrong)
