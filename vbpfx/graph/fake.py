"""Run a graph on fake tensors, which gives shapes without data, weights or arithmetic.

The batch size is a large prime that divides no size of the model, so a reshape cannot confuse the batch with another
axis. Unlike a symbolic size, it is never specialised (timm's Swin specialises them). It is also faster.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from vbpfx.data.inputs import Inputs
from vbpfx.errors import CaptureError, first_line
from vbpfx.graph.recurrent import call_stand_in, run_fake_call
from vbpfx.graph.repeated import Repeated, ReshapedError

_SMALLEST_SENTINEL = 1009


def propagate_shapes(graph_module: fx.GraphModule, inputs: Inputs, *, fixed: bool = False) -> int | None:
    """Write ``meta["val"]`` on every node, and return the size that stands for the batch.

    Return None if the graph works only for the batch size of the inputs.

    Args:
        fixed: whether it is already known that the graph works only for the batch size of the inputs.
    """

    def record(node: fx.Node, run: Callable[[], Any]) -> Any:
        node.meta["val"] = value = run()
        return value

    tensors = [*graph_module.parameters(), *graph_module.buffers(), *inputs.tensors]
    samples = sentinel({size for tensor in tensors for size in tensor.shape})
    if inputs.batch_size is not None and not fixed:
        try:
            run_fake(graph_module, inputs, samples, record, Repeated(graph_module))
        except Exception:  # a graph that is fixed to its batch size still works at that size
            pass
        else:
            if inputs.batch_size == 1:
                _require_one_sample(graph_module, inputs)
            return samples
    run_fake(graph_module, inputs, inputs.batch_size, record, Repeated(graph_module))
    return None


def _require_one_sample(graph_module: fx.GraphModule, inputs: Inputs) -> None:
    """Raise a CaptureError if a graph does not run on a single sample.

    torch.export traces two samples, and unrolls loops over them.
    """
    try:
        run_fake(graph_module, inputs, 1, lambda node, run: run(), Repeated(graph_module))
    except Exception as error:  # operators may raise any exception
        raise CaptureError(
            f"the graph does not run on a single sample ({first_line(error)}): it was traced with two, and a loop in the model's code over "
            f"an axis of its input was unrolled for them; pass at least two samples, and compute all entries of that axis at once"
        ) from error


def spent_by_node(
    graph_module: fx.GraphModule, inputs: Inputs, samples: int, meter: Callable[[], int]
) -> dict[str, int]:
    """Run the graph on that many samples, and return node -> how much its call increased the meter.

    Nodes that do not increase it are left out.
    """
    repeated, spent = Repeated(graph_module, meter), dict[str, int]()

    def count(node: fx.Node, run: Callable[[], Any]) -> Any:
        before = repeated.spent
        value = run()
        spent[node.name] = repeated.spent - before
        return value

    run_fake(graph_module, inputs, samples, count, repeated)
    return {name: number for name, number in spent.items() if number}


def renew_shapes(small: fx.GraphModule, graph_module: fx.GraphModule) -> None:
    """Recompute ``meta["val"]`` of every node of a narrowed graph, from the shapes of the original graph's arguments.

    If the arguments have no shapes, or these cannot be propagated, ``meta["val"]`` is removed, so that no dense width
    remains.
    """
    values = [node.meta.get("val") for node in graph_module.graph.find_nodes(op="placeholder")]
    mode = detect_fake_mode(values)
    complete = mode is not None
    if mode is not None:
        try:
            _Renewal(small, mode).run(*values, enable_io_processing=False)
        except Exception:  # for example symbolic shapes that belong to another exported program
            complete = False
    for node in small.graph.nodes:
        known = node.meta.pop("tensor_meta", None)
        if not complete:
            node.meta.pop("val", None)
        elif known is not None and isinstance(node.meta["val"], Tensor):
            node.meta["tensor_meta"] = _extract_tensor_metadata(node.meta["val"])


class _OnFakes(fx.Interpreter):
    """An interpreter for fake tensors, in which every recurrent layer is a single call."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(str(target))
        if isinstance(module, nn.RNNBase) and isinstance(args[0], Tensor):
            return call_stand_in(module, str(target), *args, **kwargs)
        return super().call_module(target, args, kwargs)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = run_fake_call(target, args)
        return super().call_function(target, args, kwargs) if found is None else tuple(found)


class _Renewal(_OnFakes):
    """An interpreter that runs in the fake mode of a graph's existing shapes, and writes new ones."""

    def __init__(self, graph_module: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(graph_module)
        self.mode = mode

    def run_node(self, n: fx.Node) -> Any:
        with self.mode, torch.no_grad():
            value = n.meta["val"] = _as_fake_tree(self.mode, super().run_node(n))
        return value


def run_fake(
    graph_module: fx.GraphModule,
    inputs: Inputs,
    samples: int | None,
    around: Callable[[fx.Node, Callable[[], Any]], Any],
    repeated: Repeated | None = None,
) -> None:
    """Run the graph on fake tensors with a batch of that many samples.

    Args:
        around: is called with every node and a function that runs it, and returns the node's value. It is called for
            all nodes a second time if equal calls turn out not to be able to share a result.
        repeated: the stored results of earlier equal calls. Without it, every call is run.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(leaf: Any, axis: int | None) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        shape = list(leaf.shape)
        if samples is not None and axis is not None:
            shape[axis] = samples
        return torch.empty(shape, dtype=leaf.dtype, device=leaf.device)

    class Runner(_OnFakes):
        def run_node(self, n: fx.Node) -> Any:
            return around(n, lambda: self.run_call(n))

        def run_call(self, n: fx.Node) -> Any:
            def run() -> Any:
                return _as_fake_tree(mode, super(Runner, self).run_node(n))

            if repeated is None or not n.op.startswith("call"):
                return run()
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            operator = self.fetch_attr(str(n.target)) if n.op == "call_module" else n.target
            return repeated.run(operator, args, kwargs, run)

    def run_all() -> None:
        with mode, _AllPicked(), torch.no_grad():  # type: ignore[no-untyped-call]
            args, kwargs = inputs.each(fake)
            arguments = graph_arguments(graph_module, Inputs(args, kwargs))
            Runner(graph_module).run(*arguments, enable_io_processing=False)

    try:
        run_all()
    except ReshapedError:
        assert repeated is not None  # nothing else raises this error
        repeated.forget()
        run_all()


class _AllPicked(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes results whose length depends on values as long as they can become.

    ``nonzero`` and indexing by a mask return as many entries as if every entry were picked. So all shapes are known,
    and costs are an upper bound: each expert of a mixture counts as if all tokens went to it.
    """

    supports_higher_order_operators = True  # operators such as torch.cond are passed on unchanged

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
        if func is torch.ops.aten.masked_select.default:
            shape = torch.broadcast_shapes(args[0].shape, args[1].shape)  # type: ignore[no-untyped-call]
            return args[0].new_empty(math.prod(shape))
        if func in _BY_INDICES:
            args = (args[0], [place for index in args[1] for place in _places(index)], *args[2:])
        return func(*args, **(kwargs or {}))


_BY_INDICES = frozenset(
    {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}
)


def _places(index: Tensor | None) -> list[Tensor | None]:
    """Return an index as it is, and a mask as one index for each of its axes."""
    if index is None or index.dtype not in (torch.bool, torch.uint8):
        return [index]
    return [index.new_empty(index.numel(), dtype=torch.int64) for _ in range(index.ndim)]


def _as_fake_tree(mode: FakeTensorMode, value: Any) -> Any:
    """Return a node's value with every real tensor replaced by a fake one."""

    def as_fake(tensor: Tensor) -> Tensor:
        # a parameter is real, and so is a value that an operator returns unchanged
        found = tensor if isinstance(tensor, FakeTensor) else mode.from_tensor(tensor, static_shapes=True)
        return found.detach() if found.requires_grad else found  # the flop counter adds hooks to tensors with gradients

    return pytree.tree_map_only(Tensor, as_fake, value)


def graph_arguments(graph_module: fx.GraphModule, inputs: Inputs) -> list[Any]:
    """Return the inputs in the order of the graph's placeholders."""
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    codegen = graph_module.graph._codegen
    if isinstance(codegen, fx.graph._PyTreeCodeGen):
        return _flattened(graph_module, codegen.pytree_info.in_spec, inputs)
    named = dict(zip((str(node.target) for node in placeholders), inputs.args, strict=False)) | inputs.kwargs
    return [
        named[str(node.target)] if str(node.target) in named else node.args[0] if node.args else None
        for node in placeholders
    ]


def _flattened(graph_module: fx.GraphModule, spec: pytree.TreeSpec, inputs: Inputs) -> list[Any]:
    """Return the leaves of the arguments in the order of the exported graph, whether passed by position or by name."""
    given = inspect.signature(graph_module.forward).bind(*inputs.args, **inputs.kwargs)
    given.apply_defaults()
    values: Any = list(given.arguments.values())
    match pytree.tree_unflatten(range(spec.num_leaves), spec):
        case (tuple() as args, dict() as kwargs):
            values = (values[: len(args)], dict(zip(kwargs, values[len(args) :], strict=True)))
    return list(fx._pytree.tree_flatten_spec(values, spec))


def has_fixed_batch(model: nn.Module, inputs: Inputs) -> bool:
    """Return whether the model is a graph whose recorded shapes forbid cutting or resizing a batch.

    They do if they state the inputs' batch size as a number, or if other sizes are computed from the batch size.
    """
    if not isinstance(model, fx.GraphModule):
        return False
    try:
        given = graph_arguments(model, inputs)
    except (TypeError, KeyError):  # the inputs do not fit the graph
        return False
    values = [node.meta.get("val") for node in model.graph.find_nodes(op="placeholder")]
    shapes: list[Sequence[Any]] = [
        v.shape for v, t in zip(values, given, strict=True) if isinstance(v, Tensor) and _has_axes(v, t)
    ]
    if not shapes:
        return False
    batch = shapes[0][0]
    if isinstance(batch, int):
        return batch == inputs.batch_size
    following = [
        size.node.expr
        for shape in shapes
        for axis, size in enumerate(shape)
        if isinstance(size, torch.SymInt) and not (axis == 0 and size.node.expr == batch.node.expr)
    ]
    return any(batch.node.expr.free_symbols & size.free_symbols for size in following)


def _has_axes(value: Tensor, given: Any) -> bool:
    return value.ndim > 0 and isinstance(given, Tensor) and given.ndim > 0


def sentinel(sizes: Iterable[int]) -> int:
    """Return a large prime that divides none of the sizes."""
    present = {size for size in sizes if size}
    candidate = _SMALLEST_SENTINEL
    while any(size % candidate == 0 for size in present) or any(candidate % f == 0 for f in range(2, 100)):
        candidate += 2
    return candidate
