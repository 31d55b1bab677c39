"""Models that are hard to capture: further arguments, lengths, numbers from buffers, settings, recurrent layers."""

from __future__ import annotations

import copy
import dataclasses
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import randomize, stages
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import vbpfx
from vbpfx.data.inputs import as_inputs
from vbpfx.errors import CaptureError

BOTH = pytest.mark.parametrize("frontend", ["symbolic", "export"])


class Body(nn.Module):
    """Two layers and all kinds of tensors from which code may read numbers; ``code`` is the forward function."""

    def __init__(self, code: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.code = nn.Linear(8, 12), nn.Linear(12, 8), code
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("strides", torch.tensor([8.0, 16.0]))
        self.register_buffer("wanted", torch.tensor(True))
        self.anchors = torch.tensor([2.0, 4.0])

    def layers(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x).relu())
        return y

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self, x)


def assert_same(network: nn.Module, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    torch.testing.assert_close(network(*args, **kwargs), model(*args, **kwargs))


# Arguments


class Further(nn.Module):
    """``*args`` and ``**kwargs`` whose number and names depend on the batch, and flags that change the computation."""

    def __init__(self) -> None:
        super().__init__()
        self.m = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))

    def forward(self, *xs: Tensor, negative: bool = False, size: tuple[int, int] = (2, 2), **more: Tensor) -> Tensor:
        y = self.m(torch.cat(xs, -1)).unflatten(-1, size)
        return (-y if negative else y) + more.get("shift", 0)


def further(samples: int, **flags: Any) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    return (torch.randn(samples, 5), torch.randn(samples, 3)), {"shift": torch.randn(samples, 1, 1), **flags}


@BOTH
def test_further_arguments_become_inputs_one_by_one(frontend: str, tmp_path: Path) -> None:
    model = randomize(Further())
    pruned = vbpfx.prune(model, [further(6)], ratio=0.5, method="vbp", frontend=frontend, progress=False)
    assert pruned.captured.frontend == frontend
    assert pruned.plan.widths == {"m": 6}
    pruned.save(tmp_path / "net")
    pruned.to_onnx(tmp_path / "net.onnx")  # this also compares with ONNX Runtime
    args, kwargs = further(9)
    assert_same(pruned.captured.graph_module, model, *args, **kwargs)
    for network in (pruned.apply_to(model), vbpfx.load(tmp_path / "net")):
        assert_same(network, pruned.graph_module, *args, **kwargs)


@BOTH
def test_a_wrapper_that_hands_its_arguments_on_is_captured(frontend: str) -> None:
    model = torch.optim.swa_utils.AveragedModel(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)))
    result = stages(randomize(model), torch.randn(4, 8), frontend=frontend)
    assert result.plan.widths == {"module": 6}
    vbpfx.verify(result.captured, result.small, result.plan, torch.randn(7, 8))


@BOTH
@pytest.mark.parametrize("flags", [{"negative": True}, {"size": (4, 1)}])
def test_flags_keep_the_values_they_were_captured_with(frontend: str, flags: dict[str, Any]) -> None:
    model = randomize(Further())
    result = stages(model, further(4, **flags), frontend=frontend)
    args, kwargs = further(7, **flags)
    assert_same(result.captured.graph_module, model, *args, **kwargs)
    assert result.captured.flags == flags
    assert f"captured with {next(iter(flags))}={next(iter(flags.values()))!r}" in " ".join(str(result.analysis).split())
    other = kwargs | {"negative": False, "size": (2, 2)}
    kwargs |= {name: other[name] for name in flags}
    for network in (result.captured.graph_module, result.small):
        with pytest.raises(
            AssertionError, match=rf"argument {next(iter(flags))}(_\d)? was .* when the network was captured"
        ):
            nn.Module.__call__(network, *args, **kwargs)


def test_one_tensor_as_two_arguments_stays_two_inputs() -> None:
    x = torch.randn(4, 4)
    captured = vbpfx.capture(model := randomize(Further()), (x, x), frontend="export")
    assert_same(captured.graph_module, model, torch.randn(5, 4), torch.randn(5, 4))


# Sizes


def by_len(m: Any, x: Tensor) -> Tensor:
    return m.layers(x).reshape(len(x), 2, 4)


def by_len_of_shapes(m: Any, x: Tensor) -> Tensor:
    parts = m.layers(x).chunk(2, -1)
    return parts[0].reshape(x.shape[len(x.shape) - 2], len(parts), -1)


def by_shape(m: Any, x: Tensor) -> Tensor:
    samples, width = x.shape
    return m.layers(x).reshape(samples, 2, width // 2)


def by_size(m: Any, x: Tensor) -> Tensor:
    return m.layers(x).view(x.size()).view(x.size(0), x.size()[1], 1)


def by_rank(m: Any, x: Tensor) -> Tensor:
    return m.layers(x).mean(x.ndim - 1) + x.sum(x.dim() - 1)


@pytest.mark.parametrize("code", [by_len, by_len_of_shapes, by_shape, by_size, by_rank])
def test_lengths_and_shapes_are_followed_by_symbolic_tracing(code: Callable[..., Tensor]) -> None:
    model = randomize(Body(code))
    result = stages(model, torch.randn(4, 8), frontend="symbolic")
    assert result.plan.widths == {"a->b": 6}
    assert "len" not in globals()  # tracing sets it temporarily
    for samples in (1, 9):
        assert_same(result.captured.graph_module, model, torch.randn(samples, 8))
    vbpfx.verify(result.captured, result.small, result.plan, torch.randn(9, 8))


def over_axes(m: Any, x: Tensor) -> Tensor:
    y = m.layers(x)
    for _ in range(len(x.shape)):
        y = y * 2
    return y


def by_all_sizes(m: Any, x: Tensor) -> Tensor:
    return m.layers(x).reshape(*x.shape[:-1], 2, -1) + sum(list(x.shape[1:]))


@pytest.mark.parametrize("code", [over_axes, by_all_sizes])
def test_what_symbolic_tracing_cannot_follow_falls_back_to_export_by_itself(code: Callable[..., Tensor]) -> None:
    model = randomize(Body(code))
    result = stages(model, torch.randn(4, 8))
    assert (result.captured.frontend, result.plan.widths) == ("export", {"a->b": 6})
    assert_same(result.captured.graph_module, model, torch.randn(9, 8))


# Numbers that code reads from parameters and buffers


def converted_by_an_operator(m: Any, x: Tensor) -> Tensor:
    return m.layers(x) * torch.full((1,), m.strides[0])


def of_an_attribute(m: Any, x: Tensor) -> Tensor:
    return m.layers(x) * torch.full((1,), m.anchors[0])


def by_item(m: Any, x: Tensor) -> Tensor:
    return m.layers(x) * (m.strides * 2)[1].item()


def by_int(m: Any, x: Tensor) -> Tensor:
    return m.layers(x)[:, : int(m.count)] + torch.arange(int(m.count))


def by_float_of_a_parameter(m: Any, x: Tensor) -> Tensor:
    return m.layers(x) * float(m.scale.detach())


def by_tolist(m: Any, x: Tensor) -> Tensor:
    return torch.cat([m.layers(x) / stride for stride in m.strides.tolist()], -1)


def by_branch(m: Any, x: Tensor) -> Tensor:
    return m.layers(x) if m.wanted and m.count.item() > 2 else x


@pytest.mark.parametrize(
    "code",
    [converted_by_an_operator, of_an_attribute, by_item, by_int, by_float_of_a_parameter, by_tolist, by_branch],
)
def test_a_number_from_a_parameter_or_buffer_is_a_constant(code: Callable[..., Tensor]) -> None:
    model = randomize(Body(code))
    result = stages(model, torch.randn(4, 8), frontend="export")
    assert result.plan.widths == {"a->b": 6}
    assert_same(result.captured.graph_module, model, torch.randn(9, 8))
    vbpfx.verify(result.captured, result.small, result.plan, torch.randn(9, 8))


def test_a_number_from_a_buffer_that_is_written_is_no_constant() -> None:
    def counted(m: Any, x: Tensor) -> Tensor:
        m.count.add_(1)
        return m.layers(x)[:, : int(m.count)]

    with pytest.raises(CaptureError, match=r"int\(m\.count\)"):
        vbpfx.capture(randomize(Body(counted)), torch.randn(4, 8), frontend="export")


def test_a_number_from_values_is_refused_with_its_line() -> None:
    def scaled(m: Any, x: Tensor) -> Tensor:
        largest = x.max().item()
        return m.layers(x) * largest

    with pytest.raises(CaptureError, match=r"test_frontends.py:\d+: largest = x.max\(\).item\(\)"):
        vbpfx.capture(randomize(Body(scaled)), torch.randn(4, 8), frontend="export")


# Settings


def without_autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return m.layers(x)


def without_gradients(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.a(x)
    return m.b(y.relu())


def with_gradients(m: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        y, z = m.a(x), x + 1
    return m.b(y.relu()) + z


def in_inference_mode(m: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        y = m.a(x)
    return m.b(y.relu())


def with_checkpoint(m: Any, x: Tensor) -> Tensor:
    y: Tensor = checkpoint(m.layers, x, use_reentrant=False)
    return y


@torch.compiler.nested_compile_region
def _region(m: Any, x: Tensor) -> Tensor:
    return m.layers(x)


def compiled_as_a_region(m: Any, x: Tensor) -> Tensor:
    return _region(m, x)


@BOTH
@pytest.mark.parametrize(
    "code",
    [without_autocast, without_gradients, with_gradients, in_inference_mode, with_checkpoint, compiled_as_a_region],
)
def test_regions_that_change_no_value_are_part_of_the_graph(code: Callable[..., Tensor], frontend: str) -> None:
    model = randomize(Body(code))
    result = stages(model, torch.randn(4, 8), frontend=frontend)
    assert result.plan.widths == {"a->b": 6}
    assert_same(result.captured.graph_module, model, torch.randn(9, 8))
    vbpfx.verify(result.captured, result.small, result.plan, torch.randn(9, 8))


def test_no_layer_of_a_region_is_hidden() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b, self.h = (nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[-1] > 8:  # symbolic tracing cannot decide this
                return x
            with torch.autocast("cpu", enabled=False):
                return x + self.h(x + self.b(x))

    analysis = vbpfx.find_blocks(vbpfx.capture(Head(), torch.randn(4, 8)))
    assert [block.name for block in analysis.blocks] == ["b", "h"]


@pytest.mark.parametrize("frontend", ["auto", "symbolic", "export"])
def test_an_autocast_region_is_one_message_that_says_what_to_remove(frontend: str) -> None:
    def in_autocast(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return m.layers(x).float()

    with pytest.raises(CaptureError) as raised:
        vbpfx.capture(randomize(Body(in_autocast)), torch.randn(4, 8), frontend=frontend)
    message = str(raised.value)
    assert "torch.autocast('cpu', dtype=torch.bfloat16)" in message
    assert "Take the autocast region out of forward" in message
    assert "test_frontends.py:" in message
    assert "frontend" not in message.replace("test_frontends.py", "")
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_a_model_without_numbers_is_traced_and_refused_like_one_with_numbers(frontend: str) -> None:
    def in_autocast(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return m.layers(x).float()

    real, empty = Body(without_autocast), Body(without_autocast).to("meta")
    x = torch.randn(4, 8)
    found = vbpfx.capture(empty, x, frontend=frontend)
    assert all(parameter.is_meta for parameter in found.graph_module.parameters())
    assert list(found.nodes) == list(vbpfx.capture(real, x, frontend=frontend).nodes)
    with pytest.raises(CaptureError, match="Take the autocast region out of forward"):
        vbpfx.capture(Body(in_autocast).to("meta"), x, frontend=frontend)


def test_layers_in_branches_that_values_choose_are_refused_by_name() -> None:
    def by_cond(m: Any, x: Tensor) -> Tensor:
        y: Tensor = torch.cond(x.sum() > 0, m.layers, lambda x: x + 1, (x,))
        return y

    analysis = vbpfx.find_blocks(vbpfx.capture(randomize(Body(by_cond)), torch.randn(4, 8)))
    assert not analysis.blocks
    assert {
        refusal.name: "operator cond passes it to a nested graph" in refusal.reason for refusal in analysis.refusals
    } == {
        "a": True,
        "b": True,
    }


# Recurrent layers


class Recurrent(nn.Module):
    """Two bidirectional recurrent layers, a state, and a block behind them; only export can capture the branch."""

    def __init__(self, kind: type[nn.RNNBase], branch: bool, **options: Any) -> None:
        super().__init__()
        self.r = kind(6, 5, 2, bidirectional=True, batch_first=True, **options)
        self.m = nn.Sequential(nn.Linear(2 * (options.get("proj_size") or 5), 12), nn.ReLU(), nn.Linear(12, 4))
        self.branch = branch

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.branch and x.shape[-1] > 6:
            return (x,)
        first, state = self.r(x)
        again, last = self.r(x.flip(1), state)
        h = last[0] + last[1].mean() if isinstance(self.r, nn.LSTM) else last
        return self.m(first + again), h


KINDS = [(nn.GRU, {}), (nn.RNN, {"nonlinearity": "relu"}), (nn.LSTM, {}), (nn.LSTM, {"proj_size": 3})]


@BOTH
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # computed without it
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_recurrent_layers_stay_whole(
    kind: type[nn.RNNBase], options: dict[str, Any], frontend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = randomize(Recurrent(kind, frontend == "export", **options))
    with monkeypatch.context() as patched:  # capture must not compute the layer, which would unroll its steps
        for name in ("gru", "lstm"):
            patched.setattr(torch._VF, name, None, raising=False)
        patched.setattr(nn.modules.rnn, "_rnn_impls", None)
        captured = vbpfx.capture(model, torch.randn(4, 7, 6), frontend=frontend)
        analysis = vbpfx.find_blocks(captured)
    assert [block.name for block in analysis.blocks] == ["m"]
    assert "forward" not in vars(captured.reference.get_submodule("r"))
    assert sum(node.target == "r" for node in captured.graph_module.graph.nodes) == 2
    x = torch.randn(5, 9 if frontend == "symbolic" else 7, 6)
    for found, expected in zip(captured.graph_module(x), model(x), strict=True):
        torch.testing.assert_close(found, expected)
    result = stages(model, torch.randn(4, 7, 6), frontend=frontend)
    vbpfx.verify(result.captured, result.small, result.plan, torch.randn(5, 7, 6))


@pytest.mark.parametrize(("kind", "options"), KINDS[:2])
def test_macs_of_recurrent_layers_are_those_of_their_steps(kind: type[nn.RNNBase], options: dict[str, Any]) -> None:
    model = randomize(Recurrent(kind, False, **options))
    x = torch.randn(1, 7, 6)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)  # torch's own loop over steps
    assert 2 * sum(vbpfx.capture(model, x.expand(4, -1, -1)).macs.values()) == counter.get_total_flops()


# The rest of the process


@BOTH
def test_graphs_are_copied_converted_and_pickled(frontend: str) -> None:
    model = randomize(Body(lambda m, x: m.layers(x)))
    pruned = vbpfx.prune(model, [torch.randn(6, 8)], ratio=0.5, method="vbp", frontend=frontend, progress=False)
    x, file = torch.randn(3, 8), io.BytesIO()
    torch.save(pruned.graph_module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for network in (copy.deepcopy(pruned.graph_module), copy.deepcopy(copy.deepcopy(pruned.graph_module)), loaded):
        assert_same(network, pruned.graph_module, x)
    half = copy.deepcopy(pruned.graph_module).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert pruned.graph_module(x).dtype == torch.float32
    torch.testing.assert_close(half(x.bfloat16()).float(), pruned.graph_module(x), atol=0.1, rtol=0.1)  # 8 bits


@dataclasses.dataclass
class Result:
    """A result class like those of models in transformers."""

    logits: Tensor
    hidden: tuple[Tensor, ...] | None = None


@BOTH
def test_graphs_that_return_named_fields_are_copied_and_pickled(frontend: str) -> None:
    model = randomize(Body(lambda m, x: Result(m.layers(x), (m.layers(x) * 2,))))  # type: ignore[arg-type, return-value]
    small = stages(model, torch.randn(6, 8), frontend=frontend).small
    x, file = torch.randn(3, 8), io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    for network in (copy.deepcopy(small), torch.load(file, weights_only=False)):
        torch.testing.assert_close(network(x).logits, small(x).logits)
        torch.testing.assert_close(network(x).hidden[0], small(x).logits * 2)


def test_a_process_that_loads_a_graph_traces_as_before(tmp_path: Path) -> None:
    model = randomize(Body(lambda m, x: m.layers(x)))
    small = vbpfx.prune(
        model, [torch.randn(6, 8)], ratio=0.5, method="vbp", frontend="export", progress=False
    ).graph_module
    torch.save(small, tmp_path / "small.pt")
    code = f"""
import torch, vbpfx
loaded = torch.load({str(tmp_path / "small.pt")!r}, weights_only=False)
model = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.ReLU(), torch.nn.Linear(12, 4))
x = torch.randn(3, 8)
torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))
print(vbpfx.find_blocks(vbpfx.capture(model, x, frontend="symbolic")).neurons)
torch.save(loaded, {str(tmp_path / "again.pt")!r})
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "12\n"), run.stderr
    again = torch.load(tmp_path / "again.pt", weights_only=False)
    assert_same(again, small, *as_inputs(torch.randn(5, 8), small).args)
