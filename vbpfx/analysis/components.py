"""The connected components of the dependency graph: everything that must be narrowed together.

Axes that run channel by channel into one another over their whole length form a *group*. Groups that are parts of
others (chunks of a packed gate, what a concatenation joins) are cut where the parts begin and end, until every cut has
reached every group that it concerns. The segments in between are the vertices, and a component of segments is
one hidden axis: its channel c stands at ``start + c`` of every axis it touches, in some of them several times.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import networkx as nx

from vbpfx.analysis.evidence import Evidence
from vbpfx.rules.axes import Axis


@dataclass(frozen=True)
class Component:
    """Channels that live and die together.

    Attributes:
        width: their number d.
        spans: ``(axis, start)``: channel c is channel start + c of the axis.
    """

    width: int
    spans: tuple[tuple[Axis, int], ...]

    @property
    def axes(self) -> set[Axis]:
        """The axes that hold it."""
        return {axis for axis, _ in self.spans}


class _Segment(NamedTuple):
    """Channels ``start`` to ``stop`` of a group."""

    group: int
    start: int
    stop: int


class _Link(NamedTuple):
    """Channel c of group ``part`` is channel ``start`` + c of group ``whole``."""

    whole: int
    part: int
    start: int


def components(evidence: Evidence) -> Iterator[Component]:
    """Every component, groups that have no parts first come first served, in linear time."""
    groups = list(nx.connected_components(evidence.graph))
    number = {axis: index for index, group in enumerate(groups) for axis in group}
    size = [evidence.sizes[next(iter(group))] for group in groups]
    links = list(dict.fromkeys(_Link(number[p.whole], number[p.part], p.start) for p in evidence.parts))
    cuts = _cuts(links, size)
    graph: nx.Graph[_Segment] = nx.Graph()
    for index in range(len(groups)):
        graph.add_nodes_from(_segments(index, cuts.get(index, {0, size[index]}), 0, size[index]))
    for link in links:
        stop = link.start + size[link.part]
        for segment in _segments(link.whole, cuts[link.whole], link.start, stop):
            graph.add_edge(segment, _Segment(link.part, segment.start - link.start, segment.stop - link.start))
    for found in nx.connected_components(graph):
        first = next(iter(found))
        spans = tuple((axis, s.start) for s in sorted(found) for axis in groups[s.group])
        yield Component(first.stop - first.start, spans)


def _cuts(links: list[_Link], size: list[int]) -> dict[int, set[int]]:
    """Group -> the places where it is cut, its ends included; a fixed point over all links."""
    cuts: dict[int, set[int]] = defaultdict(set)
    touching: dict[int, list[_Link]] = defaultdict(list)
    for link in links:
        for group in (link.whole, link.part):
            cuts[group] |= {0, size[group]}
            touching[group].append(link)
        cuts[link.whole] |= {link.start, link.start + size[link.part]}
    waiting = dict.fromkeys(links)
    while waiting:
        link = next(iter(waiting))
        del waiting[link]
        whole, part = cuts[link.whole], cuts[link.part]
        down = {c - link.start for c in whole if link.start <= c <= link.start + size[link.part]} - part
        up = {c + link.start for c in part} - whole
        part |= down
        whole |= up
        waiting |= dict.fromkeys([*(touching[link.part] if down else ()), *(touching[link.whole] if up else ())])
    return cuts


def _segments(group: int, cuts: set[int], start: int, stop: int) -> list[_Segment]:
    return [_Segment(group, a, b) for a, b in pairwise(sorted(c for c in cuts if start <= c <= stop))]
