"""Fine-tune a saved network: read one artifact, and write another.

The plan does not change. It says which of the dense network's neurons were removed, and still applies to the dense
model. The tuned weights are in ``model.safetensors``, from which :func:`vbpfx.load` reads them, for the graph or for
the model's own class. To make the new graph, the dense model is captured again and narrowed by the plan, and the tuned
weights are copied into it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import fx, nn

from vbpfx.artifacts.folder import load, save_network
from vbpfx.data.inputs import Inputs
from vbpfx.errors import ArtifactError, VerificationError
from vbpfx.export.onnx import onnx_writer
from vbpfx.graph.capture import Captured, capture, fingerprint, named_tensors
from vbpfx.graph.run import outputs_of
from vbpfx.outputs.differences import PARITY, relative_error
from vbpfx.plans.files import load_plan
from vbpfx.plans.records import Plan
from vbpfx.report.page import report_files
from vbpfx.report.report import Report
from vbpfx.rewrite.convert import convert
from vbpfx.rewrite.narrow import require_same_structure


@dataclass(frozen=True)
class Tuning:
    """A pruned network from an artifact, to be fine-tuned and saved again.

    Attributes:
        student: the network to train, in the model's own class, or as a graph if the class cannot hold the network.
        as_graph: why ``student`` is a graph; "" if it is not one.
        plan, report: the plan and the report of the artifact.
        captured: the dense model.
    """

    student: nn.Module
    as_graph: str
    plan: Plan
    report: Report
    captured: Captured

    def save(
        self,
        tuned: nn.Module,
        folder: Path,
        *,
        onnx: bool = True,
        how: str = "",
        command: str = "",
    ) -> Path:
        """Write an artifact that :func:`vbpfx.load` reads. If an error occurs, nothing is written.

        Args:
            tuned: the student after training.
            folder: the folder to write; it may be the one that the student was read from.
            onnx: write ``model.onnx``, too.
            how, command: for the report: how the network was trained, in words, and the command line that did it.

        Raises:
            ArtifactError: the folder cannot be written.
            VerificationError: the graph does not compute what the tuned network computes.
            ExportError: the ONNX file cannot be made.
        """
        graph = _with_weights(self.captured, self.plan, tuned)
        error = _difference(graph, tuned, self.captured.inputs)
        if not error <= PARITY:
            raise VerificationError(
                f"the graph with the tuned weights differs from the tuned network by {error:.1e} of the output's size (allowed "
                f"{PARITY:.0e}); please report the model"
            )
        tuning = "; then ".join(filter(None, (self.report.tuning, how)))
        # the verification and the evaluation in the report are of the earlier weights
        report = dataclasses.replace(self.report, verification=None, evaluation=None, tuning=tuning)
        commands = " && ".join(filter(None, (report.command, command)))
        beside = report_files(report.measured(command=commands))
        if onnx:
            beside["model.onnx"] = onnx_writer(graph, self.captured.inputs, plan=self.plan)
        return save_network(graph, tuned, self.plan, beside, folder)


def open_tuning(folder: str | Path, dense: nn.Module, example: Inputs) -> Tuning:
    """Read an artifact in order to fine-tune it.

    Args:
        folder: the artifact.
        dense: the model that was pruned. It is not changed.
        example: a few samples.

    Raises:
        ArtifactError: the artifact is missing or damaged, or belongs to another model.
        VerificationError: neither the network in its class nor the artifact's graph computes what the plan prescribes.
        CaptureError: the model does not run on the samples.
    """
    folder = Path(folder)
    plan, report = load_plan(folder), Report.load(folder)
    require_same_structure(fingerprint(dense), plan, dense)
    captured = capture(dense, example, frontend="export" if plan.frontend == "export" else "symbolic")
    try:
        student, as_graph = load(folder, into=dense), ""
    # It is the class that cannot hold the network: the check above has shown that the model is the right one.
    except ArtifactError as reason:
        student, as_graph = load(folder), str(reason)
    error = _difference(_with_weights(captured, plan, student), student, captured.inputs)
    if not error <= PARITY and not as_graph:
        student, as_graph = load(folder), f"{type(dense).__name__} computes something else when it is narrowed"
        error = _difference(_with_weights(captured, plan, student), student, captured.inputs)
    if not error <= PARITY:
        raise VerificationError(
            f"{folder} does not hold what its plan makes of {type(dense).__name__}: outputs differ by {error:.1e} (allowed "
            f"{PARITY:.0e}); save the pruned network again"
        )
    return Tuning(student, as_graph, plan, report, captured)


def _with_weights(captured: Captured, plan: Plan, tuned: nn.Module) -> fx.GraphModule:
    """Return the dense graph, narrowed by the plan, with the weights of a tuned network."""
    graph = convert(captured, plan)
    own, trained = named_tensors(graph), named_tensors(tuned)
    with torch.no_grad():
        for name, tensor in own.items():
            if name not in trained:  # a constant that was created by tracing
                continue
            if tensor.shape != trained[name].shape:
                raise ArtifactError(
                    f"{name} has shape {tuple(trained[name].shape)} in the network and {tuple(tensor.shape)} by the plan; they do "
                    f"not belong together"
                )
            tensor.copy_(trained[name])
    return graph


def _difference(one: nn.Module, other: nn.Module, inputs: Inputs) -> float:
    return relative_error(outputs_of(one, inputs), outputs_of(other, inputs))
