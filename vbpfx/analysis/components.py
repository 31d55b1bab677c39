"""The connected components of the dependency graph: everything that must be narrowed together.

Axes that run channel by channel into one another over their whole length form a *group*. Groups that are parts of
others (chunks of a packed gate, what a concatenation joins) are cut where the parts begin and end, until every cut has
reached every group that it concerns. The segments in between are the vertices, and a component of segments is
one hidden axis: its channel c stands at ``start + step c`` of every axis it touches, in some of them several times.

Where an axis is read in an interleaved way, several of its channels go with one of the part's. The segments of one component
are then of unlike lengths, and the longer ones hold so many channels more for each of the component's.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import networkx as nx

from vbpfx.analysis.evidence import Evidence
from vbpfx.rules.axes import Axis


class Span(NamedTuple):
    """Channel c of a component is channel ``start`` + ``step`` c of the axis."""

    axis: Axis
    start: int
    step: int


_MISFIT = "a slice with a step takes some of its entries, and another slice cuts between them"


@dataclass(frozen=True)
class Component:
    """Channels that live and die together.

    Attributes:
        width: their number d.
        spans: where it stands.
    """

    width: int
    spans: tuple[Span, ...]

    @property
    def axes(self) -> set[Axis]:
        """The axes that hold it."""
        return {span.axis for span in self.spans}


class _Segment(NamedTuple):
    """Channels ``start`` to ``stop`` of a group."""

    group: int
    start: int
    stop: int


class _Link(NamedTuple):
    """Channel c of group ``part`` is the ``step`` channels from ``start`` + ``step`` c on of group ``whole``."""

    whole: int
    part: int
    start: int
    step: int


def components(evidence: Evidence) -> Iterator[Component]:
    """Every component, groups that have no parts first come first served, in linear time."""
    groups = list(nx.connected_components(evidence.graph))
    number = {axis: index for index, group in enumerate(groups) for axis in group}
    size = [evidence.sizes[next(iter(group))] for group in groups]
    links = [_Link(number[p.whole], number[p.part], p.start, 1) for p in evidence.parts]
    taken_at: dict[_Link, str] = {}
    for entry in evidence.grouped:
        whole, part = number[entry.whole], number[entry.part]
        taken_at[_Link(whole, part, 0, size[whole] // size[part])] = entry.part.owner
    links = list(dict.fromkeys((*links, *taken_at)))
    cuts = _cuts(links, size)
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
            graph.add_edge(segment, _Segment(link.part, start, stop))
    for found in nx.connected_components(graph):
        width = math.gcd(*(segment.stop - segment.start for segment in found))
        yield Component(width, tuple(_spans(sorted(found), width, groups)))


def _spans(segments: list[_Segment], width: int, groups: list[set[Axis]]) -> Iterator[Span]:
    """Where a component's channels stand: once in every segment of its own length, several times in longer ones."""
    for segment in segments:
        step = (segment.stop - segment.start) // width
        for axis in groups[segment.group]:
            yield from (Span(axis, segment.start + first, step) for first in range(step))


def _cuts(links: list[_Link], size: list[int]) -> dict[int, set[int]]:
    """Group -> the places where it is cut, its ends included; a fixed point over all links."""
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
