"""Linear blocks: hidden axes whose channels may be replaced by linear combinations of them.

If only linear maps that are the same for all channels lie between the layers that produce an axis and the layers that read it, the axis
may get other coordinates: the producers' rows are multiplied by an invertible matrix, and the readers' columns by its inverse. In
attention this holds for the values, which are summed over tokens with weights common to all channels of a head, and for queries and
keys, of which products are taken.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from vbpfx.analysis.evidence import Evidence
from vbpfx.plans.records import Consumer, ParameterAxis, ValueAxis
from vbpfx.rules.calls import called_module
from vbpfx.rules.layers import attention, einsum, matrix_product
from vbpfx.rules.parts import aten_slice, concatenation, indexing, narrowing, select, splitting, stack
from vbpfx.rules.shapes import expansion, permutation, regrouping, repetition, repetition_of_entries
from vbpfx.rules.table import operator_of

# Rules of calls that may multiply two computed values.
PRODUCTS = (attention, einsum, matrix_product)
_LINEAR = (
    *PRODUCTS,
    aten_slice, concatenation, indexing, narrowing, select, splitting, stack,
    expansion, permutation, regrouping, repetition, repetition_of_entries,
)  # fmt: skip


def is_linear(
    produced: Sequence[str],
    consumers: Sequence[Consumer],
    parameters: Sequence[ParameterAxis],
    values: Sequence[ValueAxis],
    network: fx.GraphModule,
    evidence: Evidence,
) -> bool:
    """Return whether the channels of an axis may be replaced by linear combinations of the channels of their group.

    Args:
        produced: the weights that produce the axis.
        consumers, parameters, values: as in :class:`vbpfx.plans.records.Block`.
    """
    if any(consumer.padded or consumer.groups > 1 or not consumer.alone for consumer in consumers):
        return False
    if any(parameter.step != 1 for parameter in parameters) or any(value.step != 1 for value in values):
        return False
    makers = evidence.makers(values)
    at_makers = {evidence.position[name] for name in makers}
    reading = {(consumer.weight, consumer.weight_axis) for consumer in consumers}
    for parameter in parameters:
        uses = evidence.uses[parameter.name]
        if (parameter.name, parameter.axis) in reading:
            continue
        if len(uses) != 1 or uses[0] not in at_makers or parameter.name in evidence.tied or parameter.groups > 1:
            return False
    nodes = {value.node: value.axis for value in values}
    return all(name in makers or _keeps_linear(evidence.nodes[name], axis, network) for name, axis in nodes.items())


def _keeps_linear(node: fx.Node, axis: int, network: fx.GraphModule) -> bool:
    """Return whether a call does the same linear map to all channels of an axis of its value."""
    operator = operator_of(node, called_module(network, node))
    if operator.rule in _LINEAR or operator.hands_on or operator.casts:
        return True
    if not operator.scales:
        return False
    own, *others = node.args
    back = node.meta["val"].ndim - axis
    return isinstance(own, fx.Node) and all(
        not isinstance(other, fx.Node) or _is_broadcast(other, back) for other in others
    )


def _is_broadcast(node: fx.Node, back: int) -> bool:
    """Return whether a factor is the same for all channels of the axis that is counted from the end."""
    value = node.meta.get("val")
    return not isinstance(value, Tensor) or value.ndim < back or value.shape[-back] == 1
