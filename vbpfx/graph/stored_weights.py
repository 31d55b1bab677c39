"""Store weights that layers compute from parameters before every call, such as standardised ones, in plain layers.

A layer with weight standardisation (NFNet, BiT) holds a parameter W and computes with w(W). Its rows and columns cannot be
removed from W, since w(W) takes statistics over them. In a network that is not trained any further, w(W) is a constant. So
the layer is replaced by a plain one that holds w(W) itself.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vbpfx.data.inputs import as_inputs, model_device
from vbpfx.errors import CaptureError
from vbpfx.graph.capture import require_module, share_parameters
from vbpfx.graph.run import outputs_of
from vbpfx.outputs.differences import relative_error, tolerance_of

# Class of a plain layer -> the function that it calls.
_FUNCTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Linear: F.linear,
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}
_SIZES = ("stride", "padding", "dilation", "groups")


class _Calls(TorchFunctionMode):
    """Records the arguments of the calls of one function, by name."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self._function = function
        self.found: list[dict[str, Any]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a call, and record its arguments if it is one of the function."""
        if func is self._function:
            names = ("input", "weight", "bias", *_SIZES)
            self.found.append(dict(zip(names, args, strict=False)) | (kwargs or {}))
        return func(*args, **(kwargs or {}))


def store_weights(model: nn.Module, example_inputs: Any) -> nn.Module:
    """Return a copy of a model in which layers hold the weights that they compute from parameters before every call.

    Each ``nn.Linear`` or convolution whose class computes its weight in its own ``forward`` becomes a plain layer with that
    weight. It computes the same numbers, and can be narrowed like any other layer. Layers whose weights depend on their input
    stay as they are, and so do layers that do more than call the plain one, such as padding by the size of the picture. The
    copy is of the same class as the model, but its ``state_dict`` is another one. Use it in place of the model from here on:
    ``pruned.apply_to(stored)``.

    Args:
        model: a model; it is not changed.
        example_inputs: one batch, as for :func:`vbpfx.capture`.

    Raises:
        CaptureError: the model cannot be copied or run, or the copy would not compute the same as the model.
    """
    require_module(model)
    shared = share_parameters(model)
    inputs = as_inputs(example_inputs, shared).to(model_device(model))
    seen: dict[str, tuple[Any, ...]] = {}
    hooks = [
        layer.register_forward_pre_hook(functools.partial(_see, seen, name))
        for name, layer in shared.named_modules()
        if _computes_its_weight(layer)
    ]
    with torch.no_grad():
        expected = outputs_of(shared, inputs)
        for hook in hooks:
            hook.remove()
        plain = {shared.get_submodule(name): _plain(shared.get_submodule(name), args) for name, args in seen.items()}
    stored: nn.Module = copy.deepcopy(model)
    for name, layer in list(shared.named_modules(remove_duplicate=False)):
        made = plain.get(layer)
        if made is None:
            continue
        made.train(stored.get_submodule(name).training)
        if not name:
            return made
        owner, _, attribute = name.rpartition(".")
        setattr(stored.get_submodule(owner), attribute, made)
    with torch.no_grad():
        found = outputs_of(share_parameters(stored), inputs)
    error = relative_error(found, expected)
    if not error <= tolerance_of(tensor.dtype for tensor in expected):
        raise CaptureError(
            f"{type(model).__name__} with stored weights differs from the model by {error:.1e} of its output: its code reads the "
            f"weights of these layers besides, or its output is random. Store the computed weights in the code of the model instead"
        )
    return stored


def _see(seen: dict[str, tuple[Any, ...]], name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
    """Note the arguments of the first call of a layer."""
    seen.setdefault(name, args)


def _computes_its_weight(layer: nn.Module) -> bool:
    """Return whether a layer's class has a forward of its own, in place of that of a plain layer."""
    kind = _plain_class(layer)
    return kind is not None and type(layer).forward is not kind.forward


def _plain_class(layer: nn.Module) -> type[nn.Module] | None:
    return next((kind for kind in _FUNCTIONS if isinstance(layer, kind)), None)


def _plain(layer: nn.Module, args: tuple[Any, ...]) -> nn.Module | None:
    """Return a plain layer that computes the same as a layer with computed weights; None if there is none.

    Args:
        args: the arguments of one of its calls.
    """
    kind = _plain_class(layer)
    if kind is None or len(args) != 1 or not isinstance(args[0], Tensor):
        return None
    function = _FUNCTIONS[kind]
    calls: list[dict[str, Any]] = []
    outputs = []
    for x in (args[0], args[0].flip(0) * 0.5 + 0.25):  # the second shows whether the weight depends on the input
        with _Calls(function) as recorded:
            outputs.append(layer(x))
        if len(recorded.found) != 1:
            return None
        calls += recorded.found
    first, second = calls
    if first["weight"] is layer.weight or not torch.equal(first["weight"], second["weight"]):
        return None
    made = _layer_of(kind, first, layer)
    computed = made(args[0])
    if not isinstance(outputs[0], Tensor) or computed.shape != outputs[0].shape:
        return None
    return made if relative_error([computed], [outputs[0]]) <= tolerance_of([computed.dtype]) else None


def _layer_of(kind: type[nn.Module], call: dict[str, Any], layer: nn.Module) -> nn.Module:
    """Return a plain layer that makes a call of its function with weights of its own."""
    weight, bias = call["weight"], call.get("bias")
    sizes = {name: call[name] for name in _SIZES if name in call}
    window = () if kind is nn.Linear else (tuple(weight.shape[2:]),)
    made: Any = kind(
        weight.shape[1] * sizes.get("groups", 1),
        weight.shape[0],
        *window,
        **sizes,
        bias=bias is not None,
        device="meta",
        dtype=weight.dtype,
    )
    trains = any(parameter.requires_grad for parameter in layer.parameters(recurse=False))
    made.weight = nn.Parameter(weight.detach().clone(), requires_grad=trains)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=trains)
    return made  # type: ignore[no-any-return]
