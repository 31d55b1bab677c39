"""Measure latencies for a latency budget: every block at several widths, and the whole network as a correction.

A block is cut out of the graph with everything that carries its hidden axis, from its producers to its consumers, and
is timed in the runtime by itself. So its few percent of the network's time are measured directly, and not as the
difference of two large numbers. Effects across the block's borders (fusion, caches) are then measured on the whole
network, with all blocks narrowed by the same share, to about the target.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from vbpfx.analysis.blocks import Analysis
from vbpfx.data.inputs import Inputs
from vbpfx.errors import BudgetError
from vbpfx.graph.capture import Captured, named_tensors, on_cpu
from vbpfx.graph.fake import run_fake
from vbpfx.measurement.timing import Clock, alternating, interleaved
from vbpfx.planning.budget import floors, kept_neurons
from vbpfx.planning.latency_table import Latencies
from vbpfx.planning.multiples import least_step
from vbpfx.plans.records import Block, BlockPlan, Plan
from vbpfx.rewrite.convert import convert
from vbpfx.runtimes.interface import Compiled, Runtime
from vbpfx.runtimes.table import runtime as find_runtime

# The shares of a block's width at which it is measured, besides its full width.
_SHARES = (0.125, 0.25, 0.5, 0.75)
# The number of measurements of the whole network for the correction. The second uses the correction from the first.
_CORRECTIONS = 2
_ROUNDS = 21


def measure_latencies(
    analysis: Analysis,
    target: float,
    *,
    blocks: Iterable[Block] | None = None,
    runtime: str = "onnxruntime",
    batch: int = 1,
    threads: int | None = None,
    round_to: int = 1,
) -> Latencies:
    """Measure the latency of a network's blocks in a runtime, for :func:`vbpfx.make_plan` with ``latency=``.

    Args:
        analysis: the analysis of the network.
        target: the fraction of the dense latency that will be requested. The correction is measured there.
        blocks: the blocks that may be narrowed; by default :attr:`Analysis.usual`.
        runtime: a name from :data:`vbpfx.runtimes.adapters.NAMES`.
        batch: the batch size.
        threads: the number of threads; by default the runtime's own choice.
        round_to: measured widths are multiples of it.

    Raises:
        ExportError: the runtime is not installed, or does not accept the network or one of its blocks.
        BudgetError: no multiple of ``round_to`` is below the width of a block.
    """
    chosen = tuple(analysis.usual if blocks is None else blocks)
    captured, engine = _on_cpu(analysis.captured), find_runtime(runtime)
    inputs = captured.inputs.resized(batch)
    points: dict[str, tuple[tuple[int, float], ...]] = {}
    for group in _alike(captured, chosen):
        found = _block_points(captured, group[0], engine, inputs, threads, round_to)
        points |= {block.name: found for block in group}
    dense = engine.compile(captured.graph_module, inputs, threads)
    seconds = interleaved({"dense": partial(dense.run, inputs)}, rounds=_ROUNDS, clock=_clock(threads))["dense"]
    latencies = Latencies(runtime, batch, threads, seconds, points)
    for _ in range(_CORRECTIONS):
        widths = _everywhere_alike(latencies, chosen, target, round_to)
        small = convert(captured, _any_neurons(captured, chosen, widths), share=True)
        measured = _ratio(engine.compile(small, inputs, threads), dense, inputs, threads)
        alone = replace(latencies, correction=1.0)
        saved = 1 - alone.ratio(widths)
        latencies = replace(alone, correction=max(0.0, 1 - measured) / saved) if saved else alone
    return latencies


def _on_cpu(captured: Captured) -> Captured:
    """Return the captured network on the CPU, where runtimes compute."""
    return replace(captured, graph_module=on_cpu(captured.graph_module), inputs=captured.inputs.to(torch.device("cpu")))


def _ratio(narrowed: Compiled, dense: Compiled, inputs: Inputs, threads: int | None) -> float:
    """Return the latency of the narrowed network divided by the dense one's: the median over rounds that run both."""
    runs = {"narrowed": partial(narrowed.run, inputs), "dense": partial(dense.run, inputs)}
    seconds = alternating(runs, rounds=_ROUNDS, clock=_clock(threads))
    return statistics.median(a / b for a, b in zip(seconds["narrowed"], seconds["dense"], strict=True))


def _clock(threads: int | None) -> Clock:
    """Return the clock to use: for one thread, processor time, which does not count the work of other processes."""
    return time.process_time if threads == 1 else time.perf_counter


def measure_result(small: fx.GraphModule, captured: Captured, plan: Plan, latencies: Latencies) -> dict[str, Any]:
    """Return the latency of a narrowed network relative to the dense one's: requested, predicted, and measured.

    It is measured in the runtime, batch size and threads of the latency table.
    """
    captured, engine = _on_cpu(captured), find_runtime(latencies.runtime)
    inputs = captured.inputs.resized(latencies.batch)
    dense, narrowed = (engine.compile(n, inputs, latencies.threads) for n in (captured.graph_module, on_cpu(small)))
    return {
        "runtime": latencies.runtime,
        "batch": latencies.batch,
        "threads": latencies.threads,
        "asked": plan.settings["budget"]["latency"],
        "predicted": latencies.ratio(plan.widths),
        "measured": _ratio(narrowed, dense, inputs, latencies.threads),
    }


def block_network(network: fx.GraphModule, block: Block, values: Mapping[str, Any]) -> tuple[fx.GraphModule, Inputs]:
    """Return a block as a network of its own, with inputs: all nodes that carry its axis, and its consumers.

    Args:
        network: a graph that contains the block, narrowed or not.
        values: node name -> its value at the wanted batch size, as a fake tensor.
    """
    ends = {reader.node for reader in block.ends}
    inside = {carrier.node for carrier in block.carriers} | ends
    order = [node for node in network.graph.nodes if node.name in inside]
    graph, copies = fx.Graph(), {}
    tensors: list[Tensor] = []

    def within(node: fx.Node) -> fx.Node:
        """Return the node's copy. A tensor from outside the block becomes an input; sizes read from it are copied."""
        if node not in copies:
            value = values.get(node.name)
            if node.name not in inside and node.op != "get_attr" and isinstance(value, Tensor):
                copies[node] = graph.placeholder(node.name)
                copies[node].meta["val"] = value
                fill = torch.randn if value.is_floating_point() else torch.zeros
                tensors.append(fill(value.shape, dtype=value.dtype, device=value.device))
            else:
                copies[node] = graph.node_copy(node, within)
        return copies[node]

    for node in order:
        within(node)
    graph.output(tuple(copies[node] for node in order if node.name in ends))
    return fx.GraphModule(network, graph).eval(), Inputs(tuple(tensors), {})


def _block_points(
    captured: Captured, block: Block, engine: Runtime, inputs: Inputs, threads: int | None, round_to: int
) -> tuple[tuple[int, float], ...]:
    """Return pairs (width, seconds) for one block alone."""
    multiple = math.lcm(round_to, least_step(block, captured))
    steps = (max(1, round(share * block.width / multiple)) * multiple for share in _SHARES)
    widths = [*sorted({width for width in steps if width < block.width}), block.width]
    if len(widths) == 1:
        groups = "" if block.groups == 1 else f" in each of {block.groups} groups"
        raise BudgetError(
            f"block {block.name}: no multiple of round_to={round_to}{groups} is below its width {block.width}"
        )
    runs = {}
    for width in widths:
        network = captured.graph_module
        if width < block.width:
            network = convert(captured, _any_neurons(captured, [block], {block.name: width}), share=True)
        alone, own = block_network(network, block, _values(network, inputs))
        runs[str(width)] = partial(engine.compile(alone, own, threads).run, own)
    seconds = interleaved(runs, rounds=_ROUNDS, clock=_clock(threads))
    return tuple((width, seconds[str(width)]) for width in widths)


def _values(network: fx.GraphModule, inputs: Inputs) -> dict[str, Any]:
    """Return node name -> its value on these inputs, as a fake tensor."""
    values: dict[str, Any] = {}

    def keep(node: fx.Node, run: Callable[[], Any]) -> Any:
        values[node.name] = value = run()
        return value

    run_fake(network, inputs, inputs.batch_size, keep)
    return values


def _alike(captured: Captured, blocks: Iterable[Block]) -> list[list[Block]]:
    """Group the blocks that have the same cost: those with the same layers on values of the same shapes."""
    tensors, nodes = named_tensors(captured.reference), captured.nodes
    groups: dict[Any, list[Block]] = defaultdict(list)
    for block in blocks:
        weights = [(tuple(tensors[p.name].shape), p.axis, *p.place) for p in block.parameters]
        values = [(str(nodes[c.node].meta["val"].shape), nodes[c.node].op) for c in block.carriers]
        groups[block.width, tuple(weights), tuple(values)].append(block)
    return list(groups.values())


def _everywhere_alike(latencies: Latencies, blocks: Sequence[Block], target: float, round_to: int) -> dict[str, int]:
    """Return widths, with the same share of every block removed, whose predicted latency is closest to the target."""
    floor = floors(blocks, None)

    def widths(share: float) -> dict[str, int]:
        steps = {b.name: math.lcm(round_to, b.groups) for b in blocks}
        exact = {b.name: round((1 - share) * b.width / steps[b.name]) * steps[b.name] for b in blocks}
        return {b.name: min(b.width, max(floor[b.name], exact[b.name])) for b in blocks}

    # 257 is prime, so these widths are not round numbers, like those that a budget leaves; this affects runtimes
    shares = [step / 257 for step in range(1, 241)]
    return widths(min(shares, key=lambda share: abs(latencies.ratio(widths(share)) - target)))


def _any_neurons(captured: Captured, blocks: Sequence[Block], widths: Mapping[str, int]) -> Plan:
    """Return a plan with these widths, keeping the first neurons: which are kept makes no difference to the latency."""
    entries = tuple(
        BlockPlan(
            block,
            kept_neurons(torch.arange(block.width, 0, -1), widths[block.name], block.groups),
            tuple(
                torch.zeros(own - widths[block.name] * own // block.width, dtype=torch.float64)
                for own in block.measured
            ),
        )
        for block in blocks
        if widths[block.name] < block.width
    )
    return Plan(entries, captured.fingerprint, captured.frontend, {})
