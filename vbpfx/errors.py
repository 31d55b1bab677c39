"""The errors of vbpfx, all derived from :class:`VbpfxError`.

A message says what was found, where (node, module path, shape) and what to do about it. A block that
cannot be narrowed is not an error but a :class:`vbpfx.plans.records.Refusal`, a value with a reason.
"""


class VbpfxError(Exception):
    """Base class of the errors that vbpfx raises on purpose. The caller's model and files are unchanged."""


class ModelError(VbpfxError):
    """A model cannot be made from its name, or weights do not fit it."""


class CaptureError(VbpfxError):
    """The model could not be turned into a graph."""


class AnalysisError(VbpfxError):
    """No block can be narrowed, or a selection of blocks matches nothing."""


class CalibrationError(VbpfxError):
    """Data is empty, cannot be read, does not fit the model, or makes activations that are not finite."""


class BudgetError(VbpfxError):
    """The budget is invalid, or cannot be met; the message names the nearest budget that can be met."""


class VerificationError(VbpfxError):
    """The rewritten network does not compute what the plan says."""


class FinetuneError(VbpfxError):
    """Fine-tuning cannot start (its data, networks or settings do not fit) or has diverged."""


class EvaluationError(VbpfxError):
    """Networks cannot be evaluated: they do not run on the data, or do not fit each other or the labels."""


class ArtifactError(VbpfxError):
    """A saved plan or network cannot be written, read, or applied to the model given."""


class RankError(VbpfxError):
    """Another process of the distributed run has failed, has died, or does something different from this one."""


class ExportError(VbpfxError):
    """An exported file does not run, or does not compute what the pruned network computes."""


def root_cause(error: BaseException) -> BaseException:
    """Return the error at the start of a chain of causes. Exporters wrap the original error in errors of their own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type's name if it has none. Messages of other packages are long."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
