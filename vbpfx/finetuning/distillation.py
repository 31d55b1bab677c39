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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from vbpfx.calibration.moments import Moments, widened
from vbpfx.data.inputs import Inputs
from vbpfx.distributed.meeting import exchanging
from vbpfx.errors import FinetuneError, RankError, first_line
from vbpfx.graph.fields import path_name, result_paths
from vbpfx.outputs.differences import squared_errors
from vbpfx.outputs.divergence import divergence as kl

Loss = Literal["kl", "mse"]

# The names under which a model's output may hold the tensor to compare, by loss.
_NAMES: dict[str, tuple[str, ...]] = {"kl": ("logits",), "mse": ("last_hidden_state", "logits")}
# The key of the output among the scales. No module has this name.
OUTPUT = ""


@dataclass(frozen=True)
class Signals:
    """The results of one run of a network.

    Attributes:
        output: the output that is compared.
        features: watched module -> its outputs, one for each call.
        others: name -> further floating-point outputs.
    """

    output: Tensor
    features: dict[str, list[Tensor]]
    others: dict[str, Tensor] = field(default_factory=dict)


class Watched:
    """A network with hooks that keep the outputs of some modules in every run. :meth:`stop` removes the hooks.

    Args:
        network: the network. Nothing but forward hooks is added to it.
        names: the names of the modules to watch.
        loss: the loss, which decides which output is compared. With None, the first run decides: logits if there are
            any, otherwise values.

    Attributes:
        loss: the loss, which the first run sets if it was None.
    """

    def __init__(self, network: nn.Module, names: Iterable[str], loss: Loss | None) -> None:
        self.network, self.loss = network, loss
        self._seen: dict[str, list[Tensor]] = {}
        self._handles = [self._watch(network.get_submodule(name), name) for name in names]

    def _watch(self, module: nn.Module, name: str) -> RemovableHandle:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            tensors = _floats(output)
            if tensors:
                self._seen.setdefault(name, []).append(tensors[0])

        return module.register_forward_hook(keep)

    def __call__(self, inputs: Inputs) -> Signals:
        """Run the network.

        Raises:
            FinetuneError: the network does not run on the batch, or its output holds nothing to compare.
            RankError: the network is sharded over processes, and another process has ended.
        """
        self._seen = {}
        try:
            with exchanging():
                output = inputs.run(self.network)
        except RankError:
            raise
        except Exception as error:  # the model may raise any exception
            raise FinetuneError(
                f"a batch does not run through {type(self.network).__name__}: {first_line(error)}\n"
                f"  the batch: {inputs.describe()}"
            ) from error
        self.loss = self.loss or ("kl" if _named(output, "kl") else "mse")
        compared = _compared(output, self.loss)
        others = {
            path_name(path): tensor
            for path, tensor in result_paths(output)
            if tensor is not compared and tensor.is_floating_point() and tensor.ndim
        }
        return Signals(compared, self._seen, others)

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


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
                    f"the student returns no {name}, which the teacher does: choose outputs= that both return"
                )
            ours, theirs = _comparable(student.others[name], teacher.others[name], f"the output {name}")
            total = total + self._apart(inputs, ours, theirs, f":{name}", by_divergence=self._by_divergence(name))
        return total

    def _by_divergence(self, name: str) -> bool:
        return self.loss == "kl" and "logits" in name.rpartition(".")[2]

    def _apart(self, inputs: Inputs, ours: Tensor, theirs: Tensor, key: str, *, by_divergence: bool) -> Tensor:
        if by_divergence:
            found = kl(ours, theirs, self.temperature)
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


def mean_over_samples(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over samples of each sample's own mean, over the positions that the mask (batch, ...) keeps."""
    return values.mean() if mask is None else sample_means(values, mask).mean()


def sample_means(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return each sample's own mean, (batch,), over the positions that the mask (batch, ...) keeps."""
    if mask is None:
        return values.reshape(len(values), -1).mean(-1)
    positions = values.flatten(mask.ndim).mean(-1) if values.ndim > mask.ndim else values
    positions, kept = positions.reshape(len(mask), -1), mask.reshape(len(mask), -1)
    return positions.where(kept, 0).sum(1) / kept.sum(1).clamp(min=1)


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
    watched = [Watched(network, common, loss) for network in (student, teacher)]
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


def _named(output: Any, loss: Loss) -> list[Tensor]:
    """Return the tensors of an output from which a loss may be computed."""
    named = [output.get(n) if isinstance(output, Mapping) else getattr(output, n, None) for n in _NAMES[loss]]
    tensors = [value for value in named if isinstance(value, Tensor)]
    if not tensors and not (loss == "kl" and isinstance(output, Mapping)):
        tensors = [tensor for tensor in _floats(output) if tensor.ndim > 1]
    return tensors


def _compared(output: Any, loss: Loss) -> Tensor:
    tensors = _named(output, loss)
    if not tensors:
        found = f" with {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
        hint = (
            "for embeddings fine-tuning takes loss='mse', and evaluations compare='values'"
            if loss == "kl"
            else "wrap the model in one that returns a tensor"
        )
        raise FinetuneError(
            f"the model's output, a {type(output).__name__}{found}, holds no logits or values (samples, ..., classes); {hint}"
        )
    return tensors[0]


def _floats(output: Any) -> list[Tensor]:
    values = list(output.values()) if isinstance(output, Mapping) else output
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _comparable(ours: Tensor, theirs: Tensor, what: str) -> tuple[Tensor, Tensor]:
    if ours.shape != theirs.shape:
        raise FinetuneError(
            f"{what} has shape {tuple(ours.shape)} in the student and {tuple(theirs.shape)} in the teacher; "
            f"the teacher must be the dense network that was pruned"
        )
    return widened(ours), widened(theirs)


def mask_of(inputs: Inputs, values: Tensor, name: str = "") -> Tensor | None:
    """Return the padding mask as booleans if it fits the two leading axes of the values, otherwise None.

    Args:
        name: the name of the values. In an encoder-decoder model all values count as the decoder's, with the decoder's
            mask, unless the name begins with ``encoder``.
    """
    decodes = "decoder_input_ids" in inputs.kwargs and not name.removeprefix(":").startswith("encoder")
    mask = inputs.kwargs.get("decoder_attention_mask" if decodes else "attention_mask")
    fits = isinstance(mask, Tensor) and mask.ndim == 2 and values.ndim >= 2 and mask.shape == values.shape[:2]
    return mask.bool() if fits and isinstance(mask, Tensor) else None
