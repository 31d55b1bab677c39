#!/usr/bin/env bash
# torch-pruning 1.6.1, GroupTaylorImportance: the scale of a BatchNorm does not count in the importance of its channel.
#
# Expected: the importance of a channel grows if the scale of the BatchNorm behind its convolution and the scale's gradient grow, as
# GroupMagnitudeImportance does with the scale.
# Seen: the Taylor importance stays the same, bit by bit. The class lists BatchNorm among its layers, but its branch for BatchNorm
# asks for the pruning function of GroupNorm.
# What to do: compare with magnitude importance as well, or fold BatchNorm into the convolutions before Taylor importance is taken.
#
# The script installs the package in a temporary folder, computes both importances of a small network before and after one channel's
# scale is multiplied by 100, and fails if the description above is no longer true.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.14.1 numpy torch-pruning==1.6.1
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
import torch_pruning
from torch import nn

torch.manual_seed(0)
x = torch.randn(4, 3, 8, 8)
net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3))
net(x).square().sum().backward()
graph = torch_pruning.DependencyGraph().build_dependency(net, x)
group = graph.get_pruning_group(net[0], torch_pruning.prune_conv_out_channels, list(range(8)))
measures = {
    "Taylor": torch_pruning.importance.GroupTaylorImportance(normalizer=None),
    "magnitude": torch_pruning.importance.GroupMagnitudeImportance(p=2, normalizer=None),
}
before = {name: measure(group).clone() for name, measure in measures.items()}
with torch.no_grad():
    net[1].weight[0] *= 100
    net[1].weight.grad[0] *= 100
changes = {name: float((measure(group) - before[name]).abs().max()) for name, measure in measures.items()}
print("change:", {name: round(change, 3) for name, change in changes.items()})
assert changes["Taylor"] == 0.0
assert changes["magnitude"] > 1.0
PYTHON
