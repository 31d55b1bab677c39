"""Pruning as a pass for :class:`torch.fx.passes.infra.pass_manager.PassManager`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from vbpfx.analysis.blocks import find_blocks
from vbpfx.data.inputs import Inputs, argument_names, reader
from vbpfx.errors import CalibrationError, CaptureError, VerificationError, first_line
from vbpfx.graph.capture import capture, named_tensors, share_parameters
from vbpfx.graph.edit import finish
from vbpfx.graph.fake import graph_arguments, renew_shapes
from vbpfx.graph.tidy import INPUT_GUARDS
from vbpfx.pipeline.calibration import require_batches
from vbpfx.pipeline.model import prune
from vbpfx.pipeline.result import Pruned
from vbpfx.planning.options import PlanArguments, PlanOptions
from vbpfx.plans.records import Plan
from vbpfx.rewrite.verify import verify


class VarianceBasedPruning(PassBase):
    """:func:`vbpfx.prune` as a pass: it takes a GraphModule, leaves it unchanged, and returns a smaller one.

    >>> import torch, vbpfx
    >>> from torch.fx.passes.infra.pass_manager import PassManager
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 4))
    >>> step = vbpfx.VarianceBasedPruning([torch.randn(16, 8)], ratio=0.5)
    >>> result = PassManager([step])(torch.fx.symbolic_trace(model))
    >>> result.modified, step.plan.widths
    (True, {'0->2': 16})

    The pass works on graphs of ``torch.fx.symbolic_trace`` and of ``torch.export`` (``program.module()``). The result is in
    eval mode. Nodes keep their names and their metadata. If the graph has shapes (``meta["val"]``), the result has the new
    ones. The guards that ``torch.export`` puts on inputs stay.

    The pass returns the same GraphModule, with ``modified`` false, in two cases: no block is found and ``allow_no_blocks`` is
    set, or this pass has already narrowed the graph. So the budget is applied once, even with ``PassManager(steps=...)``.

    Args:
        calibration: batches, as :func:`vbpfx.prune` takes them. Several runs need data that can be iterated over several times.
        inputs: as for :func:`vbpfx.prune`.
        allow_no_blocks: return a graph without blocks unchanged, rather than raise an AnalysisError.
        options: the budget and all other arguments of :func:`vbpfx.prune`. The default of ``progress`` is False here.

    Attributes:
        pruned: the :class:`vbpfx.Pruned` of the last run, which shares its parameters with the result. It is None before the
            first run, and if no block was found.

    Raises:
        BudgetError: the budget or another option is out of range or unknown.
    """

    def __init__(
        self,
        calibration: Iterable[Any],
        *,
        inputs: Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]] | None = None,
        allow_no_blocks: bool = False,
        **options: Any,
    ) -> None:
        PlanOptions.of(**{name: options[name] for name in PlanArguments.__annotations__ if name in options})
        self.calibration, self.inputs, self.allow_no_blocks = calibration, inputs, allow_no_blocks
        self.options = {"progress": False} | options
        self.pruned: Pruned | None = None

    @property
    def plan(self) -> Plan | None:
        """The plan of the last run; None before the first run."""
        return self.pruned.plan if self.pruned else None

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Check the input, run the pass, and check its result. (PassBase would call :meth:`ensures` on the input.)"""
        self.requires(graph_module)
        result = self.call(graph_module)
        self.ensures(result.graph_module)
        return result

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Check that the graph is valid, and that the first batch fits its arguments.

        Args:
            graph_module: the graph to narrow.

        Raises:
            CaptureError: it is not a GraphModule, or its graph is invalid.
            CalibrationError: there is no batch, or the first one does not fit.
        """
        if not isinstance(graph_module, fx.GraphModule):
            raise CaptureError(
                f"expected a torch.fx.GraphModule, got {type(graph_module).__name__}; trace the model first "
                f"(torch.fx.symbolic_trace, or torch.export.export(...).module()), or use vbpfx.prune"
            )
        try:
            graph_module.graph.lint()
        except (RuntimeError, ValueError) as error:
            raise CaptureError(
                f"the graph is invalid ({first_line(error)}); an earlier pass may have broken it"
            ) from error
        batch = self._first_batch(graph_module)
        places = [node.target for node in graph_module.graph.find_nodes(op="placeholder")]
        try:
            argument_names(graph_module, batch)
            given = len(graph_arguments(graph_module, batch))
        except (TypeError, KeyError, ValueError) as error:
            raise CalibrationError(
                f"batch 1 does not fit the graph, whose arguments are {places}: {first_line(error)}; it holds "
                f"{batch.describe()}"
            ) from error
        if given != len(places):
            raise CalibrationError(f"batch 1 holds {given} values, the graph has {len(places)} arguments: {places}")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Return a smaller copy of the graph.

        Args:
            graph_module: the graph. It is not changed, and it is returned itself if there is nothing to do.

        Raises:
            VbpfxError: as :func:`vbpfx.prune` does.
        """
        if self._has_widths(graph_module):
            return PassResult(graph_module, False)
        self.pruned = None
        if self.allow_no_blocks and not find_blocks(capture(graph_module, self._first_batch(graph_module))).blocks:
            return PassResult(graph_module, False)
        pruned = self.pruned = prune(graph_module, self.calibration, inputs=self.inputs, **self.options)
        small = share_parameters(pruned.graph_module)  # the graph that vbpfx saves has no guards
        renew_shapes(small, graph_module)
        _restore_guards(small, graph_module)
        return PassResult(small, True)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Check that the result is a valid graph, has the widths of the plan, and passes the substitution oracle.

        Args:
            graph_module: the result of this pass or of a later one.

        Raises:
            VerificationError: it has other widths, or computes something else than the plan says.
        """
        if self.pruned is None:
            return
        graph_module.graph.lint()
        if not self._has_widths(graph_module):
            raise VerificationError(
                f"the graph does not have the widths of the plan, {self.pruned.plan.widths}. If no later pass changed it, please "
                f"report the model"
            )
        if self.options.get("verify", True):
            verify(self.pruned.captured, graph_module, self.pruned.plan)

    def _first_batch(self, graph_module: fx.GraphModule) -> Inputs:
        batches = require_batches(self.calibration)
        for first in batches:
            if batches is self.calibration:  # an iterator: the batch goes back in front of the rest
                self.calibration = itertools.chain([first], batches)
            return reader(graph_module, self.inputs)(first)
        raise CalibrationError(
            "the calibration data is empty: pass at least one batch (an iterator that was used up yields nothing)"
        )

    def _has_widths(self, graph_module: fx.GraphModule) -> bool:
        """Return whether every tensor that the last plan narrows has the shape that the plan gives it."""
        if self.pruned is None:
            return False
        tensors = named_tensors(graph_module)
        return all(name in tensors and tensors[name].shape == shape for name, shape in _shapes(self.pruned))


def _shapes(pruned: Pruned) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name of every parameter that the plan narrows, with its new shape."""
    dense = named_tensors(pruned.captured.reference)
    shapes: dict[str, list[int]] = {}
    for entry in pruned.plan.blocks:
        for parameter in entry.block.parameters:
            shape = shapes.setdefault(parameter.name, list(dense[parameter.name].shape))
            shape[parameter.axis] -= entry.lost(parameter)
    return ((name, tuple(shape)) for name, shape in shapes.items())


def _restore_guards(small: fx.GraphModule, graph_module: fx.GraphModule) -> None:
    """Copy the guards on the inputs from the graph that was pruned. The shapes of the inputs are the same."""
    dense, narrow = (list(g.graph.find_nodes(op="placeholder")) for g in (graph_module, small))
    for guards in graph_module.graph.find_nodes(op="call_module", target=INPUT_GUARDS):
        small.add_submodule(INPUT_GUARDS, graph_module.get_submodule(INPUT_GUARDS))
        with small.graph.inserting_after(narrow[-1]):
            copied = small.graph.node_copy(guards, dict(zip(dense, narrow, strict=True)).__getitem__)
        copied.meta = dict(guards.meta)
    finish(small)
