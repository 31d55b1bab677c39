"""Stacks: axes of G groups of d channels, such as the heads of attention, in which every group may keep other channels.

A view splits an axis of G d channels into two axes, one of G groups and one of d channels, or merges two such axes into one. Channel c
of the axis of d channels stands for one channel of every group. The groups can choose their channels independently of each other, as
long as all keep the same number, if they can be told apart everywhere: every value that has the axis of d channels needs one axis that
counts the groups, and no operator may mix or reorder the entries of that axis.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import networkx as nx

from vbpfx.analysis.evidence import Evidence
from vbpfx.rules.axes import Axis, Repeated, Stacked


class Span(NamedTuple):
    """Channel c of a component is channel ``start`` + ``step`` c of the axis.

    If ``size`` is not 0, it is channel ``start`` + ``step`` (c mod ``size``) + ``stride`` (c // ``size``). ``counting`` and ``divisor`` are
    those of :class:`vbpfx.plans.records.ValueAxis`.
    """

    axis: Axis
    start: int
    step: int
    size: int = 0
    stride: int = 0
    counting: int = 0
    divisor: int = 1


class Stacks:
    """Finds the axes that count the groups of stacks. What was found for one stack is kept for others with the same axes."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self._touching: dict[Axis, list[Stacked]] = defaultdict(list)
        for relation in evidence.stacked:
            for axis in (relation.whole, relation.inner, relation.outer):
                if axis is not None:
                    self._touching[axis].append(relation)
        self._repeated: dict[Axis, list[Repeated]] = defaultdict(list)
        for repeated in evidence.repeated:
            for axis in (repeated.x, repeated.out):
                self._repeated[axis].append(repeated)
        self._known: dict[tuple[Axis, int], dict[Axis, int]] = {}

    def counting(self, base: Axis, groups: int) -> dict[Axis, int]:
        """Return the axes that count the same groups as ``base``, with a divisor: entry i is in group (i // divisor) mod G.

        A divisor of 0 stands for an axis that is reached on two ways, which say different things about its entries.

        Args:
            base: an axis whose entry i is in group i mod G.
            groups: G.
        """
        if (base, groups) not in self._known:
            found, waiting = {base: 1}, deque([base])
            while waiting:
                axis = waiting.popleft()
                for other, divisor in self._beside(axis, found[axis], groups) if found[axis] else ():
                    if other not in found:
                        found[other] = divisor
                        waiting.append(other)
                    elif found[other] != divisor:
                        found[other] = 0
            self._known |= {(axis, groups): found for axis, divisor in found.items() if divisor == 1}
        return self._known[base, groups]

    def _beside(self, axis: Axis, divisor: int, groups: int) -> Iterator[tuple[Axis, int]]:
        """Yield the axes that one relation connects with an axis, each with its divisor."""
        sizes = self.evidence.sizes
        if axis in self.evidence.graph:
            yield from ((other, divisor) for other in self.evidence.graph.neighbors(axis))
        for whole, inner, outer in ((r.whole, r.inner, r.outer) for r in self._touching[axis]):
            size, count = sizes[inner], sizes[whole] // sizes[inner]
            if axis == inner and size % (divisor * groups) == 0:
                yield whole, divisor
            elif axis == outer and count % (divisor * groups) == 0:
                yield whole, divisor * size
            elif axis == whole and size % (divisor * groups) == 0:
                yield inner, divisor
            elif (
                axis == whole and outer is not None and divisor % size == 0 and count % (divisor // size * groups) == 0
            ):
                yield outer, divisor // size
        for repeated in self._repeated.get(axis, ()):
            if axis == repeated.x:
                yield repeated.out, divisor * repeated.count
            elif axis == repeated.out and divisor % repeated.count == 0:
                yield repeated.x, divisor // repeated.count

    def counted_by(self, inner: Axis, counting: dict[Axis, int]) -> Axis | None:
        """Return the axis that counts the groups in a value, given one of its axes, which has the channels of one group.

        None if the groups cannot be told apart.
        """
        evidence = self.evidence
        if inner.is_parameter or inner in evidence.reduced or inner in evidence.contracted or inner in evidence.divided:
            return None
        shape = evidence.nodes[inner.owner].meta["val"].shape
        beside = [a for d in range(len(shape)) if d != inner.dim and (a := Axis(inner.owner, d)) in counting]
        if len(beside) != 1 or not counting[beside[0]]:
            return None
        return None if beside[0] in evidence.out_of_order else beside[0]


class Step(NamedTuple):
    """A segment of a stack that holds channels of one group, and the relations that say which group it is."""

    segment: Any
    told: tuple[tuple[Stacked, int], ...]


def group_by_group(
    graph: nx.Graph[Any], stacks: Stacks, spans: Callable[[list[Any]], Iterable[Span]], width: int
) -> tuple[int, list[Span]] | None:
    """Return the number of groups G and the places of G d channels of a component; None if its groups cannot be told apart.

    Args:
        graph: the segments of one component of d channels. The attribute ``step`` of an edge between a segment of a stack and the
            channels of one group is a :class:`Step`; it is None for other edges.
        stacks: all stacks of the network.
        spans: a function that returns the places of d channels on the axes of some segments.
        width: d.
    """
    sizes = stacks.evidence.sizes
    steps = [(step, a if step.segment == b else b) for a, b, step in graph.edges(data="step") if step]
    counts = {
        relation: sizes[relation.whole] // sizes[relation.inner] for step, _ in steps for relation, _ in step.told
    }
    first = min(counts, key=lambda relation: counts[relation])
    groups = counts[first]
    counting = stacks.counting(first.outer, groups) if first.outer is not None else {}
    piece = {s: number for number, found in enumerate(_pieces(graph)) for s in found}
    group_of: dict[int, int] = {}
    for step, _ in steps:
        for relation, entry in step.told:
            divisor = counting.get(relation.outer, 0) if relation.outer is not None else 0
            if (
                not divisor
                or group_of.setdefault(piece[step.segment], entry // divisor % groups) != entry // divisor % groups
            ):
                return None
    shared = {piece[other] for _, other in steps}
    if not shared.isdisjoint(group_of) or shared | set(group_of) != set(piece.values()):
        return None
    found: list[Span] = []
    places: dict[Axis, dict[int, list[Span]]] = defaultdict(lambda: defaultdict(list))
    for segment, number in sorted(piece.items()):
        for span in spans([segment]):
            if number in group_of:
                places[span.axis][group_of[number]].append(span)
            elif (axis := stacks.counted_by(span.axis, counting)) is not None:
                found.append(span._replace(size=width, counting=axis.dim, divisor=counting[axis]))
            else:
                return None
    for axis, by_group in places.items():
        own = [by_group[group] for group in range(groups)]
        if axis in stacks.evidence.divided or len({len(entries) for entries in own}) > 1:
            return None
        for first_span, *others in zip(*own, strict=True):
            stride = others[0].start - first_span.start
            if any(
                (s.start, s.step) != (first_span.start + stride * (n + 1), first_span.step)
                for n, s in enumerate(others)
            ):
                return None
            consecutive = stride == first_span.step * width
            found.append(first_span if consecutive else first_span._replace(size=width, stride=stride))
    return groups, found


def _pieces(graph: nx.Graph[Any]) -> Iterator[set[Any]]:
    """Yield the segments that correspond channel by channel without passing from a stack to the channels of one group."""
    plain = nx.Graph()
    plain.add_nodes_from(graph)
    plain.add_edges_from((a, b) for a, b, step in graph.edges(data="step") if not step)
    yield from nx.connected_components(plain)
