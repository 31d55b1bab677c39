"""The records that pass between the stages.

Frozen dataclasses that hold node and parameter *names*, never ``torch.fx.Node`` objects: they survive
copies of the graph and serialise to JSON.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import networkx as nx
import torch

from vbpfx.errors import ArtifactError


def _at(start: int, step: int, channels: Iterable[int]) -> torch.Tensor:
    return start + step * torch.tensor(tuple(channels), dtype=torch.long)


@dataclass(frozen=True)
class ParameterAxis:
    """One axis of a parameter or buffer that is sliced when the block is narrowed.

    Attributes:
        name: the parameter's name in the model's ``state_dict``.
        axis: the axis of that tensor that holds the hidden axis.
        start: where on it the block's channel 0 stands. Packed gates have one entry per part.
        step: from one channel to the next. Interleaved gates have one entry for each of so many.
    """

    name: str
    axis: int
    start: int = 0
    step: int = 1

    def at(self, channels: Iterable[int]) -> torch.Tensor:
        """Where some of the block's channels stand on the axis."""
        return _at(self.start, self.step, channels)


@dataclass(frozen=True)
class SizeLiteral:
    """An integer among a node's arguments that counts channels of an axis (a ``view``, a ``groups=``, a slice's end).

    Attributes:
        node: name of the node.
        path: where the integer stands: ``("args", 1, 2)`` is ``node.args[1][2]``.
        owner: the node (or parameter, if ``of_parameter``) that has the axis, and ``axis`` which one; ``start`` to ``stop``
            are counted.
        by_code: whether the model's own code states the number; ``chunk`` works it out.
        follows: whether the code computes it from the width, as a share of it, so that it is right in a narrowed model.
    """

    node: str
    path: tuple[str | int, ...]
    owner: str
    axis: int
    start: int
    stop: int
    by_code: bool = True
    of_parameter: bool = False
    follows: bool = False


class Source(NamedTuple):
    """A value that a layer or a statistic reads the hidden axis from.

    Attributes:
        node: name of the node.
        axis: the axis of its value, counted from its end (-1 is the last).
        start: where on that axis the block's channel 0 stands; ``step`` is from one channel to the next.
    """

    node: str
    axis: int
    start: int
    step: int = 1

    def at(self, channels: Iterable[int]) -> torch.Tensor:
        """Where some of the block's channels stand on the axis."""
        return _at(self.start, self.step, channels)


class Carrier(NamedTuple):
    """A value that carries the hidden axis; ``start`` and ``step`` as of :class:`ParameterAxis`."""

    node: str
    axis: int
    start: int
    step: int = 1

    def at(self, channels: Iterable[int]) -> torch.Tensor:
        """Where some of the block's channels stand on the axis."""
        return _at(self.start, self.step, channels)


@dataclass(frozen=True)
class Consumer:
    """A layer that contracts the hidden axis: y = W h + b.

    Attributes:
        node: name of the node that calls the layer.
        source: what it reads as h.
        weight: name of W; ``weight_axis`` is the axis of W that is contracted (1 for ``nn.Linear``).
        bias: name of b; where ``creates_bias`` is true the layer has none and the fold makes one
            under this name.
        is_layer: whether the call is a layer of ``torch.nn``, whose class adds its bias by itself.
        alone: whether nothing but calls of this layer uses the weight, so that its columns may change.
    """

    node: str
    source: Source
    weight: str
    weight_axis: int
    bias: str
    creates_bias: bool
    is_layer: bool
    alone: bool = False


@dataclass(frozen=True)
class Reduction:
    """A statistic over the hidden axis: a sum, a mean, or a norm between the layers.

    The removed channels, constant by the plan, go on counting in it.

    Attributes:
        node: name of the node that takes it.
        source: what it is taken of.
        kind: ``"sum"``, ``"mean"``, ``"layer_norm"`` or ``"rms_norm"``.
        size: of the whole axis it is taken over, in the dense network.
        module: path of the module whose code takes it; ``""`` where none is known.
        calls: how often the graph calls that module.
    """

    node: str
    source: Source
    kind: str
    size: int
    module: str
    calls: int


@dataclass(frozen=True)
class Block:
    """A hidden channel axis that can be narrowed exactly, from its producers to its consumers.

    Attributes:
        name: the module path that encloses it; unique in the model.
        width: the hidden width d.
        producers: names of the weights whose rows make the axis.
        consumers: the layers that contract it.
        reductions: the statistics that are taken over it.
        parameters: every parameter and buffer axis that is sliced with it.
        literals: every integer in the graph that depends on its width.
        carriers: every value that carries the hidden axis, in graph order.
    """

    name: str
    width: int
    producers: tuple[str, ...]
    consumers: tuple[Consumer, ...]
    reductions: tuple[Reduction, ...]
    parameters: tuple[ParameterAxis, ...]
    literals: tuple[SizeLiteral, ...]
    carriers: tuple[Carrier, ...]

    @property
    def readers(self) -> tuple[Consumer | Reduction, ...]:
        """Everything that reads across the hidden axis: consumers, then reductions."""
        return (*self.consumers, *self.reductions)

    @property
    def sources(self) -> tuple[Source, ...]:
        """The distinct values that the readers read; statistics are gathered at each."""
        return tuple(dict.fromkeys(reader.source for reader in self.readers))

    def takes_prediction(self, source: Source) -> bool:
        """Whether what is removed there may be predicted from what stays.

        Every weight that reads it must be a layer's own, and no statistic may be taken of it: those count constants. Where
        a layer reads it that is called elsewhere, too, the same must hold there (:attr:`pools`).

        Args:
            source: one of :attr:`sources`.
        """
        index = self.sources.index(source)
        together = next(({self.sources[i] for i in pool} for pool in self.pools if index in pool), {source})
        return not any(r.source in together for r in self.reductions) and all(
            consumer.alone for consumer in self.consumers if consumer.source in together
        )

    @property
    def pools(self) -> tuple[tuple[int, ...], ...]:
        """The consumers' inputs, as indices into :attr:`sources`, grouped where one weight or bias takes the fold of several.

        A layer that is called several times has one weight and one bias: what stands for a removed neuron must be the
        same at every call.
        """
        joined = nx.Graph()
        for consumer in self.consumers:
            for name in (consumer.bias, consumer.weight):
                joined.add_edge(
                    (name, consumer.source.start, consumer.source.step), self.sources.index(consumer.source)
                )
        pools = (sorted(i for i in found if isinstance(i, int)) for found in nx.connected_components(joined))
        return tuple(sorted(tuple(pool) for pool in pools))

    @property
    def layers(self) -> tuple[str, ...]:
        """Module paths of the producers and consumers: what include / exclude patterns see."""
        weights = (*self.producers, *(c.weight for c in self.consumers))
        return tuple(dict.fromkeys(weight.rpartition(".")[0] for weight in weights))


_SHOWN = 3  # weights that a refusal is called by


@dataclass(frozen=True)
class Refusal:
    """An axis that layers produce and that cannot be narrowed, with the reason.

    Attributes:
        name: the module path that encloses its producers.
        width: its width.
        producers: names of the weights whose rows make it.
        node: the node nearest to a producer that stands in the way (``""`` where it is a parameter).
        reason: why, in words.
    """

    name: str
    width: int
    producers: tuple[str, ...]
    node: str
    reason: str

    @property
    def label(self) -> str:
        """What people are shown: the module path, or the first weights where no module encloses them all."""
        if self.name:
            return self.name
        others = len(self.producers) - _SHOWN
        return ", ".join(self.producers[:_SHOWN]) + (f" and {others} more" if others > 0 else "")


@dataclass(frozen=True)
class BlockPlan:
    """What becomes of one block.

    Attributes:
        block: the block as it was found.
        kept: indices of the kept neurons, ascending.
        constants: per entry of ``block.sources`` the values a that stand for the removed neurons,
            float64, in the order of :attr:`pruned`.
        predictions: per entry the matrix B (P, K), or None for B = 0; h_P is replaced by a + B h_K. Left out, all are None.
    """

    block: Block
    kept: tuple[int, ...]
    constants: tuple[torch.Tensor, ...]
    predictions: tuple[torch.Tensor | None, ...] = ()

    def __post_init__(self) -> None:
        kept, width = self.kept, self.block.width
        if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= width:
            raise ArtifactError(
                f"block {self.block.name}: the kept indices must be ascending, distinct, within 0..{width - 1} "
                f"and not empty"
            )
        shapes = [tuple(a.shape) for a in self.constants]
        if shapes != [(width - len(kept),)] * len(self.block.sources):
            raise ArtifactError(
                f"block {self.block.name}: {width - len(kept)} removed neurons at {len(self.block.sources)} "
                f"consumer inputs need one value each, found shapes {shapes}"
            )
        if not self.predictions:
            object.__setattr__(self, "predictions", (None,) * len(self.constants))
        wrong = [
            tuple(b.shape) for b in self.predictions if b is not None and b.shape != (width - len(kept), len(kept))
        ]
        if wrong or len(self.predictions) != len(self.constants):
            raise ArtifactError(
                f"block {self.block.name}: a prediction of {width - len(kept)} removed neurons from {len(kept)} kept ones "
                f"for each of {len(self.constants)} inputs is needed, found {len(self.predictions)}, shapes {wrong}"
            )
        for source, prediction in zip(self.block.sources, self.predictions, strict=True):
            if prediction is not None and not self.block.takes_prediction(source):
                raise ArtifactError(
                    f"block {self.block.name}: what is removed at {source.node} can only be replaced by constants, the plan "
                    f"predicts it"
                )
        self._require_one_prediction_a_layer()

    def _require_one_prediction_a_layer(self) -> None:
        for first, *others in self.block.pools:
            a, b = self.constants[first], self.predictions[first]
            for other in others:
                c, d = self.constants[other], self.predictions[other]
                same = b is d if b is None or d is None else torch.equal(b, d)
                if not same or (b is not None and not torch.equal(a, c)):
                    raise ArtifactError(
                        f"block {self.block.name}: one layer reads this block in several calls, among them {self.block.sources[first].node} and {self.block.sources[other].node}. The plan replaces the removed neurons with different predictions in these two calls. The calls share one weight, and one weight can take only one prediction"
                    )

    def constants_at(self, source: Source) -> torch.Tensor:
        """What stands for the removed neurons at one of the block's sources."""
        return self.constants[self.block.sources.index(source)]

    def prediction_at(self, source: Source) -> torch.Tensor | None:
        """B at one of the block's sources; None for zero."""
        return self.predictions[self.block.sources.index(source)]

    @cached_property
    def pruned(self) -> tuple[int, ...]:
        """Indices of the removed neurons, ascending."""
        kept = set(self.kept)
        return tuple(i for i in range(self.block.width) if i not in kept)


@dataclass(frozen=True)
class Correction:
    """A layer y = W x + b whose weights are fitted anew: W + dW, b + db, after everything removed is folded.

    Attributes:
        layer: the layer; ``source`` is all of its input axis.
        weight: dW, in the shape of the narrowed weight.
        bias: db, in the shape of the narrowed bias.
        further: the other calls of a layer that is called several times; ``layer`` is the first.
    """

    layer: Consumer
    weight: torch.Tensor
    bias: torch.Tensor
    further: tuple[Consumer, ...] = ()

    @property
    def calls(self) -> tuple[Consumer, ...]:
        """All calls of the layer."""
        return (self.layer, *self.further)


@dataclass(frozen=True)
class Plan:
    """Which neurons go, and what stands for them. Pure data: no graph, no module.

    Attributes:
        blocks: the blocks that are narrowed; blocks of which nothing is removed are left out.
        corrections: layers that are fitted anew, in graph order: consumers of the blocks, and others where asked for.
        fingerprint: hash of the structure of the model it was made for.
        frontend: what traced that model; node names are those of its graphs.
        settings: how it was made (criterion, compensation, budget, floors), for the report.
    """

    blocks: tuple[BlockPlan, ...]
    fingerprint: str
    frontend: str
    settings: Mapping[str, Any]
    corrections: tuple[Correction, ...] = ()

    @property
    def removed(self) -> int:
        """Number of hidden neurons removed."""
        return sum(entry.block.width - len(entry.kept) for entry in self.blocks)

    @property
    def refitted(self) -> tuple[str, ...]:
        """Weights of layers beside the blocks that are fitted anew."""
        consumers = {consumer.weight for entry in self.blocks for consumer in entry.block.consumers}
        return tuple(c.layer.weight for c in self.corrections if c.layer.weight not in consumers)

    @property
    def widths(self) -> dict[str, int]:
        """Block name -> width afterwards."""
        return {entry.block.name: len(entry.kept) for entry in self.blocks}


def consumer_from_json(data: Mapping[str, Any]) -> Consumer:
    """The inverse of ``dataclasses.asdict``, after JSON."""
    return Consumer(**dict(data) | {"source": Source(*data["source"])})


def block_to_json(block: Block) -> dict[str, Any]:
    """The block as JSON-ready dictionaries and lists."""
    return dataclasses.asdict(block)


def _path_from_json(path: Sequence[str | int]) -> tuple[str | int, ...]:
    """Where a number stands; only among arguments, since numbers are written there."""
    if not path or path[0] not in ("args", "kwargs"):
        raise ValueError(f"a number stands at {path!r}, which is no place among a call's arguments")
    return tuple(path)


def block_from_json(data: Mapping[str, Any]) -> Block:
    """The inverse of :func:`block_to_json`."""
    return Block(
        name=data["name"],
        width=data["width"],
        producers=tuple(data["producers"]),
        consumers=tuple(consumer_from_json(consumer) for consumer in data["consumers"]),
        reductions=tuple(Reduction(**r | {"source": Source(*r["source"])}) for r in data["reductions"]),
        parameters=tuple(ParameterAxis(**axis) for axis in data["parameters"]),
        literals=tuple(SizeLiteral(**entry | {"path": _path_from_json(entry["path"])}) for entry in data["literals"]),
        carriers=tuple(Carrier(*carrier) for carrier in data["carriers"]),
    )
