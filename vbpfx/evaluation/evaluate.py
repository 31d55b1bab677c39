"""Evaluate: measure what a pruned network has lost against the dense one, on the same samples."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from operator import length_hint
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vbpfx.data.inputs import LABELS, Inputs, model_device, named_labels, reader
from vbpfx.display.progress import progress_bar
from vbpfx.display.tables import counted
from vbpfx.errors import EvaluationError
from vbpfx.evaluation.intervals import Mean, PairedDifference, Share
from vbpfx.evaluation.result import Accuracy, ClassChange, Evaluation
from vbpfx.graph.capture import require_module, share_parameters
from vbpfx.outputs.divergence import divergence
from vbpfx.outputs.means import mask_of, sample_means
from vbpfx.outputs.watched import OutputKind, Watched

_MANY = 5  # top-5


def evaluate(
    dense: nn.Module,
    pruned: nn.Module | None,
    batches: Iterable[Any],
    *,
    classes: Sequence[str] | None = None,
    inputs: Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]] | None = None,
    compare: OutputKind | None = None,
    progress: bool = True,
) -> Evaluation:
    """Run both networks on the same samples, and compare their outputs with each other and with the labels.

    If the outputs are logits (over the last axis), the result holds the networks' agreement and the KL divergence, and
    with labels also the accuracies. If they are other values, such as the embeddings y of a dense and z of a pruned
    encoder, it holds the cosine y z / (|y| |z|) over the last axis, and the relative error
    sqrt(sum |z - y|^2 / sum |y|^2).

    Args:
        dense, pruned: the two networks, each with one output and on its own device. They run in eval mode and are not
            changed. Without ``pruned`` only the dense network is evaluated, which needs labels.
        batches: an iterable of batches as for :func:`vbpfx.prune`; it is iterated once. Labels are one integer per
            sample. They are a batch's ``labels``, or its second entry if the network does not take it.
        classes: the names of the classes, in order.
        inputs: a function ``batch -> (args, kwargs)`` for batches of another form.
        compare: what the outputs are: ``"logits"`` or ``"values"``. The default is logits if the output is one tensor
            or has ``logits``. If an output has several tensors, its values are ``last_hidden_state``, or else the first
            tensor.
        progress: show a bar on standard error.

    Raises:
        EvaluationError: there is no batch, a batch does not run through a network, an output is not finite, or the
            labels do not fit the networks.
        CaptureError: one of the networks is not a module, or cannot be copied.
    """
    networks = [dense] if pruned is None else [dense, pruned]
    for network in networks:
        require_module(network)
    read = reader(dense, inputs)
    if compare not in (None, *get_args(OutputKind)):
        raise EvaluationError(f"compare={compare!r} is unknown; use one of {', '.join(get_args(OutputKind))}")
    running = [Watched(share_parameters(network), (), compare, EvaluationError) for network in networks]
    devices = [model_device(network) for network in networks]
    tally = _Tally()
    total = length_hint(batches) or None
    with torch.inference_mode(), progress_bar("evaluating", total, progress) as advance:
        for number, batch in enumerate(batches, start=1):
            given, labels = _without_labels(read(batch), batch, named_labels(batch) if inputs is None else None)
            try:
                outputs = []
                for run, device in zip(running, devices, strict=True):
                    run.compared = run.compared or running[0].compared
                    outputs.append(run(given.to(device)).output.cpu())
                mask = mask_of(given, outputs[0])
                if running[0].compared == "values":
                    tally.add_values(outputs, mask)
                else:
                    tally.add_logits(outputs, labels, mask)
            except EvaluationError as error:
                raise EvaluationError(f"batch {number} (counted from 1): {error}") from error
            _require_names(classes, tally.outputs)
            advance()
    if not tally.samples:
        raise EvaluationError("there is nothing to evaluate on: pass at least one batch")
    return tally.result(classes)


def _require_names(classes: Sequence[str] | None, outputs: int) -> None:
    if classes is not None and len(classes) != outputs:
        raise EvaluationError(
            f"the data has {counted(len(classes), 'class', 'classes')}, and the network has {counted(outputs, 'output')}, so the labels would not mean the same. Pass classes= (or --classes FILE) with a name for each output; folders are found by name"
        )


def _not_finite(output: Tensor) -> str:
    return "NaN" if output.isnan().any() else "infinite values"


def _without_labels(inputs: Inputs, batch: Any, named: Any) -> tuple[Inputs, Tensor | None]:
    """Return the arguments of a batch without the labels, and the labels.

    Args:
        named: labels that were found in the batch by name and are not among its arguments.
    """
    labels = inputs.kwargs.get(LABELS, named)
    if labels is None and isinstance(batch, (tuple, list)) and len(batch) == 2:
        labels = None if any(leaf is batch[1] for leaf in inputs.leaves) else batch[1]  # an argument is not a label
    return inputs.unlabelled, labels if isinstance(labels, Tensor) else None


@dataclass
class _Tally:
    """The sums over all batches from which the result is computed."""

    samples: int = 0
    agreeing: float = 0.0
    divergences: float = 0.0
    cosines: list[float] = field(default_factory=list)
    lost: float = 0.0  # squared differences of values
    whole: float = 0.0  # the dense network's values, squared
    labels: list[int] = field(default_factory=list)
    hits: dict[tuple[int, int], list[bool]] = field(default_factory=dict)  # (network, 1 or 5) -> sample by sample
    pruned: bool = False
    outputs: int = 0
    by_position: bool = False

    def add_logits(self, outputs: list[Tensor], labels: Tensor | None, mask: Tensor | None) -> None:
        """Add a batch: the logits (samples, ..., classes) of each network, and the labels."""
        if self.samples and (labels is None) == bool(self.labels):
            here, before = ("no labels", "had some") if labels is None else ("labels", "had none")
            raise EvaluationError(f"this batch has {here}, those before {before}")
        dense, *others = self._checked(outputs, alone=labels is not None, ruled_out=True)
        self.by_position = dense.ndim > 2
        for output in others:
            self.pruned = True
            same = (output.argmax(-1) == dense.argmax(-1)).double()
            self.agreeing += sample_means(same, mask).sum().item()
            self.divergences += sample_means(divergence(output, dense).double(), mask).sum().item()
        if labels is not None:
            self._count([dense, *others], labels.cpu())

    def add_values(self, outputs: list[Tensor], mask: Tensor | None) -> None:
        """Add a batch: the values (samples, ..., features) of each network."""
        dense, *others = self._checked(outputs, alone=False, ruled_out=False)
        kept = dense.new_ones(dense.shape[:-1], dtype=torch.bool) if mask is None else mask
        for output in others:
            self.cosines += sample_means(F.cosine_similarity(output.double(), dense.double(), dim=-1), mask).tolist()
            self.lost += (output - dense)[kept].double().square().sum().item()
            self.whole += dense[kept].double().square().sum().item()

    def _checked(self, outputs: list[Tensor], *, alone: bool, ruled_out: bool) -> list[Tensor]:
        """Check the outputs of a batch, count its samples, and return the outputs in float32.

        Args:
            alone: whether the outputs of one network alone are enough.
            ruled_out: whether the outputs may hold -inf at the same places in both networks, for classes that a mask
                rules out.
        """
        dense, *others = found = [output.float() for output in outputs]
        if not dense.ndim or not len(dense):
            raise EvaluationError(f"the output has shape {tuple(dense.shape)}, expected logits (samples, ..., classes)")
        for name, output in zip(("dense", "pruned"), (dense, *others), strict=False):
            if output.shape != dense.shape:
                raise EvaluationError(
                    f"the output has shape {tuple(output.shape)} in the pruned network and {tuple(dense.shape)} in the dense one"
                )
            excused = (dense == -torch.inf) & (output == -torch.inf) if ruled_out else torch.zeros_like(dense).bool()
            if not (output.isfinite() | excused).all():
                raise EvaluationError(f"the {name} network's output holds {_not_finite(output)}")
        if not others and not alone:
            raise EvaluationError("it has no labels, and there is no other network to compare with")
        self.samples += len(dense)
        self.outputs = dense.shape[-1]
        return found

    def _count(self, outputs: list[Tensor], labels: Tensor) -> None:
        shape, most = tuple(outputs[0].shape), outputs[0].shape[-1]
        if labels.is_floating_point() or labels.shape != shape[:1] or len(shape) != 2:
            raise EvaluationError(
                f"labels of shape {tuple(labels.shape)} and type {labels.dtype} do not go with logits of shape {shape}: expected "
                f"one integer a sample"
            )
        if int(labels.min()) < 0 or int(labels.max()) >= most:
            raise EvaluationError(
                f"label {int(labels.max() if labels.max() >= most else labels.min())} is not a class of a network with {most} outputs"
            )
        self.labels += labels.tolist()
        for number, output in enumerate(outputs):
            for depth in (1, _MANY) if most > _MANY else (1,):
                found = (output.topk(depth).indices == labels[:, None]).any(-1)
                self.hits.setdefault((number, depth), []).extend(found.tolist())

    def result(self, names: Sequence[str] | None) -> Evaluation:
        both = self.pruned
        return Evaluation(
            samples=self.samples,
            dense=self._accuracy(0),
            pruned=self._accuracy(1),
            top1_change=self._change(1),
            top5_change=self._change(_MANY),
            agreement=self.agreeing / self.samples if both else None,
            kl=self.divergences / self.samples if both else None,
            classes=self._classes(names) if both else (),
            by_position=self.by_position,
            cosine=Mean.of(self.cosines) if self.cosines else None,
            relative_error=math.sqrt(self.lost / self.whole) if self.whole else None,
        )

    def _accuracy(self, network: int) -> Accuracy | None:
        if (network, 1) not in self.hits:
            return None
        one, many = self.hits[network, 1], self.hits.get((network, _MANY))
        return Accuracy(Share(sum(one), len(one)), None if many is None else Share(sum(many), len(many)))

    def _change(self, depth: int) -> PairedDifference | None:
        if (1, depth) not in self.hits:
            return None
        seen = Counter(zip(self.hits[0, depth], self.hits[1, depth], strict=True))
        return PairedDifference(seen[True, True], seen[True, False], seen[False, True], seen[False, False])

    def _classes(self, names: Sequence[str] | None) -> tuple[ClassChange, ...]:
        counts = Counter(self.labels)
        dense, pruned = (
            Counter(label for label, hit in zip(self.labels, self.hits.get((n, 1), ()), strict=False) if hit)
            for n in (0, 1)
        )
        entries = [
            ClassChange(
                label, names[label] if names and label < len(names) else str(label), count, dense[label], pruned[label]
            )
            for label, count in counts.items()
        ]
        return tuple(sorted(entries, key=lambda e: (e.pruned - e.dense, (e.pruned - e.dense) / e.samples, e.label)))
