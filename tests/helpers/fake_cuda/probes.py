"""Dense probes on a device that is not there: what they launch, and their kernel, interpreted and compiled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from xconv_fx.hooks import dispatch
from xconv_fx.ops import dense, probe_kernel, triton_words


class _Launches(TorchDispatchMode):
    """Counts operators that launch, and tensors of the host among what they read and give."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not dispatch.is_view(func) and func.namespace != "xconv":
            self.found[str(func)] += 1
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        if any(tensor.device.type == "cpu" and tensor.dim() for tensor in tensors):
            self.found["host"] += 1
        return result

    def kernel(self, *_: Any, **__: Any) -> None:
        self.found["entries_kernel"] += 1


def launches(kind: str, size: Sequence[int], probes: int) -> dict[str, Counter[str]]:
    """What encoding and decoding of a tensor launch."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from .generate import _installed

    _installed(90)
    functions: dict[str, Any] = {
        name: getattr(dense, f"dense_{name}")._init_fn for name in ("encode", "decode")
    }  # fmt: skip
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, seed = torch.empty(size, device="cuda:0"), torch.empty(1, dtype=torch.int64, device="cuda:0")
        held = torch.empty(size[0], dense.sums_held(kind, probes, size), device="cuda:0")
        arguments = {"encode": (x, seed, probes, kind), "decode": (held, seed, list(size), kind, torch.float32)}
        found = {}
        for name, function in functions.items():
            with _Launches() as counted:
                grids = mock.MagicMock()
                grids.__getitem__.return_value = counted.kernel
                with mock.patch.object(probe_kernel, "entries_kernel", grids):
                    function(*arguments[name])
            found[name] = counted.found
    return found


def interpreted(kind: str, seed: int) -> tuple[int, float]:
    """Entries of a block of odd size whose bits differ from those of plain operations, and the largest difference."""
    drawn = torch.tensor([seed])
    wanted = dense.Probes(drawn, kind, 7, 3000, torch.float32)._entries(37, 1999, slice(1, 6))
    assert not triton_words.usable(drawn.device)
    found = probe_kernel.entries(drawn, 37, 1999, range(1, 6), kind == "rademacher", torch.float32)
    return int((wanted != found).sum()), float((wanted - found).abs().max())


def local_memory(capability: int, signs: bool) -> int:
    """Bytes of spills and stack of the kernel, for 64 columns."""
    from triton.compiler import ASTSource

    from .cubins import usage

    names = probe_kernel.entries_kernel.arg_names
    constants = {"SIGNS": signs, "ROWS": 16, "COLUMNS": 64}
    integers = ("first", "rows", "column", "columns")
    signature = {
        "out": "*fp32", "seed": "*i64", **dict.fromkeys(integers, "i32"), **dict.fromkeys(constants, "constexpr")
    }  # fmt: skip
    source = ASTSource(
        probe_kernel.entries_kernel, signature, {(names.index(name),): value for name, value in constants.items()}
    )
    return usage("entries_kernel", source, capability, {}).local
