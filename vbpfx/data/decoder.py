"""Make the decoder's input of an encoder-decoder model: the target tokens, each shifted by one position."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vbpfx.errors import CalibrationError, first_line

IDS, MASK = "decoder_input_ids", "decoder_attention_mask"
_IGNORED = -100  # the label with which targets are padded; losses ignore it


def shift_of(model: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return the function that turns target tokens (B, T) into the decoder's input.

    It is the model's own function, or one that follows its configuration. Return None if there is neither.
    """
    own: Callable[[Tensor], Tensor] | None = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        return own
    config = getattr(model, "config", None)
    start, padding = (getattr(config, name, None) for name in ("decoder_start_token_id", "pad_token_id"))
    if not isinstance(start, int) or not isinstance(padding, int):
        return None

    def shift(labels: Tensor) -> Tensor:
        before = torch.cat([labels.new_full((len(labels), 1), start), labels[:, :-1]], 1)
        return before.masked_fill(before == _IGNORED, padding)

    return shift


def with_decoder_inputs(model: nn.Module, arguments: Mapping[str, Any], labels: Any) -> dict[str, Any]:
    """Return the arguments of a batch, with the decoder's input made from the labels if the batch does not state it.

    The decoder reads the labels, each shifted by one position. Positions with the label -100 are padding, and are
    masked out. With causal attention, no other position sees them anyway.

    Args:
        arguments: the arguments of the forward call, by name, without labels.
        labels: (B, T) tokens. Labels of another kind are ignored.

    Raises:
        CalibrationError: the model does not say how its decoder's input is made.
    """
    names = inspect.signature(model.forward).parameters
    given = {IDS, "decoder_inputs_embeds"} & {name for name, value in arguments.items() if value is not None}
    is_text = isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point()
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if IDS not in names or given or not is_text or not encodes:
        return dict(arguments)
    shift = shift_of(model)
    if shift is None:
        raise CalibrationError(
            f"the batch has labels and no {IDS}, and {type(model).__name__} does not say how to make it from the labels (its configuration "
            f"has no decoder_start_token_id and pad_token_id): put {IDS} into the batches"
        )
    try:
        made = {IDS: shift(labels)}
    except Exception as error:  # the model's own function, if its configuration is incomplete
        raise CalibrationError(
            f"the batch has labels and no {IDS}, and {type(model).__name__} cannot make one of the other ({first_line(error)}): complete the "
            f"model's configuration, or put {IDS} into the batches"
        ) from error
    if MASK in names and arguments.get(MASK) is None:
        made[MASK] = (labels != _IGNORED).long()
    return {**arguments, **made}
