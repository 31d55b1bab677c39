"""The methods of the benchmark on padded convolutions, each at a given number of multiply-accumulates.

MACs of every network are counted by :class:`torch.utils.flop_counter.FlopCounterMode` in one forward pass; an ONNX file is
read as a torch graph for that. vbpfx keeps at most the given MACs. The other tools take a share of channels, and with few
channels a share changes the MACs in steps. The two networks on both sides of the given MACs are measured, and their values
are interpolated linearly.

Torch-Pruning and onnxsim are used as their documentation describes, in every variant that it offers for such networks. They
are imported when they are first used.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import onnxruntime
import torch
from convolutions_subjects import Draw, Subject
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vbpfx
from vbpfx.data.inputs import Inputs
from vbpfx.export.onnx import export_onnx
from vbpfx.onnx_graph.importer import import_graph

INSTALL = "pip install torch-pruning==1.6.1 onnxsim==0.8.1"
_HALVINGS = 9


class ImpossibleError(Exception):
    """A method cannot reach the given MACs; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """What a pruned network does.

    Attributes:
        values: one value per test image, (n,) float64.
        macs: multiply-accumulates for one image.
    """

    values: Tensor
    macs: int


@dataclass(frozen=True)
class _Narrowed:
    run: Callable[[Tensor], Tensor]
    macs: int


Prune = Callable[[Subject, Draw, float], Outcome]


@dataclass(frozen=True)
class Method:
    """A method of a tool.

    Attributes:
        about: description for the page.
        variants: function from a network to its variants, name -> function from the network, calibration data and the share
            of the MACs to keep to the outcome. That raises ImpossibleError if it cannot reach them.
        ours: whether the tool is vbpfx.
        uses_data: whether the result depends on the calibration data.
    """

    about: str
    variants: Callable[[Subject], Mapping[str, Prune]]
    ours: bool = False
    uses_data: bool = True


def macs_of(network: Callable[[Tensor], Any], image: Tensor) -> int:
    """Return the multiply-accumulates of a network for one image, (1, 1, height, width)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image)
    return int(counter.get_total_flops()) // 2


@torch.no_grad()
def _values(subject: Subject, network: _Narrowed) -> Tensor:
    return subject.values(network.run(subject.test_inputs))


def _vbpfx(method: str, subject: Subject, draw: Draw, share: float) -> Outcome:
    try:
        pruned = vbpfx.prune(subject.model, draw.batches, macs=share, method=method, round_to=1, progress=False)
    except vbpfx.BudgetError as error:
        raise ImpossibleError(str(error)) from error
    narrowed = _Narrowed(pruned.graph_module, macs_of(pruned.graph_module, draw.inputs[:1]))
    return Outcome(_values(subject, narrowed), narrowed.macs)


def _at(share: float, subject: Subject, prune: Callable[[float], _Narrowed]) -> Outcome:
    """Return the outcome at the given share of the MACs.

    Args:
        prune: function from the share of channels to remove to a network.

    Raises:
        ImpossibleError: more MACs are left, however large the share.
    """
    dense = macs_of(subject.model, subject.test_inputs[:1])
    macs = int(share * dense)
    low, high = 0.0, 1.0
    above, below = None, None
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        narrowed = prune(middle)
        if narrowed.macs < macs:
            high, below = middle, narrowed
        else:
            low, above = middle, narrowed
    above = above or prune(0.0)
    if below is None:
        raise ImpossibleError(
            f"{above.macs / dense:.0%} of the MACs are left where {low:.1%} of the channels are to go"
        )
    weight = (macs - below.macs) / (above.macs - below.macs)
    return Outcome(weight * _values(subject, above) + (1 - weight) * _values(subject, below), macs)


def _torch_pruning(
    taylor: bool, hidden_alone: bool, options: Mapping[str, bool], subject: Subject, draw: Draw, share: float
) -> Outcome:
    import torch_pruning

    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
    gradients: list[Tensor] | None = None
    if taylor:
        importance = torch_pruning.importance.GroupTaylorImportance()
        loss = subject.loss(subject.model(draw.inputs), draw.targets)
        gradients = list(torch.autograd.grad(loss, list(subject.model.parameters())))

    def prune(ratio: float) -> _Narrowed:
        network = copy.deepcopy(subject.model)
        if gradients is not None:
            for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                parameter.grad = gradient.clone()
        layers = dict(network.named_modules())
        head = [module for module in layers.values() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]
        ignored = [head, *(layers[name] for name in subject.writes_stream if hidden_alone)]
        pruner = torch_pruning.pruner.BasePruner(
            network, draw.inputs[:4], importance=importance, pruning_ratio=ratio, ignored_layers=ignored, **options
        )
        pruner.step()
        return _Narrowed(network, macs_of(network, draw.inputs[:1]))

    return _at(share, subject, prune)


@functools.lru_cache(maxsize=1)
def _simplified(subject: Subject) -> onnx.ModelProto:
    """Return the network in ONNX, simplified by onnxsim, which folds BatchNorm into convolutions."""
    import onnxsim

    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(subject.model, Inputs((subject.test_inputs[:4],), {}), Path(folder) / "dense.onnx")
        return onnxsim.simplify(onnx.load(path))[0]


def _onnxsim(everywhere: bool, subject: Subject, draw: Draw, share: float) -> Outcome:
    import onnxsim

    dense = _simplified(subject)
    name = dense.graph.input[0].name
    data = [{name: batch.numpy()} for batch in draw.batches]
    example = Inputs((), {name: draw.inputs[:1]})

    def prune(sparsity: float) -> _Narrowed:
        small = onnxsim.apply_structured_wanda_pruning(
            dense, calibration_data=data, sparsity=sparsity, global_sparsity=everywhere
        )
        graph = import_graph(onnx_ir.from_proto(small), example).graph_module
        return _Narrowed(
            functools.partial(_run_recovered, onnxsim, dense, small, data), macs_of(graph, draw.inputs[:1])
        )

    return _at(share, subject, prune)


def _run_recovered(onnxsim: Any, dense: onnx.ModelProto, small: onnx.ModelProto, data: Any, inputs: Tensor) -> Tensor:
    """Apply onnxsim's closed-form recovery and return the outputs of the file in ONNX Runtime."""
    recovered = onnxsim.apply_pruning_finetune(dense, small, calibration_data=data)
    session = onnxruntime.InferenceSession(recovered.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0])


_ALLOCATIONS: dict[str, dict[str, bool]] = {
    "every layer alike": {},
    "global": {"global_pruning": True},
    "isomorphic": {"global_pruning": True, "isomorphic": True},
}


def _torch_pruning_variants(taylor: bool) -> Callable[[Subject], Mapping[str, Prune]]:
    def variants(subject: Subject) -> Mapping[str, Prune]:
        return {
            f"{name}, {axes}": functools.partial(_torch_pruning, taylor, axes == "hidden channels", options)
            for axes in (("all channels", "hidden channels") if subject.writes_stream else ("all channels",))
            for name, options in _ALLOCATIONS.items()
        }

    return variants


def _vbpfx_variants(method: str) -> Callable[[Subject], Mapping[str, Prune]]:
    return lambda subject: {"": functools.partial(_vbpfx, method)}


def _onnxsim_variants(subject: Subject) -> Mapping[str, Prune]:
    names = {"every chain alike": False, "global": True}
    return {name: functools.partial(_onnxsim, everywhere) for name, everywhere in names.items()}


METHODS: dict[str, Method] = {
    "vbp": Method('vbpfx, Variance-Based Pruning: `method="vbp"`', _vbpfx_variants("vbp"), ours=True),
    "auto": Method("vbpfx, its default method, with `round_to=1`", _vbpfx_variants("auto"), ours=True),
    "magnitude": Method(
        "Torch-Pruning, `GroupMagnitudeImportance(p=2)`; uses no data", _torch_pruning_variants(False), uses_data=False
    ),
    "Taylor": Method(
        "Torch-Pruning, `GroupTaylorImportance()`; **needs labels** (for the U-Net the images without noise)",
        _torch_pruning_variants(True),
    ),
    "Wanda": Method(
        "onnxsim, `apply_structured_wanda_pruning`, then its closed-form recovery `apply_pruning_finetune`, which fits "
        "`MatMul` and `Gemm` and no convolution",
        _onnxsim_variants,
    ),
}
