"""Bases: the linear combinations of a head's channels that matter most to what reads them.

Queries and keys of a head enter the network by their products alone. With M = E[q q^T] and C = Cov(k) over tokens and samples (a constant
that is added to all keys does not change a softmax; without a softmax, C = E[k k^T]), the error of the products is smallest, for every
rank r, with the first r terms of the singular value decomposition

    M^(1/2) C^(1/2) = U S V^T,    z_q = S^(1/2) U^T M^(-1/2) q,    z_k = S^(1/2) V^T C^(-1/2) k.

The values of a head are read by the columns W of a layer. With their covariance C the error of the layer's output is smallest with the
first r terms of

    W C^(1/2) = U S V^T,    z = V^T C^(-1/2) v.

Several query heads that share keys, or several places that read the values, add up: M, W^T W and C are sums over them. In both cases, s_i^2
is the expected squared error that the removal of z_i adds, and is its score. C and M get a small multiple of the identity, since channels
may be without variance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from vbpfx.calibration.moments import CoMoments, Moments
from vbpfx.planning.importance import columns
from vbpfx.plans.records import Basis, Block

# The multiple of the mean variance that is added to covariances.
_RIDGE = 1e-6


def find_basis(block: Block, moments: Sequence[Moments], model: nn.Module) -> tuple[Basis, Tensor]:
    """Return the basis of a linear block, and one score per channel in it, (d,) float64, highest first in every group.

    Args:
        block: a block that is linear.
        moments: the moments of every source of the block, with covariances.
        model: the dense model, for its weights.
    """
    if block.factors:
        left, right = (_powers(block, moments, role) for role in ("query", "key"))
    else:
        weights = {c.source: columns(model, c, block.width) for c in block.consumers}
        covariances = [moments[block.sources.index(source)].all_co.covariance for source in weights]
        right = torch.stack([_in_groups(c, block) for c in covariances]).sum(0)
        left = torch.stack([_in_groups(weight.T @ weight, block) for weight in weights.values()]).sum(0)
    root, inverse = _roots(right)
    half, _ = _roots(left)
    _, s, vt = torch.linalg.svd(half @ root)
    scale = s.clamp_min(s.amax(-1, keepdim=True) * torch.finfo(s.dtype).eps) if block.factors else torch.ones_like(s)
    # z_k = S^(1/2) V^T C^(-1/2) k, and z_q by the inverse of its transpose, so that products stay as they are
    to, back = scale.sqrt()[..., None] * (vt @ inverse), (root @ vt.mT) * scale.rsqrt()[..., None, :]
    basis = Basis(to, back).dual if block.factors else Basis(to, back)
    return basis, s.square().flatten()


def in_basis(block: Block, moments: Sequence[Moments], basis: Basis) -> tuple[Moments, ...]:
    """Return the moments of every source in other coordinates. Variances are those of the rows that enter covariances."""
    keys = {factor.source for factor in block.factors if factor.role == "key"}
    return tuple(
        _turned(m, torch.block_diag(*(basis.dual if source in keys else basis).to))  # type: ignore[no-untyped-call]
        for m, source in zip(moments, block.sources, strict=True)
    )


def _turned(moments: Moments, matrix: Tensor) -> Moments:
    def turned(co: CoMoments | None) -> CoMoments | None:
        return None if co is None else replace(co, mean=matrix @ co.mean.cpu(), m2=matrix @ co.m2.cpu() @ matrix.T)

    variance = turned(moments.all_co).covariance.diagonal()  # type: ignore[union-attr]
    m2 = variance * max(1, moments.count - 1)
    return Moments(moments.count, matrix @ moments.mean.cpu(), m2, turned(moments.co), turned(moments.held_out))


def _powers(block: Block, moments: Sequence[Moments], role: str) -> Tensor:
    """Return the second moments of queries, or the covariances of keys, of every group, (groups, d, d), summed over all calls."""
    total = torch.zeros(block.groups, block.group_size, block.group_size, dtype=torch.float64)
    for factor in block.factors:
        if factor.role == role:
            co = moments[block.sources.index(factor.source)].all_co
            power = co.covariance.cpu()
            if not factor.centred:
                power = power + torch.outer(co.mean.cpu(), co.mean.cpu())
            total += _in_groups(power, block)
    return total


def _in_groups(matrix: Tensor, block: Block) -> Tensor:
    """Return the part of a matrix (width, width) that belongs to each group, (groups, d, d) float64."""
    size = block.group_size
    parts = [matrix[i : i + size, i : i + size] for i in range(0, block.width, size)]
    return torch.stack(parts).double().cpu()


def _roots(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the square roots of positive matrices (groups, d, d), and their inverses."""
    values, vectors = torch.linalg.eigh(matrices)
    least = _RIDGE * values.clamp_min(0).mean(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    roots = (values.clamp_min(0) + least).sqrt()
    return (vectors * roots[..., None, :]) @ vectors.mT, (vectors / roots[..., None, :]) @ vectors.mT
