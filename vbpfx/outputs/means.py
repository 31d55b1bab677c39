"""Means over samples of values at every position. Positions that a padding mask marks as padding do not count."""

from __future__ import annotations

from torch import Tensor

from vbpfx.data.inputs import Inputs


def mean_over_samples(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over samples of each sample's own mean, over the positions that the mask (batch, ...) keeps."""
    return values.mean() if mask is None else sample_means(values, mask).mean()


def sample_means(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return each sample's own mean, (batch,), over the positions that the mask (batch, ...) keeps."""
    if mask is None:
        return values.reshape(len(values), -1).mean(-1)
    positions = values.flatten(mask.ndim).mean(-1) if values.ndim > mask.ndim else values
    positions, kept = positions.reshape(len(mask), -1), mask.reshape(len(mask), -1)
    return positions.where(kept, 0).sum(1) / kept.sum(1).clamp(min=1)


def mask_of(inputs: Inputs, values: Tensor, name: str = "") -> Tensor | None:
    """Return the padding mask as booleans if it fits the two leading axes of the values, otherwise None.

    Args:
        name: the name of the values. In an encoder-decoder model all values count as the decoder's, with the decoder's
            mask, unless the name begins with ``encoder``.
    """
    decodes = "decoder_input_ids" in inputs.kwargs and not name.removeprefix(":").startswith("encoder")
    mask = inputs.kwargs.get("decoder_attention_mask" if decodes else "attention_mask")
    fits = isinstance(mask, Tensor) and mask.ndim == 2 and values.ndim >= 2 and mask.shape == values.shape[:2]
    return mask.bool() if fits and isinstance(mask, Tensor) else None
