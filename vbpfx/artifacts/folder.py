"""Artifacts: a pruned network in a folder, without pickle.

    plan.json           which neurons stayed, of which blocks, of a model of which structure
    model.safetensors   the pruned network's tensors under the model's own names; or several files, and an index of them, and
                        what the graph needs beside in buffers.safetensors (:mod:`vbpfx.pipeline.files`)
    plan.safetensors    what stands for the removed neurons, and the corrections of layers that were fitted anew
    graph.json          the graph, to run it without the model's class, and which files hold its tensors
    report.json         the figures
    report.html         the same, to look at
    model.onnx          the pruned network for a runtime, where it was asked for

Every file is written whole or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from vbpfx.artifacts.graph_format import dtype_from_json, graph_from_json, graph_to_json
from vbpfx.errors import ArtifactError, VbpfxError
from vbpfx.graph.capture import named_tensors
from vbpfx.plans.files import load_plan, plan_files
from vbpfx.plans.records import Plan
from vbpfx.rewrite.own_class import apply_plan
from vbpfx.storage.files import Write, json_writer, made_folder, read_json, safetensors_writer, settle, write_atomically
from vbpfx.storage.tensors import INDEX, WHOLE, Stored, read_tensors

_BUFFERS = "buffers.safetensors"
_CONFIG = "config.json"  # of a model of Hugging Face, which the artifact is one of, too (:mod:`vbpfx.pipeline.files`)


@contextmanager
def folder_for_artifact(folder: Path) -> Iterator[None]:
    """A folder that an artifact will be written to, tried before the work begins; it goes again if that fails.

    Raises:
        ArtifactError: it cannot be written, or holds something else than an artifact.
    """
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder} is a file; choose a folder")
    if folder.is_dir():
        settle(folder)
        held = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        if held and not {"plan.json", "graph.json"} <= set(held):
            raise ArtifactError(
                f"{folder} holds {held[0]} and is not a pruned network; choose a new or an empty folder"
            )
    with made_folder(folder):
        yield


def save_network(
    graph_module: fx.GraphModule, reference: nn.Module, plan: Plan, beside: Mapping[str, Write], folder: str | Path
) -> Path:
    """Write the whole artifact, with the files of ``beside`` (by name) in the same commit; returns the folder.

    What the model has and the graph does not use (a layer for training alone) is taken from ``reference``,
    the dense model, so that loading into the model's class restores it too.

    A graph that calls functions which are not torch's cannot be written: such an artifact loads into the
    model's own class only, and its ``graph.json`` says why.

    Raises:
        ArtifactError: a file cannot be written, or the folder holds somebody else's model of Hugging Face.
    """
    folder = Path(folder)
    described = _described_widths(folder)
    own, dense = named_tensors(graph_module), named_tensors(reference)
    unused = {name: tensor for name, tensor in dense.items() if name not in own}
    tensors = own | unused
    first: dict[int, str] = {}
    tied = {name: first[id(t)] for name, t in tensors.items() if first.setdefault(id(t), name) != name}
    graph = _graph(graph_module, tied, list(tensors), list(unused), [WHOLE])
    stored = {name: tensor.clone() for name, tensor in tensors.items() if name not in tied}
    write_atomically(
        {
            **plan_files(plan, folder),
            folder / WHOLE: safetensors_writer(stored),
            folder / "graph.json": json_writer(graph),
            **{folder / name: write for name, write in beside.items()},
        }
    )
    # of an artifact in shards that was here before, which graph.json no longer names
    stale = [*folder.glob("model-*-of-*.safetensors"), folder / INDEX, folder / _BUFFERS]
    if described is not None and described != (plan.fingerprint, plan.widths):
        stale.append(folder / _CONFIG)
    for path in stale:
        with suppress(OSError):
            path.unlink()
    return folder


def _described_widths(folder: Path) -> tuple[str, dict[str, int]] | None:
    """Of which model and widths a configuration in the folder is; None without one.

    Raises:
        ArtifactError: it is not of an artifact, whose files may be written over.
    """
    settle(folder)
    if not (folder / _CONFIG).exists():
        return None
    if not (folder / "plan.json").exists():
        raise ArtifactError(
            f"{folder} holds {_CONFIG} and no plan.json: the weights beside it are another model's; choose another folder"
        )
    try:
        before = load_plan(folder)
    except ArtifactError:  # damaged, or of another format
        return "", {}
    return before.fingerprint, before.widths


def _graph(
    graph_module: fx.GraphModule, tied: Mapping[str, str], tensors: list[str], unused: list[str], files: list[str]
) -> dict[str, Any]:
    """The graph, and what it has to do with the tensors in the files beside it."""
    about = {
        "files": files,
        "tied": dict(tied),
        "tensors": sorted(tensors),
        "unused": sorted(unused),
        "frozen": sorted(name for name, parameter in graph_module.named_parameters() if not parameter.requires_grad),
    }
    try:
        return graph_to_json(graph_module) | about
    except ArtifactError as error:
        return {"unavailable": str(error)} | about


def save_beside_weights(
    graph_module: fx.GraphModule,
    plan: Plan,
    beside: Mapping[str, Write],
    folder: Path,
    *,
    stored: Mapping[str, str],
    others: Mapping[str, Tensor],
) -> None:
    """Write everything of an artifact but the weights, which lie in the folder already.

    Args:
        graph_module: the graph; its weights may be on the meta device, and of another precision than in the files.
        beside: further files, by name.
        stored: name of a tensor -> the name that it has in the files.
        others: values of the graph's tensors that are not there, by name.
    """
    own = named_tensors(graph_module)
    tied = {name: source for name, source in stored.items() if name != source}
    written = {*stored, *stored.values()}
    used = own.keys() | {source for name, source in tied.items() if name in own}
    rest = {name: others.get(name, tensor) for name, tensor in own.items() if name not in stored}
    holding = sorted(path.name for path in folder.glob("model*.safetensors")) + [_BUFFERS] * bool(rest)
    graph = _graph(graph_module, tied, [*(written | own.keys())], [*(written - used)], holding)
    there = Stored.of(folder).shapes
    graph["computed in"] = {
        source: str(own[name].dtype).removeprefix("torch.")
        for name, source in stored.items()
        if name in own and own[name].dtype != there[source].dtype
    }
    files = {
        **plan_files(plan, folder),
        folder / "graph.json": json_writer(graph),
        **{folder / name: write for name, write in beside.items()},
    }
    if rest:  # safetensors writes a file without tensors and does not read it
        files[folder / _BUFFERS] = safetensors_writer({name: tensor.clone() for name, tensor in rest.items()})
    write_atomically(files)


def load(folder: str | Path, *, into: nn.Module | None = None) -> nn.Module:
    """Read a saved network.

    Args:
        folder: what :func:`save` wrote.
        into: a dense model of the class that was pruned, with any weights: the result is a narrowed copy of
            it with the saved weights, in its own precision. Without it the result is a GraphModule that needs no model class,
            in the precision that it was pruned in, whatever its files hold (see :func:`vbpfx.prune_files`).

    Raises:
        ArtifactError: the artifact is missing, damaged, or of another model.
    """
    folder = Path(folder)
    settle(folder)
    graph = read_json(folder / "graph.json")
    try:
        tensors = _read_all_tensors(folder, graph.get("files", [WHOLE]))
        tied: dict[str, str] = graph["tied"]
        missing = sorted(set(graph["tensors"]) - set(tensors) - set(tied))
        if missing:
            raise ArtifactError(f"{folder} lacks {missing[0]}; save the network again")
        if into is not None:
            named = tensors | {name: tensors[first] for name, first in tied.items()}
            return _load_into(into, load_plan(folder), named, folder)
        if "unavailable" in graph:
            raise ArtifactError(
                f"{folder} holds no graph ({graph['unavailable']}); pass into= a model of the pruned class"
            )
        unused, computed = set(graph["unused"]), graph.get("computed in", {})
        used = {
            name: tensor.to(dtype_from_json(computed[name])) if name in computed else tensor
            for name, tensor in tensors.items()
            if name not in unused
        }
        network = graph_from_json(graph, used, {n: first for n, first in tied.items() if n not in unused})
        for name in graph["frozen"]:
            network.get_parameter(name).requires_grad_(False)
        return network
    except VbpfxError:
        raise
    except Exception as error:  # a file that was tampered with can go wrong anywhere
        raise ArtifactError(
            f"{folder / 'graph.json'} is damaged ({type(error).__name__}: {error}); save the network again"
        ) from error


def load_beside(folder: Path, dense: nn.Module) -> nn.Module:
    """A saved network to compare with its dense model: the graph, as it was checked, or the model's class where it has no graph.

    Raises:
        ArtifactError: as :func:`load`.
    """
    settle(folder)
    graph = read_json(folder / "graph.json")
    return load(folder, into=dense if isinstance(graph, dict) and "unavailable" in graph else None)


def _load_into(model: nn.Module, plan: Plan, tensors: dict[str, Tensor], folder: Path) -> nn.Module:
    small = apply_plan(model, plan)
    own = named_tensors(small)
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


def _read_all_tensors(folder: Path, files: list[str]) -> dict[str, Tensor]:
    """What lies in the files that graph.json names."""
    if not all(name == Path(name).name for name in files):
        raise ArtifactError(f"{folder / 'graph.json'} names files outside of its folder")
    return {name: tensor for file in files for name, tensor in read_tensors(folder / file).items()}
