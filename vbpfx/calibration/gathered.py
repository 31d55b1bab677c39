"""Gathered moments: merge the observers' moments over all ranks, and convert them for a checkpoint.

If rank r has count n_r, mean mu_r and centred second moment M2_r, then all ranks together have (Chan, Golub and LeVeque
1979)

    n = sum n_r,    mu = sum n_r mu_r / n,    M2 = sum M2_r + n_r (mu_r - mu)(mu_r - mu)^T.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vbpfx.calibration.moments import CoMoments, Moments
from vbpfx.calibration.observer import Observer
from vbpfx.distributed.ranks import Ranks


def over_all_ranks(
    moments: Sequence[Moments | None], widths: Sequence[int], device: torch.device, ranks: Ranks
) -> list[Moments | None]:
    """Return the moments of the data of all ranks, for every observer; None if no rank has seen data for it.

    The result is the same on all ranks.

    Args:
        moments, widths: the moments and the width of every observer, in the same order on all ranks.
        device: the device of the moments.
    """
    nothing = [(0, torch.zeros(width, dtype=torch.float64, device=device)) for width in widths]
    kinds = (list(moments), [m and m.co for m in moments], [m and m.held_out for m in moments])
    parts = [part for kind in kinds for part in kind]
    own = [(part.count, part.mean) if part else none for part, none in zip(parts, nothing * len(kinds), strict=True)]
    if not own:
        return []
    flat = torch.cat([torch.cat([mean.new_tensor([count]), count * mean]) for count, mean in own])
    totals = torch.split(ranks.sum([flat])[0], [1 + len(mean) for _, mean in own])
    merged: list[Any] = []
    for number, (part, (count, mean), total) in enumerate(zip(parts, own, totals, strict=True)):
        n = int(total[0])
        center = total[1:] / max(1, n)
        delta = mean - center
        kind, spread = (Moments, _squares) if number < len(moments) else (CoMoments, _products)
        if n:
            m2 = ranks.sum([spread(delta, count) + (part.m2 if part else 0.0)])[0]
        merged.append(kind(n, center, m2) if n else None)
    size = len(moments)
    return [
        Moments(a.count, a.mean, a.m2, co, held_out) if a else None
        for a, co, held_out in zip(merged[:size], merged[size : 2 * size], merged[2 * size :], strict=True)
    ]


def _squares(delta: Tensor, count: int) -> Tensor:
    return count * delta.square()


def _products(delta: Tensor, count: int) -> Tensor:
    return count * torch.outer(delta, delta)


def to_tensors(watching: Sequence[Observer]) -> tuple[dict[str, Tensor], list[dict[str, int]]]:
    """Return the observers' moments as tensors by name, and the counts that belong to them."""
    tensors: dict[str, Tensor] = {}
    counts: list[dict[str, int]] = []
    for number, observer in enumerate(watching):
        own, parts = observer.moments.to_tensors() if observer.moments else ({}, {})
        tensors |= {f"{number}/{key}": tensor for key, tensor in own.items()}
        counts.append(parts)
    return tensors, counts


def put_back(
    watching: Sequence[Observer],
    tensors: Mapping[str, Tensor],
    counts: Sequence[Mapping[str, int]],
    device: torch.device,
) -> None:
    """Restore the observers' moments from what :func:`to_tensors` returned."""
    for number, (observer, parts) in enumerate(zip(watching, counts, strict=True)):
        read = _reader(tensors, f"{number}/", device)
        observer.moments = Moments.from_tensors(read, parts) if parts else None


def _reader(tensors: Mapping[str, Tensor], prefix: str, device: torch.device) -> Any:
    return lambda key: tensors[prefix + key].to(device)
