"""Move graphs that were traced on tensors of the CPU to another device, whose memory is not there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from xconv_fx import hooks
from xconv_fx.hooks.fake import FakeTensor
from xconv_fx.hooks.pytree import tree_map_only

from .graph import is_primal, is_tangent


def place(halves: Sequence[fx.GraphModule], device: str) -> None:
    """Move the graphs of a forward (the first) and its backward to `device`: tensors' values, and `device` arguments.

    What they compute of images is laid out as Inductor chooses for this device; parameters and inputs stay as they are.
    """
    nodes = [node for half in halves for node in half.graph.nodes]
    move = _Move(device)
    for node in nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device(device)}
        _map_values(node, "val", move)
    if hooks.channels_last_convolutions(halves[0]):
        move = _Move(device, images=True)
        for node in nodes:
            if not (is_primal(node) or is_tangent(node)):
                _map_values(node, "val", move)


def place_inputs(gm: fx.GraphModule, device: str) -> None:
    """Say of all values of a Dynamo graph that they are on `device`, for passes that ask before autograd traces it."""
    move = _Move(device)
    for node in gm.graph.nodes:
        _map_values(node, "example_value", move)


def _map_values(node: fx.Node, key: str, function: Callable[[FakeTensor], Tensor]) -> None:
    if key in node.meta:
        node.meta[key] = tree_map_only(FakeTensor, function, node.meta[key])


class _Move:
    """Fake tensors on another device, channels-last if they may be `images`; one for all of the same kind."""

    def __init__(self, device: str, images: bool = False) -> None:
        self.device, self.images = torch.device(device), images
        self.moved: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, value: FakeTensor) -> Tensor:
        kind = (tuple(map(int, value.shape)), tuple(map(int, value.stride())), value.dtype)
        if kind not in self.moved:
            meta = torch.empty_strided(*kind[:2], dtype=value.dtype, device="meta")
            if self.images and value.dim() == 4:
                meta = torch.empty_like(meta, memory_format=torch.channels_last)
            self.moved[kind] = FakeTensor(value.fake_mode, meta, self.device)
        return self.moved[kind]
