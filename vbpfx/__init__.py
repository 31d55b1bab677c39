"""vbpfx: make trained networks smaller and faster without retraining them.

vbpfx is a graph-rewriting pass on ``torch.fx``. It removes hidden neurons whose activation hardly varies, and folds what
they contribute into the next layer. :func:`prune` runs all stages. Every stage is also a public function of its own.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vbpfx.analysis.blocks import Analysis, find_blocks
    from vbpfx.artifacts.folder import load
    from vbpfx.calibration.calibrate import calibrate
    from vbpfx.calibration.prepare import Statistics, prepare, statistics
    from vbpfx.data.sources import open_data
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
    from vbpfx.evaluation.evaluate import evaluate
    from vbpfx.evaluation.result import Evaluation
    from vbpfx.finetuning.finetune import FineTuned, finetune
    from vbpfx.graph.capture import Captured, capture
    from vbpfx.graph.stored_weights import store_weights
    from vbpfx.measurement.bench import bench
    from vbpfx.measurement.bench_result import BenchResult
    from vbpfx.measurement.latency import measure_latencies
    from vbpfx.measurement.sensitivity import sensitivities
    from vbpfx.models.weightless import without_weights
    from vbpfx.onnx_graph.table import register_onnx_operator
    from vbpfx.pipeline.exported_program import prune_exported
    from vbpfx.pipeline.files import PrunedFiles, prune_files
    from vbpfx.pipeline.fx_pass import VarianceBasedPruning
    from vbpfx.pipeline.model import prune
    from vbpfx.pipeline.onnx_file import PrunedOnnx, prune_onnx
    from vbpfx.pipeline.result import Pruned, save
    from vbpfx.planning.latency_table import Latencies
    from vbpfx.planning.plan import make_plan
    from vbpfx.plans.records import Block, Plan, Refusal
    from vbpfx.report.report import Report
    from vbpfx.rewrite.convert import convert
    from vbpfx.rewrite.own_class import apply_plan
    from vbpfx.rewrite.verify import Verification, verify
    from vbpfx.rules.ops import register_operator

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
    "register_onnx_operator",
    "register_operator",
    "save",
    "sensitivities",
    "statistics",
    "store_weights",
    "verify",
    "without_weights",
]

# file -> its public names; they are imported when they are first used, because importing torch takes seconds
_HOMES = {
    "analysis.blocks": "Analysis find_blocks",
    "artifacts.folder": "load",
    "calibration.calibrate": "calibrate",
    "calibration.prepare": "Statistics prepare statistics",
    "data.sources": "open_data",
    "errors": "AnalysisError ArtifactError BudgetError CalibrationError CaptureError "
    "EvaluationError ExportError FinetuneError ModelError RankError VbpfxError VerificationError",
    "evaluation.evaluate": "evaluate",
    "evaluation.result": "Evaluation",
    "pipeline.exported_program": "prune_exported",
    "finetuning.finetune": "FineTuned finetune",
    "pipeline.fx_pass": "VarianceBasedPruning",
    "graph.capture": "Captured capture",
    "graph.stored_weights": "store_weights",
    "models.weightless": "without_weights",
    "onnx_graph.table": "register_onnx_operator",
    "pipeline.files": "PrunedFiles prune_files",
    "measurement.bench": "bench",
    "measurement.bench_result": "BenchResult",
    "measurement.latency": "measure_latencies",
    "measurement.sensitivity": "sensitivities",
    "pipeline.onnx_file": "PrunedOnnx prune_onnx",
    "pipeline.model": "prune",
    "pipeline.result": "Pruned save",
    "planning.latency_table": "Latencies",
    "planning.plan": "make_plan",
    "plans.records": "Block Plan Refusal",
    "report.report": "Report",
    "rewrite.convert": "convert",
    "rewrite.own_class": "apply_plan",
    "rewrite.verify": "Verification verify",
    "rules.ops": "register_operator",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Return a public name; import its file when it is first used (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
