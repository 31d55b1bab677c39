"""Front ends: trace a model's code into a graph.

Both return a ``torch.fx.GraphModule``:

- ``"symbolic"``, :class:`torch.fx.Tracer` (:mod:`vbpfx.graph.symbolic`): keeps the module structure, ``train()`` /
  ``eval()`` and the parameter names.
- ``"export"``, :func:`torch.export.export`: an ATen graph, for models whose Python control flow stops
  symbolic tracing.

Arguments that are not tensors (flags, strings, None) keep their values from the example, and the graph checks that
later calls pass the same values. Recurrent layers stay whole in both.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from traceback import FrameSummary
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch.nn.modules import transformer

from vbpfx.data.inputs import Inputs, Place, model_device
from vbpfx.display.quiet import quiet_python
from vbpfx.display.whole_process import shared_by_threads
from vbpfx.errors import CaptureError
from vbpfx.graph.constants import KnownNumbers, fold_numbers
from vbpfx.graph.fake import graph_arguments
from vbpfx.graph.fields import tracer_of
from vbpfx.graph.recurrent import recurrent_as_leaves, restore_recurrent
from vbpfx.graph.regions import autocast_devices, inline_regions
from vbpfx.graph.source import line_of_frames
from vbpfx.graph.symbolic import trace_symbolic
from vbpfx.graph.tidy import drop_input_checks, follow_inputs, require_constants
from vbpfx.outputs.fields import without_classes
from vbpfx.rules.table import operator_of


def refuse_training_operators(model: nn.Module) -> None:
    """Raise a CaptureError for a graph with operators that are fixed in training mode."""
    for node in model.graph.nodes if isinstance(model, fx.GraphModule) else ():
        place = operator_of(node).trains if isinstance(node.target, torch._ops.OpOverload) else None
        if place is not None and len(node.args) > place and node.args[place] is True:
            raise CaptureError(
                f"the graph was exported in training mode (node {node.name} is {node.target} with training=True), which eval() "
                f"does not change: export model.eval()"
            )


def _trace_export(model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    # torch.export would silently specialise a batch size of 1; two samples keep the axis dynamic.
    if inputs.batch_size == 0:
        raise CaptureError("the example batch is empty, and torch.export runs the model: pass at least one sample")
    samples = max(2, inputs.batch_size or 2)
    example = inputs.resized(samples).map(torch.clone)  # a tensor that is passed twice would become a single input
    shapes = dynamic_shapes(model, example, batch=torch.export.Dim.AUTO)
    device = model_device(model)
    # without gradients, because a no_grad region in the model would otherwise become a subgraph of its own;
    # quiet, because torch.export prints the graph where the model's code depends on values
    numbers = KnownNumbers(model)
    with (
        quiet_python(), unfused_attention(), masks_as_given(), torch.no_grad(),
        numbers, recurrent_as_leaves(model), neutral_results(model),
    ):  # fmt: skip
        program = torch.export.export(model, example.args, example.kwargs, dynamic_shapes=shapes, strict=False)
        exported = program.module(check_guards=False)
    assert isinstance(exported, fx.GraphModule)
    graph = exported.graph
    drop_input_checks(graph)
    inline_regions(exported, autocast_devices(device))
    fold_numbers(exported, numbers.unknown)
    restore_recurrent(exported, model)
    placeholders = graph.find_nodes(op="placeholder")
    values = dict(zip(placeholders, graph_arguments(exported, example), strict=True))
    follow_inputs(graph, device, {node.target for node, value in values.items() if isinstance(value, Tensor)})
    require_constants(graph, {node: value for node, value in values.items() if not isinstance(value, Tensor)})
    for node in graph.nodes:  # other entries refer to the trace, and cannot be copied or pickled
        node.meta = {key: value for key, value in node.meta.items() if key in _KEPT}
    assert isinstance(graph._codegen, fx.graph._PyTreeCodeGen)
    assert graph._codegen.pytree_info.out_spec is not None
    graph._tracer_cls = tracer_of(graph._codegen.pytree_info.out_spec)
    # Rebuilt as a plain GraphModule, because the module that torch.export returns refuses train() and eval().
    return fx.GraphModule(exported, graph, type(model).__name__)


# The metadata of torch.export that a node keeps: its place in the model's modules and in its code.
_KEPT = ("nn_module_stack", "stack_trace")


@contextmanager
def neutral_results(model: nn.Module) -> Iterator[None]:
    """A context in which the model returns :class:`~vbpfx.outputs.fields.Fields` for dataclasses.

    torch.export does not know the dataclasses of a model.
    """
    own, before = model.forward, vars(model).get("forward")

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return without_classes(own(*args, **kwargs))

    vars(model)["forward"] = forward
    try:
        yield
    finally:
        del vars(model)["forward"]
        if before is not None:
            vars(model)["forward"] = before


def dynamic_shapes(model: nn.Module, example: Inputs, batch: Any) -> dict[str, Any]:
    """Return the axes that torch.export may leave open, by argument, in its own format.

    They are the batch axis, every axis of integer and boolean tensors (token ids and masks), and the axes in which
    batches differ. Texts differ in length, so such an axis stays open wherever the model allows it.
    """

    axes = example.batch_axes

    def dynamic(leaf: Any, place: Place | None) -> dict[int, Any] | None:
        if place is None:
            return None
        open_axes = range(leaf.ndim) if not leaf.is_floating_point() else (a for p, a in example.open if p == place)
        return dict.fromkeys(open_axes, torch.export.Dim.AUTO) | ({axes[place]: batch} if place in axes else {})

    args, kwargs = example.by_place(dynamic)
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)


def fixing_line(model: nn.Module, inputs: Inputs, axes: Collection[tuple[Place, int]]) -> str:
    """Return ``file:line: code`` of the model's code that fixes the size of an axis, or "" if it is not found.

    Args:
        axes: the axes of the inputs that torch.export is asked to leave open, and no others, not even the batch axis.
    """
    count = max(2, inputs.batch_size or 2)
    example = inputs.resized(count)

    def dynamic(leaf: Any, place: Place | None) -> dict[int, Any] | None:
        return None if place is None else {axis: torch.export.Dim.AUTO for p, axis in axes if p == place}

    args, kwargs = example.by_place(dynamic)
    shapes = dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    try:
        with quiet_python(), unfused_attention(), torch.no_grad():
            program = torch.export.export(model, example.args, example.kwargs, dynamic_shapes=shapes, strict=False)
        values = [node.meta.get("val") for node in program.graph.nodes]
        mode = detect_fake_mode([value for value in values if isinstance(value, Tensor)])
        guards = mode.shape_env.guards  # type: ignore[union-attr]
        # A guard that fixes a size is an equation, and holds the line of code that caused it. ``is_Equality`` is
        # sympy's. Sympy itself is not imported here, which would take long; where there are guards, torch.export has
        # imported it.
        found: list[Any] = [guard.sloc.framework_loc for guard in guards if guard.expr.is_Equality]
        return line_of_frames(frame for frame in found if isinstance(frame, FrameSummary))
    except Exception:  # this uses internals of torch; if they change, the line is not named
        return ""


@shared_by_threads
@contextmanager
def masks_as_given() -> Iterator[None]:
    """Keep nn.TransformerEncoder from comparing a mask with the causal mask, a decision by values that stops tracing.

    The result of the comparison is only a hint for fused kernels. The mask itself is applied in any case.
    """
    looks = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = looks


@shared_by_threads
@contextmanager
def unfused_attention() -> Iterator[None]:
    """Switch off the fused inference kernels of attention and encoder layers, which hide the matrix products inside."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


FRONTENDS: Mapping[Literal["symbolic", "export"], Callable[[nn.Module, Inputs], fx.GraphModule]] = {
    "symbolic": trace_symbolic,
    "export": _trace_export,
}
