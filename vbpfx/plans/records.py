"""The records that the stages pass to each other: blocks, refusals and plans.

They are frozen dataclasses that hold the *names* of nodes and parameters, and never ``torch.fx.Node`` objects. So they
remain valid for copies of the graph, and can be written as JSON.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import networkx as nx
import torch

from vbpfx.errors import ArtifactError
from vbpfx.rules.routing import Routing


def _at(place: ParameterAxis | ValueAxis, channels: Iterable[int]) -> torch.Tensor:
    found = torch.tensor(tuple(channels), dtype=torch.long)
    if not place.size:
        return place.start + place.step * found
    return place.start + place.step * (found % place.size) + place.stride * (found // place.size)


@dataclass(frozen=True)
class ParameterAxis:
    """One axis of a parameter or buffer that is sliced when the block is narrowed.

    Attributes:
        name: the parameter's name in the model's ``state_dict``.
        axis: the axis of that tensor that holds the hidden axis.
        start: the position of the block's channel 0 on this axis. A packed gate has one entry for each of its parts.
        step: the distance from one channel to the next. An interleaved gate has one entry for each interleaved part.
        groups: for a grouped convolution's weight (out, in / groups, ...) the number of groups. Its axis holds the channels of one
            group only, and axis 0 of the tensor has as many equal parts, one for each group. ``start`` and ``step`` refer to the
            channels of all groups one behind the other. For a stack of experts (E, ...) it is E, and entry e of axis 0 belongs to expert e.
        size, stride: if ``size`` is not 0, the block's channels are in groups of so many, and the first channel of the next group is
            ``stride`` further on this axis. For a stack of experts the axes of all experts count as one behind the other.
        dual: in other coordinates of the block's channels (:class:`Basis`), the entries of this axis are multiplied by the transposed
            inverse of the matrix that multiplies the channels.
    """

    name: str
    axis: int
    start: int = 0
    step: int = 1
    groups: int = 1
    size: int = 0
    stride: int = 0
    dual: bool = False

    @property
    def place(self) -> tuple[int, int, int, int]:
        """The four numbers that say where the block's channels are on the axis."""
        return self.start, self.step, self.size, self.stride

    def at(self, channels: Iterable[int]) -> torch.Tensor:
        """Return the positions of some of the block's channels on the axis, with all groups one behind the other."""
        return _at(self, channels)


@dataclass(frozen=True)
class SizeLiteral:
    """An integer among a node's arguments that is a number of channels (in a ``view``, a ``groups=`` or a slice's end).

    Attributes:
        node: name of the node.
        path: the place of the integer: ``("args", 1, 2)`` is ``node.args[1][2]``; ``("module", "features.1", "num_features")`` is an
            attribute of the layer ``features.1``, in whose code the node is.
        owner: name of the node (or of the parameter, if ``of_parameter``) whose axis ``axis`` has these channels.
        axis: the axis of the owner.
        start, stop: the integer is the number of channels from ``start`` to ``stop``.
        by_code: whether the model's own code states the number; for a ``chunk``, for example, PyTorch computes it.
        of_parameter: whether ``owner`` is a parameter.
        follows: whether the model's code computes the number as a share of the width, so that it is right in a narrowed
            model.
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

    @property
    def of_module(self) -> bool:
        """Whether the integer is an attribute of a layer, and not an argument of the call."""
        return self.path[0] == "module"


class ValueAxis(NamedTuple):
    """The hidden axis of a node's value.

    Attributes:
        node: name of the node.
        axis: the axis of its value: counted from the end (-1 is the last) where a layer or a reduction reads it, from the front in
            :attr:`Block.carriers`.
        start: the position of the block's channel 0 on this axis.
        step: the distance from one channel to the next.
        size, stride: as for :class:`ParameterAxis`. A stride of 0 means that the axis has the channels of one group only, and that
            another axis of the value counts the groups (the heads of attention).
        counting, divisor: that axis, counted as ``axis`` is, and 0 for none; its entry i is in group (i // ``divisor``) mod G.
        dual: as for :class:`ParameterAxis`; set in :attr:`Block.carriers`.
    """

    node: str
    axis: int
    start: int
    step: int = 1
    size: int = 0
    stride: int = 0
    counting: int = 0
    divisor: int = 1
    dual: bool = False

    @property
    def place(self) -> tuple[int, int, int, int]:
        """The four numbers that say where the block's channels are on the axis."""
        return self.start, self.step, self.size, self.stride

    @property
    def of_one_group(self) -> bool:
        """Whether the axis has as many channels as one group, and each group has others on it."""
        return self.size > 0 and self.stride == 0

    def at(self, channels: Iterable[int]) -> torch.Tensor:
        """Return the positions of some of the block's channels on the axis."""
        return _at(self, channels)

    def marked(self, channels: Iterable[int], shape: Sequence[int], width: int) -> torch.Tensor:
        """Return which entries of a value belong to some of the block's channels, as a mask that broadcasts to the value.

        Args:
            channels: indices of channels of the block.
            shape: the value's shape.
            width: the block's width.
        """
        ndim, axis = len(shape), self.axis % len(shape)
        if not self.of_one_group:
            mask = torch.zeros([size if dim == axis else 1 for dim, size in enumerate(shape)], dtype=torch.bool)
            return mask.index_fill_(axis, self.at(channels), True)
        counting = self.counting % ndim
        chosen = torch.zeros(width // self.size, shape[axis], dtype=torch.bool)
        indices = torch.tensor(tuple(channels), dtype=torch.long)
        chosen[indices // self.size, self.at(indices.tolist())] = True
        groups = torch.arange(shape[counting]) // self.divisor % len(chosen)
        by_entry = chosen[groups]  # (entries of the counting axis, entries of the axis)
        by_entry = by_entry if counting < axis else by_entry.T
        return by_entry.reshape([size if dim in (axis, counting) else 1 for dim, size in enumerate(shape)])


@dataclass(frozen=True)
class Consumer:
    """A layer that contracts the hidden axis: y = W h + b.

    Attributes:
        node: name of the node that calls the layer.
        source: the value h.
        weight: name of W.
        weight_axis: the axis of W that is contracted (1 for ``nn.Linear``).
        bias: name of b.
        creates_bias: whether the layer has no bias yet, so that folding creates one under the name ``bias``.
        is_layer: whether the call is a layer of ``torch.nn``, whose class adds its bias by itself.
        alone: whether only calls of this layer use the weight, so that its columns may change.
        padded: whether the call adds zeros around h, so that a constant channel is not constant for it: beside the border fewer
            taps of the window see the constant, and a bias cannot replace it.
        groups: the number of groups of a grouped convolution: the rows of W are as many equal parts, and each reads only its own part
            of h.
        routing: if W is a stack of experts (E, ...), how the rows of h are divided among them; None for any other layer. ``bias`` is
            then a stack, too, or "" if the experts have none: none is created for them.
        total: for experts, the node that adds the bias; "" if they have none, or if the call itself adds it.
    """

    node: str
    source: ValueAxis
    weight: str
    weight_axis: int
    bias: str
    creates_bias: bool
    is_layer: bool
    alone: bool = False
    padded: bool = False
    groups: int = 1
    routing: Routing | None = None
    total: str = ""


@dataclass(frozen=True)
class Factor:
    """One of two values that a call multiplies channel by channel, and sums over the hidden axis, as for queries and keys.

    Removed channels are 0 in both values.

    Attributes:
        node: name of the node that computes the products.
        source: the value.
        role: ``"query"`` for the first value and ``"key"`` for the second.
        scales: whether the call divides by the square root of the number of channels. The narrowed call gets the dense network's
            number.
        shift_free: whether only a softmax over the second value's positions reads the products. Then a constant that is added to
            a channel of the second value at all positions changes nothing.
    """

    node: str
    source: ValueAxis
    role: Literal["query", "key"]
    scales: bool = False
    shift_free: bool = False

    @property
    def centred(self) -> bool:
        """Whether the mean of the value counts for nothing: only its covariance matters to what reads the products."""
        return self.role == "key" and self.shift_free


@dataclass(frozen=True)
class Setting:
    """A number that a parameter is set to at a block's constant channel.

    Attributes:
        parameter: the axis of the parameter that holds the block's channels.
        value: the number, for all entries of the parameter at the channel.
    """

    parameter: ParameterAxis
    value: float


@dataclass(frozen=True)
class ConstantChannel:
    """How one channel of a block is made constant.

    A padded layer cannot take the constants of removed channels in its bias. It takes them from a channel of the value c,
    which is padded as the removed channels were.

    Attributes:
        settings: what the parameters of this channel are set to.
        values: for every entry of ``block.sources`` the value c; 0 where no padded layer reads the source.
    """

    settings: tuple[Setting, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Reduction:
    """A statistic over the hidden axis: a sum, a mean, or a norm between the layers.

    The plan replaces removed channels by constants, and these still count in the statistic.

    Attributes:
        node: name of the node that computes it.
        source: the value that it is computed from.
        kind: ``"sum"``, ``"mean"``, ``"layer_norm"`` or ``"rms_norm"``.
        size: the size of the whole axis in the dense network.
        module: path of the module whose code computes it; ``""`` if unknown.
        calls: the number of times that the graph calls this module.
    """

    node: str
    source: ValueAxis
    kind: str
    size: int
    module: str
    calls: int


Kind = Literal["mlp", "value", "query"]
KINDS: tuple[Kind, ...] = ("mlp", "value", "query")
# The kinds of which linear combinations of channels are kept, where a block is linear.
COMBINED: tuple[Kind, ...] = ("value", "query")
# The kinds that are narrowed if no others are asked for.
DEFAULT_KINDS: tuple[Kind, ...] = ("mlp",)


@dataclass(frozen=True)
class Block:
    """A hidden channel axis that can be narrowed exactly, from its producers to its consumers.

    Attributes:
        name: a unique name, if possible the path of the module that contains the block.
        width: the hidden width d.
        producers: names of the weights whose rows produce the axis.
        consumers: the layers that contract the axis.
        reductions: the statistics that are taken over the axis.
        parameters: every axis of a parameter or buffer that is sliced when the block is narrowed.
        literals: every integer in the graph that depends on the width.
        carriers: every value that carries the hidden axis, in graph order.
        constant: how one channel is made constant; None if no layer needs one.
        groups: the number of equal parts of the axis that keep the same number of channels each. A part holds consecutive channels.
            It is more than 1 if a grouped convolution makes or reads the axis, if its parts are the heads of attention, or if the block
            is a stack of experts. Then each part holds the channels of one expert. A row of a value belongs to one expert, and the
            value has only as many channels.
        kind: ``"mlp"`` for a hidden axis, ``"value"`` for the values of attention with heads, and ``"query"`` for queries and keys.
        linear: whether the channels of a group may be replaced by others that are linear combinations of them, since only linear
            maps that are the same for all channels of the group lie between the producers and the readers.
        factors: the values that are multiplied channel by channel, instead of consumers, if the axis is one of queries and keys.
    """

    name: str
    width: int
    producers: tuple[str, ...]
    consumers: tuple[Consumer, ...]
    reductions: tuple[Reduction, ...]
    parameters: tuple[ParameterAxis, ...]
    literals: tuple[SizeLiteral, ...]
    carriers: tuple[ValueAxis, ...]
    constant: ConstantChannel | None = None
    groups: int = 1
    kind: Kind = "mlp"
    factors: tuple[Factor, ...] = ()
    linear: bool = False

    @property
    def group_size(self) -> int:
        """The number of channels of one group."""
        return self.width // self.groups

    def in_groups(self, channels: Iterable[int]) -> list[list[int]]:
        """Return some of the block's channels, group by group, each counted from the start of its group.

        Args:
            channels: indices of channels of the block.
        """
        found: list[list[int]] = [[] for _ in range(self.groups)]
        for channel in channels:
            found[channel // self.group_size].append(channel % self.group_size)
        return found

    @property
    def has_experts(self) -> bool:
        """Whether the block holds the hidden channels of all experts of a mixture."""
        return any(consumer.routing is not None for consumer in self.consumers)

    @property
    def value_width(self) -> int:
        """The number of the block's channels on the axis of a value: those of one expert if the block is a stack."""
        return self.group_size if self.has_experts else self.width

    @property
    def measured(self) -> tuple[int, ...]:
        """The widths of what statistics are gathered of, and removed neurons are replaced in: every source, or every expert."""
        return (self.group_size,) * self.groups if self.has_experts else (self.width,) * len(self.sources)

    def expert(self, number: int) -> Block:
        """Return one expert of a stack as a block of its own, by which its neurons are scored and replaced.

        Args:
            number: the number of the expert, from 0 on.
        """
        first = self.consumers[0]
        assert first.routing is not None
        alone = dataclasses.replace(first, routing=Routing("one", first.routing.experts, at=number))
        parameters = (dataclasses.replace(p, start=p.start + number * p.stride) for p in self.parameters)
        return dataclasses.replace(
            self, width=self.group_size, groups=1, consumers=(alone,), parameters=tuple(parameters)
        )

    def routing(self, source: ValueAxis) -> Routing | None:
        """Return how the rows of a source are divided among experts; None if the block is no stack.

        Args:
            source: one of :attr:`sources`.
        """
        return (
            next(consumer.routing for consumer in self.consumers if consumer.source == source)
            if self.has_experts
            else None
        )

    @property
    def readers(self) -> tuple[Consumer | Factor | Reduction, ...]:
        """Everything that reads across the hidden axis: consumers, factors, then reductions."""
        return (*self.consumers, *self.factors, *self.reductions)

    @property
    def ends(self) -> tuple[Consumer | Factor, ...]:
        """The readers at which the axis ends: consumers and factors."""
        return (*self.consumers, *self.factors)

    @property
    def sources(self) -> tuple[ValueAxis, ...]:
        """The distinct values that the readers read. Activation statistics are gathered at each of them."""
        return tuple(dict.fromkeys(reader.source for reader in self.readers))

    def takes_constants(self, source: ValueAxis) -> bool:
        """Return whether removed neurons at a source may be replaced by constants other than 0: not where factors are multiplied.

        Args:
            source: one of :attr:`sources`.
        """
        return all(factor.source != source for factor in self.factors)

    def takes_prediction(self, source: ValueAxis) -> bool:
        """Return whether removed neurons at a source may be predicted from the kept ones, and not only by constants.

        Every weight that reads the source must belong to one layer alone, and no reduction may be taken over it,
        because reductions can only count constants. If a layer that reads it is called at other sources, too, the same
        must hold there (:attr:`pools`).

        Args:
            source: one of :attr:`sources`.
        """
        index = self.sources.index(source)
        together = next(({self.sources[i] for i in pool} for pool in self.pools if index in pool), {source})
        others: tuple[Reduction | Factor, ...] = (*self.reductions, *self.factors)
        return not any(other.source in together for other in others) and all(
            consumer.alone for consumer in self.consumers if consumer.source in together
        )

    def read_together(self, source: ValueAxis) -> torch.Tensor | None:
        """Return, for every pair of channels, whether a removed one may be predicted from the other at a source; (d, d).

        It may not if grouped convolutions read the two channels in different groups. If a layer that reads the source is called
        at other sources, too, this is about all of them. None if there are no groups.

        Args:
            source: one of :attr:`sources`.
        """
        index = self.sources.index(source)
        pool = {self.sources[i] for found in self.pools if index in found for i in found}
        found: torch.Tensor | None = None
        for reader in self.consumers:
            if reader.source in pool and reader.groups > 1:
                places = {c.source.start for c in self.consumers if c.weight == reader.weight}
                group = reader.source.at(range(self.width)) // (self.width * len(places) // reader.groups)
                same = group[:, None] == group
                found = same if found is None else found & same
        return found

    @property
    def pools(self) -> tuple[tuple[int, ...], ...]:
        """Groups of the consumers' inputs, as indices into :attr:`sources`, that share a weight or a bias.

        A layer that is called several times has one weight and one bias for the fold. So a removed neuron must be
        replaced in the same way at every call.
        """
        joined = nx.Graph()
        for consumer in self.consumers:
            for name in (consumer.bias, consumer.weight):
                joined.add_edge((name, consumer.source.place), self.sources.index(consumer.source))
        pools = (sorted(i for i in found if isinstance(i, int)) for found in nx.connected_components(joined))
        return tuple(sorted(tuple(pool) for pool in pools))

    @property
    def layers(self) -> tuple[str, ...]:
        """Module paths of the producers and consumers; include and exclude patterns are matched against them."""
        weights = (*self.producers, *(c.weight for c in self.consumers))
        return tuple(dict.fromkeys(weight.rpartition(".")[0] for weight in weights))


_SHOWN = 3  # the largest number of weights in the label of a refusal


@dataclass(frozen=True)
class Refusal:
    """An axis that layers produce but that cannot be narrowed, with the reason.

    Attributes:
        name: the path of the module that contains its producers.
        width: the size of the axis.
        producers: names of the weights whose rows produce the axis.
        node: the node that prevents the narrowing, the one nearest to a producer; ``""`` if it is a parameter.
        reason: the reason, in words.
    """

    name: str
    width: int
    producers: tuple[str, ...]
    node: str
    reason: str

    @property
    def label(self) -> str:
        """The name to show to people: the module path, or the first weights if no module contains them all."""
        if self.name:
            return self.name
        others = len(self.producers) - _SHOWN
        return ", ".join(self.producers[:_SHOWN]) + (f" and {others} more" if others > 0 else "")


@dataclass(frozen=True)
class Basis:
    """Other coordinates for the channels of a block: z = E h in every group, and back, h = D z.

    Products of queries and keys stay the same if the keys get z = D^T k and the queries z = E q.

    Attributes:
        to: E, (groups, d, d) float64.
        back: D, its inverse, (groups, d, d) float64.
    """

    to: torch.Tensor
    back: torch.Tensor

    @property
    def dual(self) -> Basis:
        """The coordinates of keys, and of the columns of weights that read the channels."""
        return Basis(self.back.mT, self.to.mT)


@dataclass(frozen=True)
class BlockPlan:
    """How one block is narrowed. At each source the removed neurons h_P are replaced by a + B h_K.

    Attributes:
        block: the block as it was found.
        kept: indices of the kept neurons, ascending.
        constants: for every entry of ``block.sources`` the constants a, float64, in the order of :attr:`pruned`. For a stack, one entry
            for every expert, with the constants of this expert's removed neurons.
        predictions: for every entry of ``constants`` the matrix B (P, K), or None for B = 0; all None by default.
        constants_in: indices of removed neurons in whose place a constant channel stays (:class:`ConstantChannel`). One is needed if
            a padded layer reads constants other than 0.
        basis: the coordinates in which channels are kept and removed; None for the channels as they are. ``kept``, the constants and
            the predictions are about the channels in these coordinates.
    """

    block: Block
    kept: tuple[int, ...]
    constants: tuple[torch.Tensor, ...]
    predictions: tuple[torch.Tensor | None, ...] = ()
    constants_in: tuple[int, ...] = ()
    basis: Basis | None = None

    def __post_init__(self) -> None:
        if self.basis is not None:
            shape = (self.block.groups, self.block.group_size, self.block.group_size)
            if not self.block.linear or {tuple(self.basis.to.shape), tuple(self.basis.back.shape)} != {shape}:
                raise ArtifactError(
                    f"block {self.block.name}: its channels are to be replaced by linear combinations, which needs a block that is linear "
                    f"and matrices of the shape {shape}; found {tuple(self.basis.to.shape)} and linear={self.block.linear}"
                )
        kept, width = self.kept, self.block.width
        if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= width:
            raise ArtifactError(
                f"block {self.block.name}: the kept indices must be ascending, distinct, within 0..{width - 1} "
                f"and not empty"
            )
        for what, channels in (("kept indices", kept), ("constant channels", self.constants_in)):
            counts = {len(group) for group in self.block.in_groups(channels)}
            if len(counts) > 1:
                raise ArtifactError(
                    f"block {self.block.name}: its {self.block.groups} groups must keep the same number of channels each, and the {what} "
                    f"are divided into {sorted(counts)}"
                )
        shapes = [tuple(a.shape) for a in self.constants]
        experts = self.block.groups if self.block.has_experts else 1
        removed, left = (width - len(kept)) // experts, len(kept) // experts
        places = len(self.block.measured)
        if shapes != [(removed,)] * places:
            raise ArtifactError(
                f"block {self.block.name}: {removed} removed neurons at {places} "
                f"{'experts' if self.block.has_experts else 'consumer inputs'} need one value each, found shapes {shapes}"
            )
        if not self.predictions:
            object.__setattr__(self, "predictions", (None,) * len(self.constants))
        wrong = [tuple(b.shape) for b in self.predictions if b is not None and b.shape != (removed, left)]
        if wrong or len(self.predictions) != len(self.constants):
            raise ArtifactError(
                f"block {self.block.name}: a prediction of {removed} removed neurons from {left} kept ones "
                f"for each of {len(self.constants)} inputs is needed, found {len(self.predictions)}, shapes {wrong}"
            )
        if self.block.has_experts:
            self._require_places_of_experts()
            return
        for source, prediction in zip(self.block.sources, self.predictions, strict=True):
            if prediction is not None and not self.block.takes_prediction(source):
                raise ArtifactError(
                    f"block {self.block.name}: neurons removed at {source.node} can only be replaced by constants, but the "
                    f"plan predicts them from kept neurons"
                )
            together = self.block.read_together(source) if prediction is not None else None
            if prediction is not None and together is not None:
                across = ~together[list(self.pruned)][:, list(self.kept)]
                if bool(prediction[across.to(prediction.device)].any()):
                    raise ArtifactError(
                        f"block {self.block.name}: a grouped convolution reads {source.node}, and the plan predicts removed neurons of one "
                        f"group from kept neurons of another. A layer cannot do that: such entries of a prediction must be 0"
                    )
            if not self.block.takes_constants(source) and bool(self.constants_at(source).any()):
                raise ArtifactError(
                    f"block {self.block.name}: the channels removed at {source.node} are factors of products, and can only be replaced by 0, "
                    f"but the plan has other constants for them"
                )
        self._require_one_prediction_a_layer()
        self._require_a_constant_channel()

    def _require_places_of_experts(self) -> None:
        for consumer in self.block.consumers:
            if not consumer.bias and any(bool(a.any()) for a in self.constants):
                raise ArtifactError(
                    f"block {self.block.name}: {consumer.weight} has no bias, so the experts have no place for constants of removed "
                    f"neurons, and the plan has some"
                )
            if not consumer.alone and any(b is not None for b in self.predictions):
                raise ArtifactError(
                    f"block {self.block.name}: {consumer.weight} is used by something else than these experts, so its columns must stay, "
                    f"and the plan predicts removed neurons from kept ones"
                )

    def of_expert(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the kept and the removed channels of one expert of a stack, each counted within the expert."""
        kept, pruned = (self.block.in_groups(channels)[expert] for channels in (self.kept, self.pruned))
        return torch.tensor(kept), torch.tensor(pruned)

    def _require_a_constant_channel(self) -> None:
        if self.constants_in and (self.block.constant is None or not set(self.constants_in) <= set(self.pruned)):
            raise ArtifactError(
                f"block {self.block.name}: constant channels are to stay in place of the neurons {self.constants_in}, but these are not "
                f"all removed, or no layer of the block needs a constant channel"
            )
        for consumer in self.block.consumers:
            if consumer.padded and not self.constants_in and bool(self.constants_at(consumer.source).any()):
                raise ArtifactError(
                    f"block {self.block.name}: {consumer.weight} pads its input, so the constants of removed neurons need a channel of "
                    f"their own, and the plan has none"
                )

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

    def constants_at(self, source: ValueAxis) -> torch.Tensor:
        """Return the constants a at one of the block's sources."""
        return self.constants[self.block.sources.index(source)]

    def prediction_at(self, source: ValueAxis) -> torch.Tensor | None:
        """Return the prediction B at one of the block's sources; None for B = 0."""
        return self.predictions[self.block.sources.index(source)]

    def value_at(self, source: ValueAxis) -> float:
        """Return the value c of the constant channel at one of the block's sources."""
        assert self.block.constant is not None
        return self.block.constant.values[self.block.sources.index(source)]

    @cached_property
    def pruned(self) -> tuple[int, ...]:
        """Indices of the removed neurons P, ascending."""
        kept = set(self.kept)
        return tuple(i for i in range(self.block.width) if i not in kept)

    @cached_property
    def gone(self) -> tuple[int, ...]:
        """Indices of the channels that the narrowed network lacks, ascending: P without the constant channels."""
        return tuple(i for i in self.pruned if i not in self.constants_in)

    def lost(self, parameter: ParameterAxis) -> int:
        """Return by how many entries an axis of a parameter becomes shorter at one of the block's places on it."""
        return len(self.gone) // parameter.groups

    @property
    def width(self) -> int:
        """The width after pruning: the kept neurons, and the constant channels."""
        return self.block.width - len(self.gone)


@dataclass(frozen=True)
class Correction:
    """A layer y = W x + b that was fitted anew: after removed neurons are folded, its weights become W + dW and b + db.

    Attributes:
        layer: the layer, or its first call; its ``source`` is the whole input axis.
        weight: dW, in the shape of the narrowed weight.
        bias: db, in the shape of the narrowed bias.
        further: the other calls, if the layer is called several times.
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
    """Which neurons are removed, and what replaces them. A plan is pure data, without a graph or a module.

    Attributes:
        blocks: the blocks that are narrowed; blocks that stay whole are left out.
        corrections: layers that were fitted anew, in graph order: consumers of the blocks, and others if asked for.
        fingerprint: hash of the structure of the model that the plan was made for.
        frontend: the front end that traced the model; node names in the plan are those of its graphs.
        settings: how the plan was made (criterion, compensation, budget, floors), for the report.
    """

    blocks: tuple[BlockPlan, ...]
    fingerprint: str
    frontend: str
    settings: Mapping[str, Any]
    corrections: tuple[Correction, ...] = ()

    @property
    def removed(self) -> int:
        """Number of hidden neurons removed."""
        return sum(len(entry.gone) for entry in self.blocks)

    @property
    def refitted(self) -> tuple[str, ...]:
        """Names of the weights of layers outside the blocks that were fitted anew."""
        consumers = {consumer.weight for entry in self.blocks for consumer in entry.block.consumers}
        return tuple(c.layer.weight for c in self.corrections if c.layer.weight not in consumers)

    @property
    def widths(self) -> dict[str, int]:
        """Block name -> width after pruning."""
        return {entry.block.name: entry.width for entry in self.blocks}


def consumer_from_json(data: Mapping[str, Any]) -> Consumer:
    """Return the consumer that ``dataclasses.asdict`` turned into this dictionary, which may come from JSON."""
    routing = data.get("routing")
    division = None if routing is None else Routing(**routing)
    return Consumer(**dict(data) | {"source": ValueAxis(*data["source"]), "routing": division})


def block_to_json(block: Block) -> dict[str, Any]:
    """Return the block as dictionaries and lists that can be written as JSON."""
    return dataclasses.asdict(block)


def _path_from_json(path: Sequence[str | int]) -> tuple[str | int, ...]:
    """Return the path of a number. It must lead into a call's arguments, because numbers will be written there."""
    if not path or path[0] not in ("args", "kwargs"):
        raise ValueError(f"the plan writes a number at {path!r}, which is not an argument of a call")
    return tuple(path)


def block_from_json(data: Mapping[str, Any]) -> Block:
    """Return the block that :func:`block_to_json` was called on."""
    return Block(
        name=data["name"],
        width=data["width"],
        producers=tuple(data["producers"]),
        consumers=tuple(consumer_from_json(consumer) for consumer in data["consumers"]),
        reductions=tuple(Reduction(**r | {"source": ValueAxis(*r["source"])}) for r in data["reductions"]),
        parameters=tuple(ParameterAxis(**axis) for axis in data["parameters"]),
        literals=tuple(SizeLiteral(**entry | {"path": _path_from_json(entry["path"])}) for entry in data["literals"]),
        carriers=tuple(ValueAxis(*carrier) for carrier in data["carriers"]),
        constant=_constant_from_json(data.get("constant")),
        groups=data.get("groups", 1),
        kind=data.get("kind", "mlp"),
        factors=tuple(Factor(**f | {"source": ValueAxis(*f["source"])}) for f in data.get("factors", ())),
        linear=data.get("linear", False),
    )


def _constant_from_json(data: Mapping[str, Any] | None) -> ConstantChannel | None:
    if data is None:
        return None
    settings = tuple(Setting(ParameterAxis(**entry["parameter"]), entry["value"]) for entry in data["settings"])
    return ConstantChannel(settings, tuple(data["values"]))
