"""vbpfx: make trained networks smaller and faster without retraining them.

A graph-rewriting pass on ``torch.fx``: hidden neurons whose activation hardly varies are removed and folded
into the layer behind. :func:`prune` is the whole way; every stage is a public function of its own.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vbpfx.artifact import load
    from vbpfx.bench import bench
    from vbpfx.bench_result import BenchResult
    from vbpfx.blocks import Analysis, find_blocks
    from vbpfx.calibrate import calibrate
    from vbpfx.capture import Captured, capture
    from vbpfx.convert import convert
    from vbpfx.data_sources import open_data
    from vbpfx.errors import (
        AnalysisError,
        ArtifactError,
        BudgetError,
        CalibrationError,
        CaptureError,
        EvaluationError,
        ExportError,
        FinetuneError,
        ModelError,
        RankError,
        VbpfxError,
        VerificationError,
    )
    from vbpfx.evaluate import evaluate
    from vbpfx.evaluation import Evaluation
    from vbpfx.exported import prune_exported
    from vbpfx.finetune import FineTuned, finetune
    from vbpfx.fx_pass import VarianceBasedPruning
    from vbpfx.large import PrunedFiles, prune_files
    from vbpfx.latency import measure_latencies
    from vbpfx.latency_table import Latencies
    from vbpfx.onnx_pipeline import PrunedOnnx, prune_onnx
    from vbpfx.ops import register_operator
    from vbpfx.own_class import apply_plan
    from vbpfx.pipeline import Pruned, prune, save
    from vbpfx.plan import make_plan
    from vbpfx.prepare import Statistics, prepare, statistics
    from vbpfx.records import Block, Plan, Refusal
    from vbpfx.report import Report
    from vbpfx.sensitivity import sensitivities
    from vbpfx.verify import Verification, verify
    from vbpfx.weightless import without_weights

__version__ = "0.1.0"

__all__ = [
    "Analysis",
    "AnalysisError",
    "ArtifactError",
    "BenchResult",
    "Block",
    "BudgetError",
    "CalibrationError",
    "CaptureError",
    "Captured",
    "Evaluation",
    "EvaluationError",
    "ExportError",
    "FineTuned",
    "FinetuneError",
    "Latencies",
    "ModelError",
    "Plan",
    "Pruned",
    "PrunedFiles",
    "PrunedOnnx",
    "RankError",
    "Refusal",
    "Report",
    "Statistics",
    "VarianceBasedPruning",
    "VbpfxError",
    "Verification",
    "VerificationError",
    "apply_plan",
    "bench",
    "calibrate",
    "capture",
    "convert",
    "evaluate",
    "find_blocks",
    "finetune",
    "load",
    "make_plan",
    "measure_latencies",
    "open_data",
    "prepare",
    "prune",
    "prune_exported",
    "prune_files",
    "prune_onnx",
    "register_operator",
    "save",
    "sensitivities",
    "statistics",
    "verify",
    "without_weights",
]

# file -> the public names in it, which are imported when they are first asked for: torch takes seconds
_HOMES = {
    "artifact": "load",
    "bench": "bench",
    "bench_result": "BenchResult",
    "blocks": "Analysis find_blocks",
    "calibrate": "calibrate",
    "capture": "Captured capture",
    "convert": "convert",
    "data_sources": "open_data",
    "errors": "AnalysisError ArtifactError BudgetError CalibrationError CaptureError "
    "EvaluationError ExportError FinetuneError ModelError RankError VbpfxError VerificationError",
    "evaluate": "evaluate",
    "evaluation": "Evaluation",
    "exported": "prune_exported",
    "finetune": "FineTuned finetune",
    "fx_pass": "VarianceBasedPruning",
    "large": "PrunedFiles prune_files",
    "latency": "measure_latencies",
    "latency_table": "Latencies",
    "onnx_pipeline": "PrunedOnnx prune_onnx",
    "ops": "register_operator",
    "own_class": "apply_plan",
    "pipeline": "Pruned prune save",
    "plan": "make_plan",
    "prepare": "Statistics prepare statistics",
    "records": "Block Plan Refusal",
    "report": "Report",
    "sensitivity": "sensitivities",
    "verify": "Verification verify",
    "weightless": "without_weights",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}


class _Package(ModuleType):
    """The package, whose public names stay what they are where a file has the same name (``vbpfx.prepare``)."""

    def __getattr__(self, name: str) -> Any:
        if name in _HOME:
            value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
            self.__dict__[name] = value
            return value
        if not name.startswith("_"):
            try:
                return importlib.import_module(f"{__name__}.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"{__name__}.{name}":
                    raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        # the import of a file sets it as an attribute of its package
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *__all__})


sys.modules[__name__].__class__ = _Package
