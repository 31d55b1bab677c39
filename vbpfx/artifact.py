"""Artifacts: a pruned network in a folder, without pickle.

    plan.json           which neurons stayed, of which blocks, of a model of which structure
    model.safetensors   the pruned network's tensors under the model's own names
    plan.safetensors    the constants that stand for the removed neurons
    graph.json          the graph, to run it without the model's class
    report.json         the figures

Every file is written whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, fx, nn

from vbpfx.convert import apply_plan
from vbpfx.errors import ArtifactError
from vbpfx.files import read_json, write_json, write_safetensors
from vbpfx.graph_format import graph_from_json, graph_to_json
from vbpfx.records import BlockPlan, Plan, block_from_json, block_to_json

_FORMAT = 1


def save_plan(plan: Plan, folder: str | Path) -> None:
    """Write ``plan.json`` and ``plan.safetensors``."""
    folder = Path(folder)
    constants = {
        f"{number}.{index}": values
        for number, entry in enumerate(plan.blocks)
        for index, values in enumerate(entry.constants)
    }
    data = {
        "format": _FORMAT,
        "fingerprint": plan.fingerprint,
        "settings": dict(plan.settings),
        "blocks": [{"block": block_to_json(entry.block), "kept": list(entry.kept)} for entry in plan.blocks],
    }
    write_safetensors(folder / "plan.safetensors", constants)
    write_json(folder / "plan.json", data)


def load_plan(folder: str | Path) -> Plan:
    """Read what :func:`save_plan` wrote.

    Raises:
        ArtifactError: a file is missing or damaged, or of a newer format.
    """
    folder = Path(folder)
    data = read_json(folder / "plan.json")
    constants = _read_tensors(folder / "plan.safetensors")
    try:
        if data["format"] != _FORMAT:
            raise ArtifactError(f"{folder} has format {data['format']}, this vbpfx reads {_FORMAT}; update vbpfx")
        entries = tuple(
            BlockPlan(
                block := block_from_json(entry["block"]),
                tuple(entry["kept"]),
                tuple(constants[f"{number}.{index}"] for index in range(len(block.sources))),
            )
            for number, entry in enumerate(data["blocks"])
        )
        return Plan(entries, data["fingerprint"], data["settings"])
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{folder / 'plan.json'} is damaged ({type(error).__name__}: {error})") from error


def save_network(graph_module: fx.GraphModule, plan: Plan, report: Mapping[str, Any], folder: str | Path) -> Path:
    """Write the whole artifact; returns the folder.

    A graph that calls functions which are not torch's is saved without ``graph.json``: such an artifact
    loads into the model's own class only, and ``graph.json`` says why.
    """
    folder = Path(folder)
    tensors: dict[str, Tensor] = dict(graph_module.named_parameters(remove_duplicate=False))
    tensors |= dict(graph_module.named_buffers(remove_duplicate=False))
    first: dict[int, str] = {}
    tied = {name: first[id(t)] for name, t in tensors.items() if first.setdefault(id(t), name) != name}
    try:
        graph = graph_to_json(graph_module) | {"tied": tied}
    except ArtifactError as error:
        graph = {"unavailable": str(error), "tied": tied}
    save_plan(plan, folder)
    write_safetensors(folder / "model.safetensors", {n: t.cpu().clone() for n, t in tensors.items() if n not in tied})
    write_json(folder / "graph.json", graph)
    write_json(folder / "report.json", report)
    return folder


def load(folder: str | Path, *, into: nn.Module | None = None) -> nn.Module:
    """Read a saved network.

    Args:
        into: a dense model of the class that was pruned, with any weights: the result is a narrowed copy of
            it with the saved weights. Without it the result is a GraphModule that needs no model class.

    Raises:
        ArtifactError: the artifact is missing, damaged, or of another model.
    """
    folder = Path(folder)
    graph = read_json(folder / "graph.json")
    tensors = _read_tensors(folder / "model.safetensors")
    tensors |= {name: tensors[first] for name, first in graph["tied"].items()}
    if into is not None:
        return _load_into(into, load_plan(folder), tensors, folder)
    if "unavailable" in graph:
        raise ArtifactError(f"{folder} holds no graph ({graph['unavailable']}); pass into= a model of the pruned class")
    try:
        return graph_from_json(graph, tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{folder / 'graph.json'} is damaged ({type(error).__name__}: {error})") from error


def _load_into(model: nn.Module, plan: Plan, tensors: dict[str, Tensor], folder: Path) -> nn.Module:
    small = apply_plan(model, plan)
    own = dict(small.named_parameters(remove_duplicate=False)) | dict(small.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name not in own:  # constants that tracing made
                continue
            if own[name].shape != tensor.shape:
                raise ArtifactError(
                    f"{folder}: {name} has shape {tuple(tensor.shape)}, the narrowed {type(model).__name__} "
                    f"{tuple(own[name].shape)}; the artifact's files do not belong together"
                )
            own[name].copy_(tensor)
    return small


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} is missing or damaged ({error}); save the network again") from error
