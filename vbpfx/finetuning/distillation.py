"""Distillation losses: how far a network is from its teacher.

For logits z (student) and t (teacher) of shape (batch, ..., classes), at temperature T:

    KL = T^2 mean over the batch of sum_c p_c (log p_c - log q_c),   p = softmax(t / T),  q = softmax(z / T)

(Hinton, Vinyals and Dean 2015; T^2 keeps the gradient's size independent of T). For outputs that are not logits, and
for features, the mean squared error relative to the teacher's variance:

    MSE = mean (s - t)^2 / mean_c Var[t_c]

where the variance of every channel of the last axis is taken over samples and positions. It is measured once, in
float64, so that the loss does not depend on how the data is split into batches. Predicting the teacher's mean gives a
loss of 1.

If a network returns several tensors, each contributes to the loss, and the losses are added. Where the loss is ``kl``,
tensors with ``logits`` in their name contribute their KL, and all others their MSE. Each MSE is relative to the
variance of the teacher's output, so that no tensor dominates the others.

Means are taken first within a sample, over the positions that the ``attention_mask`` keeps (for a decoder's values, the
``decoder_attention_mask``), and then over samples.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from vbpfx.calibration.moments import Moments, widened
from vbpfx.data.inputs import Inputs
from vbpfx.errors import FinetuneError
from vbpfx.outputs.differences import squared_errors
from vbpfx.outputs.divergence import divergence
from vbpfx.outputs.means import mask_of, mean_over_samples
from vbpfx.outputs.watched import OutputKind, Signals, Watched

Loss = Literal["kl", "mse"]

# Loss -> the kind of output that it compares.
COMPARED: dict[Loss, OutputKind] = {"kl": "logits", "mse": "values"}
# The key of the output among the scales. No module has this name.
OUTPUT = ""


@dataclass
class Distillation:
    """The losses of a student against its teacher.

    Attributes:
        loss: the loss of the outputs, ``kl`` or ``mse``.
        temperature: T.
        features: the names of the modules whose outputs are compared.
        others: the names of further outputs that are compared.
        scales: name -> variance of the teacher's values. The key is a module's name, ``OUTPUT`` for the output, or a
            colon and a name for a further output.
    """

    loss: Loss
    temperature: float
    features: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    scales: dict[str, float] = field(default_factory=dict)

    def measure_scales(self, runs: Iterable[tuple[Inputs, Signals]]) -> None:
        """Measure the variances on runs of the teacher. A value that never varies gets the scale 1."""
        moments: dict[str, Moments] = {}
        for inputs, signals in runs:
            outputs = {OUTPUT: [signals.output]} if self.loss == "mse" else {}
            further = {f":{name}": [signals.others[name]] for name in self.others if not self._by_divergence(name)}
            for name, tensors in {**outputs, **further, **signals.features}.items():
                for tensor in tensors:
                    kept = mask_of(inputs, tensor, name)
                    wide = tensor if tensor.ndim > 1 else tensor.unsqueeze(-1)
                    rows = Moments.of((wide if kept is None else wide[kept]).detach().reshape(-1, wide.shape[-1]))
                    moments[name] = moments[name] | rows if name in moments else rows
        self.scales = {name: found.variance.mean().item() or 1.0 for name, found in moments.items()}

    def output_loss(self, inputs: Inputs, student: Signals, teacher: Signals) -> Tensor:
        """Return the loss of all compared outputs, averaged over the batch: a scalar."""
        ours, theirs = _comparable(student.output, teacher.output, "the output")
        total = self._apart(inputs, ours, theirs, OUTPUT, by_divergence=self.loss == "kl")
        for name in self.others:
            if name not in student.others:
                raise FinetuneError(
                    f"the teacher returns {name} and the student does not: choose outputs= that both return"
                )
            ours, theirs = _comparable(student.others[name], teacher.others[name], f"the output {name}")
            total = total + self._apart(inputs, ours, theirs, f":{name}", by_divergence=self._by_divergence(name))
        return total

    def _by_divergence(self, name: str) -> bool:
        return self.loss == "kl" and "logits" in name.rpartition(".")[2]

    def _apart(self, inputs: Inputs, ours: Tensor, theirs: Tensor, key: str, *, by_divergence: bool) -> Tensor:
        if by_divergence:
            found = divergence(ours, theirs, self.temperature)
            return self.temperature**2 * mean_over_samples(found, mask_of(inputs, found, key))
        return mean_over_samples(squared_errors(ours, theirs), mask_of(inputs, ours, key)) / self.scales[key]

    def feature_loss(self, inputs: Inputs, student: Signals, teacher: Signals) -> Tensor:
        """Return the relative squared error of the features, averaged over modules and the batch: a scalar."""
        losses = []
        for name in self.features:
            for mine, dense in zip(student.features[name], teacher.features[name], strict=True):
                ours, theirs = _comparable(mine, dense, f"the output of {name}")
                losses.append(mean_over_samples((ours - theirs).square(), mask_of(inputs, ours)) / self.scales[name])
        return sum(losses[1:], losses[0]) / len(losses)


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of logits (batch, ..., classes) and labels (batch, ...), averaged over the batch.

    Labels of -100 are ignored, as everywhere in PyTorch.
    """
    if labels.is_floating_point() or labels.shape != logits.shape[:-1]:
        raise FinetuneError(
            f"labels of shape {tuple(labels.shape)} and type {labels.dtype} do not go with logits of shape "
            f"{tuple(logits.shape)}: labels=True takes one integer per prediction, as the second entry of a batch"
        )
    wide = widened(logits)
    losses = F.cross_entropy(wide.reshape(-1, wide.shape[-1]), labels.reshape(-1).long(), reduction="none")
    return mean_over_samples(losses.view(labels.shape), labels != -100)


def choose_outputs(student: Signals, teacher: Signals, patterns: Sequence[str] | str | None) -> tuple[str, ...]:
    """Return the further outputs to compare: those that match the patterns, by default all that both networks return.

    Raises:
        FinetuneError: a pattern matches nothing.
    """
    names = [name for name in teacher.others if name in student.others]
    if patterns is None:
        return tuple(names)
    return tuple(matching(names, [patterns] if isinstance(patterns, str) else list(patterns), "outputs"))


def choose_features(
    student: nn.Module, teacher: nn.Module, example: Inputs, patterns: Sequence[str] | str | None, loss: Loss
) -> tuple[str, ...]:
    """Return the modules whose outputs to compare: those that match the patterns, or by default repeated blocks.

    Both networks run once, in their present mode. Repeated blocks are the children of a list of modules of one class.
    Lists inside other lists do not count. Only blocks that both networks call, with outputs of equal shapes, are
    returned.

    Raises:
        FinetuneError: a pattern matches nothing, or something that cannot be compared.
    """
    names = [name for name, _ in student.named_modules() if name]
    if patterns is None:
        chosen = _repeated_blocks(student)
    else:
        chosen = matching(names, [patterns] if isinstance(patterns, str) else list(patterns), "features")
    known = {name for name, _ in teacher.named_modules()}
    comparable = []
    common = [name for name in chosen if name in known]
    watched = [Watched(network, common, COMPARED[loss], FinetuneError) for network in (student, teacher)]
    try:
        ours, theirs = (one(example).features for one in watched)
    finally:
        for one in watched:
            one.stop()
    for name in chosen:
        shapes = [[tuple(tensor.shape) for tensor in seen.get(name, [])] for seen in (ours, theirs)]
        if shapes[0] and shapes[0] == shapes[1]:
            comparable.append(name)
        elif patterns is not None:
            raise FinetuneError(
                f"the output of {name} cannot be compared: shapes {shapes[0] or 'none'} in the student, "
                f"{shapes[1] or 'none'} in the teacher. Choose modules that both networks call and whose width stayed "
                f"(a captured graph calls layers alone: Pruned.apply_to makes a student that has its blocks)"
            )
    return tuple(comparable)


def matching(names: Sequence[str], patterns: Sequence[str], option: str) -> list[str]:
    """Return the names that match any glob pattern, in order.

    Raises:
        FinetuneError: a pattern matches nothing. The message suggests similar names.
    """
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
            raise FinetuneError(
                f"{option} pattern {pattern!r} matches none of {len(names)} names; near it are {', '.join(near)}"
            )
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def _repeated_blocks(network: nn.Module) -> list[str]:
    found: list[str] = []
    for name, module in network.named_modules():
        children = dict(module.named_children())
        inside = any(name.startswith(f"{block}.") or name == block for block in found)
        # Forwards are compared, because sharding changes a module's class.
        kinds = {type(child).forward for child in children.values()}
        if len(children) > 1 and len(kinds) == 1 and all(key.isdigit() for key in children) and not inside:
            found += [f"{name}.{key}".removeprefix(".") for key in children]
    return found


def _comparable(ours: Tensor, theirs: Tensor, what: str) -> tuple[Tensor, Tensor]:
    if ours.shape != theirs.shape:
        raise FinetuneError(
            f"{what} has shape {tuple(ours.shape)} in the student and {tuple(theirs.shape)} in the teacher; "
            f"the teacher must be the dense network that was pruned"
        )
    return widened(ours), widened(theirs)
