"""Rules for norms, reductions and pooling: operators that mix values along some axes and keep the others apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vbpfx.rules.axes import Axis, Opaque, Operand, Reduces, Relation, Same, Site, SizeStated, as_tuple, leading
from vbpfx.rules.pointwise import elementwise


def norm_parameters(site: Site) -> dict[str, Operand]:
    """Return the parameters and statistics that a BatchNorm or InstanceNorm has, by name."""
    names = ["running_mean", "running_var", "weight", "bias"]
    if isinstance(site.node.target, torch._ops.OpOverload) or site.node.target is torch.batch_norm:
        names = names[2:] + names[:2]
    found = {name: site.operand(position, name) for position, name in enumerate(names, start=1)}
    return {name: operand for name, operand in found.items() if operand is not None}


def takes_statistics(site: Site) -> bool:
    """Return whether a BatchNorm or InstanceNorm takes the statistics of its input, and not the running ones."""
    if site.module is not None:
        return site.module.running_mean is None
    by_default = site.operator.rule is instance_norm
    name = "use_input_stats" if by_default else "training"
    return bool(site.constant(5, name, by_default)) or "running_mean" not in norm_parameters(site)


def batch_norm(site: Site) -> Iterator[Relation]:
    """Scale and shift per channel (axis 1); the running statistics are per-channel parameters, too."""
    x, out = site.x, site.out
    yield from (Same(a, b) for a, b in zip(x.axes, out.axes, strict=True))
    for dim, axis in enumerate(x.axes if takes_statistics(site) else ()):
        if dim != 1:
            yield Opaque(axis, "a norm takes its statistics across it")
    yield from _features(site, x.axis(1))


def _features(site: Site, channels: Axis) -> Iterator[Relation]:
    """Yield that the parameters of a norm have one entry per channel; without parameters, its module states their number."""
    parameters = norm_parameters(site).values()
    yield from (Same(channels, parameter.axis(0)) for parameter in parameters)
    if not parameters:
        yield SizeStated(channels, ("module", "num_features"), by_code=False)


def norm_over_last(site: Site) -> Iterator[Relation]:
    """LayerNorm, RMSNorm: statistics over the last axes, then scale and shift along them.

    Statistics over a single axis are sums, to which the contribution of constant channels can be added.
    """
    x, out = site.x, site.out
    given = site.argument(1, "normalized_shape")
    whole = site.size_read(given)
    sizes = whole.axes if whole is not None and whole.plain else as_tuple(given, 1)
    normalized = len(sizes)
    yield from leading(x, out, but=normalized)
    scale_and_shift = (site.operand(2, "weight"), site.operand(3, "bias"))
    if normalized == 1:
        yield Reduces(x.axis(-1), "rms_norm" if "rms" in site.name else "layer_norm")
        if site.module is None:
            yield _stated_size(site, x.axis(-1), sizes[0], "normalized_shape")
    for back in range(1, normalized + 1):
        if normalized > 1:
            yield Opaque(x.axis(-back), "a norm takes its statistics across it")
        yield Same(x.axis(-back), out.axis(-back))
        yield from (Same(x.axis(-back), p.axis(-back)) for p in scale_and_shift if p is not None)


def _stated_size(site: Site, axis: Axis, size: Any, argument: str) -> Relation:
    """Return the relation for the size of an axis, which a call states as a number or as a size read from a tensor.

    The size is the call's second argument, or the first entry of it.
    """
    if isinstance(size, Axis):
        return Same(axis, size)
    read = site.size_read(size)
    if read is not None and read.plain and len(read.axes) == 1:
        return Same(axis, read.axes[0])
    if not isinstance(size, int):
        return Opaque(axis, "its size is stated by a computed number")
    path = site.path(1, argument)
    return SizeStated(axis, path if isinstance(site.argument(1, argument), int) else (*path, 0))


def group_norm(site: Site) -> Iterator[Relation]:
    """GroupNorm: statistics over groups of channels and all positions, then scale and shift per channel."""
    x, out = site.x, site.out
    yield Same(x.axis(0), out.axis(0))
    for a, b in zip(x.axes[1:], out.axes[1:], strict=True):
        yield Same(a, b)
        yield Opaque(a, "a norm takes its statistics across it")
    for parameter in (site.operand(2, "weight"), site.operand(3, "bias")):
        if parameter is not None:
            yield Same(x.axis(1), parameter.axis(0))


def along_one_axis(site: Site) -> Iterator[Relation]:
    """softmax, cumulative sums, normalisation: values are mixed along ``dim``, and the shape is kept."""
    x, out = site.x, site.out
    yield from (Same(a, b) for a, b in zip(x.axes, out.axes, strict=True))
    dim = site.along(1, "dim")
    for mixed in x.axes if not isinstance(dim, int) else (x.axis(dim),):
        yield Opaque(mixed, f"{site.name} mixes the channels along it")


def reduction(site: Site) -> Iterator[Relation]:
    """mean, sum, extrema or vector norm over ``dim``; every other axis is kept."""
    x, out = site.x, site.out
    given, statistic = site.along(1, "dim"), site.operator.statistic
    if given is None or isinstance(given, bool) or given == () or given == []:
        yield from site.all_opaque(f"{site.name} reduces it")
        return
    reduced = {dim % x.ndim for dim in as_tuple(given, 1)}
    kept = [dim for dim in range(x.ndim) if dim not in reduced]
    for dim in reduced:
        if len(reduced) == 1 and statistic is not None and site.of_floats:
            yield Reduces(x.axis(dim), statistic)
        else:
            yield Opaque(x.axis(dim), f"{site.name} reduces it")
    for position, dim in enumerate(kept):
        yield Same(x.axis(dim), out.axis(dim if out.ndim == x.ndim else position))


def extremum(site: Site) -> Iterator[Relation]:
    """max, min, median, sort, topk... along ``dim``: values and their indices; every other axis is kept.

    The call returns a tuple; the relations are about the entries that are taken out of it.
    """
    x, name = site.x, site.name
    if isinstance(site.node.meta["val"], Tensor) and name in ("max", "min") and len(site.operands) == 2:
        yield from elementwise(site)
        return
    given = site.along(1, "dim")
    if isinstance(site.node.meta["val"], Tensor) or not isinstance(given, int) or isinstance(given, bool):
        yield from site.all_opaque(f"{name} reduces it")
        return
    dim, keeps = given % x.ndim, site.operator.keeps_axis
    yield Opaque(x.axis(dim), f"{name} compares the channels along it" if keeps else f"{name} reduces it")
    for user in site.node.users:
        if not isinstance(user.meta.get("val"), Tensor):
            yield from site.all_opaque(f"the tuple that {name} returns is used as a whole")
            continue
        out = Operand(user.name, tuple(user.meta["val"].shape))
        same_axes = out.ndim == x.ndim
        for position, axis in enumerate(d for d in range(x.ndim) if same_axes or d != dim):
            if axis != dim:
                yield Same(x.axis(axis), out.axis(position))
            elif keeps:
                yield Opaque(out.axis(position), f"{name} compares the channels along it")


def pooling(site: Site) -> Iterator[Relation]:
    """Windows over the last one to three axes, with or without a batch axis in front; every channel is treated by itself."""
    x, out = site.x, site.out
    digits = [int(letter) for letter in site.name if letter in "123"]
    positions = digits[-1] if digits else x.ndim - 2  # interpolation: every axis behind batch and channel
    yield from leading(x, out, but=positions)
    for dim in range(x.ndim - positions, x.ndim):
        yield Opaque(x.axis(dim), f"{site.name} mixes the positions along it")
        yield Opaque(out.axis(dim), f"{site.name} mixes the positions along it")


def sampling(site: Site) -> Iterator[Relation]:
    """grid_sample: every channel is read at the positions that a grid gives."""
    x, out = site.x, site.out
    yield from leading(x, out, but=x.ndim - 2)
    for operand, reason in (
        (x, "grid_sample mixes the positions along it"),
        (site.operand(1, "grid"), "it belongs to the grid of positions of grid_sample"),
    ):
        for axis in operand.axes[2 if operand is x else 0 :] if operand is not None else ():
            yield Opaque(axis, reason)
    for axis in out.axes[2:]:
        yield Opaque(axis, "grid_sample mixes the positions along it")


def resizing(site: Site) -> Iterator[Relation]:
    """Positions are resampled, every channel by itself; ``sizes`` may include the unchanged number of channels."""
    yield from pooling(site)
    sizes = site.argument(1, "sizes")
    if sizes is not None and sizes[0] is not None:
        yield _stated_size(site, site.x.axis(1), sizes[0], "sizes")


def instance_norm(site: Site) -> Iterator[Relation]:
    """Statistics of every sample and channel over all positions, then scale and shift per channel."""
    x, out = site.x, site.out
    digits = [int(letter) for letter in site.name if letter in "123"]
    channel = x.ndim - digits[-1] - 1 if digits else 1  # a module may be called without a batch axis
    for dim, (a, b) in enumerate(zip(x.axes, out.axes, strict=True)):
        yield Same(a, b)
        if dim > channel:
            yield Opaque(a, "a norm takes its statistics across it")
    yield from _features(site, x.axis(channel))


def rolling(site: Site) -> Iterator[Relation]:
    """roll, flip: entries along ``dims`` change places; every other axis is kept."""
    x, out = site.x, site.out
    given = site.along(1, "dims")
    if site.name == "flip" and len(site.node.args) > 2:
        given = site.node.args[1:]
    moved = set(range(x.ndim)) if given in (None, (), []) else {dim % x.ndim for dim in as_tuple(given, 1)}
    for dim in range(x.ndim):
        yield Same(x.axis(dim), out.axis(dim))
        if dim in moved:
            yield Opaque(x.axis(dim), f"{site.name} moves the channels along it")


def padding(site: Site) -> Iterator[Relation]:
    """pad: (before, after) for the last axis, then for the second last, and so on; an axis without padding is kept."""
    x, out = site.x, site.out
    listed = site.argument(1, "pad")
    amounts = listed if isinstance(listed, (tuple, list)) else site.constant(1, "pad")
    for dim in range(x.ndim):
        if all(isinstance(amount, int) and amount == 0 for amount in amounts[2 * (x.ndim - 1 - dim) :][:2]):
            yield Same(x.axis(dim), out.axis(dim))
        else:
            yield Opaque(x.axis(dim), "it is padded")
            yield Opaque(out.axis(dim), "it is padded")
