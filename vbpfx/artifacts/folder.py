"""Artifacts: a pruned network in a folder, without pickle.

    plan.json           the kept neurons of every block, and a hash of the model's structure
    model.safetensors   the pruned network's tensors under the model's own names. There may be several such files with
    an
                        index, and buffers.safetensors with other tensors of the graph (:mod:`vbpfx.pipeline.files`)
    plan.safetensors    what replaces the removed neurons, and the corrections of layers that were fitted anew
    graph.json          the graph, to run it without the model's class, and the names of the files with its tensors
    report.json         the figures of the report
    report.html         the report, to look at
    model.onnx          the pruned network for a runtime, if it was asked for

Every file is written completely or not at all.
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
_CONFIG = "config.json"  # present if the artifact is a Hugging Face model as well (:mod:`vbpfx.pipeline.files`)


@contextmanager
def folder_for_artifact(folder: Path) -> Iterator[None]:
    """Check that an artifact can be written to the folder, before the work in this context begins.

    The folder is made if needed. If the work fails, a folder that was made here is removed again.

    Raises:
        ArtifactError: the folder cannot be written, or holds something else than an artifact.
    """
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder} is a file; choose a folder")
    if folder.is_dir():
        settle(folder)
        files = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        if files and not {"plan.json", "graph.json"} <= set(files):
            raise ArtifactError(
                f"{folder} holds {files[0]} and is not a pruned network; choose a new or an empty folder"
            )
    with made_folder(folder):
        yield


def save_network(
    graph_module: fx.GraphModule, reference: nn.Module, plan: Plan, beside: Mapping[str, Write], folder: str | Path
) -> Path:
    """Write the whole artifact and return its folder.

    Tensors that the model has but the graph does not use (a layer for training only) are taken from the dense model, so
    that loading into the model's class restores them, too.

    A graph that calls functions outside of torch cannot be written. Then the artifact can be loaded only into the
    model's own class, and its ``graph.json`` says why.

    Args:
        graph_module: the pruned graph.
        reference: the dense model.
        plan: the plan that the graph was pruned by.
        beside: name -> function that writes this file. These files are put in place together with the others.
        folder: the folder of the artifact.

    Raises:
        ArtifactError: a file cannot be written, or the folder holds a Hugging Face model that is not an artifact.
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
    # files of an earlier artifact in shards, which graph.json no longer names
    stale = [*folder.glob("model-*-of-*.safetensors"), folder / INDEX, folder / _BUFFERS]
    if described is not None and described != (plan.fingerprint, plan.widths):
        stale.append(folder / _CONFIG)
    for path in stale:
        with suppress(OSError):
            path.unlink()
    return folder


def _described_widths(folder: Path) -> tuple[str, dict[str, int]] | None:
    """Return the fingerprint of the model and the widths that the folder's ``config.json`` describes; None without one.

    Raises:
        ArtifactError: the folder does not hold an artifact, so that its files must not be overwritten.
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
    """Return the contents of ``graph.json``: the graph, and how it uses the tensors in the other files."""
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
    """Write all files of an artifact except for the weights, which are in the folder already.

    Args:
        graph_module: the graph. Its weights may be on the meta device, and may have another precision than in the
            files.
        beside: name -> function that writes this file, for further files.
        stored: name of a tensor in the graph -> its name in the files.
        others: name -> value, for tensors of the graph that are not in the files.
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
        folder: the folder that :func:`save` wrote.
        into: a dense model of the class that was pruned, with any weights. The result is then a narrowed copy of this
            model with the saved weights, in the model's precision. Without ``into`` the result is a GraphModule, which
            does not need the model's class. It has the precision in which it was pruned, even if its files hold another
            one (see :func:`vbpfx.prune_files`).

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
    except Exception as error:  # a manipulated file can cause any error
        raise ArtifactError(
            f"{folder / 'graph.json'} is damaged ({type(error).__name__}: {error}); save the network again"
        ) from error


def load_beside(folder: Path, dense: nn.Module) -> nn.Module:
    """Read a saved network, to compare it with its dense model.

    The result is the saved graph, which is what was verified; or a model of the dense model's class if no graph was
    saved.

    Raises:
        ArtifactError: as for :func:`load`.
    """
    settle(folder)
    graph = read_json(folder / "graph.json")
    return load(folder, into=dense if isinstance(graph, dict) and "unavailable" in graph else None)


def _load_into(model: nn.Module, plan: Plan, tensors: dict[str, Tensor], folder: Path) -> nn.Module:
    small = apply_plan(model, plan)
    own = named_tensors(small)
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name not in own:  # a constant that tracing created
                continue
            if own[name].shape != tensor.shape:
                raise ArtifactError(
                    f"{folder}: {name} has shape {tuple(tensor.shape)}, the narrowed {type(model).__name__} "
                    f"{tuple(own[name].shape)}; the artifact's files do not belong together"
                )
            own[name].copy_(tensor)
    return small


def _read_all_tensors(folder: Path, files: list[str]) -> dict[str, Tensor]:
    """Return all tensors in the files that graph.json names."""
    if not all(name == Path(name).name for name in files):
        raise ArtifactError(f"{folder / 'graph.json'} names files outside of its folder")
    return {name: tensor for file in files for name, tensor in read_tensors(folder / file).items()}
