"""Importance: criteria that give every hidden neuron of a block a score. The lowest scores are removed first.

h is the activation at a consumer's input, C is its covariance, and w_j is column j of the consumer's weight. If a block
has several consumer inputs, their scores are added (several calls of one layer count once).

- ``"variance"`` (Variance-Based Pruning, ICCV 2025, arXiv 2507.12988): C_jj. Replacing h_j by its mean costs an expected
  squared error of C_jj.
- ``"output_variance"`` (FLAP, AAAI 2024, arXiv 2312.11983, without its normalisation): C_jj |w_j|^2, the same error in
  the consumer's output.
- ``"denoised_variance"`` (DVBP, arXiv 2608.17657): (1 - p) C_jj + p D_jj, where D is the part of C above the
  Marchenko-Pastur edge, and p the share of neurons that is removed.
- ``"obs"`` (Optimal Brain Surgeon on the layer's regression): |w_j|^2 / [(C + lambda I)^-1]_jj, the error that is left when
  j alone is removed and the consumer is fitted again.
- ``"greedy_obs"``: the same for one neuron after the other, with a new fit each time
  (:mod:`vbpfx.planning.elimination`).
- ``"magnitude"``: the squared L2 norm of all weights of the neuron: its rows in the producers and its columns in the
  consumers.
- ``"random"``: uniform, from a fixed seed.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from vbpfx.calibration.moments import Moments
from vbpfx.errors import BudgetError, CalibrationError
from vbpfx.graph.capture import tensor_named
from vbpfx.planning.elimination import elimination_costs, ridge_inverse
from vbpfx.plans.records import Block, Consumer


@dataclass(frozen=True)
class Scoring:
    """What a criterion gets to score a block's neurons.

    Attributes:
        block: the block.
        moments: the activation moments for every entry of ``block.sources``; those of several calls of one layer are
            pooled.
        model: the model, for its weights.
        ratio: the share of all neurons that will be removed, as far as it is known.
        samples: number of calibration samples.
    """

    block: Block
    moments: tuple[Moments, ...]
    model: nn.Module
    ratio: float
    samples: int

    @cached_property
    def inputs(self) -> list[tuple[Moments, Tensor]]:
        """The moments of every distinct consumer input, with the weights (out, d) that read it, float64."""
        found = []
        for pool in self.block.pools:
            sources = [self.block.sources[index] for index in pool]
            readers: dict[str, Consumer] = {c.weight: c for c in self.block.consumers if c.source in sources}
            weights = [columns(self.model, reader, self.block.width) for reader in readers.values()]
            found.append((self.moments[pool[0]], torch.cat(weights)))
        return found


Criterion = Callable[[Scoring], Tensor]


def columns(model: nn.Module, consumer: Consumer, width: int) -> Tensor:
    """Return the columns of a consumer's weight at a block's channels, (out, d) float64.

    The positions of a convolution's window count as further outputs.
    """
    weight = tensor_named(model, consumer.weight).detach().double().cpu()
    own = weight.index_select(consumer.weight_axis, consumer.source.at(range(width)))
    return own.movedim(consumer.weight_axis, -1).reshape(-1, width)


def summed_variance(block: Block, moments: tuple[Moments, ...]) -> Tensor:
    """Return the sum of a block's variances over its consumer inputs, (d,) float64.

    Args:
        moments: as in :class:`Scoring`.
    """
    return torch.stack([moments[pool[0]].variance.cpu() for pool in block.pools]).sum(0)


def variance(about: Scoring) -> Tensor:
    """Return the sum of M2 / (n - 1) over the consumer inputs; (d,) float64."""
    return summed_variance(about.block, about.moments)


def output_variance(about: Scoring) -> Tensor:
    """Return the sum of C_jj |w_j|^2 over the consumer inputs; (d,) float64."""
    return torch.stack([m.variance.cpu() * weight.square().sum(0) for m, weight in about.inputs]).sum(0)


def denoised_variance(about: Scoring) -> Tensor:
    """Return the sum of (1 - p) C_jj + p D_jj over the consumer inputs; (d,) float64.

    D is the sum of lambda_i u_i u_i^T over the eigenvalues of C above the Marchenko-Pastur edge s (1 + sqrt(d / n))^2.
    n is the number of *samples* (positions of one image are not independent draws). s is the median eigenvalue divided
    by the median of the Marchenko-Pastur law, which is taken as 1 here.
    """
    total = torch.zeros(about.block.width, dtype=torch.float64)
    for moments, _ in about.inputs:
        c = moments.all_co.covariance.cpu()
        values, vectors = torch.linalg.eigh(c)
        edge = values.median() * (1 + (len(c) / max(1, about.samples)) ** 0.5) ** 2
        denoised = (vectors.square() * torch.where(values > edge, values, 0.0)).sum(1)
        total += (1 - about.ratio) * moments.variance.cpu() + about.ratio * denoised
    return total


def obs(about: Scoring) -> Tensor:
    """Return the sum of |w_j|^2 / [(C + lambda I)^-1]_jj over the consumer inputs; (d,) float64."""
    total = torch.zeros(about.block.width, dtype=torch.float64)
    for moments, weight in about.inputs:
        total += weight.square().sum(0) / ridge_inverse(moments.all_co.covariance.cpu()).diagonal()
    return total


def greedy_obs(about: Scoring) -> Tensor:
    """Return the error in the consumers' outputs when each neuron is removed in its turn; (d,) float64.

    The scores never fall in the order of removal.
    """
    order, costs = elimination_costs([(m.all_co.covariance.cpu(), weight) for m, weight in about.inputs])
    scores = torch.full((about.block.width,), torch.inf, dtype=torch.float64)
    # a neuron may cost less than one that was removed before it; the running maximum keeps the order
    scores[order] = costs.cummax(0).values
    return scores.clamp_max(2 * float(costs.max()) if len(costs) else 1.0)  # the one neuron that is never removed


def magnitude(about: Scoring) -> Tensor:
    """Return the sum of the squares of all weights that belong to each neuron; (d,) float64."""
    block = about.block
    total = torch.zeros(block.width, dtype=torch.float64)
    weights = {*block.producers, *(consumer.weight for consumer in block.consumers)}
    for entry in block.parameters:
        if entry.name in weights:
            weight = tensor_named(about.model, entry.name).detach().double().cpu()
            own = weight.index_select(entry.axis, entry.at(range(block.width)))
            total += own.movedim(entry.axis, 0).flatten(1).square().sum(1)
    return total


def random(about: Scoring) -> Tensor:
    """Return uniform random numbers in [0, 1), the same for the same block name; (d,) float64."""
    # the seed is a 32-bit checksum of the whole name, since torch's generator uses no more than 32 bits
    generator = torch.Generator().manual_seed(zlib.crc32(about.block.name.encode()))
    return torch.rand(about.block.width, dtype=torch.float64, generator=generator)


CRITERIA: Mapping[str, Criterion] = {
    "variance": variance,
    "output_variance": output_variance,
    "denoised_variance": denoised_variance,
    "obs": obs,
    "greedy_obs": greedy_obs,
    "magnitude": magnitude,
    "random": random,
}
NEED_COVARIANCE = ("denoised_variance", "obs", "greedy_obs")


def name_of(criterion: Criterion) -> str:
    """Return the name of a function, or of a callable object's class.

    Its ``repr`` would hold an address in memory, which differs from run to run.
    """
    name: str = getattr(criterion, "__name__", type(criterion).__name__)
    return name


def score(criterion: str | Criterion, about: Scoring) -> Tensor:
    """Return the scores of one block, (d,) float64 on the CPU.

    Args:
        criterion: the name of a criterion, or the user's own function.
        about: the block.

    Raises:
        BudgetError: the user's function returned something else than one finite number per neuron.
        CalibrationError: a named criterion gave scores that are not finite, because of the block's weights or
            statistics.
    """
    if isinstance(criterion, str):
        scores = CRITERIA[criterion](about)
        if not bool(scores.isfinite().all()):
            raise CalibrationError(
                f"block {about.block.name}: criterion {criterion!r} gives scores that are not finite, so its neurons cannot be "
                f"ranked: weights of {', '.join(about.block.layers)} hold NaN or infinity, or their squares overflow; mend them, "
                f"or leave the block out with exclude={about.block.name!r}"
            )
        return scores
    found = criterion(about)
    if not isinstance(found, Tensor) or found.shape != (about.block.width,) or not bool(found.isfinite().all()):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise BudgetError(
            f"criterion={getattr(criterion, '__name__', criterion)} returned {shape} for block {about.block.name}: it must "
            f"return a tensor of {about.block.width} finite numbers, one per neuron"
        )
    return found.detach().double().cpu()
