"""Windows: which positions of its input a convolution reads for each position of its output.

A convolution is a linear layer on windows. For the output position p it reads u (C T,): from each of the C input channels the T
entries of the window at p, with zeros (or what another padding mode gives) beyond the border. Its weight (out, C, ...) is a matrix
(out, C T). A transposed convolution is one, too: the window of an output position has the entries of the input that are spread over
it, and zeros in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from vbpfx.rules.axes import as_tuple
from vbpfx.rules.layers import convolution, transposed_convolution
from vbpfx.rules.table import Argument, operator_of

_CONVOLVE: dict[int, Callable[..., Tensor]] = {
    1: nn.functional.conv1d,
    2: nn.functional.conv2d,
    3: nn.functional.conv3d,
}
_SPREAD: dict[int, Callable[..., Tensor]] = {
    1: nn.functional.conv_transpose1d,
    2: nn.functional.conv_transpose2d,
    3: nn.functional.conv_transpose3d,
}


@dataclass(frozen=True)
class Window:
    """The windows of a convolution; all tuples have one entry for each spatial axis.

    Attributes:
        size: the number of entries along each axis.
        stride: the distance from one window to the next.
        dilation: the distance from one entry to the next.
        padding: how many entries are added before and after the input; of a transposed convolution, how many are cut off its output.
        mode: what is added: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        behind: how many positions a transposed convolution adds behind its output; None for any other convolution.
        groups: the number of groups: each reads its own part of the channels.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    mode: str
    behind: tuple[int, ...] | None
    groups: int

    @property
    def taps(self) -> int:
        """T, the number of entries of a window."""
        return math.prod(self.size)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return the convolution of x (..., C, spatial axes) with a weight (out, C / groups, ...) of this size."""
        dims = len(self.size)
        if self.behind is not None:
            cut = tuple(before for before, _ in self.padding)
            weight = weight.transpose(0, 1)
            return _SPREAD[dims](x, weight, bias, self.stride, cut, self.behind, self.groups, self.dilation)
        amounts = [amount for pair in reversed(self.padding) for amount in pair]
        x = self._surrounded(x, amounts, 0.0) if any(amounts) else x
        return _CONVOLVE[dims](x, weight, bias, self.stride, 0, self.dilation, self.groups)

    def gather(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return some windows of x, and which of their entries are inside x.

        Args:
            x: (samples, C, spatial axes), or the same without the samples.
            positions: indices (n,) into the flattened samples and spatial axes of the output.

        Returns:
            The windows (n, C, T), and booleans (n, T). Beyond a border of zeros windows are zero.
        """
        spatial = len(self.size)
        x = x if x.ndim == spatial + 2 else x.unsqueeze(0)
        samples, *sizes = x.shape[0], *x.shape[2:]
        outputs = [self._outputs(dim, size) for dim, size in enumerate(sizes)]
        sample, *at = torch.unravel_index(positions.to(x.device), (samples, *outputs))
        flat = sample.reshape(-1, *[1] * spatial)
        inside = torch.ones_like(flat, dtype=torch.bool)
        for dim, (size, start) in enumerate(zip(sizes, at, strict=True)):
            read = self._read(dim, size, start[:, None])
            read = read.reshape(len(read), *(self.size[dim] if other == dim else 1 for other in range(spatial)))
            inside = inside & (read >= 0)
            flat = flat * size + read.clamp_min(0)
        flat, inside = flat.flatten(1), inside.flatten(1)
        windows = x.movedim(1, -1).flatten(0, -2)[flat] * inside[..., None]
        return windows.transpose(1, 2), inside

    def _outputs(self, dim: int, size: int) -> int:
        """Return the size of the output along an axis."""
        reach, added = self.dilation[dim] * (self.size[dim] - 1), sum(self.padding[dim])
        if self.behind is not None:
            return (size - 1) * self.stride[dim] - added + reach + self.behind[dim] + 1
        return (size + added - reach - 1) // self.stride[dim] + 1

    def _read(self, dim: int, size: int, output: Tensor) -> Tensor:
        """Return which entries of the input output positions (n, 1) read along an axis, (n, taps); -1 for zeros."""
        taps = torch.arange(self.size[dim], device=output.device) * self.dilation[dim]
        stride = self.stride[dim]
        if self.behind is not None:
            spread = output + self.padding[dim][0] - taps
            read = spread.div(stride, rounding_mode="floor")
            return torch.where((spread % stride == 0) & (read < size), read, -1)
        own = torch.arange(size, dtype=torch.float32, device=output.device).reshape(1, 1, -1)
        return self._surrounded(own, self.padding[dim], -1.0).flatten().long()[output * stride + taps]

    def _surrounded(self, x: Tensor, amounts: Any, value: float) -> Tensor:
        if self.mode == "zeros":
            return nn.functional.pad(x, amounts, value=value)
        return nn.functional.pad(x, amounts, mode=self.mode)


def window_of(node: fx.Node, module: nn.Module | None) -> Window | None:
    """Return the windows of a call; None if it is no convolution, or a plain matrix product at every position.

    Args:
        node: a call in a captured graph.
        module: the module that it calls, if any.
    """
    rule = operator_of(node, module).rule
    if rule is not convolution and rule is not transposed_convolution:
        return None
    transposed = rule is transposed_convolution

    def given(position: int, name: str, default: Any) -> Any:
        return Argument(position, name, default).given(node, module)

    weight = given(1, "weight", None)
    weight = weight.meta["val"] if isinstance(weight, fx.Node) else weight
    size = tuple(weight.shape[2:])

    def each(position: int, name: str, default: int) -> tuple[int, ...]:
        return as_tuple(given(position, name, default), len(size))

    stride, dilation = each(3, "stride", 1), each(7 if transposed else 5, "dilation", 1)
    padding = given(4, "padding", 0)
    if padding == "same":
        added = [d * (k - 1) for d, k in zip(dilation, size, strict=True)]
        pairs = tuple((total // 2, total - total // 2) for total in added)
    else:
        pairs = tuple((p, p) for p in as_tuple(0 if padding == "valid" else padding, len(size)))
    mode = "zeros" if module is None else str(module.padding_mode)
    behind = each(5, "output_padding", 0) if transposed else None
    window = Window(size, stride, dilation, pairs, mode, behind, given(6, "groups", 1))
    one_position = window.taps == 1 and set(stride) == {1} and not any(map(any, pairs)) and not any(behind or ())
    return None if one_position and window.groups == 1 else window


def applied(x: Tensor, weight: Tensor, bias: Tensor, axis: int, window: Window | None) -> Tensor:
    """Return W x + b, where W (out, in, ...) sums over an axis of x: of each position, or of its window."""
    if window is not None:
        return window.convolve(x, weight, bias)
    return nn.functional.linear(x.movedim(axis, -1), weight.flatten(1), bias).movedim(-1, axis)
