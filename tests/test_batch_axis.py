"""The batch axis of every input is found by running the model, and every stage respects it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_unchanged, double, state
from torch import Tensor, nn

import vbpfx
from vbpfx.data.inputs import Inputs
from vbpfx.errors import CaptureError
from vbpfx.graph.batch_axis import find_batch_axes


class Computing(nn.Module):
    """A module that applies a function to a network and the inputs."""

    def __init__(self, compute: Callable[..., Any], network: nn.Module | None = None) -> None:
        super().__init__()
        self.compute, self.network = compute, network or mlp()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.compute(self.network, *args, **kwargs)


def mlp(inputs: int = 8, hidden: int = 24, outputs: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 24, dropout=0.0)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


def lstm_batch(steps: int, samples: int) -> tuple[Any, ...]:
    return torch.randn(steps, samples, 8), (torch.randn(1, samples, 8), torch.randn(1, samples, 8))


# (name, model, inputs, batch axis of every tensor or None, whether samples influence one another)
CASES: list[tuple[str, Callable[[], nn.Module], tuple[Any, ...], list[int | None], bool]] = [
    ("elements alike", mlp, (torch.randn(6, 5, 8),), [0], False),
    ("one sample", mlp, (torch.randn(1, 8),), [0], False),
    ("two samples", encoder, (torch.randn(5, 2, 8),), [1], False),
    ("sequence first", encoder, (torch.randn(7, 6, 8),), [1], False),
    ("a mask of positions", encoder, (torch.randn(6, 6, 8), torch.randn(6, 6)), [1, None], False),
    (
        "a mask of padding",
        lambda: Computing(lambda net, x, m: net(x, src_key_padding_mask=m), encoder()),
        (torch.randn(7, 6, 8), torch.arange(7) > torch.randint(3, 7, (6, 1))),
        [1, 0],
        False,
    ),
    ("recurrent", lambda: nn.LSTM(8, 8), lstm_batch(5, 3), [1, 1, 1], False),
    (
        "recurrent, batch first",
        lambda: nn.LSTM(8, 8, batch_first=True),
        (torch.randn(3, 5, 8), (torch.randn(1, 3, 8), torch.randn(1, 3, 8))),
        [0, 1, 1],
        False,
    ),
    ("only looks back", lambda: Computing(lambda net, x: net(x).cumsum(0)), (torch.randn(7, 3, 8),), [1], False),
    ("merged", lambda: Computing(lambda net, x: net(x).flatten(0, 1)), (torch.randn(5, 3, 8),), [0], False),
    (
        "merged, time ahead",
        lambda: Computing(lambda net, x: net(x.transpose(0, 1)).cumsum(0).flatten(0, 1)),
        (torch.randn(6, 3, 8),),
        [0],
        False,
    ),
    ("every pair", lambda: Computing(lambda net, a, b: net(a) @ net(b).T), (torch.randn(5, 8), torch.randn(5, 8)), [0, 0], False),
    ("a scale for all", lambda: Computing(lambda net, x, s: net(x) * s), (torch.randn(8, 8), torch.randn(8)), [0, None], False),
    ("a mean beside it", lambda: Computing(lambda net, x: (net(x), net(x).mean(0))), (torch.randn(5, 8),), [0], False),
    ("random", lambda: Computing(lambda net, x: F.dropout(net(x), 0.5, True)), (torch.randn(5, 8),), [0], True),
    ("a norm over the batch", lambda: nn.BatchNorm1d(8, track_running_stats=False), (torch.randn(5, 8),), [0], True),
    (
        "nodes and edges",
        lambda: Computing(lambda net, x, e: net(torch.zeros_like(x).index_add(0, e[1], x[e[0]]))),
        (torch.randn(9, 8), torch.randint(0, 9, (2, 30))),
        [None, None],
        False,
    ),
    ("groups of two", lambda: Computing(lambda net, x: net(x).view(-1, 2, 8).sum(1)), (torch.randn(6, 8),), [None], False),
]  # fmt: skip


@pytest.mark.parametrize(("make", "given", "axes", "coupled"), [pytest.param(*c[1:], id=c[0]) for c in CASES])
def test_the_axis_of_the_samples_is_found(
    make: Callable[[], nn.Module], given: tuple[Any, ...], axes: list[int | None], coupled: bool
) -> None:
    torch.manual_seed(0)
    model, inputs = make().eval(), Inputs(given, {})
    before, tensors, rng = state(model), copy.deepcopy(inputs.tensors), torch.get_rng_state()
    found = find_batch_axes(model, inputs)
    assert list(found.axes.values()) == axes  # type: ignore[union-attr]
    assert found.coupled is coupled
    assert_unchanged(model, before)
    assert all(torch.equal(a, b) for a, b in zip(inputs.tensors, tensors, strict=True))
    assert torch.equal(torch.get_rng_state(), rng)


def test_samples_are_taken_along_their_axes() -> None:
    x, lengths, scale = torch.arange(12.0).view(4, 3), torch.arange(3), torch.ones(3)
    inputs = Inputs((x,), {"more": [lengths, scale]}, {(0, 0): 1, ("more", 0): 0, ("more", 1): None})
    assert inputs.batch_size == 3
    assert not inputs.is_empty
    assert inputs.sample == "4"
    first, other = inputs.first(2), inputs.resized(5)
    assert torch.equal(first.args[0], x[:, :2])
    assert first.kwargs["more"][0].tolist() == [0, 1]
    assert torch.equal(other.args[0], x[:, [0, 1, 2, 0, 1]])
    assert other.kwargs["more"][0].tolist() == [0, 1, 2, 0, 1]
    assert other.kwargs["more"][1] is scale
    assert first.batch_axes == other.batch_axes == {(0, 0): 1, ("more", 0): 0}
    by_name = Inputs((), {"x": x, "more": [lengths, scale]}).along(inputs)
    assert by_name.batch_axes == {("x", 0): 1, ("more", 0): 0}


class Steps(nn.Module):
    """A recurrent network written as a loop over time, (T, B, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(8, 16), mlp(16, 48, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[1], 16)
        for step in range(x.shape[0]):
            h = self.cell(x[step], h)
        return self.head(h)


def test_a_loop_over_time_reads_every_step() -> None:
    torch.manual_seed(0)
    model = double(Steps())
    data = [torch.randn(12, 6, 8, dtype=torch.float64) for _ in range(3)]
    pruned = vbpfx.prune(model, data, ratio=0.5, progress=False)
    assert pruned.captured.inputs.batch_axes == {(0, 0): 1}
    for samples in (1, 6, 9):
        x = torch.randn(12, samples, 8, dtype=torch.float64)
        torch.testing.assert_close(pruned.captured.graph_module(x), model(x), rtol=1e-12, atol=1e-12)
        assert pruned.graph_module(x).shape == (samples, 3)
    later = x.clone()
    later[4:] = 100
    assert not torch.equal(pruned.graph_module(x), pruned.graph_module(later))


@pytest.mark.parametrize("masked", [False, True])
def test_sequence_first_encoders_are_pruned_as_those_whose_batch_comes_first(masked: bool) -> None:
    """The reference is the same network with batch-first data; only the axes differ."""

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder()

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return self.encoder(x, mask=mask, is_causal=False)

    class Turned(First):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(x.transpose(0, 1), mask).transpose(0, 1)

    torch.manual_seed(0)
    model = double(First())
    turned = double(Turned())
    turned.load_state_dict(model.state_dict())
    mask = (nn.Transformer.generate_square_subsequent_mask(5).double(),) if masked else ()
    data = [(torch.randn(5, 20, 8, dtype=torch.float64), *mask) for _ in range(3)]
    # Co-moments hold samples out by their numbers.
    options: dict[str, Any] = {"ratio": 0.5, "progress": False, "reconstruct": False}
    pruned = vbpfx.prune(model, data, **options)
    other = vbpfx.prune(turned, [(x.transpose(0, 1), *rest) for x, *rest in data], **options)
    axes = list(pruned.captured.inputs.axes.values())  # type: ignore[union-attr]
    assert axes == [1, None][: len(axes)]
    assert [e.kept for e in pruned.plan.blocks] == [e.kept for e in other.plan.blocks]
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(
        pruned.graph_module(x, *mask),
        other.graph_module(x.transpose(0, 1), *mask).transpose(0, 1),
        rtol=1e-9,
        atol=1e-9,
    )


def test_the_batch_of_a_sequence_first_network_stays_open_in_files(tmp_path: Any) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    pruned = vbpfx.prune(Steps().eval(), [torch.randn(4, 6, 8)], ratio=0.5, progress=False)
    session = onnxruntime.InferenceSession(str(pruned.to_onnx(tmp_path / "steps.onnx")))
    program = pruned.to_exported_program().module()
    for samples in (1, 7):
        x = torch.randn(4, samples, 8)
        expected = pruned.graph_module(x)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(program(x), expected, rtol=1e-5, atol=1e-5)


class Graphs(nn.Module):
    """A graph network with messages along edges: neither nodes nor edges are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp(8, 48, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.mlp(x + torch.zeros_like(x).index_add(0, edges[1], x[edges[0]]))


@pytest.mark.parametrize("options", [{"method": "vbp"}, {}])
def test_a_graph_of_nodes_and_edges_is_taken_whole(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = double(Graphs())
    data = [(torch.randn(n, 8, dtype=torch.float64), torch.randint(0, n, (2, 3 * n))) for n in (40, 25)]
    pruned = vbpfx.prune(model, data, ratio=0.5, progress=False, **options)
    assert pruned.captured.batch is None
    assert pruned.plan.widths == {"mlp": 24}
    assert pruned.captured.inputs.args[0].shape == (40, 8)  # all nodes are used
    # The statistics cover the nodes of all graphs.
    seen = torch.cat([model.mlp[1](model.mlp[0](x + torch.zeros_like(x).index_add(0, e[1], x[e[0]]))) for x, e in data])
    torch.testing.assert_close(pruned.statistics.moments["mlp"][0].mean, seen.mean(0).detach().cpu())
    for x, e in data:
        torch.testing.assert_close(pruned.captured.graph_module(x, e), model(x, e))
        assert pruned.graph_module(x, e).shape == (len(x), 3)
    assert vbpfx.verify(pruned.captured, pruned.graph_module, pruned.plan, data[1]).error < 1e-9


def test_sparse_inputs_are_named() -> None:
    class Sparse(Graphs):
        def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
            return self.mlp(torch.sparse.mm(adjacency, x))

    with pytest.raises(CaptureError, match=r"argument number 2 is a sparse .*to_dense\(\).*edge list"):
        vbpfx.prune(Sparse(), [(torch.randn(9, 8), torch.eye(9).to_sparse())], ratio=0.5, progress=False)


def test_a_batch_that_influences_itself_is_never_cut() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 24), nn.BatchNorm1d(24, track_running_stats=False), nn.ReLU(), nn.Linear(24, 3))
    model = double(model)
    data = [torch.randn(100, 8, dtype=torch.float64) for _ in range(2)]
    pruned = vbpfx.prune(model, data, ratio=0.25, progress=False, samples=30)
    assert pruned.captured.batch is not None
    assert not pruned.captured.divisible
    seen = torch.cat([model[:3](x) for x in data])
    torch.testing.assert_close(pruned.statistics.moments["0->3"][0].mean, seen.mean(0).detach())
