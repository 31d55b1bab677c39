"""Save and load a plan: ``plan.json`` with the kept neurons, and ``plan.safetensors`` with what replaces the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vbpfx.errors import ArtifactError
from vbpfx.plans.records import Basis, BlockPlan, Correction, Plan, block_from_json, block_to_json, consumer_from_json
from vbpfx.storage.checkpoint import tensors_digest
from vbpfx.storage.files import Write, json_writer, read_json, safetensors_writer, settle
from vbpfx.storage.tensors import read_tensors

# Format 4 added constant channels and groups, format 5 other coordinates of channels. Formats 3 and 4 are read as well.
_FORMATS = (3, 4, 5)


def plan_digest(plan: Plan) -> str:
    """Return the SHA-256 of a plan's kept neurons and of all its tensors."""
    kept = {f"kept.{number}": torch.tensor(entry.kept) for number, entry in enumerate(plan.blocks)}
    kept |= {f"constants_in.{n}": torch.tensor(e.constants_in) for n, e in enumerate(plan.blocks) if e.constants_in}
    return tensors_digest(kept | _plan_tensors(plan))


def plan_files(plan: Plan, folder: Path) -> dict[Path, Write]:
    """Return ``plan.json`` and ``plan.safetensors`` of a folder as paths with functions that write them."""
    data = {
        "format": _FORMATS[-1],
        "fingerprint": plan.fingerprint,
        "frontend": plan.frontend,
        "settings": dict(plan.settings),
        "blocks": [
            {"block": block_to_json(entry.block), "kept": list(entry.kept), "constants_in": list(entry.constants_in)}
            for entry in plan.blocks
        ],
        "corrections": [dataclasses.asdict(correction.layer) for correction in plan.corrections],
        "further_calls": [[dataclasses.asdict(c) for c in correction.further] for correction in plan.corrections],
    }
    return {
        folder / "plan.safetensors": safetensors_writer(_plan_tensors(plan)),
        folder / "plan.json": json_writer(data),
    }


def load_plan(folder: str | Path) -> Plan:
    """Read a plan from the files of :func:`plan_files`.

    Raises:
        ArtifactError: a file is missing, is damaged or has another format.
    """
    folder = Path(folder)
    settle(folder)
    data = read_json(folder / "plan.json")
    tensors = read_tensors(folder / "plan.safetensors")
    try:
        if data["format"] not in _FORMATS:
            raise ArtifactError(
                f"{folder} has format {data['format']}, this vbpfx reads {_FORMATS[0]} to {_FORMATS[-1]}: prune again, or use the "
                f"vbpfx that wrote it"
            )
        entries = tuple(
            BlockPlan(
                block := block_from_json(entry["block"]),
                tuple(entry["kept"]),
                tuple(tensors[f"{number}.{index}"] for index in range(len(block.measured))),
                tuple(tensors.get(f"{number}.{index}.prediction") for index in range(len(block.measured))),
                tuple(entry.get("constants_in", ())),
                _basis(tensors, number),
            )
            for number, entry in enumerate(data["blocks"])
        )
        corrections = tuple(
            Correction(
                consumer_from_json(layer),
                tensors[f"correction.{n}.weight"],
                tensors[f"correction.{n}.bias"],
                tuple(consumer_from_json(call) for call in further),
            )
            for n, (layer, further) in enumerate(zip(data["corrections"], _further_calls(data), strict=True))
        )
        return Plan(entries, data["fingerprint"], data["frontend"], data["settings"], corrections)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ArtifactError(f"{folder / 'plan.json'} is damaged ({type(error).__name__}: {error})") from error


def _basis(tensors: Mapping[str, Tensor], number: int) -> Basis | None:
    to, back = (tensors.get(f"{number}.basis.{name}") for name in ("to", "back"))
    return None if to is None or back is None else Basis(to, back)


def _further_calls(data: Mapping[str, Any]) -> list[Any]:
    """Return the further calls of every correction's layer; plans of earlier versions have no such entry."""
    further: list[Any] = data.get("further_calls", [[]] * len(data["corrections"]))
    return further


def _plan_tensors(plan: Plan) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for number, entry in enumerate(plan.blocks):
        for index, (constants, prediction) in enumerate(zip(entry.constants, entry.predictions, strict=True)):
            # calls of one layer may share their tensors, and safetensors forbids tensors that share memory
            tensors[f"{number}.{index}"] = constants.clone()
            if prediction is not None:
                tensors[f"{number}.{index}.prediction"] = prediction.clone()
        if entry.basis is not None:
            tensors |= {f"{number}.basis.to": entry.basis.to.clone(), f"{number}.basis.back": entry.basis.back.clone()}
    for number, correction in enumerate(plan.corrections):
        tensors |= {f"correction.{number}.weight": correction.weight, f"correction.{number}.bias": correction.bias}
    return tensors
