"""Rewrite the pair to a plan: encode right after the producer, decode just before each reader, replay what is dropped.

The pair is what PyTorch's partitioner made of the joint graph, so nothing here can be undone by a later cut or merged
by a common-subexpression pass: a residual's place among the values that cross is taken by its payload, and each reader
in the backward gets a decoded value of its own, made just before it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from xconv_fx.codec_spec import BLOCK, CodecSpec
from xconv_fx.hooks.pytree import tree_leaves
from xconv_fx.ops import fixed
from xconv_fx.ops.codec import SavedAs, codec_of
from xconv_fx.plan import Choice

from .find_norms import Norm
from .graph import first_operation, inline, origin_meta, tensor_of
from .partition import Pair
from .rematerialize import RecomputeSubgraph
from .residuals import Residual, physical_order

aten = torch.ops.aten

BITS = CodecSpec("bitmask")
_CONVERT = torch.ops.prims.convert_element_type.default


def rewrite(
    pair: Pair,
    residuals: Mapping[str, Residual],
    chains: Mapping[str, RecomputeSubgraph],
    choices: Iterable[Choice],
    stream: int | None = None,
    norms: Mapping[str, Norm] = MappingProxyType({}),
    blocks: Mapping[str, RecomputeSubgraph] = MappingProxyType({}),
) -> None:
    """Apply the choices to the pair in place.

    `chains` and `blocks` replay residuals, by name: from the nearest others, and from where a block begins.
    `stream` names a fixed sequence of seeds (`torch.ops.xconv.stream_seeds`); None draws from torch's generator each
    step. `norms` are the normalisations of what is held as "fixed".
    """
    how = {choice.residual: choice for choice in choices if choice.codec != "keep"}
    replayed = {name: choice for name, choice in how.items() if choice.codec == "recompute"}
    chosen = {name: (blocks if choice.kind == BLOCK else chains)[name] for name, choice in replayed.items()}
    writer = _Writer(pair, residuals, chosen, how, stream, norms)
    # Readers before what they read: a replayed residual adds readers to its sources.
    for name in reversed([name for name in residuals if name in how]):
        writer.apply(residuals[name], how[name])
    _ask_once(pair.forward.graph)
    for module in (pair.forward, pair.backward):
        module.graph.eliminate_dead_code()
        module.graph.lint()
        module.recompile()


def _ask_once(graph: fx.Graph) -> None:
    """Ask for the gradients that were noted of samples where the graph begins, and for all that read them.

    Between the layers, each would end what a CUDA graph can capture.
    """
    asked: dict[Any, fx.Node] = {}
    first = first_operation(graph)
    for node in graph.find_nodes(op="call_function", target=torch.ops.xconv.noted_gradients.default):
        same = asked.setdefault(node.args, node)
        if same is node:
            if node is not first:
                first.prepend(node)
        else:
            node.replace_all_uses_with(same)
            graph.erase_node(node)


def _element(seeds: Tensor, number: int) -> Tensor:
    """One of the seeds, in a dim of its own. Taken where it is read: at the start of a graph, it raised the peak."""
    return seeds if len(seeds) == 1 else seeds[number : number + 1]


def _is_seeded(choice: Choice) -> bool:
    """Whether its codec draws."""
    return choice.codec != "recompute" and codec_of(choice.codec).seeded


class _Writer:
    """The rewrite of one pair, and what it has already added: seeds, packed masks, booleans of the forward."""

    def __init__(
        self,
        pair: Pair,
        residuals: Mapping[str, Residual],
        chains: Mapping[str, RecomputeSubgraph],
        how: Mapping[str, Choice],
        stream: int | None,
        norms: Mapping[str, Norm],
    ) -> None:
        self.pair, self.chains, self.how, self.stream = pair, chains, how, stream
        self.fixed = {name: norm for name, norm in norms.items() if name in how and how[name].codec == "fixed"}
        self.residuals = residuals
        self.scaled: dict[str, tuple[fx.Node, fx.Node, SavedAs]] = {}
        self.forward, self.backward = pair.forward.graph, pair.backward.graph
        self.saved = pair.saved()
        # The partitioner copies nodes under the joint graph's names: what both halves compute has one name in both.
        self.computed = {node.name: node for node in self.forward.nodes if node.op == "call_function"}
        self.sketches, self.draws = self.numbered_sketches()
        self.seeds: dict[torch.device, tuple[fx.Node, fx.Node]] = {}
        self.packed: dict[fx.Node, tuple[fx.Node, SavedAs]] = {}
        self.lifted: dict[Any, fx.Node] = {}

    def apply(self, residual: Residual, choice: Choice) -> None:
        approximate = self.is_approximate(residual.name)
        if approximate or choice.codec == "bitmask":
            for mask in residual.masks:
                self.hoist(mask, residual.order)
        _convert_for_each(self.backward, residual.backward)
        if choice.codec == "recompute":
            readers, chain = list(residual.backward.users), self.chains[residual.name]
            if chain.reruns and readers:  # Once, where the first of its readers stands.
                value = self.replay(chain, residual, min(readers), approximate)
                residual.backward.replace_all_uses_with(value)
                readers = []
            for reader in readers:
                reader.replace_input_with(residual.backward, self.replay(chain, residual, reader, approximate))
        elif residual.backward.users:
            if choice.codec == "bitmask" and residual.value.dtype != torch.bool:
                return  # Its masks are read from bits; weight gradients read the tensor itself.
            self.hold(residual, residual.saved_as(choice.spec))
        self.pair.remove_saved(residual.forward, residual.backward)

    def is_approximate(self, name: str) -> bool:
        """Whether the residual is held approximately, or replayed from one that is."""
        choice = self.how.get(name)
        if choice is not None and choice.codec == "recompute":
            return any(self.is_approximate(source) for source in self.chains[name].sources)
        return choice is not None and not codec_of(choice.codec).lossless

    def hold(self, residual: Residual, held: SavedAs) -> None:
        """Encode after the producer, cross with the payload, decode before every reader."""
        codec = codec_of(held.spec.codec)
        if residual.name in self.fixed:
            words, table, held = self.fix(residual.name)
            for reader in list(residual.backward.users):
                self.decode([words], held, [table], residual.backward, reader)
            return
        if residual.value.dtype == torch.bool:
            words, held = self.pack(residual.forward, residual.order)
            for reader in list(residual.backward.users):
                self.decode([words], held, [], residual.backward, reader)
            return
        seeds = [self.drawn(residual.value.device)] if codec.seeded else []
        number = self.sketches.get(residual.name, 0)
        payload = self.encode(residual.forward, held, [forward for forward, _ in seeds], number)
        for reader in list(residual.backward.users):
            self.decode(payload, held, [backward for _, backward in seeds], residual.backward, reader, number)

    def encode(self, node: fx.Node, held: SavedAs, seeds: list[fx.Node], number: int = 0) -> list[fx.Node]:
        """The payload's placeholders in the backward; `number` is the place of its seed among all."""
        codec = codec_of(held.spec.codec)

        def encode(x: Tensor, *seeds: Tensor) -> tuple[Tensor, ...]:
            if not seeds:
                return codec.encode(x, x, held)
            return codec.encode(torch.ops.xconv.stored(x), _element(seeds[0], number), held)

        with self.forward.inserting_before(max([node, *seeds]).next):
            payload = inline(self.forward, encode, [node, *seeds], origin_meta(node))
        return [self.pair.add_saved(part, f"{node.name}_{held.spec.codec}") for part in payload]

    def decode(
        self, payload: list[fx.Node], held: SavedAs, side: list[fx.Node], old: fx.Node, reader: fx.Node, number: int = 0
    ) -> None:
        """Give `reader` a decoded value in the place of `old`. `side` are all seeds, or for "fixed" its table."""
        codec = codec_of(held.spec.codec)

        def decode(*values: Tensor) -> Tensor:
            last = _element(values[-1], number) if codec.seeded else values[-1]
            return codec.decode(values[: len(payload)], last, held)

        with self.backward.inserting_before(reader):
            (value,) = inline(self.backward, decode, [*payload, *side], origin_meta(old))
        reader.replace_input_with(old, value)

    def numbered_sketches(self) -> tuple[dict[str, int], int]:
        """Which of the step's seeds each residual takes whose codec draws, and how many seeds there are.

        They are drawn at once, but as layers that run one after the other would draw them (`xconv_fx.nn`): one for each
        layer that reads such a residual, of which the first is taken. What no layer reads comes after.
        """
        drawing = [r for name, r in self.residuals.items() if name in self.how and _is_seeded(self.how[name])]
        drawing.sort(key=lambda residual: residual.forward)
        draws = sorted(((number, r.name) for r in drawing for number in r.reads), key=lambda draw: draw[0])
        names = [name for _, name in draws] + [r.name for r in drawing if not r.reads]
        return {name: names.index(name) for name in names}, len(names)

    def drawn(self, device: torch.device) -> tuple[fx.Node, fx.Node]:
        """The step's seeds on a device: the forward's node and the backward's placeholder, made once."""
        if device not in self.seeds:
            stream, count = self.stream, self.draws

            def draw() -> Tensor:
                if stream is None:
                    return torch.ops.xconv.seeds(count, device)
                return torch.ops.xconv.stream_seeds(stream, count, device)

            with self.forward.inserting_before(first_operation(self.forward)):
                (node,) = inline(self.forward, draw, [])
            self.seeds[device] = (node, self.pair.add_saved(node, "xconv_seeds"))
        return self.seeds[device]

    # Fixed point: codes that carry a sign, and the table of scales that both halves read.

    def fix(self, name: str) -> tuple[fx.Node, fx.Node, SavedAs]:
        """The backward's placeholders for codes and table of a normalised residual, made once, and what they are."""
        if name not in self.scaled:
            residual, norm = self.residuals[name], self.fixed[name]
            held = residual.saved_as(self.how[name].spec)
            scales = functools.partial(norm.scales, fixed.bits_of(held))
            table = self.append(scales, norm.mean, norm.rstd, *norm.coefficients)
            read = [residual.forward, table]
            if norm.activation is not None:
                read.append(self.append(lambda z: aten.gt.Scalar(z, 0), norm.activation))
            words = self.append(lambda x, table, *positive: fixed.encode(x, table, held, *positive)[0], *read)
            crossing = [
                self.pair.add_saved(node, f"{name}_{part}") for node, part in ((words, "fixed"), (table, "scales"))
            ]
            self.scaled[name] = (crossing[0], crossing[1], held)
        return self.scaled[name]

    def append(self, function: Callable[..., Tensor], *inputs: fx.Node) -> fx.Node:
        """A value of the forward, computed as soon as its inputs are there."""
        place = max(inputs).next
        while place.op == "placeholder":
            place = place.next
        with self.forward.inserting_before(place):
            return inline(self.forward, function, inputs, origin_meta(inputs[0]))[0]

    def told(self, boolean: fx.Node) -> fx.Node | None:
        """The boolean of a comparison, or `relu(z) <= 0` of a ReLU, from a sign that codes carry; None if none does.

        Made at the backward's insertion point.
        """
        for name, norm in self.fixed.items():
            positive = norm.tells(boolean)
            if positive is not None:
                words, table, held = self.fix(name)
                read = functools.partial(_told, held, positive)
                return inline(self.backward, read, [words, table], origin_meta(boolean))[0]
        return None

    # Booleans: computed in the forward from true values, held as bits.

    def hoist(self, mask: fx.Node, order: tuple[int, ...]) -> None:
        """Take a comparison out of the backward: the forward computes it, and its bits cross."""
        for reader in list(mask.users):
            with self.backward.inserting_before(reader):
                boolean = self.told(mask) or self.unpack(self.in_forward(mask), order)
            reader.replace_input_with(mask, boolean)
        if not mask.users and mask in self.backward.nodes:
            self.backward.erase_node(mask)

    def pack(self, boolean: fx.Node, order: tuple[int, ...]) -> tuple[fx.Node, SavedAs]:
        if boolean not in self.packed:
            value = tensor_of(boolean)
            assert value is not None
            if len(order) != value.dim():  # Between it and the residual lies a change of shape.
                order = physical_order(value, channels_last=False)
            held = SavedAs(BITS, tuple(int(n) for n in value.shape), torch.bool, order)
            (words,) = self.encode(boolean, held, [])
            self.packed[boolean] = (words, held)
        return self.packed[boolean]

    def in_forward(self, node: fx.Node) -> fx.Node:
        """The forward's node of the same value as a node of the backward that no gradient enters."""
        if node.name in self.saved:
            return self.saved[node.name][0]
        twin = self.computed.get(node.name)
        if twin is not None and twin.target is node.target:
            return twin
        arguments = fx.node.map_arg((node.args, node.kwargs), self.in_forward)
        return self.make(node, *arguments)  # type: ignore[misc]

    def make(self, like: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        """An operation like `like` in the forward, behind its arguments; the same one for the same arguments."""
        key = (like.target, _frozen(args), _frozen(kwargs))
        if key not in self.lifted:
            inputs = [arg for arg in tree_leaves((args, kwargs)) if isinstance(arg, fx.Node)]
            place = max(inputs).next if inputs else first_operation(self.forward)
            while place.op == "placeholder":
                place = place.next
            with self.forward.inserting_before(place):
                node = self.forward.create_node("call_function", like.target, args, kwargs)
            node.meta = dict(like.meta)
            node.meta.pop("partitioner_tag", None)
            self.lifted[key] = node
        return self.lifted[key]

    # Replayed residuals.

    def replay(self, chain: RecomputeSubgraph, residual: Residual, reader: fx.Node, approximate: bool) -> fx.Node:
        """A copy of the chain before `reader`: the value of the residual."""
        masks = set(chain.masks or ()) if approximate else set()
        values: dict[fx.Node, fx.Node] = {}
        for node in (*chain.inputs, *chain.nodes):
            if node in chain.nodes:
                values[node] = self.copy(node, values, reader, residual, node in masks)
            else:
                values[node] = self.available(node)
        return values[chain.nodes[-1]]

    def available(self, node: fx.Node) -> fx.Node:
        """The backward's node of a forward value, crossing with it if need be."""
        if node.name in self.pair.restored:
            return self.pair.restored[node.name]
        if node.name not in self.saved:
            self.saved[node.name] = (node, self.pair.add_saved(node, node.name))
        return self.saved[node.name][1]

    def copy(
        self, node: fx.Node, values: dict[fx.Node, fx.Node], reader: fx.Node, residual: Residual, masked: bool
    ) -> fx.Node:
        """The node's copy before `reader`; a `masked` one takes its boolean from the bits of the true value."""
        with self.backward.inserting_before(reader):
            if not masked:
                return self.backward.node_copy(node, lambda arg: values[arg])
            bits = self.told(node)
            if node.target is not aten.relu.default:
                return bits or self.unpack(node, residual.order)
            bits = bits or self.unpack(self.not_positive(node), residual.order)
            return inline(self.backward, _rectify, [bits, values[node.all_input_nodes[0]]], origin_meta(node))[0]

    def unpack(self, boolean: fx.Node, order: tuple[int, ...]) -> fx.Node:
        """The forward's boolean, unpacked at the backward's insertion point."""
        words, held = self.pack(boolean, order)
        return inline(self.backward, lambda w: codec_of("bitmask").decode((w,), w, held), [words])[0]

    def not_positive(self, node: fx.Node) -> fx.Node:
        """The forward's `node <= 0`: what ReLU's backward asks, so that both share their bits."""
        key = (aten.le.Scalar, (node, 0), ())
        if key not in self.lifted:
            with self.forward.inserting_before(node.next):
                self.lifted[key] = inline(self.forward, lambda x: aten.le.Scalar(x, 0), [node], origin_meta(node))[0]
        return self.lifted[key]


def _convert_for_each(graph: fx.Graph, value: fx.Node) -> None:
    """Give every reader of the value in another dtype a conversion of its own.

    Each then gets a decoded value of its own, as it does without autocast. Shared by several, the conversion of what is
    decoded from many reads is stored, in float32.
    """
    for conversion in [user for user in value.users if user.target is _CONVERT and len(user.users) > 1]:
        for reader in list(conversion.users):
            with graph.inserting_before(reader):
                reader.replace_input_with(conversion, graph.node_copy(conversion))
        graph.erase_node(conversion)


def _told(held: SavedAs, positive: bool, words: Tensor, table: Tensor) -> Tensor:
    sign = fixed.sign(words, table, held)
    return sign if positive else aten.logical_not.default(sign)


def _rectify(not_positive: Tensor, x: Tensor) -> Tensor:
    return torch.where(not_positive, torch.zeros((), dtype=x.dtype, device=x.device), x)


def _frozen(value: Any) -> Any:
    """Arguments as a dictionary key."""
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, Mapping):
        return tuple((key, _frozen(item)) for key, item in value.items())
    return value
