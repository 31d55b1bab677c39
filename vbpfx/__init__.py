"""vbpfx: make trained networks smaller and faster without retraining them.

A graph-rewriting pass on ``torch.fx``: hidden neurons whose activation hardly varies are removed and folded
into the layer behind. :func:`prune` is the whole way; every stage is a public function of its own.
"""

from vbpfx.artifact import load
from vbpfx.bench import bench
from vbpfx.bench_result import BenchResult
from vbpfx.blocks import Analysis, find_blocks
from vbpfx.calibrate import calibrate
from vbpfx.capture import Captured, capture
from vbpfx.convert import convert
from vbpfx.errors import (
    AnalysisError,
    ArtifactError,
    BudgetError,
    CalibrationError,
    CaptureError,
    ExportError,
    FinetuneError,
    ModelError,
    RankError,
    VbpfxError,
    VerificationError,
)
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
    "find_blocks",
    "finetune",
    "load",
    "make_plan",
    "measure_latencies",
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
