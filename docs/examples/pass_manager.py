"""Pruning as one step among others in PyTorch's own pass manager.

Needs the extra ``vbpfx[demo]``. The pass in front says how large the network is, the pass behind makes every exact GELU an
approximate one; both are plain functions of a GraphModule. Prints the accuracy on images that the network has not seen.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.export import Dim
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.infra.pass_manager import PassManager, this_before_that_pass_constraint

import vbpfx
from vbpfx.demo.digits import accuracy, load_digits, load_trained


def count_parameters(graph_module: fx.GraphModule) -> PassResult:
    """Say how large the graph is; changes nothing."""
    print(f"parameters: {sum(p.numel() for p in graph_module.parameters()):,}")
    return PassResult(graph_module, False)


def approximate_gelu(graph_module: fx.GraphModule) -> PassResult:
    """GELU by tanh."""
    calls = graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.gelu.default)
    for node in calls:
        node.kwargs = {"approximate": "tanh"}
    return PassResult(graph_module, bool(calls))


def main() -> None:
    """A pipeline of three passes."""
    split, model = load_digits(), load_trained()
    calibration = split.train_images.split(100)
    program = torch.export.export(model, (calibration[0],), dynamic_shapes=({0: Dim("batch")},))
    pruning = vbpfx.VarianceBasedPruning(calibration, ratio=0.7)
    passes = PassManager(
        [count_parameters, pruning, approximate_gelu],
        # statistics are of the network as it was trained
        constraints=[this_before_that_pass_constraint(pruning, approximate_gelu)],
        run_checks_after_each_pass=True,
    )
    passes.add_checks(lambda graph_module: graph_module.graph.lint())
    dense = program.module()
    result = passes(dense)
    count_parameters(result.graph_module)
    print(f"modified: {result.modified}")
    print(f"widths: {sorted(set(pruning.plan.widths.values()))}, of 256")
    print(f"error against the plan: {pruning.pruned.verification.error:.1e} of the largest logit")
    for name, network in {"dense": dense, "pruned": result.graph_module}.items():
        print(f"{name}: accuracy {accuracy(network, split.test_images, split.test_labels):.2%}")


if __name__ == "__main__":
    main()
