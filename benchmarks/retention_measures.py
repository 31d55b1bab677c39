"""Measures of how much a pruned network keeps of the dense one, on the same n test samples.

For classifiers, d_i and p_i in {0, 1} say whether the dense and the pruned network are right on sample i:

- top-1 is the mean of p_i; *kept* is R = mean(p) / mean(d), a ratio of paired means with the standard error (delta method)

      SE(R) = sqrt(sum_i (p_i - R d_i)^2 / (n (n - 1))) / mean(d).

- agreement is the share of samples on which both have their highest logit at the same class;
- KL is the mean of sum_c q_c ln(q_c / r_c), in nats, with q the dense and r the pruned network's softmax.

For sentence encoders:

- the cosine between the dense and the pruned embedding of a text: its mean, with the standard error s / sqrt(n);
- recall@1: one network embeds the first and second halves of all texts, and recall@1 is the share of first halves whose
  nearest second half by cosine is their own; *kept* is pruned over dense, as above.

For two pruned networks a and b on the same samples, the difference in *kept* is D = (mean(a) - mean(b)) / mean(d) with

    SE(D) = sqrt(sum_i (a_i - b_i - D d_i)^2 / (n (n - 1))) / mean(d),

and the difference of cosines is the mean difference, with s / sqrt(n). All standard errors describe the draw of test samples;
weights and calibration data are taken as given.
"""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Measured:
    """Figures by name, and the values per sample that they average.

    Attributes:
        values: (n,) float64: whether the network is right (classifiers), or the cosine (encoders).
    """

    figures: dict[str, float]
    values: Tensor


def compare(dense: Tensor, pruned: Tensor, labels: Tensor) -> Measured:
    """Compare the logits of both networks, (n, classes), given the labels, (n,)."""
    d, p = ((logits.argmax(1) == labels).double() for logits in (dense, pruned))
    kept, error = ratio_of_means(p, d)
    q, r = (F.log_softmax(logits.double(), dim=1) for logits in (dense, pruned))
    figures = {
        "top1": p.mean().item(),
        "kept": kept,
        "kept_se": error,
        "agreement": (dense.argmax(1) == pruned.argmax(1)).double().mean().item(),
        "kl": (q.exp() * (q - r)).sum(1).mean().item(),
    }
    return Measured(figures, p)


def compare_embeddings(dense: tuple[Tensor, Tensor, Tensor], pruned: tuple[Tensor, Tensor, Tensor]) -> Measured:
    """Compare both networks' embeddings of texts, of their first halves and of their second halves, (n, e) each."""
    cosine = F.cosine_similarity(dense[0].double(), pruned[0].double(), dim=1)
    d, p = (found_again(first, second) for _, first, second in (dense, pruned))
    mean, mean_error = mean_of(cosine)
    kept, error = ratio_of_means(p, d)
    figures = {
        "cosine": mean,
        "cosine_se": mean_error,
        "recall": p.mean().item(),
        "kept": kept,
        "kept_se": error,
    }
    return Measured(figures, cosine)


def found_again(first: Tensor, second: Tensor) -> Tensor:
    """Return whether row i of ``second`` is the nearest to row i of ``first`` by cosine, (n,) float64."""
    nearest = (F.normalize(first.double(), dim=1) @ F.normalize(second.double(), dim=1).T).argmax(1)
    return (nearest == torch.arange(len(first))).double()


def mean_of(values: Tensor) -> tuple[float, float]:
    """Return the mean of values, (n,), and its standard error."""
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def ratio_of_means(over: Tensor, under: Tensor) -> tuple[float, float]:
    """Return mean(over) / mean(under) of paired values, (n,), and its standard error."""
    ratio, n = over.mean() / under.mean(), len(under)
    residual = over - ratio * under  # its mean is zero
    return ratio.item(), ((residual.square().sum() / (n * (n - 1))).sqrt() / under.mean()).item()


def difference(a: Tensor, b: Tensor, dense: Tensor | None) -> tuple[float, float]:
    """Return how much more a keeps than b, given (n,) values of each, and its standard error.

    Args:
        dense: the dense network's values, for classifiers; None gives the plain mean difference.
    """
    return mean_of(a - b) if dense is None else ratio_of_means(a - b, dense)


def pack(values: Tensor) -> str:
    """Encode values as text for JSON: 1 - v in float16, which is exact for 0 and 1 and precise near 1."""
    return base64.b85encode(zlib.compress((1 - values).numpy().astype("<f2").tobytes(), 9)).decode()


def unpack(text: str) -> Tensor:
    """Decode the values that :func:`pack` encoded, (n,) float64."""
    return 1 - torch.from_numpy(np.frombuffer(zlib.decompress(base64.b85decode(text)), "<f2").astype(np.float64))
