"""Generated code that releases every buffer as soon as it is dead.

Two habits of Inductor keep dead buffers alive. Its C++ backend gathers all loop nests between two extern kernels into
one function, whose buffers are then alive at once. And a buffer that dies is not released when one of the same size
will be allocated later: it waits, through everything in between, to be taken again. Inductor allows the wait where its
own estimate of the peak bears it, which knows neither workspaces nor copies. A call and an allocation cost
microseconds, the buffers megabytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

# Loop nests that allocate and release less than this together share a C++ function.
GATHERED_BYTES = 1 << 16


@contextlib.contextmanager
def early_releases(enabled: bool = True) -> Iterator[None]:
    """While active, code is generated that ends a C++ function after every loop nest that allocates or releases much,
    and that takes a dead buffer again at once or never."""
    if not enabled:
        yield
        return
    from torch._inductor.codegen.cpp import CppScheduling
    from torch._inductor.codegen.wrapper import AllocateLine

    generate = CppScheduling.codegen_node

    def codegen_node(self: Any, node: Any) -> Any:
        result = generate(self, node)
        names = {*node.get_buffer_names(), *node.last_usage}
        if sum(_buffer_bytes(name) for name in names) > GATHERED_BYTES:
            self._set_flush_status(True)
        return result

    def should_reuse_buffer(self: Any, free_line: Any, size: int) -> bool:
        return bool(size <= GATHERED_BYTES or free_line.scheduler_node_index + 1 == self.scheduler_node_index)

    with (
        mock.patch.object(CppScheduling, "codegen_node", codegen_node),
        mock.patch.object(AllocateLine, "should_reuse_buffer", should_reuse_buffer),
    ):
        yield


def _buffer_bytes(name: str) -> int:
    """Bytes of a buffer of the graph that is being lowered; 0 for a tuple of tensors, which are buffers themselves."""
    from torch._inductor.ir import MultiOutputLayout
    from torch._inductor.virtualized import V

    if isinstance(getattr(V.graph.name_to_buffer.get(name), "layout", None), MultiOutputLayout):
        return 0
    return int(V.graph.get_numel(name)) * V.graph.get_dtype(name).itemsize
