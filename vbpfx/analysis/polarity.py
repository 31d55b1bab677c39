"""Polarity: find out by experiment which entries of a mask mean padding, since names do not tell.

Hugging Face's masks are nonzero at tokens, and those of ``nn.MultiheadAttention`` at padding. Masks that are added to
attention scores are far below zero at padding. Padding does not influence the output at any other position. So for each
of the two meanings we run a few samples with a mask that marks one position as padding, put two different tokens there
in turn, and compare the outputs at all other positions. If they are equal for one meaning only, that meaning is right.
This is tried at the first position, which causal attention sees from everywhere, and at the last, which networks that
read lengths from the mask leave out.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx

from vbpfx.data.inputs import tensors_in
from vbpfx.display.quiet import quiet_logging
from vbpfx.graph.capture import Captured
from vbpfx.graph.fake import graph_arguments

# What the nonzero entries of a mask stand for.
Polarity = Literal["tokens", "padding"]
POLARITIES: tuple[Polarity, ...] = ("tokens", "padding")

_SAMPLES = 2
# The largest change, relative to the output, that counts as none. A masked score adds exactly zero, but the order of
# sums may change.
_NOTHING = 1e-5


class Tried(NamedTuple):
    """The result of trying out a mask.

    Attributes:
        polarity: what the mask's nonzero entries stand for; None if this could not be found out.
        influences: whether neither meaning holds: positions influence each other whatever the mask says.
    """

    polarity: Polarity | None
    influences: bool = False


def try_out(captured: Captured, mask: fx.Node, beside: Collection[str]) -> Tried:
    """Find out what the nonzero entries of a mask (B, T) stand for.

    Args:
        mask: the mask's node, an input of the graph.
        beside: names of the inputs that hold tokens, or values computed from them, along the mask's second axis.
    """
    if any(tensor.is_meta for tensor in captured.graph_module.parameters()):
        return Tried(None)
    inputs = captured.inputs.first(_SAMPLES) if captured.divisible else captured.inputs
    given = graph_arguments(captured.graph_module, inputs)
    names = [node.name for node in captured.graph_module.graph.find_nodes(op="placeholder")]
    values: dict[str, Any] = dict(zip(names, given, strict=True))
    own = values[mask.name]
    others = {name: two for name in beside if (two := _two_tokens(values[name])) is not None}
    (output,) = captured.graph_module.graph.find_nodes(op="output")
    samples = [captured.samples_axis(v) or 0 for v in tensors_in(output.meta["val"]) if v.is_floating_point()]
    if not others or own.shape[1] < 3:
        return Tried(None)
    marked = _nonzero_entry(own)
    unmoved: dict[tuple[int, Polarity], bool] = {}
    for place in (0, own.shape[1] - 1):
        for polarity in POLARITIES:
            padding, tokens = (marked, 0) if polarity == "padding" else (0, marked)
            masked = torch.full_like(own, tokens)
            masked[:, place] = padding
            outputs = []
            for which in (0, 1):
                replaced = {name: _with(values[name], place, two[which]) for name, two in others.items()}
                found = _run(captured.graph_module, list((values | replaced | {mask.name: masked}).values()))
                if found is None:
                    return Tried(None)
                outputs.append(found)
            one, other = outputs
            unmoved[place, polarity] = _same(one, other, samples, place=place, length=own.shape[1])
    for place in (0, own.shape[1] - 1):
        seen = [polarity for polarity in POLARITIES if unmoved[place, polarity]]
        if len(seen) == 1:
            return Tried(seen[0])
    return Tried(None, influences=not any(unmoved.values()))


def _nonzero_entry(mask: Tensor) -> Any:
    """Return the value of a nonzero entry of the mask; 1 if it has none."""
    nonzero = mask[mask != 0]
    if nonzero.numel():
        return nonzero.flatten()[0].item()
    return 1


def _two_tokens(tokens: Any) -> tuple[Tensor, Tensor] | None:
    """Return two tokens to use as replacements.

    The smallest and the largest of the given tokens are avoided if possible, since they may be special.
    """
    if not isinstance(tokens, Tensor) or tokens.dtype == torch.bool or tokens.ndim < 2:
        return None
    if tokens.is_floating_point():
        one = tokens[:, 0]
        return one, 1 - one
    known = torch.tensor(sorted(set(tokens.flatten().tolist())), dtype=tokens.dtype, device=tokens.device)
    if len(known) < 2:
        return None
    inner = known[1:-1] if len(known) > 3 else known
    return inner[len(inner) // 3], inner[2 * len(inner) // 3] if len(inner) > 2 else inner[-1]


def _with(tokens: Tensor, place: int, token: Tensor) -> Tensor:
    changed = tokens.clone()
    changed[:, place] = token
    return changed


def _run(graph_module: fx.GraphModule, arguments: list[Any]) -> list[Tensor] | None:
    """Run the graph and return its floating-point outputs; None if the network does not accept such a mask."""
    own = [value.clone() if isinstance(value, Tensor) else value for value in arguments]
    try:
        with torch.no_grad(), quiet_logging():
            output = fx.Interpreter(graph_module).run(*own, enable_io_processing=False)
    except Exception:  # the model's operators may raise any error
        return None
    return [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]


def _same(one: list[Tensor], other: list[Tensor], samples: list[int], *, place: int, length: int) -> bool:
    """Return whether the outputs are finite, and equal at all positions but ``place``.

    Every axis of this length, except the samples' axis, is taken for positions.
    """
    for a, b, axis_of_samples in zip(one, other, samples, strict=True):
        kept = torch.tensor([n for n in range(length) if n != place], device=a.device)
        for axis, size in enumerate(a.shape):
            if axis != axis_of_samples and size == length:
                a, b = a.index_select(axis, kept), b.index_select(axis, kept)
        if not bool(a.isfinite().all() & b.isfinite().all()) or bool(((a - b).abs() > _NOTHING * a.abs().max()).any()):
            return False
    return bool(one)
