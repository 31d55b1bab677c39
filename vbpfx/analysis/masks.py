"""Which masks cover which values: padding must not enter the statistics.

A mask has one entry per sample and token, (B, T). It covers a value if the value's token axis *is* the mask's, which the
dependency graph knows: both run from the same tokens. Equal lengths say nothing: an image tower may have as many
patches as the text has words.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import networkx as nx
from torch import Tensor, fx

from vbpfx.analysis.evidence import Evidence, gather
from vbpfx.errors import AnalysisError
from vbpfx.graph.capture import Captured
from vbpfx.records import Source
from vbpfx.rules.axes import Axis

# What Hugging Face models call the masks of their two inputs.
FOUND_BY_THEMSELVES = ("attention_mask", "decoder_attention_mask")


@dataclass(frozen=True)
class Mask:
    """A mask over a value.

    Attributes:
        node: name of the mask's node.
        axes: the axes of the value that stand for its samples and tokens, counted from the value's end; one axis where
            they are merged, sample after sample.
    """

    node: str
    axes: tuple[int, ...]


def find_masks(captured: Captured, sources: Iterable[Source], name: str | None = None) -> dict[Source, Mask]:
    """The mask of every source that has one.

    Args:
        name: the model's argument that is the mask; by default ``attention_mask`` and
            ``decoder_attention_mask``, where the model was captured with them.

    Raises:
        AnalysisError: the named argument is none of the graph's inputs, has no axes for samples and tokens, or covers none
            of the sources. A mask that was found by itself and covers none is a warning.
    """
    inputs = {str(n.target): n for n in captured.graph_module.graph.nodes if n.op == "placeholder"}
    chosen = [n for n in FOUND_BY_THEMSELVES if n in inputs] if name is None else [name]
    for mask in chosen:
        value = inputs[mask].meta["val"] if mask in inputs else None
        if name is not None and not (isinstance(value, Tensor) and value.ndim == 2):
            raise AnalysisError(
                f"mask={name!r} is no input of the captured graph with an entry per sample and token; its inputs are "
                f"{', '.join(inputs)}"
            )
    masks = [inputs[n] for n in chosen if isinstance(inputs[n].meta["val"], Tensor) and inputs[n].meta["val"].ndim == 2]
    if not masks:
        return {}
    evidence = gather(captured)
    found = {}
    for node in masks:
        tokens, rows = _tokens(_beginnings(node, inputs), evidence)
        for source in sources:
            axes = _covered(source, tokens, rows, evidence.sizes[Axis(node.name, 0)], evidence)
            if axes is not None:
                found[source] = Mask(node.name, axes)
    if not found:
        message = f"the mask {', '.join(chosen)} covers none of the values that are observed"
        if name is not None:
            raise AnalysisError(f"{message}: none of them has the mask's token axis; leave mask= out")
        warnings.warn(f"{message}; if the batches are padded, padding enters the statistics", stacklevel=3)
    return found


def _beginnings(mask: fx.Node, inputs: Mapping[str, fx.Node]) -> list[Axis]:
    """The token axes of a mask and of the token ids beside it, which masks made by indexing have no other link to."""
    ids = inputs.get(str(mask.target).replace("attention_mask", "input_ids"))
    both = [mask] if ids is None or ids is mask else [mask, ids]
    return [Axis(node.name, 1) for node in both if node.meta["val"].shape[:2] == mask.meta["val"].shape]


def _tokens(beginnings: list[Axis], evidence: Evidence) -> tuple[set[Axis], set[Axis]]:
    """Every axis that is the mask's token axis, and every one that holds samples and tokens merged into rows."""
    tokens, rows = set[Axis](), set[Axis]()
    for axis in beginnings:
        tokens |= nx.node_connected_component(evidence.graph, axis)
    samples, length = evidence.sizes[beginnings[0]._replace(dim=0)], evidence.sizes[beginnings[0]]
    waiting = [m for m in evidence.merged if (evidence.sizes[m.first], evidence.sizes[m.second]) == (samples, length)]
    while waiting:
        joined = [m for m in waiting if m.second in tokens or m.out in rows]
        if not joined:
            break
        for merged in joined:
            rows |= nx.node_connected_component(evidence.graph, merged.out)
            tokens |= nx.node_connected_component(evidence.graph, merged.second)
        waiting = [m for m in waiting if m not in joined]
    return tokens, rows


def _covered(
    source: Source, tokens: set[Axis], rows: set[Axis], samples: int, evidence: Evidence
) -> tuple[int, ...] | None:
    """The source's axes for samples and tokens; None where its tokens are not these."""
    shape = evidence.nodes[source.node].meta["val"].shape
    others = [dim for dim in range(len(shape)) if dim != source.axis % len(shape)]
    merged = [dim for dim in others if Axis(source.node, dim) in rows]
    batch = [dim for dim in others if shape[dim] == samples]
    along = [dim for dim in others if Axis(source.node, dim) in tokens and dim not in batch[:1]]
    if merged:
        return (merged[0] - len(shape),)
    return (batch[0] - len(shape), along[0] - len(shape)) if batch and along else None
