"""Runs of a graph on fake tensors: shapes without data, weights or arithmetic.

The batch is a large prime that divides no size of the model. A reshape read at such a size cannot confuse the batch
with another axis, and unlike symbolic shapes it never specialises (timm's Swin does); it is also faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from vbpfx.inputs import Inputs

_SMALLEST_SENTINEL = 1009


def propagate_shapes(graph_module: fx.GraphModule, inputs: Inputs) -> int | None:
    """Write ``meta["val"]`` on every node; returns the size that stands for the batch."""

    def record(node: fx.Node, run: Callable[[], Any]) -> Any:
        node.meta["val"] = value = run()
        return value

    tensors = [*graph_module.parameters(), *graph_module.buffers(), *inputs.tensors]
    samples = sentinel({size for tensor in tensors for size in tensor.shape})
    if inputs.batch_size is not None:
        try:
            run_fake(graph_module, inputs, samples, record)
            return samples
        except Exception:  # a graph that is tied to its batch size still works at that size
            pass
    run_fake(graph_module, inputs, inputs.batch_size, record)
    return None


def run_fake(
    graph_module: fx.GraphModule,
    inputs: Inputs,
    samples: int | None,
    around: Callable[[fx.Node, Callable[[], Any]], Any],
) -> None:
    """Run the graph on fake tensors with a batch of that many samples."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: Tensor) -> Tensor:
        shape = list(tensor.shape)
        if samples is not None and inputs.is_batched(tensor):
            shape[0] = samples
        return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)

    def as_fake(tensor: Tensor) -> Tensor:
        # a parameter, or what an operator hands on unchanged, is still real
        found = tensor if isinstance(tensor, FakeTensor) else mode.from_tensor(tensor, static_shapes=True)
        return found.detach() if found.requires_grad else found  # the flop counter hooks what asks for gradients

    class Runner(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            return around(n, lambda: pytree.tree_map_only(Tensor, as_fake, super(Runner, self).run_node(n)))

    with mode, torch.no_grad():
        example = inputs.map(fake)
        Runner(graph_module).run(*graph_arguments(graph_module, example), enable_io_processing=False)


def graph_arguments(graph_module: fx.GraphModule, inputs: Inputs) -> list[Any]:
    """The inputs in the order of the graph's placeholders."""
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    if isinstance(graph_module.graph._codegen, fx.graph._PyTreeCodeGen):
        return inputs.leaves
    named = dict(zip((str(node.target) for node in placeholders), inputs.args, strict=False)) | inputs.kwargs
    return [
        named[str(node.target)] if str(node.target) in named else node.args[0] if node.args else None
        for node in placeholders
    ]


def sentinel(sizes: Iterable[int]) -> int:
    """A prime that divides none of the sizes."""
    present = {size for size in sizes if size}
    candidate = _SMALLEST_SENTINEL
    while any(size % candidate == 0 for size in present) or any(candidate % f == 0 for f in range(2, 100)):
        candidate += 2
    return candidate
