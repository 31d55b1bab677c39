"""Make a report by counting both networks."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from vbpfx import __version__
from vbpfx.analysis.blocks import Analysis
from vbpfx.calibration.prepare import Statistics
from vbpfx.graph.capture import Captured, named_tensors
from vbpfx.planning.multiples import blocks_with_convolutions
from vbpfx.plans.records import DEFAULT_KINDS, Plan
from vbpfx.report.report import Report
from vbpfx.report.spectrum import spectra
from vbpfx.rewrite.verify import Verification
from vbpfx.runtimes.table import best_multiple


def make_report(
    captured: Captured,
    small: fx.GraphModule,
    analysis: Analysis,
    plan: Plan,
    verification: Verification | None,
    latency: Mapping[str, Any] | None = None,
    *,
    statistics: Statistics | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Report:
    """Make the report of a pruned network. Parameters and MACs are counted on both graphs, not taken from the plan."""
    narrowed = dataclasses.replace(captured, graph_module=small)
    asked = plan.settings.get("kinds", DEFAULT_KINDS)
    blocks = tuple(block for block in analysis.blocks if block.kind in asked)
    total = sum(block.width for block in blocks)
    return Report(
        params=(count_parameters(captured.graph_module), count_parameters(small)),
        macs=(sum(captured.macs.values()), sum(narrowed.macs.values())),
        neurons=(total, total - plan.removed),
        widths={block.name: (block.width, plan.widths.get(block.name, block.width)) for block in blocks},
        refused=len(analysis.refusals),
        settings=plan.settings,
        verification=verification,
        latency=latency,
        uneven=_uneven(captured, plan),
        fixed=tuple(map(str, captured.fixed)),
        network=type(captured.reference).__name__,
        sample=captured.inputs.sample,
        size=(count_bytes(named_tensors(captured.graph_module)), count_bytes(named_tensors(small))),
        spectra=spectra(blocks, statistics, plan) if statistics else {},
        refusals=analysis.refusals,
        arguments=arguments or {},
        versions=_versions(),
    )


def _uneven(captured: Captured, plan: Plan) -> tuple[str, ...]:
    """Return the narrowed convolution blocks whose width is slow in ONNX Runtime.

    Its fast layout for convolutions needs a multiple of a certain number of channels.
    """
    multiple = best_multiple("onnxruntime")
    convolving = blocks_with_convolutions(captured, [entry.block for entry in plan.blocks])
    return tuple(
        entry.block.name
        for entry in plan.blocks
        if entry.gone
        and entry.block.group_size > multiple  # for a narrower block there is no smaller multiple
        and entry.width // entry.block.groups % multiple
        and entry.block.name in convolving
    )


def count_parameters(network: nn.Module) -> int:
    """Return the number of parameters, counting shared ones once."""
    return sum(parameter.numel() for parameter in network.parameters())


def count_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes of tensors, counting those with several names once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors.values()}.values())


def _versions() -> dict[str, str]:
    return {
        "vbpfx": __version__,
        "torch": str(torch.__version__),
        "Python": platform.python_version(),
        "platform": platform.platform(),
    }
