"""One hierarchy of errors.

A message says what was found, where (node, module path, shape) and what to do about it. A block that
cannot be narrowed is no error: it is a :class:`vbpfx.plans.records.Refusal`, a value with a reason.
"""


class VbpfxError(Exception):
    """Anything vbpfx raises on purpose. The caller's model and files are as they were."""


class ModelError(VbpfxError):
    """A model cannot be made from its name, or weights do not fit it."""


class CaptureError(VbpfxError):
    """The model could not be turned into a graph."""


class AnalysisError(VbpfxError):
    """No block can be narrowed, or a selection of blocks matches nothing."""


class CalibrationError(VbpfxError):
    """Data is empty, cannot be read, does not fit the model, or makes activations that are not finite."""


class BudgetError(VbpfxError):
    """The budget is not a budget, or cannot be met; the message names the nearest one that can."""


class VerificationError(VbpfxError):
    """The rewritten network does not compute what the plan says."""


class FinetuneError(VbpfxError):
    """Fine-tuning cannot start (its data, networks or settings do not fit) or has diverged."""


class EvaluationError(VbpfxError):
    """Networks cannot be evaluated: the data does not run through them, or they or the labels do not go together."""


class ArtifactError(VbpfxError):
    """A saved plan or network cannot be written, read, or applied to the model given."""


class RankError(VbpfxError):
    """Another process of the run has failed, died, or does something else than this one."""


class ExportError(VbpfxError):
    """An exported file does not run, or does not compute what the pruned network computes."""


def root_cause(error: BaseException) -> BaseException:
    """What an error was raised from, at whatever remove: exporters wrap what went wrong in what they were about."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none: other people's errors run on."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
