"""How far one network's class probabilities are from another's: the one definition that everything here uses."""

from __future__ import annotations

from torch import Tensor


def divergence(narrowed: Tensor, dense: Tensor, temperature: float = 1.0) -> Tensor:
    """The Kullback-Leibler divergence of logits from the dense network's, in nats: one number per prediction.

        sum_c p_c (ln p_c - ln q_c),    p = softmax(dense / T),    q = softmax(narrowed / T)

    A class that the dense network rules out (its logit is -inf, so p_c = 0) adds nothing, which is the limit of p ln p. Two
    equal rows of logits are 0 apart, whatever they hold; so is their gradient. A class that the narrowed network alone rules
    out makes the divergence infinite, and a NaN in one of the two networks makes it NaN.

    Args:
        narrowed, dense: logits (..., classes), of floating point.
        temperature: T, positive.
    """
    equal = (narrowed == dense).all(-1, keepdim=True)
    log_q, log_p = ((z.masked_fill(equal, 0.0) / temperature).log_softmax(-1) for z in (narrowed, dense))
    impossible = log_p == -float("inf")
    # both are filled before they are subtracted: the gradient of inf - inf is NaN even where the difference is not used
    apart = log_p.masked_fill(impossible, 0.0) - log_q.masked_fill(impossible, 0.0)
    return (log_p.exp() * apart).sum(-1)
