#!/usr/bin/env bash
# torch 2.14.1, torch.export.export: an example that passes one tensor as two arguments gives a program that reads only one of them.
#
# Expected: the program computes a + 10 b for any a and b, or its guards refuse two different tensors.
# Seen: the graph has both inputs and computes b + 10 b. Called with a = 1 and b = 0 it returns 0 instead of 1, and no guard raises.
# What to do: pass a clone of the tensor for every argument of the example.
#
# The script installs the package in a temporary folder, exports the module with a shared and with separate tensors, runs both
# programs, and fails if the description above is no longer true.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.14.1 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch


class Sum(torch.nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + 10 * b


shared = torch.ones(2)
examples = {"one tensor twice": (shared, shared), "a clone": (shared, shared.clone())}
found = {
    name: torch.export.export(Sum(), example).module()(torch.ones(2), torch.zeros(2)).tolist()
    for name, example in examples.items()
}
print("a + 10 b for a = 1, b = 0:", found)
assert found == {"one tensor twice": [0.0, 0.0], "a clone": [1.0, 1.0]}
PYTHON
# Printed: a + 10 b for a = 1, b = 0: {'one tensor twice': [0.0, 0.0], 'a clone': [1.0, 1.0]}
