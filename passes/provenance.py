"""Where a node of an FX graph comes from: the layer and the line of the user's code that made it."""

from __future__ import annotations

import re
from typing import Any

from torch import fx


def layer_of(node: fx.Node) -> str:
    """Dotted path of the module that the node came from, or "" (functions outside any module)."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    path = re.sub(r"^L\[['\"]\w+['\"]\]\.?", "", path).replace("._modules", "")
    return re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", path).strip(".")


def source_of(node: fx.Node) -> str:
    """`file.py:line` of the innermost frame of the user's code that made the node, or ""."""
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f"{lines[-1][0]}:{lines[-1][1]}" if lines else ""


def origin_meta(node: fx.Node) -> dict[str, Any]:
    """The part of a node's metadata that says where it came from."""
    keys = ("stack_trace", "nn_module_stack", "source_fn_stack", "original_aten", "seq_nr", "from_node",
            "fwd_nn_module_stack", "fwd_source_fn_stack")  # fmt: skip
    return {key: node.meta[key] for key in keys if key in node.meta}
