"""Find out whether only a softmax reads the products of queries and keys.

A softmax over the keys' positions does not change if the same number is added to all products of a query. So a constant that is added
to a channel of all keys changes nothing.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from vbpfx.rules.axes import spelling
from vbpfx.rules.calls import called_module
from vbpfx.rules.table import Argument, operator_of


def softmaxed(products: fx.Node, network: fx.GraphModule) -> bool:
    """Return whether a call that multiplies queries and keys computes a softmax over the keys, or only such a softmax reads it.

    Scales and masks may lie in between. The keys' positions are the last axis of the products.
    """
    if operator_of(products).scales_by_width:  # attention in one call
        return True
    value: Any = products.meta["val"]
    return bool(products.users) and all(
        _leads_to_softmax(user, products, value.ndim, network) for user in products.users
    )


def _leads_to_softmax(node: fx.Node, operand: fx.Node, ndim: int, network: fx.GraphModule) -> bool:
    module = called_module(network, node)
    operator, name = operator_of(node, module), spelling(node) if module is None else type(module).__name__.lower()
    if name == "softmax":
        dim: Any = Argument(1, "dim").given(node, module)
        return isinstance(dim, int) and dim % ndim == ndim - 1
    of_numbers = operator.scales and not any(isinstance(v, fx.Node) for v in node.args if v is not operand)
    same = node.meta.get("val") is not None and getattr(node.meta["val"], "shape", None) == operand.meta["val"].shape
    passes = operator.adds or of_numbers or operator.hands_on or operator.casts or name in ("masked_fill", "where")
    return (
        passes
        and same
        and bool(node.users)
        and all(_leads_to_softmax(user, node, ndim, network) for user in node.users)
    )
