"""Routing: which rows of a value belong to which expert of a mixture.

The experts of a mixture keep their weights in one parameter, a *stack*: entry e of its first axis is the weight of expert e. Rows
(tokens) are sent to experts, and every expert computes with its own rows alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """How the rows of a value are divided among the experts.

    Attributes:
        kind: ``"offsets"``: rows are sorted by expert, and ``by`` holds for every expert where its rows end, (E,). ``"ids"``: ``by``
            holds the expert of every row. ``"axis"``: axis ``at`` of the value has one entry for each expert. ``"one"``: all rows
            belong to expert ``at``. ``"all"``: every expert reads all rows.
        experts: the number of experts E.
        by: the name of a node; ``""`` if the kind needs none.
        at: an axis, counted from the end, or an expert.
    """

    kind: Literal["offsets", "ids", "axis", "one", "all"]
    experts: int
    by: str = ""
    at: int = 0


def rows_by_expert(value: Tensor, routing: Routing, by: Tensor | None = None) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Yield (expert, index) so that ``value[index]`` holds the rows of this expert, with as many axes as ``value``.

    Args:
        value: the value whose rows are divided.
        routing: how they are divided.
        by: the value of the node ``routing.by``.
    """
    if routing.kind == "one":
        yield routing.at, (...,)
    elif routing.kind == "axis":
        ahead = (slice(None),) * (value.ndim + routing.at)
        for expert in range(routing.experts):
            yield expert, (*ahead, slice(expert, expert + 1))
    elif routing.kind == "offsets" and by is not None:
        start = 0
        for expert, end in enumerate(by.tolist()):
            yield expert, (slice(start, int(end)),)
            start = int(end)
    elif routing.kind == "ids" and by is not None:
        ids = by.flatten()
        for expert in range(routing.experts):
            yield expert, ((ids == expert).nonzero().flatten(),)
