"""The records that pass between the stages.

Frozen dataclasses that hold node and parameter *names*, never ``torch.fx.Node`` objects: they survive
copies of the graph and serialise to JSON.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vbpfx.errors import ArtifactError


@dataclass(frozen=True)
class ParameterAxis:
    """One axis of a parameter or buffer that is sliced when the block is narrowed.

    Attributes:
        name: the parameter's name in the model's ``state_dict``.
        axis: the axis of that tensor that is the hidden axis.
    """

    name: str
    axis: int


@dataclass(frozen=True)
class SizeLiteral:
    """An integer among a node's arguments that states the hidden width (a ``view``, a ``groups=``).

    Attributes:
        node: name of the node.
        path: where the integer stands: ``("args", 1, 2)`` is ``node.args[1][2]``.
    """

    node: str
    path: tuple[str | int, ...]


@dataclass(frozen=True)
class Consumer:
    """A layer that contracts the hidden axis: y = W h + b.

    Attributes:
        node: name of the node that calls the layer.
        source: name of the node whose value it reads as h.
        axis: the hidden axis of that value, counted from its end (-1 is the last).
        weight: name of W; ``weight_axis`` is the axis of W that is contracted (1 for ``nn.Linear``).
        bias: name of b; where ``creates_bias`` is true the layer has none and the fold makes one
            under this name.
        is_layer: whether the call is a layer of ``torch.nn``, whose class adds its bias by itself.
    """

    node: str
    source: str
    axis: int
    weight: str
    weight_axis: int
    bias: str
    creates_bias: bool
    is_layer: bool


@dataclass(frozen=True)
class Block:
    """A hidden channel axis that can be narrowed exactly, from its producers to its consumers.

    Attributes:
        name: the module path that encloses it; unique in the model.
        width: the hidden width d.
        producers: names of the weights whose rows make the axis.
        consumers: the layers that contract it.
        parameters: every parameter and buffer axis that is sliced with it.
        literals: every integer in the graph that states its width.
        carriers: ``(node, axis)`` of every value that carries the hidden axis, in graph order.
    """

    name: str
    width: int
    producers: tuple[str, ...]
    consumers: tuple[Consumer, ...]
    parameters: tuple[ParameterAxis, ...]
    literals: tuple[SizeLiteral, ...]
    carriers: tuple[tuple[str, int], ...]

    @property
    def sources(self) -> tuple[tuple[str, int], ...]:
        """The distinct ``(node, axis)`` that the consumers read; statistics are gathered at each."""
        return tuple(dict.fromkeys((c.source, c.axis) for c in self.consumers))

    @property
    def layers(self) -> tuple[str, ...]:
        """Module paths of the producers and consumers: what include / exclude patterns see."""
        weights = (*self.producers, *(c.weight for c in self.consumers))
        return tuple(dict.fromkeys(weight.rpartition(".")[0] for weight in weights))


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


@dataclass(frozen=True)
class BlockPlan:
    """What becomes of one block.

    Attributes:
        block: the block as it was found.
        kept: indices of the kept neurons, ascending.
        constants: per entry of ``block.sources`` the values a that stand for the removed neurons,
            float64, in the order of :attr:`pruned`; h_P is replaced by a.
    """

    block: Block
    kept: tuple[int, ...]
    constants: tuple[torch.Tensor, ...]

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

    @property
    def pruned(self) -> tuple[int, ...]:
        """Indices of the removed neurons, ascending."""
        kept = set(self.kept)
        return tuple(i for i in range(self.block.width) if i not in kept)


@dataclass(frozen=True)
class Plan:
    """Which neurons go, and what stands for them. Pure data: no graph, no module.

    Attributes:
        blocks: the blocks that are narrowed; blocks of which nothing is removed are left out.
        fingerprint: hash of the structure of the model it was made for.
        frontend: what traced that model; node names are those of its graphs.
        settings: how it was made (criterion, compensation, budget, floors), for the report.
    """

    blocks: tuple[BlockPlan, ...]
    fingerprint: str
    frontend: str
    settings: Mapping[str, Any]

    @property
    def removed(self) -> int:
        """Number of hidden neurons removed."""
        return sum(entry.block.width - len(entry.kept) for entry in self.blocks)

    @property
    def widths(self) -> dict[str, int]:
        """Block name -> width afterwards."""
        return {entry.block.name: len(entry.kept) for entry in self.blocks}


def block_to_json(block: Block) -> dict[str, Any]:
    """The block as JSON-ready dictionaries and lists."""
    return dataclasses.asdict(block)


def block_from_json(data: Mapping[str, Any]) -> Block:
    """The inverse of :func:`block_to_json`."""
    return Block(
        name=data["name"],
        width=data["width"],
        producers=tuple(data["producers"]),
        consumers=tuple(Consumer(**consumer) for consumer in data["consumers"]),
        parameters=tuple(ParameterAxis(**axis) for axis in data["parameters"]),
        literals=tuple(SizeLiteral(entry["node"], tuple(entry["path"])) for entry in data["literals"]),
        carriers=tuple((node, axis) for node, axis in data["carriers"]),
    )
