#!/usr/bin/env bash
# torch 2.14.1, torch.fx.symbolic_trace: a call of the scan operator is dropped from the graph, without an error.
#
# Expected: a node for scan, as in torch.export's graph, or an error that scan cannot be traced symbolically.
# Seen: the graph has no node for scan and returns an empty list where the module returns a tensor.
# What to do: capture networks with scan by torch.export.
#
# The script installs the package in a temporary folder, traces and exports a module that sums its input, runs both, and fails if
# the description above is no longer true.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.14.1 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch._higher_order_ops.scan import scan


class Sums(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return scan(lambda carry, y: (carry + y, carry + y), torch.zeros_like(x[0]), x)[1]


x = torch.arange(6.0).reshape(3, 2)
model = Sums()
traced = torch.fx.symbolic_trace(model)
exported = torch.export.export(model, (x,)).module()
print("nodes:", [node.op for node in traced.graph.nodes], "output:", traced(x))
assert torch.equal(model(x), x.cumsum(0))
assert torch.equal(exported(x), x.cumsum(0))
assert not [node for node in traced.graph.nodes if "scan" in str(node.target)]
assert traced(x) == []
PYTHON
# Printed: nodes: ['placeholder', 'call_function', 'call_function', 'output'] output: []
