"""Give concatenations memory of their own: what they join is copied into them where others read it as well.

Inductor has a part computed right in its place within the concatenation, where its other readers find it. Then a skip
connection lies in memory twice its size from the encoder on, and a dense block holds all of its concatenations at once,
each for the one part that began there. See `ops/materialize.py`.
"""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten


def own_concatenations(graph: fx.Graph) -> None:
    """Rewrite a forward or backward graph in place."""
    for node in graph.find_nodes(op="call_function", target=aten.cat.default):
        parts = list(node.args[0])
        for place, part in enumerate(parts):
            if len(part.users) > 1 or parts.count(part) > 1:
                with graph.inserting_before(node):
                    parts[place] = graph.call_function(torch.ops.xconv.apart.default, (part,))
                parts[place].meta = dict(part.meta)
        node.args = (parts, *node.args[1:])
    graph.lint()
