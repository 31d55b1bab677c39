"""Measure one model of the coverage run: prune it by half, in every form, and check it with the substitution oracle.

The stages follow each other in :func:`measure`. The record is sent after each of them, so that a model that takes too
long or too much memory leaves what was found until then. Errors are relative: the largest difference of the outputs
divided by the largest output. All comparisons run without a bound and are judged afterwards, so that a wrong network
leaves its figure, too.
"""

from __future__ import annotations

import re
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from coverage_models import SAMPLES, Subject
from exactness import randomize, shaken
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import vbpfx
from vbpfx.data.inputs import Inputs, argument_names, as_inputs
from vbpfx.errors import AnalysisError, ExportError, VbpfxError, VerificationError, first_line
from vbpfx.export.onnx import export_onnx
from vbpfx.onnx_session.session import open_session, run_session
from vbpfx.outputs.differences import TOLERANCES, relative_error
from vbpfx.rewrite.substitute import reference_graph

EXAMPLES = 1  # named axes per reason
# Rounding errors can grow on the way through a network. A float32 result counts as right if its error is at most this
# many times the error of the dense network itself between float64 and float32. Float64 is always held to its tolerance.
ROUNDING = 30
# If the effect of the substitution is below this many times the error, the comparison proves nothing ("blind").
VISIBLE = 1e3

# Other picture sizes differ from the traced one by this many pixels, the usual stride of a network.
TILE = 32

# Some random networks hardly depend on their images, so that the means replace the neurons almost exactly. If the effect
# is below this value, the constants are perturbed.
FAINT = 1e-6

Told = Callable[["Record"], None]


@dataclass
class Record:
    """The results for one model; a value is None if its stage was not reached.

    Attributes:
        status: ``ok`` (blocks pruned, proven in float64 and float32), ``no blocks``, ``refused`` (another error of
            vbpfx's own), ``wrong`` (the pruned network is not the substituted one), ``blind`` (the substitution
            changes the output too little to prove anything), ``untyped`` (an exception that is not one of vbpfx's
            own), ``broken`` (the model itself does not run here), ``timeout``, ``killed``.
        stage: the stage at which the measurement ended.
        reason: why it ended, unless the status is ``ok``.
        size: pixels per side of the images; None for other inputs.
        parameters: number of parameters.
        blocks, neurons: number of blocks and of hidden neurons in them.
        refused: number of refused axes; ``refusals`` lists them by reason, with their number and some examples.
        macs: multiply-accumulates of the dense network per sample, at this size.
        prunable: share of the MACs in products that make, carry or contract the hidden axis of a block.
        error64, error32: error of the GraphModule against the reference; ``effect`` is how much the substitution changes
            the output. If that is below ``FAINT``, both are measured with perturbed constants.
        capture64, capture32: error of the captured graph against the model.
        sizes: for images, the largest error of the GraphModule in float64 at picture sizes that tracing has not seen, or why there
            is none.
        rounding32: error of the dense network in float32 against itself in float64.
        own: error of the model's own class against the reference, in float64, or why there is none.
        onnx: error of ONNX Runtime against the reference, in float32, or why there is none; None if it was not tried.
        seconds: processor time per stage.
    """

    library: str
    name: str
    family: str
    status: str = "started"
    stage: str = "build"
    reason: str = ""
    size: int | None = None
    parameters: int | None = None
    frontend: str | None = None
    blocks: int | None = None
    neurons: int | None = None
    refused: int | None = None
    refusals: list[dict[str, Any]] = field(default_factory=list)
    macs: int | None = None
    prunable: float | None = None
    error64: float | None = None
    effect: float | None = None
    capture64: float | None = None
    sizes: float | str | None = None
    error32: float | None = None
    capture32: float | None = None
    rounding32: float | None = None
    own: float | str | None = None
    onnx: float | str | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON-ready dictionaries, with infinity, which JSON lacks, as text."""
        plain = asdict(self)
        return {k: str(v) if isinstance(v, float) and v in (torch.inf, -torch.inf) else v for k, v in plain.items()}


def measure(subject: Subject, tell: Told) -> Record:
    """Measure one model and put any exception into the record."""
    record = Record(subject.library, subject.name, subject.family)

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        record.stage = name
        tell(record)
        start = time.process_time()
        try:
            yield
        finally:
            record.seconds[name] = round(time.process_time() - start, 2)

    try:
        _stages(subject, record, stage)
    except Exception as error:  # every exception is a result of the coverage run
        record.status, record.reason = _judge_exception(error, record.stage), explain(error)
    else:
        record.status, record.reason = judge(record)
    tell(record)
    return record


def _stages(subject: Subject, record: Record, stage: Callable[[str], Any]) -> None:
    torch.manual_seed(0)
    with stage("build"):
        model, batch, record.size = subject.make()
        randomize(model).eval()
        record.parameters = sum(p.numel() for p in model.parameters())
    with stage("run"):
        dense = outputs(model, batch)
        if not all(t.isfinite().all() for t in dense):
            raise ArithmeticError("the output is not finite with random weights")
    with stage("prune"):
        try:
            single = vbpfx.prune(model, [batch], ratio=0.5, method="vbp", progress=False, verify=False)
        except AnalysisError:
            captured = vbpfx.capture(model, batch)
            describe(captured, vbpfx.find_blocks(captured), record)
            raise
        describe(single.captured, single.analysis, record)
    with stage("oracle, float32"):
        checked = vbpfx.verify(single.captured, single.graph_module, single.plan, tolerance=torch.inf)
        record.error32, record.capture32, record.effect = checked.error, checked.capture, checked.effect
        reference = reference_graph(single.captured, single.plan)
        expected = outputs(reference, batch)
        network, inputs, plan = single.graph_module, single.captured.inputs, single.plan
    del single, reference  # these networks share parameters that are about to change
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")  # torch's grouped products do not take float64
    exact, precise = model.double(), as_inputs(batch, model).map(to_double)
    with stage("run, float64"):
        record.rounding32 = relative_error(dense, outputs(exact, precise))
    with stage("prune, float64"):
        double = vbpfx.prune(
            exact,
            [(precise.args, precise.kwargs)],
            inputs=lambda b: b,
            ratio=0.5,
            method="vbp",
            progress=False,
            verify=False,
        )  # it does not matter here which neurons are removed
    with stage("oracle, float64"):
        captured, plan64, small = double.captured, double.plan, double.graph_module
        del double
        checked = vbpfx.verify(captured, small, plan64, tolerance=torch.inf)
        record.error64, record.capture64, record.effect = checked.error, checked.capture, checked.effect
        if checked.effect < FAINT:
            plan64 = shaken(plan64)
            small = vbpfx.convert(captured, plan64)
            checked = vbpfx.verify(captured, small, plan64, tolerance=torch.inf)
            record.error64, record.effect = max(record.error64, checked.error), checked.effect
    if record.size is not None:
        with stage("other sizes"):
            record.sizes = at_other_sizes(captured, small, plan64, record.size)
    del small
    with stage("own class"):
        try:
            record.own = vbpfx.verify(captured, vbpfx.apply_plan(exact, plan64), plan64).error
        except VbpfxError as error:
            record.own = explain(error)
    del captured, exact, model
    if not subject.onnx:
        return
    with stage("ONNX"), tempfile.TemporaryDirectory() as folder:
        try:
            file = export_onnx(network, inputs, Path(folder) / "pruned.onnx", plan=plan)
            session = open_session(file, threads=1)
            ordered = {n: inputs.kwargs[n] for n in argument_names(network, inputs) if n in inputs.kwargs}
            record.onnx = relative_error(run_session(session, replace(inputs, kwargs=ordered)), expected)
        except VbpfxError as error:
            record.onnx = explain(error)


def at_other_sizes(captured: vbpfx.Captured, small: nn.Module, plan: vbpfx.Plan, size: int) -> float | str:
    """Return the largest error of a pruned graph on pictures of other sizes, in float64, or why there is none."""
    worst = 0.0
    for height, width in ((size + TILE, size), (size + TILE, size + TILE)):
        pictures = torch.randn(SAMPLES, 3, height, width, dtype=torch.float64)
        try:
            with torch.no_grad():
                captured.reference(pictures)
        except Exception:  # each library raises its own exceptions for a size that does not fit
            return f"the model takes no pictures of {height} x {width} pixels"
        try:
            worst = max(worst, vbpfx.verify(captured, small, plan, pictures, tolerance=torch.inf).error)
        except VerificationError as error:
            return explain(error)
    return worst


def describe(captured: vbpfx.Captured, analysis: vbpfx.Analysis, record: Record) -> None:
    """Put the findings of the analysis into the record."""
    record.frontend = captured.frontend
    record.blocks, record.neurons = len(analysis.blocks), analysis.neurons
    record.refused = len(analysis.refusals)
    reasons: dict[str, list[vbpfx.Refusal]] = {}
    for refusal in analysis.refusals:
        reasons.setdefault(refusal.reason, []).append(refusal)
    record.refusals = [
        {
            "reason": reason,
            "count": len(refusals),
            "examples": [{"axis": r.name, "width": r.width, "node": r.node} for r in refusals[:EXAMPLES]],
        }
        for reason, refusals in sorted(reasons.items(), key=lambda entry: -len(entry[1]))
    ]
    macs = captured.macs
    record.macs = sum(macs.values())
    # as vbpfx.planning.budget counts them: a product is linear in each axis that its node carries or contracts
    touched = {node for block in analysis.blocks for node, *_ in block.carriers}
    touched |= {consumer.node for block in analysis.blocks for consumer in block.consumers}
    record.prunable = sum(count for node, count in macs.items() if node in touched) / max(1, record.macs)


def judge(record: Record) -> tuple[str, str]:
    """Return status and reason of a model that went through all stages."""
    assert isinstance(record.error64, float)
    assert isinstance(record.effect, float)
    assert isinstance(record.rounding32, float)
    exact = TOLERANCES[torch.float64]
    single = max(TOLERANCES[torch.float32], ROUNDING * record.rounding32)
    measured = {
        "the GraphModule in float64": (record.error64, exact),
        "the captured graph in float64": (record.capture64, exact),
        "the GraphModule in float64 at other picture sizes": (record.sizes, exact),
        "the GraphModule in float32": (record.error32, single),
        "the captured graph in float32": (record.capture32, single),
        "ONNX": (record.onnx, single),
    }
    for what, (error, bound) in measured.items():
        if isinstance(error, float) and not error <= bound:
            return "wrong", f"{what} is off by {error:.1e} of the output (allowed {bound:.0e})"
    if record.effect < VISIBLE * record.error64:
        return "blind", f"the substitution changes the output by only {record.effect:.1e}"
    return "ok", ""


def _judge_exception(error: Exception, stage: str) -> str:
    if stage in ("build", "run", "run, float64"):
        return "broken"
    if isinstance(error, AnalysisError):
        return "no blocks"
    if isinstance(error, VerificationError):
        return "wrong"
    return "refused" if isinstance(error, VbpfxError) else "untyped"


def explain(error: Exception) -> str:
    """Return the error message without the parts that depend on the machine.

    A capture error includes the messages of the front ends.
    """
    lines = str(error).strip().splitlines() or [""]
    text = first_line(error)
    if isinstance(error, vbpfx.CaptureError):
        text = (
            " | ".join(line.strip() for line in lines if line.startswith(("  symbolic:", "  export:", "    at ")))
            or text
        )
    if isinstance(error, ExportError):
        text += f" <- {first_line(_root(error))}"
    if not isinstance(error, VbpfxError):
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {text} (at {where.filename}:{where.lineno})"
    text = re.sub(r"\x1b?\[\d+m", "", text)  # the exporter writes in colours
    return re.sub(r"/\S*/(?:site-packages|lib/python[\d.]+)/|/\S*/(?=vbpfx/|benchmarks/)", "", text)[:600]


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    """Return the tensors that the model returns. The model gets copies of its inputs, as it may write into them."""
    inputs = (batch if isinstance(batch, Inputs) else as_inputs(batch, model)).map(torch.clone)
    with torch.no_grad():
        found = model(*inputs.args, **inputs.kwargs)
    return [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]


def to_double(tensor: Tensor) -> Tensor:
    """Convert a floating-point tensor to float64 and return others, such as token ids, unchanged."""
    return tensor.double() if tensor.is_floating_point() else tensor
