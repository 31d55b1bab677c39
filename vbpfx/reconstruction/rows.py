"""Rows: the inputs, targets and weights of a layer's regression, one per position, taken from the two streams."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vbpfx.analysis.masks import Mask, MaskArgument, find_masks
from vbpfx.calibration.observer import as_rows, is_held_out, row_numbers
from vbpfx.calibration.prepare import coprime, rows_a_sample
from vbpfx.calibration.samples import Samples
from vbpfx.graph.capture import Captured
from vbpfx.graph.fake import graph_arguments
from vbpfx.plans.records import Consumer, ValueAxis
from vbpfx.reconstruction.influence import Influence
from vbpfx.reconstruction.layer_input import LayerInput
from vbpfx.reconstruction.residual import ResidualSum, find_residual_sum, pull_back
from vbpfx.reconstruction.stream import Stream

# A regression uses at least this many rows for every column of the layer's input, or all rows if there are fewer.
_ROWS_PER_COLUMN = 64


class Rows(NamedTuple):
    """Some rows of one batch: inputs x (n, in), targets t (n, out), weights (n,), and whether the rows are held out."""

    x: Tensor
    t: Tensor
    weights: Tensor
    held_out: bool


def in_larger_parts(rows: Iterable[Rows], least: int) -> Iterator[Rows]:
    """Yield the same rows in parts of at least ``least`` rows each; the last parts may be smaller.

    The sums over a part are matrices as large as the input is wide, however few rows the part has, so small parts waste
    work.
    """
    waiting: dict[bool, list[Rows]] = {False: [], True: []}
    for part in rows:
        own = waiting[part.held_out]
        own.append(part)
        if sum(len(p.x) for p in own) >= least:
            yield _joined(own)
            own.clear()
    for own in waiting.values():
        if own:
            yield _joined(own)


def _joined(parts: list[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    xs, ts, weights, held_out = zip(*parts, strict=True)
    return Rows(torch.cat(xs), torch.cat(ts), torch.cat(weights), held_out[0])


class LayerRows:
    """The rows of every layer that is fitted.

    Args:
        captured: the dense graph.
        dense, narrow: the two streams. They must have run up to the layer whose rows are asked for.
        samples: the samples that run through the streams.
        inputs: every call of a layer that is fitted -> what it reads.
        influence: layer node -> influence. All rows of a layer without influence count alike.
        mask: as for :func:`vbpfx.prepare`.
    """

    def __init__(
        self,
        captured: Captured,
        dense: Stream,
        narrow: Stream,
        samples: Samples,
        inputs: Mapping[Consumer, LayerInput],
        influence: Mapping[str, Influence],
        mask: MaskArgument | None,
    ) -> None:
        self._captured, self._dense, self._narrow = captured, dense, narrow
        self._samples, self._influence = samples, influence
        self._inputs = inputs
        outputs = [_output(layer) for layer in inputs]
        self._masks = find_masks(captured, [*outputs, *(layer.source for layer in inputs)], mask)
        self._every = {layer: self._step(layer, read) for layer, read in inputs.items()}

    def of(self, layer: Consumer, matrices: Sequence[Tensor], bias: Tensor, share: float) -> Iterator[Rows]:
        """Yield the rows of a layer W x + b, batch after batch; held-out rows come in parts of their own.

        Args:
            matrices: W as a matrix (outputs, columns) for each of the layer's parts.
            bias: b.
            share: m, the share of the difference between the residual streams that the layer is to make up for.
        """
        read, output = self._inputs[layer], _output(layer)
        operand = self._narrow.nodes[layer.node].all_input_nodes[0].name  # with the substitutes for removed neurons
        residual = self._residual(layer)
        mask, about = self._masks.get(output), self._influence.get(layer.node)
        masked = mask.axes if mask else ()
        a_sample = rows_a_sample(self._captured, output)
        on = self._captured.samples_axis(layer.node) or 0
        for number, start in enumerate(self._samples.starts):
            x, y = self._narrow.value(number, operand), self._wanted(number, layer, residual)
            padding = self._padding(number, mask)
            ys = as_rows(y, output.axis, padding, masked, on)
            counts = as_rows(about.weights[number], output.axis, padding, masked, on) if about else None
            numbers = row_numbers(len(ys), start * a_sample, a_sample, padding)
            rows, weights = _sample(numbers, self._every[layer], counts)
            held_out = is_held_out(numbers[rows], a_sample)
            if read.window is None:
                xs = as_rows(x, output.axis, padding, masked, on)
            else:
                places = _positions(y, output.axis)
                positions = as_rows(places, output.axis, padding, masked, on).flatten()
            for part, is_held in ((~held_out, False), (held_out, True)):
                if bool(part.any()):
                    # a window is many times as large as a position, so only some rows are made at once
                    for some in torch.split(part.nonzero().flatten(), matrices[0].shape[1]):
                        chosen = rows[some]
                        own = xs[chosen] if read.window is None else read.rows(x, positions[chosen])
                        y_own = _product(own, matrices, read) + bias.to(own)
                        yield Rows(own, y_own + share * (ys[chosen] - y_own), weights[some], is_held)

    def _residual(self, layer: Consumer) -> ResidualSum | None:
        """Return the residual sum behind a layer; None if there is none or a stream lacks its other operand."""
        found = find_residual_sum(self._captured, layer.node)
        kept = found is not None and self._dense.holds(found.stream) and self._narrow.holds(found.stream)
        return found if kept else None

    def _wanted(self, number: int, layer: Consumer, residual: ResidualSum | None) -> Tensor:
        """Return the output that the layer would need, in one batch, for the residual stream to equal the dense one."""
        y = self._dense.value(number, layer.node)
        if residual is None:
            return y
        lost = self._dense.value(number, residual.stream) - self._narrow.value(number, residual.stream)
        wish = pull_back(self._dense, number, layer.node, residual, y, lost)
        return y if wish is None else y + wish

    def _step(self, layer: Consumer, read: LayerInput) -> int:
        """Return n so that every n-th row is used: 1, or more if there are more rows than a fit of that width needs."""
        a_sample = rows_a_sample(self._captured, _output(layer))
        rows = a_sample * self._samples.total
        step = max(1, min(a_sample, rows // (_ROWS_PER_COLUMN * read.whole * read.taps // read.groups)))
        return coprime(step, a_sample)

    def _padding(self, batch: int, mask: Mask | None) -> Tensor | None:
        """Return the padding mask of one batch, nonzero at tokens; None without a mask."""
        if mask is None:
            return None
        names = [node.name for node in self._captured.graph_module.graph.nodes if node.op == "placeholder"]
        found = graph_arguments(self._captured.graph_module, self._samples.batches[batch])[names.index(mask.node)]
        assert isinstance(found, Tensor)
        return found if mask.nonzero == "tokens" else found.logical_not()


def _product(x: Tensor, matrices: Sequence[Tensor], read: LayerInput) -> Tensor:
    """Return W x (n, out) for rows x (n, columns) of all channels, and the matrices of the layer's parts."""
    if read.groups == 1:
        return x @ matrices[0].to(x).T
    columns = [read.columns(torch.tensor(part.channels)).to(x.device) for part in read.parts]
    return torch.cat([x[:, own] @ w.to(x).T for own, w in zip(columns, matrices, strict=True)], 1)


def _output(layer: Consumer) -> ValueAxis:
    """Return the axis of the layer's output that holds its channels."""
    return ValueAxis(layer.node, layer.source.axis, 0)


def _positions(y: Tensor, axis: int) -> Tensor:
    """Return a value shaped as y with one channel, which numbers the entries of y's other axes in order."""
    shape = [1 if dim == axis % y.ndim else size for dim, size in enumerate(y.shape)]
    return torch.arange(y.numel() // max(1, y.shape[axis]), device=y.device).reshape(shape)


def _sample(numbers: Tensor, every: int, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the indices of the rows of a batch that enter a regression, and their weights.

    Every n-th row is taken, with n = ``every``; rows are numbered across batches, so batching makes no difference. A
    row whose weight is n or more is always taken.

    Args:
        numbers: the numbers of the batch's rows among those of all data.
        counts: the weight of every row; None if all count alike.
    """
    index = torch.arange(len(numbers))
    turn = numbers % every == 0
    if counts is None:
        return index[turn], torch.ones(int(turn.sum()))
    weights = counts.flatten().cpu()
    always = weights >= every
    chosen = turn | always
    return index[chosen], torch.where(always, weights, weights * every)[chosen]
