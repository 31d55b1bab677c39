"""Run an ONNX file in ONNX Runtime, for its outputs and for the activations from which a plan is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, fx

from vbpfx.calibration.observer import Observer
from vbpfx.data.inputs import Inputs
from vbpfx.errors import CalibrationError
from vbpfx.onnx_graph.file import true_inputs
from vbpfx.onnx_graph.importer import Imported
from vbpfx.onnx_graph.runtime import session_with
from vbpfx.onnx_session.session import run_session

Array = npt.NDArray[Any]


def batch_reader(model: ir.Model, imported_names: Mapping[str, str]) -> Callable[[Any], Inputs]:
    """Return a function that converts a batch to the arguments of the fx graph.

    A batch is an array or a tensor (for one input), a mapping from input names to arrays, or a sequence in the order of
    the inputs. A sequence may hold labels after the inputs; they are ignored.

    Args:
        imported_names: input of the file -> argument of the graph.
    """
    inputs = true_inputs(model)

    def read(batch: Any) -> Inputs:
        if isinstance(batch, Mapping):
            missing = [str(value.name) for value in inputs if value.name not in batch]
            if missing:
                raise CalibrationError(
                    f"a batch lacks the input {missing[0]!r}; it holds {', '.join(map(repr, batch))}, the file takes "
                    f"{', '.join(repr(str(value.name)) for value in inputs)}"
                )
            given = [batch[str(value.name)] for value in inputs]
        elif isinstance(batch, (tuple, list)):
            given = list(batch)[: len(inputs)]
        else:
            given = [batch]
        if len(given) != len(inputs):
            names = ", ".join(repr(str(value.name)) for value in inputs)
            raise CalibrationError(f"a batch has {len(given)} arrays, the file takes {len(inputs)}: {names}")
        return Inputs((), {imported_names[str(v.name)]: _fitting(v, x) for v, x in zip(inputs, given, strict=True)})

    return read


def _fitting(value: ir.Value, given: Any) -> Tensor:
    """Return the data as a tensor of the input's dtype, after checking it against the shape that the file states."""
    array = given.detach().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
    wanted = value.dtype.numpy() if value.dtype is not None else array.dtype
    if array.dtype.kind != wanted.kind and not {array.dtype.kind, wanted.kind} <= {"i", "u"}:
        raise CalibrationError(f"input {value.name!r} takes {wanted}, the data is {array.dtype}; convert it")
    stated = list(value.shape) if value.shape is not None else None
    fits = stated is None or (
        len(stated) == array.ndim
        and all(not isinstance(d, int) or d == size for d, size in zip(stated, array.shape, strict=True))
    )
    if not fits:
        shape = ", ".join(str(dim) for dim in stated or ())
        raise CalibrationError(f"input {value.name!r} takes the shape ({shape}), a batch has {array.shape}")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=wanted))


@dataclass
class Tally:
    """Counts how many of the batches that the observers saw were run in ONNX Runtime."""

    observers: list[Observer]
    calls: int = 0

    def __str__(self) -> str:
        seen = max(observer.calls for observer in self.observers)
        return "torch" if not self.calls else "ONNX Runtime" if self.calls == seen else "ONNX Runtime and torch"


class RuntimeObservation:
    """Runs batches in ONNX Runtime, and passes the inputs of consumers to the observers of a prepared graph."""

    def __init__(
        self, session: onnxruntime.InferenceSession, arguments: Mapping[str, str], plan: Mapping[Observer, list[str]]
    ) -> None:
        self.session, self.arguments, self.plan = session, arguments, plan
        self.tally = Tally(list(plan))
        self.names = list(dict.fromkeys(name for names in plan.values() for name in names))

    def __call__(self, inputs: Inputs) -> None:
        """Run one batch."""
        self.tally.calls += 1
        given = {name: inputs.kwargs[argument] for name, argument in self.arguments.items()}
        asked = [name for name in self.names if name not in given]
        found = given | dict(zip(asked, run_session(self.session, inputs, self.arguments, asked), strict=True))
        for observer, names in self.plan.items():
            observer(*(found[name] for name in names))


def observe_in_runtime(
    model: ir.Model, folder: Path, imported: Imported, observed: fx.GraphModule
) -> RuntimeObservation | None:
    """Return a function that runs the file on a batch and passes activations to the observers of a prepared graph.

    Return None if an observed value has no name in the file.
    """
    plan: dict[Observer, list[str]] = {}
    for node in observed.graph.nodes:
        observer = observed.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(observer, Observer):
            names = [imported.value_of.get(_observed(n, observed).name) for n in node.all_input_nodes]
            if None in names:
                return None
            plan[observer] = [str(name) for name in names]
    given = set(imported.arguments)
    wanted = [name for names in plan.values() for name in names if name not in given]
    return RuntimeObservation(session_with(model, folder, list(dict.fromkeys(wanted))), imported.arguments, plan)


def _observed(node: fx.Node, observed: fx.GraphModule) -> fx.Node:
    """Return the node that is observed, skipping observers that follow each other."""
    while node.op == "call_module" and isinstance(observed.get_submodule(str(node.target)), Observer):
        node = node.all_input_nodes[0]
    return node
