"""Prepare: insert observers into a graph, and read the statistics that they gathered."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, fx

from vbpfx.analysis.blocks import Analysis
from vbpfx.analysis.masks import Mask, MaskArgument, find_masks
from vbpfx.calibration.moments import Moments
from vbpfx.calibration.observer import ExpertsObserver, Observer
from vbpfx.errors import AnalysisError, ArtifactError, CalibrationError
from vbpfx.graph.capture import Captured, share_parameters
from vbpfx.graph.edit import divided_by, insert_at_sources
from vbpfx.plans.records import Block, ValueAxis
from vbpfx.storage.files import safetensors_writer, write_atomically

# As many rows enter the covariances as keep their multiply-accumulates below this share of the network's own.
COVARIANCE_SHARE = 0.5


@dataclass(frozen=True)
class Statistics:
    """The activation moments of every block, at each value that its consumers and reductions read (``block.sources``).

    ``a | b`` is the statistics of both data sets together; order and batching do not matter (pairwise merge, Chan et al. 1983).
    Rows are positions: samples and tokens or pixels are pooled. Sums are float64 on the network's device. The variance
    is M2 / (n - 1), as in VBP (arXiv 2507.12988).

    Attributes:
        moments: block -> one :class:`~vbpfx.calibration.moments.Moments` for each of its ``sources``: count, mean (d,),
            centred second moment (d,), and, if asked for, the co-moments (d, d) of a share of the rows. For a stack of experts there is
            one for each expert, of the rows that were routed to it.
    """

    moments: Mapping[str, tuple[Moments, ...]]

    def __or__(self, other: Statistics) -> Statistics:
        own, others = ({n: [m.mean.shape for m in ms] for n, ms in s.moments.items()} for s in (self, other))
        if own != others:
            names = sorted(name for name in own.keys() | others.keys() if own.get(name) != others.get(name))
            raise CalibrationError(
                f"statistics of different blocks cannot be merged: block {', block '.join(names)} differ"
            )
        return Statistics(
            {
                name: tuple(a | b for a, b in zip(self.moments[name], other.moments[name], strict=True))
                for name in self.moments
            }
        )

    def save(self, path: str | Path) -> None:
        """Write the statistics to a ``.safetensors`` file, atomically.

        Args:
            path: the path of the file.

        Raises:
            ArtifactError: the file cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        counts: dict[str, list[dict[str, int]]] = {}
        for name, sources in self.moments.items():
            counts[name] = []
            for index, moments in enumerate(sources):
                own, parts = moments.to_tensors()
                tensors |= {f"{name}/{index}/{key}": tensor for key, tensor in own.items()}
                counts[name].append(parts)
        write_atomically({Path(path): safetensors_writer(tensors, {"vbpfx.statistics": json.dumps(counts)})})

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read the statistics that :meth:`save` wrote.

        Args:
            path: the path of the file.

        Raises:
            ArtifactError: the file cannot be read, or holds something else.
        """
        try:
            with safe_open(path, "pt") as file:
                counts = json.loads(file.metadata()["vbpfx.statistics"])

                def read(prefix: str, parts: Mapping[str, int]) -> Moments:
                    return Moments.from_tensors(lambda key: file.get_tensor(f"{prefix}/{key}"), parts)

                return cls(
                    {
                        name: tuple(read(f"{name}/{index}", parts) for index, parts in enumerate(sources))
                        for name, sources in counts.items()
                    }
                )
        except Exception as error:  # safetensors, json and look-ups raise errors of different types
            raise ArtifactError(
                f"{path} cannot be read as statistics that vbpfx saved ({type(error).__name__}: {error}). Pass a file that vbpfx wrote"
            ) from error


def prepare(
    captured: Captured,
    analysis: Analysis,
    *,
    blocks: Iterable[Block] | None = None,
    mask: MaskArgument | None = None,
    covariance: bool | float = True,
) -> fx.GraphModule:
    """Return an instrumented copy of the captured graph, in eval mode. Run your own data through it.

    An :class:`~vbpfx.calibration.observer.Observer` is inserted at the input of every consumer, so that the statistics
    are those of the value that the layer reads. The copy shares the model's parameters; running it does not change the
    model.

    Args:
        captured: the dense graph; it is not changed.
        analysis: the analysis of this graph.
        blocks: the blocks to observe; by default those that are narrowed by default, :attr:`Analysis.usual`.
        mask: the model's argument that tells which tokens are padding, (B, T); ``attention_mask`` is found
            automatically. Padding does not enter the statistics of any value that has the mask's token axis. Nonzero
            entries may stand for tokens (Hugging Face) or for padding (``nn.MultiheadAttention``). This is found out by
            running a few samples, since padding does not influence the output at other positions. A pair such as
            ``("pad", "padding")`` or ``("keep", "tokens")`` states the argument's name and this meaning, which is
            checked.
        covariance: whether to gather covariances as well as variances. Only every n-th position is used, so that this
            costs less than half of the network's own multiply-accumulates, or less than the share that is given as a
            number. Regressions need covariances; ``method="vbp"`` does not.

    Raises:
        AnalysisError: there is no block to observe, or the analysis is of another model.
    """
    chosen = analysis.usual if blocks is None else tuple(blocks)
    if not chosen:
        raise AnalysisError(no_blocks(analysis))
    theirs = analysis.captured
    if (theirs.fingerprint, theirs.frontend) != (captured.fingerprint, captured.frontend):
        raise AnalysisError("the analysis is of another model or front end than the captured graph; analyse this one")
    observed = share_parameters(captured.graph_module)
    observed_by = {source: block for block in chosen for source in block.sources}
    every = (
        rows_between(captured, observed_by, COVARIANCE_SHARE if covariance is True else covariance)
        if covariance
        else {}
    )
    masks = find_masks(captured, [s for b in chosen if not b.has_experts for s in b.sources], mask)
    experts = {block.name: _expert_observers(captured, block, every) for block in chosen if block.has_experts}

    def observer(block: Block, index: int) -> Observer:
        source = block.sources[index]
        routing = block.routing(source)
        if routing is not None:
            return ExpertsObserver(experts[block.name], routing)
        masked = masks[source].axes if source in masks else ()
        return Observer(
            block.name,
            source.axis,
            source.start,
            block.width,
            masked,
            step=source.step,
            size=source.size,
            stride=source.stride,
            counting=source.counting,
            divisor=source.divisor,
            every=every.get(source, 0),
            rows_a_sample=rows_a_sample(captured, source, block.groups),
            samples=captured.samples_axis(source.node) or 0,
        )

    beside = {source: _kept(observed, found) for source, found in masks.items()} | divided_by(chosen)
    insert_at_sources(observed, chosen, observer, "observe", beside)
    return observed


def _expert_observers(captured: Captured, block: Block, every: Mapping[ValueAxis, int]) -> list[Observer]:
    """Return an observer for every expert of a stack. The sources of the stack share them, since they share its weights."""
    source = block.sources[0]
    a_sample = max(1, sum(rows_a_sample(captured, s) for s in block.sources) // block.groups)
    step = coprime(every[source], a_sample) if every.get(source) else 0
    return [
        Observer(
            block.name,
            source.axis,
            source.start,
            block.value_width,
            every=step,
            rows_a_sample=a_sample,
            step=source.step,
        )
        for _ in range(block.groups)
    ]


def _kept(observed: fx.GraphModule, mask: Mask) -> str:
    """Return the name of a node that is nonzero at tokens: the mask, or its negation, which is inserted if needed."""
    if mask.nonzero == "tokens":
        return mask.node
    inputs = observed.graph.find_nodes(op="placeholder")
    node = next(node for node in inputs if node.name == mask.node)
    made = next((user for user in node.users if user.name == f"{mask.node}_kept"), None)
    if made is None:
        with observed.graph.inserting_after(inputs[-1]):
            made = observed.graph.create_node("call_function", torch.logical_not, (node,), name=f"{mask.node}_kept")
        with node.meta["val"].fake_mode:
            made.meta["val"] = node.meta["val"].logical_not()
    return made.name


def rows_a_sample(captured: Captured, source: ValueAxis, groups: int = 1) -> int:
    """Return the number of positions (tokens, pixels, windows) that one sample has in the source's value.

    Args:
        groups: the number of the block's groups of channels, which count as channels if another axis of the value counts them.
    """
    value: Tensor = captured.nodes[source.node].meta["val"]
    channels = value.shape[source.axis] * (groups if source.of_one_group else 1)
    return max(1, value.numel() // channels // (captured.batch or captured.inputs.batch_size or 1))


def rows_between(captured: Captured, sources: Mapping[ValueAxis, Block], share: float) -> dict[ValueAxis, int]:
    """Return, for every source, the n so that every n-th row enters the covariances.

    n is chosen so that the covariances cost about the given share of the network's multiply-accumulates. It has no
    divisor in common with the number of rows of a sample, so that all positions are used in turn.

    Args:
        sources: source -> the block that has it.
        share: the share of the network's multiply-accumulates.
    """
    rows = {source: rows_a_sample(captured, source, block.groups) for source, block in sources.items()}
    spent = sum(rows[source] * block.value_width**2 for source, block in sources.items())
    step = math.ceil(spent / max(1.0, share * sum(captured.macs.values())))
    return {source: coprime(min(step, count), count) for source, count in rows.items()}


def coprime(step: int, count: int) -> int:
    """Return the smallest number from ``step`` on that has no divisor in common with ``count``."""
    return next((k for k in range(step, 2 * step + 2) if math.gcd(k, count) == 1), step)


def observers(observed: fx.GraphModule) -> list[Observer]:
    """Return the observers of a prepared graph, ordered by block and source.

    Raises:
        CalibrationError: the graph was not made by :func:`prepare`.
    """
    placed = [module for module in observed.children() if isinstance(module, Observer)]
    found = list(dict.fromkeys(own for module in placed for own in module.gathering))
    if not found:
        raise CalibrationError("this graph holds no observers; pass what vbpfx.prepare returned")
    return found


def statistics(observed: fx.GraphModule) -> Statistics:
    """Return the statistics that a prepared graph has gathered so far.

    Args:
        observed: what :func:`prepare` returned, after data has run through it.

    Raises:
        CalibrationError: no data has run through it, or an activation was not finite.
    """
    gathered: dict[str, list[Moments]] = {}
    watching = observers(observed)
    seen = {observer.name for observer in watching if observer.moments is not None}
    for observer in watching:
        if observer.bad_call is not None:
            raise CalibrationError(
                f"block {observer.name}: NaN or infinite activations in batch {observer.bad_call + 1} "
                f"(counted from 1); remove that batch, or run the model in a wider dtype"
            )
        found = observer.moments
        if found is None and observer.name in seen:  # an expert of a stack, to which no row was routed
            found = Moments.nothing(observer.width)
        if found is None:
            raise CalibrationError(
                f"block {observer.name} saw no data: run batches through the prepared graph first; where data decides what goes "
                f"through it (an expert that no token was sent to), give more batches, or leave it out with "
                f"exclude={observer.name!r}"
            )
        gathered.setdefault(observer.name, []).append(found)
    return Statistics({name: tuple(moments) for name, moments in gathered.items()})


_SHOWN = 8  # the largest number of refusals that an error message lists


def no_blocks(analysis: Analysis) -> str:
    """Return the message that says why there is nothing to prune."""
    if not analysis.refusals:
        return "the model has no block that can be narrowed: no layer with a weight was found"
    reasons = [f"\n  {r.label}: {r.reason}" + (f" (node {r.node})" if r.node else "") for r in analysis.refusals]
    more = len(reasons) - _SHOWN
    return (
        "the model has no block that can be narrowed; what was looked at:"
        + "".join(reasons[:_SHOWN])
        + (f"\n  and {more} more; vbpfx inspect lists them all" if more > 0 else "")
    )
