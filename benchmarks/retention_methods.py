"""The pruning methods that the retention benchmark compares, and the cost of each.

A method is a set of options for :func:`vbpfx.prune`. All methods except ``auto`` are one-shot: they make one plan from
statistics of the dense network. They share one capture and one calibration; ``auto`` is :func:`vbpfx.prune` itself.
Methods with one global ranking may narrow a block to a single neuron; the others keep at least a sixteenth of every block,
which is the default.

SNIP (ICLR 2019, arXiv 1810.02340) ranks by |h dL/dh|. It is used here without labels: over some calibration samples i and
the positions t of the hidden activation h,

    s_j = mean_i sum_t |h_itj dL_i / dh_itj|,

with L_i the cross-entropy of the dense network's logits against its own prediction or, where the output is an embedding,
the product of the output with a random direction.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from retention_networks import Kind, Network
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import vbpfx
from vbpfx.data.inputs import Inputs, as_inputs
from vbpfx.graph.fake import graph_arguments
from vbpfx.planning.importance import Scoring
from vbpfx.planning.options import PlanArguments
from vbpfx.report.make import make_report

SNIP_SAMPLES = 64
_SAMPLES_AT_ONCE = 8
_SEED = 0


@dataclass(frozen=True)
class Method:
    """A pruning method, defined by its options.

    Attributes:
        about: description for the page.
        options: options of :func:`vbpfx.make_plan`.
        covariance: whether it needs covariances, which cost more than variances.
        gradients: whether it uses SNIP's criterion.
        one_shot: whether it only makes one plan from one calibration.
    """

    about: str
    options: PlanArguments = field(default_factory=lambda: PlanArguments())
    covariance: bool = False
    gradients: bool = False
    one_shot: bool = True


METHODS: dict[str, Method] = {
    "random": Method("any neurons, mean fold", {"method": "vbp", "criterion": "random"}),
    "magnitude": Method(
        "one global ranking by the weights' norm, mean fold", {"method": "vbp", "criterion": "magnitude"}
    ),
    "snip": Method(
        f"one global ranking by the size of activation times gradient, without labels, on {SNIP_SAMPLES} samples; mean fold",
        {"method": "vbp"},
        gradients=True,
    ),
    "vbp": Method("Variance-Based Pruning: one global ranking by variance, mean fold", {"method": "vbp"}),
    "flap": Method(
        "FLAP's criterion: variance times the squared norm of what reads it, normalised in each block, mean fold",
        {"criterion": "output_variance", "allocation": "normalised", "compensation": "mean"},
    ),
    "dvbp+ob2c": Method(
        "one global ranking by denoised variance, affine ridge compensation",
        {"criterion": "denoised_variance", "allocation": "global", "compensation": "ridge", "min_width": 1},
        covariance=True,
    ),
    "obs": Method(
        "greedy OBS, the same share of every block, affine ridge compensation: `auto` without reconstruction",
        {"method": "auto", "criterion": "greedy_obs", "compensation": "ridge"},
        covariance=True,
    ),
    "auto": Method("what `vbpfx.prune` does by default", {"method": "auto"}, one_shot=False),
}


@dataclass(frozen=True)
class Outcome:
    """A pruned network, and the processor seconds that it took to make it from the dense one."""

    network: nn.Module
    report: vbpfx.Report
    seconds: float


class Study:
    """A network and its calibration data. Results that methods share are computed once, but their time counts for each."""

    def __init__(self, network: Network, kind: Kind, samples: int) -> None:
        self.network, self.kind, self.samples = network, kind, samples
        self.batches = network.calibration(samples)
        self._seconds: dict[str, float] = {}
        # Warm up: modules loaded at the first call should not count for the first method.
        vbpfx.prune(network.model, [network.example], ratio=0.5, progress=False)

    def prune(self, method: Method, ratio: float) -> Outcome:
        """Prune with a method.

        Raises:
            BudgetError: the method cannot remove that share.
        """
        gc.collect()  # collecting the garbage of other methods should not count for this one
        if not method.one_shot:
            start = time.process_time()
            pruned = vbpfx.prune(
                self.network.model,
                self.batches,
                example_inputs=self.network.example,
                ratio=ratio,
                progress=False,
                **method.options,
            )
            return Outcome(pruned.graph_module, pruned.report, time.process_time() - start)
        statistics = self.covariances if method.covariance else self.variances
        options = method.options | {"ratio": ratio}
        if method.gradients:
            options["criterion"] = self.snip
        start = time.process_time()
        plan = vbpfx.make_plan(self.analysis, statistics, **options)
        small = vbpfx.convert(self.captured, plan)
        report = make_report(self.captured, small, self.analysis, plan, vbpfx.verify(self.captured, small, plan))
        own = time.process_time() - start
        parts = ["analysis", "covariances" if method.covariance else "variances", *["snip"] * method.gradients]
        return Outcome(small, report, own + sum(self._seconds[part] for part in parts))

    @cached_property
    def forward_seconds(self) -> float:
        """The processor seconds of one plain forward pass over the calibration data."""
        inputs = [as_inputs(batch, self.network.model) for batch in self.batches]
        start = time.process_time()
        with torch.inference_mode():
            for batch in inputs:
                self.network.model(*batch.args, **batch.kwargs)
        return time.process_time() - start

    @cached_property
    def analysis(self) -> vbpfx.Analysis:
        """The blocks of the captured network."""
        start = time.process_time()
        found = vbpfx.find_blocks(vbpfx.capture(self.network.model, self.network.example))
        self._seconds["analysis"] = time.process_time() - start
        return found

    @property
    def captured(self) -> vbpfx.Captured:
        """The captured network."""
        return self.analysis.captured

    @cached_property
    def variances(self) -> vbpfx.Statistics:
        """The statistics with means and variances."""
        return self._calibrate("variances", covariance=False)

    @cached_property
    def covariances(self) -> vbpfx.Statistics:
        """The statistics with means and covariances."""
        return self._calibrate("covariances", covariance=True)

    def _calibrate(self, name: str, covariance: bool) -> vbpfx.Statistics:
        analysis = self.analysis
        start = time.process_time()
        observed = vbpfx.prepare(analysis.captured, analysis, covariance=covariance)
        vbpfx.calibrate(observed, self.batches)
        found = vbpfx.statistics(observed)
        self._seconds[name] = time.process_time() - start
        return found

    @cached_property
    def snip(self) -> Snip:
        """SNIP's criterion with its scores."""
        analysis = self.analysis
        start = time.process_time()
        found = Snip(saliencies(analysis, self.kind, self.network.calibration(min(self.samples, SNIP_SAMPLES))))
        self._seconds["snip"] = time.process_time() - start
        return found


class Snip:
    """A criterion for :func:`vbpfx.make_plan` that returns precomputed scores."""

    __name__ = "snip"

    def __init__(self, scores: dict[str, Tensor]) -> None:
        self.scores = scores

    def __call__(self, about: Scoring) -> Tensor:
        """Return the scores of the block."""
        return self.scores[about.block.name]


def saliencies(analysis: vbpfx.Analysis, kind: Kind, batches: Sequence[Any]) -> dict[str, Tensor]:
    """Return block -> s_j, (d,) float64, summed over the tensors that the block's consumers read."""
    captured = analysis.captured
    nodes = {source.node for block in analysis.blocks for source in block.sources}
    total = {block.name: torch.zeros(block.width, dtype=torch.float64) for block in analysis.blocks}
    generator = torch.Generator().manual_seed(_SEED)
    samples = 0
    for batch in itertools.chain.from_iterable(_chunks(as_inputs(batch, captured.reference)) for batch in batches):
        samples += batch.batch_size or 1
        products = _products(captured.graph_module, batch, nodes, kind, generator)
        for block in analysis.blocks:
            for source in dict.fromkeys(consumer.source for consumer in block.consumers):
                if source.node in products:
                    own = products[source.node].narrow(source.axis, source.start, block.width)
                    total[block.name] += own.movedim(source.axis, -1).reshape(-1, block.width).double().sum(0)
    return {name: score / samples for name, score in total.items()}


def _chunks(batch: Inputs) -> list[Inputs]:
    """Split the batch into small parts, because their activations are kept for the backward pass."""
    return [
        batch.samples(start, start + _SAMPLES_AT_ONCE) for start in range(0, batch.batch_size or 1, _SAMPLES_AT_ONCE)
    ]


def _products(
    graph_module: fx.GraphModule, batch: Inputs, nodes: set[str], kind: Kind, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return node -> |h dL/dh|."""
    seen: dict[str, Tensor] = {}

    class Watching(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if n.name in nodes and isinstance(value, Tensor):
                seen[n.name] = value if value.requires_grad else value.requires_grad_()
            return value

    with torch.enable_grad():
        arguments = graph_arguments(graph_module, batch.map(torch.clone))
        output = Watching(graph_module).run(*arguments, enable_io_processing=False)
        value = next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad)
        if kind == "classifier":
            loss = F.cross_entropy(value, value.detach().argmax(1), reduction="sum")
        else:
            loss = (value * torch.randn(value.shape, generator=generator)).sum()
        gradients = torch.autograd.grad(loss, list(seen.values()), allow_unused=True)
    return {name: (seen[name].detach() * g).abs() for name, g in zip(seen, gradients, strict=True) if g is not None}
