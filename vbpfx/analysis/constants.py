"""Constant channels: whether one channel of a hidden axis can be made constant, and by which values of its parameters.

The constants a that replace removed channels go into the bias of the layer that reads them. Behind zero padding this is
wrong beside the border, where fewer taps of the window see the constant. There the constants need a channel of their own,
which is padded like any other: its value is c inside, and its column of the reader's weight is W_P a / c, tap by tap.

One of the block's removed channels becomes that channel. Its rows in the producers are set to 0, and its biases, norms and
scales to plain numbers. Between producers and readers every operator treats the channel by itself, so its value follows
from these numbers alone, operator by operator. If an operator makes it depend on anything else (a mask, a gate that is
computed elsewhere, a padded average), no channel of the axis can be constant behind it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from vbpfx.analysis.evidence import Evidence
from vbpfx.plans.records import ConstantChannel, Consumer, ParameterAxis, Setting, ValueAxis
from vbpfx.rules import cells, layers, norms, parts, pointwise, shapes
from vbpfx.rules.axes import Operand, Site, operand_of
from vbpfx.rules.calls import called_module
from vbpfx.rules.table import operator_of

PADDED = "a padded or transposed convolution reads it"
# The values that are tried for the channel's biases, then for other parameters. One that leaves c between a half and 2 is
# taken at once.
_TRIED = (1.0, 2.0, -1.0, 0.5, -2.0, 4.0, -4.0)
# A smaller c would make the reader's column for it large, and with it the rounding error.
_LEAST = 1e-2
_LAYERS = (
    layers.linear,
    layers.addmm,
    layers.convolution,
    layers.transposed_convolution,
    layers.matrix_product,
)
_NORMS = (norms.batch_norm, norms.instance_norm)
_NORM_PARAMETERS = {"running_mean": 0.0, "running_var": 1.0, "weight": 0.0}
# Operators behind which a channel has the value that it has in front of them.
_MOVING = (
    pointwise.unchanged,
    shapes.permutation,
    shapes.regrouping,
    shapes.expansion,
    shapes.repetition,
    shapes.repetition_of_entries,
    parts.indexing,
    parts.aten_slice,
    parts.narrowing,
    parts.select,
    parts.splitting,
    parts.concatenation,
    parts.stack,
    cells.pixel_shuffle,
    cells.pixel_unshuffle,
    norms.rolling,
)


class _NotConstantError(Exception):
    """Behind a call, the channel's value depends on more than its own parameters."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site


def find_constant_channel(
    produced: Iterable[str],
    producing: set[str],
    consumers: Sequence[Consumer],
    parameters: Sequence[ParameterAxis],
    carriers: Sequence[ValueAxis],
    network: fx.GraphModule,
    evidence: Evidence,
) -> ConstantChannel | tuple[str, str]:
    """Return how a channel of an axis can be made constant for the readers that pad it; or the node and the reason why not.

    Args:
        produced: names of the weights whose rows produce the axis.
        producing: names of the nodes that call these layers.
        consumers: the layers that read the axis.
        parameters: all axes of parameters that hold the axis.
        carriers: all values that hold it.
        network: the graph.
        evidence: what the rules said about it.
    """
    padded = [consumer for consumer in consumers if consumer.padded]
    reader = padded[0].node
    for consumer in consumers:
        if not consumer.alone:
            return consumer.node, f"{PADDED}, and {consumer.weight} is used by more than its own layer"
    read = {(consumer.weight, consumer.weight_axis) for consumer in consumers}
    own = [entry for entry in parameters if (entry.name, entry.axis) not in read]
    nodes = list(dict.fromkeys(evidence.nodes[carrier.node] for carrier in carriers))
    channel = _Channel(nodes, producing, network, evidence)
    found: dict[float, tuple[dict[str, float], dict[str, float]]] = {}
    obstacle: Site | None = None
    for settings in channel.attempts(own, set(produced)):
        try:
            values = {c.source.node: channel.value(evidence.nodes[c.source.node], settings) for c in padded}
        except _NotConstantError as error:
            obstacle = error.site
            continue
        sizes = [min(abs(c), 1 / abs(c)) if c and math.isfinite(c) else 0.0 for c in values.values()]
        found[min(sizes)] = settings, values
        if min(sizes) >= 0.5:
            break
    if not found:
        assert obstacle is not None
        return obstacle.node.name, (
            f"{PADDED}. The constants of removed channels then need a channel that is constant before the padding, and behind "
            f"{obstacle.name} no channel is constant"
        )
    if max(found) < _LEAST:
        return reader, (
            f"{PADDED}. The constants of removed channels then need a channel with a constant value other than 0, and no bias or "
            f"norm in front of the convolution can give it one"
        )
    settings, values = found[max(found)]
    for weight in {consumer.weight for consumer in padded}:
        if len({values[consumer.source.node] for consumer in padded if consumer.weight == weight}) > 1:
            return reader, f"{PADDED} in several calls, and in these a constant channel has different values"
    sources = dict.fromkeys(consumer.source for consumer in consumers)
    return ConstantChannel(
        tuple(Setting(entry, settings[entry.name]) for entry in own),
        tuple(values.get(source.node, 0.0) for source in sources),
    )


class _Channel:
    """Computes the value of one channel from the numbers that its parameters are set to.

    Args:
        nodes: all nodes that carry the axis, in graph order.
        producing: names of those that call its producers.
    """

    def __init__(
        self, nodes: Sequence[fx.Node], producing: set[str], network: fx.GraphModule, evidence: Evidence
    ) -> None:
        self._producing, self._network, self._names = producing, network, evidence.names
        self._carrying = set(nodes)
        self._sites = {node: Site(node, called_module(network, node), evidence.names, evidence.read) for node in nodes}

    def attempts(self, own: Iterable[ParameterAxis], rows: set[str]) -> Iterator[dict[str, float]]:
        """Yield, for every attempt, parameter -> the number that it is set to at the channel.

        Rows of producers and kernels of depthwise convolutions become 0, norms a weight of 0 over the mean 0 and the variance
        1, biases each of the values that are tried, and all other parameters 1. Then each of these others takes these values
        in turn, with biases of 1: a norm may be written out by hand.

        Args:
            own: the parameters to set.
            rows: the weights of the producers.
        """
        names = list(dict.fromkeys(entry.name for entry in own))
        roles = self._roles(rows, 1.0)
        plain = dict.fromkeys(names, 1.0)
        for bias in _TRIED:
            yield plain | {name: value for name, value in self._roles(rows, bias).items() if name in plain}
        settings = plain | {name: value for name, value in roles.items() if name in plain}
        for name in names:
            for value in _TRIED if name not in roles else ():
                yield settings | {name: value}

    def _roles(self, rows: set[str], bias: float) -> dict[str, float]:
        """Return parameter -> number, for the parameters of layers and norms."""
        known = dict.fromkeys(rows, 0.0)
        for node, site in self._sites.items():
            rule = site.operator.rule
            roles: dict[Operand | None, float] = {}
            if rule in _LAYERS:
                roles[_bias(site)] = bias
                if node.name not in self._producing:
                    roles[site.operand(1, "weight")] = 0.0
            elif rule in _NORMS:
                numbers = _NORM_PARAMETERS | {"bias": bias}
                roles = {operand: numbers[name] for name, operand in norms.norm_parameters(site).items()}
            known |= {operand.owner: value for operand, value in roles.items() if operand is not None}
        return known

    def value(self, node: fx.Node, settings: Mapping[str, float]) -> float:
        """Return the channel's value at a node.

        Raises:
            _NotConstantError: it depends on more than the settings.
        """
        known: dict[fx.Node, float | None] = {}
        waiting = [node]
        while waiting:
            at = waiting[-1]
            operands = [] if self._starts_here(at, settings) else [n for n in self._operands(at) if n not in known]
            if operands:
                waiting += operands
                continue
            waiting.pop()
            if at not in known:
                known[at] = self._compute(at, known, settings)
        found = known[node]
        assert found is not None
        return found

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        """Return the operands that carry the axis; a call that returns a tuple is replaced by its own operand."""
        return [n for n in map(_taken_from, node.all_input_nodes) if n in self._carrying]

    def _starts_here(self, node: fx.Node, settings: Mapping[str, float]) -> bool:
        """Return whether the channel's value behind a call does not depend on its value in front of it."""
        site = self._sites[node]
        if site.operator.rule in _LAYERS:
            return True
        scale = norms.norm_parameters(site).get("weight") if site.operator.rule in _NORMS else None
        return self._setting(scale, settings) == 0

    def _compute(self, node: fx.Node, known: Mapping[fx.Node, float | None], settings: Mapping[str, float]) -> float:
        site = self._sites[node]
        rule = site.operator.rule
        values: set[float | None] = set()
        if not self._starts_here(node, settings):
            held = node.all_input_nodes if rule in _MOVING else self._operands(node)
            values = {self._known(n, known, settings) for n in held if self._carries(n, settings)}
        same = values.pop() if len(values) == 1 else None
        found: float | None = None
        if rule in _LAYERS:
            found = self._made(site, settings)
        elif rule in _NORMS:
            found = self._normed(site, same, settings)
        elif rule in _MOVING or site.operator.hands_on:
            found = same
        elif rule is norms.pooling:
            found = None if _averages_padding(site) else same
        elif rule is norms.padding:
            found = same if _keeps_constants(site) else None
        elif rule is norms.reduction:
            found = same if site.name in ("mean", "amax", "amin") else None
        elif rule is pointwise.prelu:
            found = same if same is not None and same >= 0 else None
        elif rule is parts.glu and same is not None:
            found = same / (1 + math.exp(-same))
        elif rule is pointwise.elementwise:
            found = self._applied(node, site.module, known, settings)
        if found is None:
            raise _NotConstantError(site)
        return found

    def _carries(self, node: fx.Node, settings: Mapping[str, float]) -> bool:
        """Return whether an operand holds the axis, as a value or as a parameter that is set at the channel."""
        own = operand_of(node, self._names)
        return _taken_from(node) in self._carrying or self._setting(own, settings) is not None

    def _setting(self, operand: Operand | None, settings: Mapping[str, float]) -> float | None:
        return settings.get(operand.owner) if operand is not None and operand.is_parameter else None

    def _made(self, site: Site, settings: Mapping[str, float]) -> float | None:
        """Return the bias of a layer whose weight is 0 at the channel: a producer, or a depthwise convolution.

        Any other layer that carries the axis mixes the positions, so that a constant does not stay constant.
        """
        producing = site.node.name in self._producing
        if not producing and self._setting(site.operand(1, "weight"), settings) != 0:
            return None
        bias = _bias(site)
        return 0.0 if bias is None else self._setting(bias, settings)

    def _normed(self, site: Site, x: float | None, settings: Mapping[str, float]) -> float | None:
        parameters = norms.norm_parameters(site)
        set_to = {name: self._setting(operand, settings) for name, operand in parameters.items()}
        w, b = set_to.get("weight", 1.0), set_to.get("bias", 0.0)
        if w == 0 or b is None or w is None:
            return b if w == 0 else None
        if norms.takes_statistics(site):  # a constant equals its mean
            return b
        m, v = set_to.get("running_mean"), set_to.get("running_var")
        eps = site.argument(7, "eps", 1e-5)
        return None if x is None or m is None or v is None else (x - m) / math.sqrt(v + eps) * w + b

    def _applied(
        self,
        node: fx.Node,
        module: nn.Module | None,
        known: Mapping[fx.Node, float | None],
        settings: Mapping[str, float],
    ) -> float | None:
        """Return an elementwise operator's value, computed on a single number; None if another tensor enters."""

        def number(operand: fx.Node) -> Any:
            value = self._known(operand, known, settings)
            if value is None:
                raise ValueError("not a number")
            like = operand.meta["val"]
            dtype = torch.float64 if like.is_floating_point() else like.dtype
            return torch.full((1,) * max(1, like.ndim), value, dtype=dtype)

        if module is not None and any(True for _ in module.parameters()):
            return None
        try:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), number)
            with torch.no_grad():
                if module is not None:
                    result = module(*args, **kwargs)
                elif node.op == "call_method":
                    result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
                else:
                    result = node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception:  # an operator may refuse single numbers with any exception
            return None
        return float(result) if isinstance(result, Tensor) and result.numel() == 1 else None

    def _known(
        self, operand: fx.Node, known: Mapping[fx.Node, float | None], settings: Mapping[str, float]
    ) -> float | None:
        if _taken_from(operand) in known:
            return known[_taken_from(operand)]
        own = operand_of(operand, self._names)
        if own is None or not own.is_parameter:
            return None
        if own.owner in settings:
            return settings[own.owner]
        tensor = operator.attrgetter(str(operand.target))(self._network) if math.prod(own.shape) == 1 else None
        return None if tensor is None or tensor.is_meta else float(tensor.detach())


def _taken_from(node: fx.Node) -> fx.Node:
    """Return the operand of a call that returns a tuple, and any other node itself."""
    return node.all_input_nodes[0] if operator_of(node).takes_apart else node


def _bias(site: Site) -> Operand | None:
    """Return the bias of a layer's call."""
    if site.operator.rule is layers.matrix_product:
        return None
    return site.operand(0, "input") if site.operator.rule is layers.addmm else site.operand(2, "bias")


def _averages_padding(site: Site) -> bool:
    """Return whether a pooling averages over zeros that it pads with, so that constants are smaller beside the border."""
    if "avg" not in site.name or "adaptive" in site.name:
        return False
    padding = site.argument(3, "padding", 0)
    padded = any(padding) if isinstance(padding, (tuple, list)) else bool(padding)
    divides_by_another = site.argument(6, "divisor_override") is not None
    return divides_by_another or (padded and bool(site.argument(5, "count_include_pad", True)))


def _keeps_constants(site: Site) -> bool:
    """Return whether a pad call surrounds a constant with the same constant."""
    return bool(site.argument(2, "mode", "constant") != "constant")
