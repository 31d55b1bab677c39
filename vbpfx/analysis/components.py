"""The connected components of the dependency graph: axes, or parts of axes, that must be narrowed together.

Axes that correspond channel by channel over their whole length form a *group*. One group may be a part of another, such
as a chunk of a packed gate or an operand of a concatenation. Groups are cut into segments where such parts begin and
end, and every cut is carried over to all groups that it concerns. The segments are the vertices of a graph, and a
connected component of segments is one hidden axis. Its channel c is channel ``start + step c`` of every axis that it
touches; it may touch an axis several times.

If an axis is read in an interleaved way, several of its channels correspond to one channel of the part. The segments of
a component then differ in length, and a longer segment holds several channels for each channel of the component.

An axis of G groups of d channels (the heads of attention) has a link for each group to the axis of d channels that a view splits it
into. So the component has d channels, each of which stands for one channel of every group. If the groups can be told apart
(:mod:`vbpfx.analysis.stacks`), it gets G d channels instead.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import networkx as nx

from vbpfx.analysis.evidence import Evidence
from vbpfx.analysis.stacks import Span, Stacks, Step, group_by_group
from vbpfx.rules.axes import Axis, Stacked

_MISFIT = "a slice with a step takes some of its entries, and another slice cuts between them"


@dataclass(frozen=True)
class Component:
    """A hidden axis: channels of several axes that must be kept or removed together.

    Attributes:
        width: the number of channels d.
        spans: the places of these channels on all axes.
        groups: the number of groups of channels, of which each may keep other channels, but all as many.
        stacked: whether a view splits the axis into groups of channels, or merges such groups.
        of_keys: the places, as an axis and the position of channel 0, that belong to the second factor of products over the axis; None
            if a place belongs to both factors.
    """

    width: int
    spans: tuple[Span, ...]
    groups: int = 1
    stacked: bool = False
    of_keys: frozenset[tuple[Axis, int]] | None = frozenset()

    @property
    def axes(self) -> set[Axis]:
        """The axes that hold the component's channels."""
        return {span.axis for span in self.spans}


class _Segment(NamedTuple):
    """Channels ``start`` to ``stop`` of a group."""

    group: int
    start: int
    stop: int


class _Link(NamedTuple):
    """Channel c of group ``part`` stands for ``step`` channels of group ``whole``, from ``start`` + ``step`` c on."""

    whole: int
    part: int
    start: int
    step: int


def components(evidence: Evidence) -> Iterator[Component]:
    """Yield every component of the graph; the time is linear in the size of the graph."""
    groups = list(nx.connected_components(evidence.graph))
    number = {axis: index for index, group in enumerate(groups) for axis in group}
    size = [evidence.sizes[next(iter(group))] for group in groups]
    links = [_Link(number[p.whole], number[p.part], p.start, 1) for p in evidence.parts]
    taken_at: dict[_Link, str] = {}
    for entry in evidence.grouped:
        whole, part = number[entry.whole], number[entry.part]
        taken_at[_Link(whole, part, 0, size[whole] // size[part])] = entry.part.owner
    paired = [_Link(number[pair.first], number[pair.second], 0, 1) for pair in evidence.pairs]
    plain = dict.fromkeys((*links, *taken_at))
    stacked: dict[_Link, tuple[tuple[Stacked, int], ...]] = {}
    for link, told in _stacked(evidence, number, size):
        if link not in plain:
            stacked[link] = (*stacked.get(link, ()), told)
    pairs = {link for link in paired if link.whole != link.part and link not in plain}
    links = list(dict.fromkeys((*plain, *stacked, *paired)))
    cuts = _cuts(links, size)
    stacks = Stacks(evidence)
    graph: nx.Graph[_Segment] = nx.Graph()
    for index in range(len(groups)):
        graph.add_nodes_from(_segments(index, cuts.get(index, {0, size[index]}), 0, size[index]))
    for link in links:
        stop = link.start + link.step * size[link.part]
        segments = _segments(link.whole, cuts[link.whole], link.start, stop)
        if any((end - link.start) % link.step for segment in segments for end in (segment.start, segment.stop)):
            for axis in (*groups[link.whole], *groups[link.part]):
                evidence.opaque[axis].append((taken_at[link], _MISFIT))
            continue
        for segment in segments:
            start, stop = ((end - link.start) // link.step for end in (segment.start, segment.stop))
            step = Step(segment, stacked[link]) if link in stacked else None
            graph.add_edge(segment, _Segment(link.part, start, stop), step=step, pair=link in pairs)
    for found in nx.connected_components(graph):
        width = math.gcd(*(segment.stop - segment.start for segment in found))
        own = graph.subgraph(found)
        of_keys = _of_keys(own, partial(_spans, width=width, groups=groups), evidence)
        if all(step is None for _, _, step in own.edges(data="step")):
            yield Component(width, tuple(_spans(sorted(found), width, groups)), of_keys=of_keys)
            continue
        apart = group_by_group(own, stacks, partial(_spans, width=width, groups=groups), width)
        if apart is None:
            yield Component(width, tuple(_spans(sorted(found), width, groups)), stacked=True, of_keys=of_keys)
        else:
            count, spans = apart
            yield Component(width * count, tuple(spans), count, stacked=True, of_keys=of_keys)


def _of_keys(
    graph: nx.Graph[_Segment], spans: Callable[[list[_Segment]], Iterable[Span]], evidence: Evidence
) -> frozenset[tuple[Axis, int]] | None:
    """Return the places that belong to the second factor of products (:attr:`Component.of_keys`)."""
    if not any(pair for _, _, pair in graph.edges(data="pair")):
        return frozenset()
    one_side = nx.Graph()
    one_side.add_nodes_from(graph)
    one_side.add_edges_from((a, b) for a, b, pair in graph.edges(data="pair") if not pair)
    found: set[tuple[Axis, int]] = set()
    for side in nx.connected_components(one_side):
        places = {(span.axis, span.start) for span in spans(sorted(side))}
        roles = {factor.role for axis, _ in places for factor in evidence.paired.get(axis, ())}
        if len(roles) != 1:
            return None
        found |= places if roles == {"key"} else set()
    return frozenset(found)


def _stacked(
    evidence: Evidence, number: dict[Axis, int], size: list[int]
) -> Iterator[tuple[_Link, tuple[Stacked, int]]]:
    """Yield the links of stacked axes, one for each group, with the relation and the number of the group.

    Stacks that no weight produces (samples, tokens) are left out.
    """
    joined = nx.Graph([(number[r.whole], number[r.inner]) for r in evidence.stacked])
    joined.add_edges_from((number[p.whole], number[p.part]) for p in evidence.parts)
    joined.add_edges_from((number[g.whole], number[g.part]) for g in evidence.grouped)
    produced = {number[axis] for axis in evidence.produced}
    made = {group for found in nx.connected_components(joined) if not produced.isdisjoint(found) for group in found}
    for relation in evidence.stacked:
        whole, inner = number[relation.whole], number[relation.inner]
        if whole in made:
            for group in range(size[whole] // size[inner]):
                yield _Link(whole, inner, group * size[inner], 1), (relation, group)


def _spans(segments: list[_Segment], width: int, groups: list[set[Axis]]) -> Iterator[Span]:
    """Yield the places of a component's channels: one for a segment of its width, several for a longer segment."""
    for segment in segments:
        step = (segment.stop - segment.start) // width
        for axis in groups[segment.group]:
            yield from (Span(axis, segment.start + first, step) for first in range(step))


def _cuts(links: list[_Link], size: list[int]) -> dict[int, set[int]]:
    """Return, for every group, the places where it is cut, including its ends.

    Cuts are passed on along the links until none is new.
    """
    cuts: dict[int, set[int]] = defaultdict(set)
    touching: dict[int, list[_Link]] = defaultdict(list)
    for link in links:
        for group in (link.whole, link.part):
            cuts[group] |= {0, size[group]}
            touching[group].append(link)
        cuts[link.whole] |= {link.start, link.start + link.step * size[link.part]}
    waiting = dict.fromkeys(links)
    while waiting:
        link = next(iter(waiting))
        del waiting[link]
        whole, part = cuts[link.whole], cuts[link.part]
        stop = link.start + link.step * size[link.part]
        within = [c - link.start for c in whole if link.start <= c <= stop]
        down = {c // link.step for c in within if c % link.step == 0} - part
        up = {link.start + link.step * c for c in part} - whole
        part |= down
        whole |= up
        waiting |= dict.fromkeys([*(touching[link.part] if down else ()), *(touching[link.whole] if up else ())])
    return cuts


def _segments(group: int, cuts: set[int], start: int, stop: int) -> list[_Segment]:
    return [_Segment(group, a, b) for a, b in pairwise(sorted(c for c in cuts if start <= c <= stop))]
