"""What a pruned network keeps, against the dense one on the same n test samples.

Classifiers, with d_i, p_i in {0, 1} whether the dense and the pruned network are right on sample i:

- top-1 is the mean of p_i; *kept* is R = mean(p) / mean(d), a ratio of paired means with the standard error (delta method)

      SE(R) = sqrt(sum_i (p_i - R d_i)^2 / (n (n - 1))) / mean(d).

- agreement is the share of samples on which both have their highest logit at the same class;
- KL is the mean of sum_c q_c ln(q_c / r_c), in nats, with q the dense and r the pruned network's softmax.

Sentence encoders:

- the cosine between the dense and the pruned embedding of a text, its mean with the standard error s / sqrt(n);
- recall@1: the share of texts whose first half has, of all second halves, its own as the nearest by cosine, all embedded
  by one network; *kept* is pruned over dense, as above.

Two pruned networks a and b on the same samples: the difference of what they keep is (mean(a) - mean(b)) / mean(d) = D with

    SE(D) = sqrt(sum_i (a_i - b_i - D d_i)^2 / (n (n - 1))) / mean(d),

and of cosines the mean difference with s / sqrt(n). All errors are over the draw of test samples; weights and calibration
data are taken as given.
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
    """Figures by name, and what they are the means of.

    Attributes:
        values: (n,) float64: whether the network is right (classifiers), the cosine (encoders).
    """

    figures: dict[str, float]
    values: Tensor


def compare(dense: Tensor, pruned: Tensor, labels: Tensor) -> Measured:
    """Logits of both networks, (n, classes), under the labels, (n,)."""
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
    """Embeddings of the texts, of their first halves and of their second halves, by both networks, (n, e) each."""
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
    """Whether row i of ``second`` is the nearest to row i of ``first`` by cosine, (n,) float64."""
    nearest = (F.normalize(first.double(), dim=1) @ F.normalize(second.double(), dim=1).T).argmax(1)
    return (nearest == torch.arange(len(first))).double()


def mean_of(values: Tensor) -> tuple[float, float]:
    """The mean of values, (n,), and its standard error."""
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def ratio_of_means(over: Tensor, under: Tensor) -> tuple[float, float]:
    """mean(over) / mean(under) of paired values, (n,), and its standard error."""
    ratio, n = over.mean() / under.mean(), len(under)
    residual = over - ratio * under  # of mean zero
    return ratio.item(), ((residual.square().sum() / (n * (n - 1))).sqrt() / under.mean()).item()


def difference(a: Tensor, b: Tensor, dense: Tensor | None) -> tuple[float, float]:
    """What a keeps more than b, (n,) values each, with its standard error.

    Args:
        dense: the dense network's values, for classifiers; None for the plain mean difference.
    """
    return mean_of(a - b) if dense is None else ratio_of_means(a - b, dense)


def pack(values: Tensor) -> str:
    """Values as text for JSON: 1 - v in float16, which is exact for 0 and 1 and fine near 1."""
    return base64.b85encode(zlib.compress((1 - values).numpy().astype("<f2").tobytes(), 9)).decode()


def unpack(text: str) -> Tensor:
    """What :func:`pack` packed, (n,) float64."""
    return 1 - torch.from_numpy(np.frombuffer(zlib.decompress(base64.b85decode(text)), "<f2").astype(np.float64))
