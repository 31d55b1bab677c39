"""The divergence between the class probabilities of two networks. All of vbpfx uses this definition."""

from __future__ import annotations

from torch import Tensor


def divergence(narrowed: Tensor, dense: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the Kullback-Leibler divergence KL(dense ‖ narrowed) of logits, in nats: one number per prediction.

        sum_c p_c (ln p_c - ln q_c),    p = softmax(dense / T),    q = softmax(narrowed / T)

    A class that the dense network rules out (its logit is -inf, so p_c = 0) adds nothing, which is the limit of p ln p. Two
    equal rows of logits have a divergence of 0 and a gradient of 0, whatever they hold. A class that only the narrowed
    network rules out makes the divergence infinite. A NaN in one of the two networks makes it NaN.

    Args:
        narrowed, dense: floating-point logits (..., classes).
        temperature: T, positive.
    """
    equal = (narrowed == dense).all(-1, keepdim=True)
    log_q, log_p = ((z.masked_fill(equal, 0.0) / temperature).log_softmax(-1) for z in (narrowed, dense))
    impossible = log_p == -float("inf")
    # both are filled before the subtraction: the gradient of inf - inf is NaN even if the difference is not used
    apart = log_p.masked_fill(impossible, 0.0) - log_q.masked_fill(impossible, 0.0)
    return (log_p.exp() * apart).sum(-1)
