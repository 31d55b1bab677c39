"""Capture records shapes on every node, a dynamic batch and the model's signature, and its errors name the line."""

from __future__ import annotations

import inspect
import logging
import operator
from typing import Any, NamedTuple

import pytest
import torch
from oracle import randomize, stages
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from zoo import FOUND, PICKED, Attention, tokens

import vbpfx
from vbpfx.data.inputs import Inputs, as_inputs
from vbpfx.errors import CaptureError

BOTH = pytest.mark.parametrize("frontend", ["symbolic", "export"])


class Result(NamedTuple):
    y: Tensor
    parts: dict[str, tuple[Tensor, Tensor]]


class Nested(nn.Module):
    """The input is a dictionary with a list, the output is nested, and options keep their defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 12), nn.Linear(12, 4)

    def forward(self, data: dict[str, Any], scale: Tensor, mask: Tensor | None = None, twice: bool = False) -> Any:
        y = self.fc2(self.fc1(data["a"]).relu()) + data["b"][0]
        if mask is not None:
            y = y * mask
        return {"y": y * scale, "parts": (y, [y + 1, data["b"][1]])}


def nested_batch(samples: int) -> dict[str, Any]:
    return {
        "data": {"a": torch.randn(samples, 4), "b": [torch.randn(samples, 4), torch.randn(samples, 2)]},
        "scale": torch.randn(samples, 1),
    }


@BOTH
def test_nested_inputs_and_outputs_keep_their_structure(frontend: str) -> None:
    model = randomize(Nested())
    pruned = vbpfx.prune(model, [nested_batch(6)], ratio=0.5, frontend=frontend, progress=False)
    assert pruned.captured.frontend == frontend
    for samples in (1, 5):
        batch = nested_batch(samples)
        expected, found = model(**batch), pruned.captured.graph_module(**batch)
        assert pytree.tree_structure(found) == pytree.tree_structure(expected)
        for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
            torch.testing.assert_close(a, b)
        assert pytree.tree_structure(pruned.graph_module(**batch)) == pytree.tree_structure(expected)


def test_an_option_left_at_its_default_keeps_its_place_and_cannot_change_in_silence() -> None:
    captured = vbpfx.capture(Nested(), nested_batch(3), frontend="symbolic")
    parameters = inspect.signature(captured.graph_module.forward).parameters
    assert list(parameters) == ["data", "scale", "mask", "twice"]
    captured.graph_module(**nested_batch(2), mask=None)
    with pytest.raises(AssertionError, match="argument mask was None when the network was captured"):
        nn.Module.__call__(captured.graph_module, **nested_batch(2), mask=torch.ones(2, 1))


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in FOUND])
def test_every_node_knows_its_shape(case: Any) -> None:
    """The recorded shapes are those of a real run, with the batch size in place of the stand-in."""
    captured = vbpfx.capture(case.make(), case.batch(), frontend=case.frontends[0])
    real: dict[str, Any] = {}

    class Record(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            real[n.name] = value = super().run_node(n)
            return value

    batch = case.batch()
    Record(captured.graph_module).run(batch, enable_io_processing=False)
    for node in captured.graph_module.graph.nodes:
        value = node.meta["val"]
        if isinstance(real[node.name], Tensor):
            assert isinstance(value, FakeTensor)
            # The batch may be merged with another axis: 2018 is two heads of 1009 samples.
            shape = [s // captured.batch * len(batch) if s % captured.batch == 0 else s for s in value.shape]
            found = list(real[node.name].shape)
            if case in PICKED:  # the number of picked rows depends on values; the largest is recorded
                assert len(found) == len(shape), node.name
                assert all(map(operator.le, found, shape)), node.name
            else:
                assert shape == found, node.name
            assert value.dtype == real[node.name].dtype


def test_the_batch_stand_in_divides_no_size_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(1009, 2 * 1013), nn.ReLU(), nn.Linear(2 * 1013, 4))
    captured = vbpfx.capture(model, torch.randn(2, 1009))
    assert captured.batch == 1019


def test_a_model_tied_to_its_batch_size_is_captured_at_that_size() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.fc1(x).relu().view(3, 5, 12)).view(-1, 8)

    result = stages(randomize(Tied()), tokens())
    assert result.captured.batch is None
    assert result.plan.widths == {"fc1->fc2": 6}
    vbpfx.verify(result.captured, result.small, result.plan)


def test_export_is_the_fallback_where_symbolic_tracing_stops() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[-1] % 2:
                x = x[..., :-1]
            return self.mlp(x)

    result = stages(randomize(Branches()), torch.randn(1, 5, 8))
    assert result.captured.frontend == "export"
    assert result.plan.widths == {"mlp": 6}
    # The graph is not fixed to the example's batch of one, and the result can switch to training mode.
    assert result.small(torch.randn(4, 5, 8)).shape == (4, 5, 8)
    assert result.small.train().training
    with pytest.raises(CaptureError, match="symbolic"):
        vbpfx.capture(Branches(), torch.randn(2, 5, 8), frontend="symbolic")


def test_frozen_and_no_grad_models_are_captured() -> None:
    class NoGrad(Attention):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model = randomize(NoGrad()).requires_grad_(False)
    assert stages(model, tokens()).plan.widths == {"mlp": 6}


def test_capture_copies_no_weights_and_leaves_logging_alone() -> None:
    model = Attention()
    captured = vbpfx.capture(model, tokens(), frontend="export")
    own = {id(p) for p in model.parameters()}
    assert {id(p) for p in captured.graph_module.parameters()} == own
    assert logging.root.manager.disable == logging.NOTSET


def test_macs_are_those_of_the_arithmetic() -> None:
    """Counts per sample: qkv 5x8x24, two attention products 2x5x5x8, proj 5x8x8, mlp 2x5x8x12."""
    captured = vbpfx.capture(Attention(), tokens())
    assert sum(captured.macs.values()) == 5 * 8 * 24 + 2 * 5 * 5 * 8 + 5 * 8 * 8 + 2 * 5 * 8 * 12
    assert captured.macs["mlp_0"] == 5 * 8 * 12


def _model(forward: Any) -> nn.Module:
    return type("M", (nn.Module,), {"forward": forward})()


X, Y = torch.zeros(4, 2), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("batch", "model", "args", "kwargs"),
    [
        (X, _model(lambda self, x: x), (X,), {}),
        ([X], _model(lambda self, x: x), (X,), {}),
        ((X, Y), _model(lambda self, x: x), (X,), {}),
        ((X, X), _model(lambda self, x, y: x), (X, X), {}),
        ((X, X, Y), _model(lambda self, x, y: x), (X, X), {}),
        ({"x": X}, _model(lambda self, x: x), (), {"x": X}),
        ({"a": X}, _model(lambda self, data: data), ({"a": X},), {}),
        (({"x": X}, Y), _model(lambda self, x: x), (), {"x": X}),
        (((X,), {"y": X}), _model(lambda self, x, y: x), (X,), {"y": X}),
        ({"x": X, "labels": Y}, _model(lambda self, x: x), (), {"x": X}),
        ({"x": X, "labels": Y}, _model(lambda self, x, labels=None: x), (), {"x": X}),
        ({"x": X, "labels": Y}, _model(lambda self, x, labels: x), (), {"x": X, "labels": Y}),
    ],
)
def test_batches_become_arguments(batch: Any, model: nn.Module, args: tuple, kwargs: dict) -> None:
    found = as_inputs(batch, model)
    assert pytree.tree_structure((found.args, found.kwargs)) == pytree.tree_structure((args, kwargs))
    assert all(a is b for a, b in zip(found.leaves, pytree.tree_leaves((args, kwargs)), strict=True))


def test_inputs_are_resized_along_the_batch_alone() -> None:
    inputs = Inputs((torch.arange(3.0), torch.ones(7)), {})
    assert inputs.resized(5).args[0].tolist() == [0, 1, 2, 0, 1]
    assert inputs.resized(5).args[1].shape == (7,)
    assert inputs.first(2).args[0].tolist() == [0, 1]


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed", "ignore::FutureWarning:torch.distributed")
def test_a_model_divided_over_processes_is_named_with_the_way_to_gather_it() -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        second = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
        fully_shard(second, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
        first = nn.Sequential(
            FullyShardedDataParallel(nn.Linear(8, 12), device_id=torch.device("cpu")), nn.Linear(12, 4)
        )
        for model, where in ((second, r"0\.weight is divided.*FSDP2"), (first, "module 0 is divided.*FullySharded")):
            with pytest.raises(CaptureError, match=f"{where}.*get_model_state_dict"):
                vbpfx.prune(model, [torch.randn(4, 8)], ratio=0.5, progress=False, ranks="alone")
    finally:
        dist.destroy_process_group()


class _Remembers(nn.Module):
    """Its forward pass stores a tensor in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.seen, self.all = nn.Linear(8, 12), nn.Linear(12, 4), None, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = self.fc1(x)
        return self.fc2(self.seen.relu())


@pytest.mark.parametrize("attribute", ["seen", "all"])
def test_a_fake_tensor_that_a_trace_left_in_the_model_is_named(attribute: str) -> None:
    model, outer = _Remembers(), nn.Module()
    with FakeTensorMode():
        left = torch.empty(4, 12)
    setattr(model, attribute, left if attribute == "seen" else [left])
    outer.inner, outer.forward = model, model.forward
    with pytest.raises(CaptureError, match=rf"inner\.{attribute} holds a fake tensor"):
        vbpfx.capture(outer, torch.randn(4, 8))
