"""The pass: pruning as one step among others in :class:`torch.fx.passes.infra.pass_manager.PassManager`."""

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
from vbpfx.rewrite.narrow import removed_channels
from vbpfx.rewrite.verify import verify


class VarianceBasedPruning(PassBase):
    """:func:`vbpfx.prune` as a pass: a GraphModule goes in and stays as it was, a smaller one comes out.

    >>> import torch, vbpfx
    >>> from torch.fx.passes.infra.pass_manager import PassManager
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 4))
    >>> step = vbpfx.VarianceBasedPruning([torch.randn(16, 8)], ratio=0.5)
    >>> result = PassManager([step])(torch.fx.symbolic_trace(model))
    >>> result.modified, step.plan.widths
    (True, {'0->2': 16})

    It works on graphs of ``torch.fx.symbolic_trace`` and of ``torch.export`` (``program.module()``). The result is in eval mode.
    Nodes keep their names and their metadata; shapes (``meta["val"]``) are renewed, where the graph had them, and the guards
    that ``torch.export`` puts on inputs stay.

    ``modified`` is false, and the very GraphModule is returned, if ``allow_no_blocks`` let a graph without a block through, and if
    the graph is one that this pass has narrowed already: under ``PassManager(steps=...)`` the budget is spent once.

    Args:
        calibration: batches, as :func:`vbpfx.prune` takes them. For several runs, something that can be gone through again.
        inputs: as for :func:`vbpfx.prune`.
        allow_no_blocks: leave a graph alone in which no block is found, rather than raise an AnalysisError.
        options: the budget and all else that :func:`vbpfx.prune` takes; no progress is shown unless asked for.

    Attributes:
        pruned: the last run's :class:`vbpfx.Pruned`, which shares its parameters with the result; None before the first run, and
            where no block was found.

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
        """What the last run removed; None before the first."""
        return self.pruned.plan if self.pruned else None

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """The precondition, the pass, and the postconditions on its result; torch's own looks at what went in."""
        self.requires(graph_module)
        result = self.call(graph_module)
        self.ensures(result.graph_module)
        return result

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Check that this is a sound graph, and that the first batch fits its arguments.

        Args:
            graph_module: what the pass shall narrow.

        Raises:
            CaptureError: it is not a GraphModule, or its graph is broken.
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
                f"the graph is broken, as a pass before may have left it: {first_line(error)}"
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
        """A smaller copy of the graph.

        Args:
            graph_module: stays as it is; handed on itself where there is nothing to do.

        Raises:
            VbpfxError: what :func:`vbpfx.prune` raises.
        """
        if self._has_widths(graph_module):
            return PassResult(graph_module, False)
        self.pruned = None
        if self.allow_no_blocks and not find_blocks(capture(graph_module, self._first_batch(graph_module))).blocks:
            return PassResult(graph_module, False)
        pruned = self.pruned = prune(graph_module, self.calibration, inputs=self.inputs, **self.options)
        small = share_parameters(pruned.graph_module)  # what vbpfx saves has no guards
        renew_shapes(small, graph_module)
        _restore_guards(small, graph_module)
        return PassResult(small, True)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Check the result: a sound graph of the plan's widths that computes what the plan says.

        Args:
            graph_module: what the pass, or one behind it, has made.

        Raises:
            VerificationError: it is not.
        """
        if self.pruned is None:
            return
        graph_module.graph.lint()
        if not self._has_widths(graph_module):
            raise VerificationError(
                f"the graph's widths are not those of the plan, {self.pruned.plan.widths}; please report the model"
            )
        if self.options.get("verify", True):
            verify(self.pruned.captured, graph_module, self.pruned.plan)

    def _first_batch(self, graph_module: fx.GraphModule) -> Inputs:
        batches = require_batches(self.calibration)
        for first in batches:
            if batches is self.calibration:  # can be gone through once
                self.calibration = itertools.chain([first], batches)
            return reader(graph_module, self.inputs)(first)
        raise CalibrationError(
            "the calibration data is empty: pass at least one batch (an iterator that was used up yields nothing)"
        )

    def _has_widths(self, graph_module: fx.GraphModule) -> bool:
        """Whether every tensor that the last plan narrows has the shape that the plan gives it."""
        if self.pruned is None:
            return False
        tensors = named_tensors(graph_module)
        return all(name in tensors and tensors[name].shape == shape for name, shape in _shapes(self.pruned))


def _shapes(pruned: Pruned) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every narrowed tensor's name with its shape by the plan."""
    dense = named_tensors(pruned.captured.reference)
    shapes: dict[str, list[int]] = {}
    for (name, axis, of_parameter), positions in removed_channels(pruned.plan).items():
        if of_parameter:
            shapes.setdefault(name, list(dense[name].shape))[axis] -= len(positions)
    return ((name, tuple(shape)) for name, shape in shapes.items())


def _restore_guards(small: fx.GraphModule, graph_module: fx.GraphModule) -> None:
    """Check the inputs as the graph did that was pruned: their shapes are the same."""
    dense, narrow = (list(g.graph.find_nodes(op="placeholder")) for g in (graph_module, small))
    for guards in graph_module.graph.find_nodes(op="call_module", target=INPUT_GUARDS):
        small.add_submodule(INPUT_GUARDS, graph_module.get_submodule(INPUT_GUARDS))
        with small.graph.inserting_after(narrow[-1]):
            copied = small.graph.node_copy(guards, dict(zip(dense, narrow, strict=True)).__getitem__)
        copied.meta = dict(guards.meta)
    finish(small)
