"""Importance: one score per hidden neuron of a block; the lowest go first.

h is the activation at a consumer's input, C its covariance, w_j the consumer's column j. With several consumer inputs
the scores add up (several calls of one layer count once).

- ``"variance"`` (Variance-Based Pruning, ICCV 2025, arXiv 2507.12988): C_jj. Replacing h_j by its mean costs an expected
  squared error of just C_jj.
- ``"output_variance"`` (FLAP, AAAI 2024, arXiv 2312.11983, without its normalisation): C_jj |w_j|^2, the same error behind
  the consumer.
- ``"denoised_variance"`` (DVBP, arXiv 2608.17657): (1 - p) C_jj + p D_jj, with D what is left of C above the
  Marchenko-Pastur edge, and p the share that is removed.
- ``"obs"`` (Optimal Brain Surgeon on the layer's regression): |w_j|^2 / [(C + lambda I)^-1]_jj, the error that is left when
  j alone goes and the consumer is fitted again.
- ``"greedy_obs"``: the same, one neuron after the other, with the fit brought up to date (:mod:`vbpfx.planning.elimination`).
- ``"magnitude"``: the squared L2 norm of everything the neuron owns: its rows in the producers, its
  columns in the consumers.
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
    """What a criterion sees of a block.

    Attributes:
        block: the block.
        moments: one per entry of ``block.sources``; several calls of one layer have theirs pooled.
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
        """Per distinct consumer input its moments, and the weights (out, d) that read it, float64."""
        found = []
        for pool in self.block.pools:
            sources = [self.block.sources[index] for index in pool]
            readers: dict[str, Consumer] = {c.weight: c for c in self.block.consumers if c.source in sources}
            weights = [columns(self.model, reader, self.block.width) for reader in readers.values()]
            found.append((self.moments[pool[0]], torch.cat(weights)))
        return found


Criterion = Callable[[Scoring], Tensor]


def columns(model: nn.Module, consumer: Consumer, width: int) -> Tensor:
    """The columns of a consumer's weight at a block's channels, (out, d) float64; windows count as further outputs."""
    weight = tensor_named(model, consumer.weight).detach().double().cpu()
    own = weight.index_select(consumer.weight_axis, consumer.source.at(range(width)))
    return own.movedim(consumer.weight_axis, -1).reshape(-1, width)


def summed_variance(block: Block, moments: tuple[Moments, ...]) -> Tensor:
    """The sum of a block's variances over its consumer inputs, (d,) float64; moments as :class:`Scoring` has them."""
    return torch.stack([moments[pool[0]].variance.cpu() for pool in block.pools]).sum(0)


def variance(about: Scoring) -> Tensor:
    """Sum over the consumer inputs of M2 / (n - 1); (d,) float64."""
    return summed_variance(about.block, about.moments)


def output_variance(about: Scoring) -> Tensor:
    """Sum over the consumer inputs of C_jj |w_j|^2; (d,) float64."""
    return torch.stack([m.variance.cpu() * weight.square().sum(0) for m, weight in about.inputs]).sum(0)


def denoised_variance(about: Scoring) -> Tensor:
    """Sum over the consumer inputs of (1 - p) C_jj + p D_jj; (d,) float64.

    D = sum of lambda_i u_i u_i^T over the eigenvalues of C above the Marchenko-Pastur edge s (1 + sqrt(d / n))^2, with n
    the number of *samples* (positions of one image are not independent draws) and s the median eigenvalue over the
    median of the Marchenko-Pastur law, here taken as 1.
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
    """Sum over the consumer inputs of |w_j|^2 / [(C + lambda I)^-1]_jj; (d,) float64."""
    total = torch.zeros(about.block.width, dtype=torch.float64)
    for moments, weight in about.inputs:
        total += weight.square().sum(0) / ridge_inverse(moments.all_co.covariance.cpu()).diagonal()
    return total


def greedy_obs(about: Scoring) -> Tensor:
    """The error of the consumer's output when the neuron goes in its turn; rises in the order of removal; (d,) float64."""
    order, costs = elimination_costs([(m.all_co.covariance.cpu(), weight) for m, weight in about.inputs])
    scores = torch.full((about.block.width,), torch.inf, dtype=torch.float64)
    # in its turn a neuron may cost less than one before it: what counts is the order
    scores[order] = costs.cummax(0).values
    return scores.clamp_max(2 * float(costs.max()) if len(costs) else 1.0)  # the last one left, whatever it costs


def magnitude(about: Scoring) -> Tensor:
    """Sum of the squares of all weights that belong to the neuron; (d,) float64."""
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
    """Uniform in [0, 1), the same for the same block name; (d,) float64."""
    # a checksum of the whole name: torch's generator uses no more than 32 bits of a seed
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
    """Of a function, or of the class of what is called: not where in memory it is, which no other run shares."""
    name: str = getattr(criterion, "__name__", type(criterion).__name__)
    return name


def score(criterion: str | Criterion, about: Scoring) -> Tensor:
    """The scores of one block, (d,) float64 on the CPU, by a criterion's name or the user's own function.

    Raises:
        BudgetError: an own function returns something else than one finite number per neuron.
        CalibrationError: weights or statistics of the block are so that a named criterion gives none.
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
