"""Masks: find which mask covers which value, so that padding does not enter the statistics.

A mask has one entry per sample and token, (B, T). It covers a value if the value has the mask's own token axis. The
dependency graph tells this: both axes come from the same tokens. Equal lengths do not tell it: an image tower may have
as many patches as the text has words. An experiment tells whether nonzero entries mean tokens or padding
(:mod:`vbpfx.analysis.polarity`).
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx
from torch import Tensor, fx

from vbpfx.analysis.evidence import Evidence, find_evidence
from vbpfx.analysis.polarity import Polarity, try_out
from vbpfx.errors import AnalysisError
from vbpfx.graph.capture import Captured
from vbpfx.plans.records import ValueAxis
from vbpfx.rules.axes import Axis

# The names of the masks in Hugging Face models, which are found without being named by the user.
FOUND_BY_THEMSELVES = ("attention_mask", "decoder_attention_mask")
# The mask argument's name, alone or with the meaning of its nonzero entries.
MaskArgument = str | tuple[str, Polarity]


@dataclass(frozen=True)
class Mask:
    """A mask that covers a value.

    Attributes:
        node: name of the mask's node.
        axes: the value's axes for samples and tokens, counted from the end; one axis if they are merged, sample after
            sample.
        nonzero: what the mask's nonzero entries stand for.
    """

    node: str
    axes: tuple[int, ...]
    nonzero: Polarity = "tokens"


def find_masks(
    captured: Captured, sources: Iterable[ValueAxis], mask: MaskArgument | None = None
) -> dict[ValueAxis, Mask]:
    """Return the mask of every source that has one.

    A mask that was found automatically but covers no source causes a warning. So does a mask whose padding influences
    the output.

    Args:
        mask: the name of the model's argument that is the mask, alone or with the meaning of its nonzero entries, such
            as ``("pad", "padding")``. By default ``attention_mask`` and ``decoder_attention_mask``, if the model was
            captured with them. The meaning is found out by experiment. If that shows nothing, nonzero entries are
            padding if the name contains ``padding``, and tokens otherwise.

    Raises:
        AnalysisError: the argument is not an input of the graph, has no axes for samples and tokens, covers none of the
            sources, or its entries mean the opposite of what was stated.
    """
    name, stated = settled_mask(mask)
    inputs = {str(n.target): n for n in captured.graph_module.graph.nodes if n.op == "placeholder"}
    chosen = [n for n in FOUND_BY_THEMSELVES if n in inputs] if name is None else [name]
    for argument in chosen:
        value = inputs[argument].meta["val"] if argument in inputs else None
        if name is not None and not (isinstance(value, Tensor) and value.ndim == 2):
            raise AnalysisError(
                f"mask={name!r} is not an input of the captured graph with an entry per sample and token; its inputs are "
                f"{', '.join(inputs)}"
            )
    masks = [inputs[n] for n in chosen if isinstance(inputs[n].meta["val"], Tensor) and inputs[n].meta["val"].ndim == 2]
    if not masks:
        return {}
    evidence = find_evidence(captured)
    found: dict[ValueAxis, Mask] = {}
    for node in masks:
        tokens, rows = _tokens(_beginnings(node, inputs), evidence)
        covered = {
            source: axes
            for source in sources
            if (axes := _covered(source, tokens, rows, evidence.sizes[Axis(node.name, 0)], evidence)) is not None
        }
        if covered:
            beside = [n.name for n in inputs.values() if n is not node and Axis(n.name, 1) in tokens]
            nonzero = _nonzero(captured, node, beside, stated)
            found |= {source: Mask(node.name, axes, nonzero) for source, axes in covered.items()}
    if not found:
        message = f"the mask {', '.join(chosen)} covers none of the values that are observed"
        if name is not None:
            raise AnalysisError(f"{message}: none of them has the mask's token axis; leave mask= out")
        warnings.warn(f"{message}; if the batches are padded, padding enters the statistics", stacklevel=3)
    return found


def settled_mask(mask: Any) -> tuple[str | None, Polarity | None]:
    """Return the name and the polarity in an argument ``mask``; None for what it does not state.

    Raises:
        AnalysisError: it is neither a name nor a pair of a name and a polarity.
    """
    match mask:
        case None | str():
            return mask, None
        case (str() as name, ("tokens" | "padding") as stated):
            return name, stated
    raise AnalysisError(
        f"mask={mask!r} is not a mask: pass the name of the model's argument, or the name and what its nonzero entries stand for, such as "
        f"('key_padding_mask', 'padding') or ('attention_mask', 'tokens')"
    )


def _nonzero(captured: Captured, mask: fx.Node, beside: Collection[str], stated: Polarity | None) -> Polarity:
    """Return what the nonzero entries of a mask stand for."""
    usual: Polarity = "padding" if "padding" in str(mask.target) else "tokens"
    tried = try_out(captured, mask, beside)
    if tried.influences:
        warnings.warn(
            f"the mask {mask.target} does not separate padding from tokens: a token at a padding position influences the output at "
            f"other positions, whether its zero or its nonzero entries are taken for padding. Its "
            f"{'nonzero' if (stated or usual) == 'padding' else 'zero'} entries are left out of the statistics; if "
            f"that is not right, leave the argument out of the batches, or name another mask=",
            stacklevel=5,
        )
    elif stated is not None and tried.polarity not in (None, stated):
        raise AnalysisError(
            f"mask=({str(mask.target)!r}, {stated!r}) says that its nonzero entries are {stated}, and they are {tried.polarity}: "
            f"replacing a token whose entry is {'zero' if stated == 'padding' else 'nonzero'} leaves the output at other positions as "
            f"it is. Pass mask=({str(mask.target)!r}, {tried.polarity!r}), or the name alone"
        )
    return stated or tried.polarity or usual


def _beginnings(mask: fx.Node, inputs: Mapping[str, fx.Node]) -> list[Axis]:
    """Return the token axes of a mask and of the token ids that belong to it.

    The token ids are needed because the graph may have no link between the mask and the values, if the mask is used by
    indexing or inside of a layer. They are found by their name; otherwise they are the only other input with as many
    samples and tokens.
    """
    ids = inputs.get(str(mask.target).replace("attention_mask", "input_ids"))
    if ids is None or ids is mask:
        shapes = {n: v.shape[:2] for n in inputs.values() if isinstance(v := n.meta["val"], Tensor) and v.ndim > 1}
        alike = [n for n, shape in shapes.items() if n is not mask and shape == shapes[mask]]
        ids = alike[0] if len(alike) == 1 else None
    both = [mask] if ids is None or ids is mask else [mask, ids]
    return [Axis(node.name, 1) for node in both if node.meta["val"].shape[:2] == mask.meta["val"].shape]


def _tokens(beginnings: list[Axis], evidence: Evidence) -> tuple[set[Axis], set[Axis]]:
    """Return every axis that is the mask's token axis, and every axis that has samples and tokens merged into rows."""
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
    source: ValueAxis, tokens: set[Axis], rows: set[Axis], samples: int, evidence: Evidence
) -> tuple[int, ...] | None:
    """Return the source's axes for samples and tokens; None if it does not have the mask's tokens."""
    shape = evidence.nodes[source.node].meta["val"].shape
    others = [dim for dim in range(len(shape)) if dim != source.axis % len(shape)]
    merged = [dim for dim in others if Axis(source.node, dim) in rows]
    batch = [dim for dim in others if shape[dim] == samples]
    along = [dim for dim in others if Axis(source.node, dim) in tokens and dim not in batch[:1]]
    if merged:
        return (merged[0] - len(shape),)
    return (batch[0] - len(shape), along[0] - len(shape)) if batch and along else None
