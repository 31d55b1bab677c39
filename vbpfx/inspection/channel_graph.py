"""Channel graphs: drawings of a block, from the layers that produce its hidden axis to the layers that read it."""

from __future__ import annotations

import difflib
from typing import Any

import networkx as nx
from torch import Tensor, fx

from vbpfx.analysis.blocks import Analysis
from vbpfx.display.templates import render
from vbpfx.errors import AnalysisError
from vbpfx.plans.records import Block
from vbpfx.rules.calls import called_module, describe

_WIDTH, _HEIGHT, _ACROSS, _DOWN, _MARGIN = 300, 46, 30, 34, 20
_LONGEST = 44  # characters of a line of text
_FILLS = {"producer": "#cfe3f7", "carrier": "#eeeeee", "statistic": "#f7ecc4", "consumer": "#d3eed3"}


def channel_graph(analysis: Analysis, name: str) -> str:
    """Return the channel graph of a block as SVG: producers, carriers, statistics and consumers, from top to bottom.

    Raises:
        AnalysisError: there is no block of this name.
    """
    known = {block.name: block for block in analysis.blocks}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or list(known)[:3]
        raise AnalysisError(
            f"there is no block {name!r}; " + (f"near it: {', '.join(near)}" if near else "there is none")
        )
    roles, edges = _parts(analysis, known[name])
    drawn: nx.DiGraph[str] = nx.DiGraph()
    drawn.add_nodes_from(roles)
    drawn.add_edges_from(edges)
    rows = [sorted(row, key=list(roles).index) for row in nx.topological_generations(drawn)]
    across = max(map(len, rows))
    width = 2 * _MARGIN + across * _WIDTH + (across - 1) * _ACROSS
    places: dict[str, tuple[float, float]] = {}
    for y, row in enumerate(rows):
        left = (width - len(row) * _WIDTH - (len(row) - 1) * _ACROSS) / 2
        places |= {n: (left + x * (_WIDTH + _ACROSS), 3 * _MARGIN + y * (_HEIGHT + _DOWN)) for x, n in enumerate(row)}
    height = 4 * _MARGIN + len(rows) * (_HEIGHT + _DOWN)
    title = f"{name or '(whole model)'}: {known[name].width} hidden channels"
    return render(
        "inspection/channel_graph.svg.jinja",
        title=title,
        width=width,
        height=height,
        margin=_MARGIN,
        arrows=[_arrow(places[a], places[b]) for a, b in drawn.edges],
        boxes=[_box(analysis, name, roles[name], places[name]) for name in roles],
        fills=_FILLS,
        box=(_WIDTH, _HEIGHT),
    )


def _parts(analysis: Analysis, block: Block) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Return the nodes of a block with their roles, in graph order, and the edges from each node to its readers."""
    nodes = analysis.captured.nodes
    carriers = {carrier.node for carrier in block.carriers}
    # include chunk and split between two carriers; they are not carriers themselves, as they return several tensors
    carriers |= {
        node.name
        for node in nodes.values()
        if not isinstance(node.meta.get("val"), Tensor)
        and _inputs(node, carriers)
        and {u.name for u in node.users} & carriers
    }
    parts = {node: "carrier" if _inputs(nodes[node], carriers) else "producer" for node in carriers}
    parts |= {reduction.node: "statistic" for reduction in block.reductions}
    parts |= {consumer.node: "consumer" for consumer in block.consumers}
    ordered = {node: parts[node] for node in nodes if node in parts}
    edges = [(source, node) for node in ordered for source in _inputs(nodes[node], set(ordered))
             if source in carriers or ordered[node] == "carrier"]  # fmt: skip
    return ordered, edges


def _inputs(node: fx.Node, among: set[str]) -> list[str]:
    return [source.name for source in node.all_input_nodes if source.name in among]


def _box(analysis: Analysis, name: str, part: str, place: tuple[float, float]) -> dict[str, Any]:
    """Return the position of a node's box, its colour and its two lines of text, for the template."""
    node = analysis.captured.nodes[name]
    value = node.meta.get("val")
    module = called_module(analysis.captured.graph_module, node)
    what = describe(node, module)
    shape = " x ".join(str(size) for size in value.shape[1:]) if isinstance(value, Tensor) else ""
    path = str(node.target) if node.op == "call_module" else name
    x, y = place
    return {"x": x, "y": y, "fill": _FILLS[part], "name": _short(path), "about": _short(f"{what}  {shape}")}


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    """Return the path of an arrow down to another row; it runs past the rows in between, if there are any."""
    x, y, to_x, to_y = start[0] + _WIDTH / 2, start[1] + _HEIGHT, end[0] + _WIDTH / 2, end[1]
    past = to_y - y > _DOWN
    if past and x == to_x:
        aside = _WIDTH * 0.75
        return f"M{x},{y} C{x + aside},{y + _DOWN} {x + aside},{to_y - _DOWN} {x},{to_y}"
    last = to_y - _DOWN if past else y
    return f"M{x},{y} V{last} C{x},{last + _DOWN} {to_x},{to_y - _DOWN} {to_x},{to_y}"


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2 - 1]}…{text[-_LONGEST // 2 :]}"
