"""Pruning from ExportedProgram to ExportedProgram."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from oracle import randomize
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import vbpfx
from vbpfx.data.inputs import Inputs
from vbpfx.errors import CalibrationError, CaptureError, ExportError
from vbpfx.export.exported_program import export_program
from vbpfx.outputs.differences import relative_error


class Nested(nn.Module):
    """Keyword arguments, a dictionary input, nested outputs, a layer without bias, a constant and two buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 24), nn.Linear(24, 5, bias=False)
        self.norm, self.head = nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.register_buffer("shift", torch.randn(5))
        self.register_buffer("hidden", torch.randn(5), persistent=False)
        self.constant = torch.tensor(1.5)

    def forward(self, x: dict[str, Tensor], *, scale: Tensor, power: int = 2) -> dict[str, Any]:
        y = self.norm(self.b(F.gelu(self.a(x["x"] + x["y"]))) * scale**power + self.shift)
        return {"out": self.head(y), "rest": [y * self.constant, (y + self.hidden).sum(-1)]}


class Tokens(nn.Module):
    """A network with two dynamic axes, batch and length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return x + self.mlp(x)


def nested(dynamic: bool = True) -> tuple[nn.Module, ExportedProgram]:
    model = randomize(Nested()).double().eval()
    batch = Dim("batch", min=2, max=40)
    args, kwargs = nested_inputs(3)
    sizes = {"x": {"x": {0: batch}, "y": {0: batch}}, "scale": {0: batch}, "power": None} if dynamic else None
    return model, torch.export.export(model, args, kwargs, dynamic_shapes=sizes)


def nested_inputs(samples: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x, y = torch.randn(2, samples, 6, dtype=torch.float64)
    return ({"x": x, "y": y},), {"scale": torch.rand(samples, 1, dtype=torch.float64), "power": 3}


def leaves(output: Any) -> list[Tensor]:
    return pytree.tree_leaves(output)


@pytest.mark.parametrize("method", ["vbp", "auto"])
def test_it_computes_what_the_pruned_model_computes(method: str) -> None:
    model, program = nested()
    data = [nested_inputs(20) for _ in range(3)]
    options: Any = {"ratio": 0.5, "method": method, "progress": False}
    small = vbpfx.prune_exported(program, data, **options)
    assert small.state_dict["a.weight"].shape == (12, 6)
    assert small.state_dict["b.weight"].shape == (5, 12)
    expected = vbpfx.prune(model, data, **options).graph_module
    for samples in (2, 3, 7, 40):
        args, kwargs = nested_inputs(samples)
        found, reference = small.module()(*args, **kwargs), expected(*args, **kwargs)
        assert pytree.tree_structure(found) == pytree.tree_structure(reference)
        assert relative_error(leaves(found), leaves(reference)) < 1e-9
        assert relative_error(leaves(found), leaves(model(*args, **kwargs))) > 1e-3


def test_names_kinds_ranges_and_structure_stay() -> None:
    _, program = nested()
    before, text = {name: value.clone() for name, value in program.state_dict.items()}, str(program)
    small = vbpfx.prune_exported(program, [nested_inputs(20)], ratio=0.5, progress=False)
    assert small.call_spec.in_spec == program.call_spec.in_spec
    assert small.call_spec.out_spec == program.call_spec.out_spec
    assert set(small.state_dict) == {*program.state_dict, "b.bias"}
    assert set(small.constants) == set(program.constants) != set()
    for name in ("non_persistent_buffers", "buffers", "user_inputs"):
        assert list(getattr(small.graph_signature, name)) == list(getattr(program.graph_signature, name))
    for name in program.state_dict.keys() - {"a.weight", "a.bias", "b.weight"}:
        assert torch.equal(small.state_dict[name], program.state_dict[name])
    assert [(r.lower, r.upper) for r in small.range_constraints.values()] == [(2, 40)]
    with pytest.raises(AssertionError, match="<= 40"):
        small.module()(*nested_inputs(41)[0], **nested_inputs(41)[1])
    assert str(program) == text
    assert all(torch.equal(program.state_dict[name], value) for name, value in before.items())


def test_nodes_tell_where_they_come_from() -> None:
    _, program = nested()
    small = vbpfx.prune_exported(program, [nested_inputs(20)], ratio=0.5, progress=False)
    (gelu,) = small.graph.find_nodes(op="call_function", target=torch.ops.aten.gelu.default)
    linear = small.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    modules = [list(node.meta["nn_module_stack"].values())[-1] for node in linear]
    assert [path for path, _ in modules] == ["a", "b", "head"]
    assert all(kind.endswith("Linear") for _, kind in modules)
    assert "F.gelu" in gelu.meta["stack_trace"]


def test_sizes_stay_open_and_equal() -> None:
    model = randomize(Tokens()).double().eval()
    batch, length = Dim("batch"), Dim("length", min=3, max=19)
    ids = torch.randint(11, (2, 5))
    program = torch.export.export(model, (ids,), dynamic_shapes=({0: batch, 1: length},))
    small = vbpfx.prune_exported(program, [torch.randint(11, (9, 7))], ratio=0.5, progress=False)
    for shape in ((2, 3), (4, 19), (31, 8)):
        assert small.module()(torch.randint(11, shape)).shape == (*shape, 8)
    with pytest.raises(AssertionError, match="<= 19"):
        small.module()(torch.randint(11, (2, 20)))


def test_a_size_that_follows_another_goes_on_following() -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.mlp(x) + y[: x.shape[0]] + y[x.shape[0] : -1]

    model, n = randomize(Pairs()).eval(), Dim("n", max=30)
    program = torch.export.export(
        model, (torch.randn(3, 4), torch.randn(7, 4)), dynamic_shapes=({0: n}, {0: 2 * n + 1})
    )
    small = vbpfx.prune_exported(program, [(torch.randn(20, 4), torch.randn(41, 4))], ratio=0.5, progress=False)
    assert small.module()(torch.randn(5, 4), torch.randn(11, 4)).shape == (5, 4)
    with pytest.raises(AssertionError, match="Guard failed"):
        small.module()(torch.randn(5, 4), torch.randn(10, 4))


@pytest.mark.parametrize("samples", [1, 8])
def test_one_fixed_batch_size(samples: int) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 24), nn.Linear(24, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = x.reshape(x.shape[0] * 3, 6)
            return self.b(F.gelu(self.a(x))).reshape(-1, 3, 6)

    model = randomize(Fixed()).double().eval()
    data = [torch.randn(samples, 3, 6, dtype=torch.float64) for _ in range(40)]
    program = torch.export.export(model, (data[0],))
    options: Any = {"ratio": 0.5, "progress": False}
    small = vbpfx.prune_exported(program, data, **options)
    reference = vbpfx.prune(model, data, **options).graph_module
    assert relative_error([small.module()(data[1])], [reference(data[1])]) < 1e-9
    with pytest.raises(CalibrationError, match=rf"batch 2 .* axis 0, and the program only accepts {samples}:"):
        vbpfx.prune_exported(program, [data[0], torch.randn(5, 3, 6, dtype=torch.float64)], **options)


def test_from_a_model_with_an_open_batch() -> None:
    model = randomize(Tokens()).double().eval()
    pruned = vbpfx.prune(model, [torch.randint(11, (9, 7))], ratio=0.5, progress=False)
    program = pruned.to_exported_program()
    for shape in ((2, 3), (5, 9)):
        ids = torch.randint(11, shape)
        assert relative_error([program.module()(ids)], [pruned.graph_module(ids)]) < 1e-12


def test_decomposed_programs() -> None:
    model = nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 6))
    model = randomize(model).double().eval()
    x = torch.randn(30, 6, dtype=torch.float64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("n")},)).run_decompositions()
    small = vbpfx.prune_exported(program, [x], ratio=0.5, method="vbp", progress=False)
    reference = vbpfx.prune(model, [x], ratio=0.5, method="vbp", progress=False).graph_module
    assert relative_error([small.module()(x)], [reference(x)]) < 1e-9


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (({"x": torch.randn(41, 6), "y": torch.randn(41, 6)}, torch.rand(41, 1)), "has size 41 on axis 0, .* 2 to 40"),
        (({"x": torch.randn(4, 6), "y": torch.randn(4, 6)}, torch.rand(5, 1)), "where an equal size before is 4"),
        (({"x": torch.randn(4, 7), "y": torch.randn(4, 7)}, torch.rand(4, 1)), "size 7 on axis 1, .* only accepts 6:"),
        (({"x": torch.randn(4, 6, 1), "y": torch.randn(4, 6)}, torch.rand(4, 1)), "3 axes, the program takes 2"),
        (({"x": torch.randn(4, 6), "y": 1}, torch.rand(4, 1)), "is a tensor in the program, a int in the batch"),
        (({"x": torch.randn(4, 6)}, torch.rand(4, 1)), "batch 2 .* does not fit the program"),
    ],
)
def test_batches_that_break_the_constraints(batch: Any, message: str) -> None:
    _, program = nested()
    wrong = (batch[0],), {"scale": batch[1], "power": 3}
    with pytest.raises(CalibrationError, match=message) as raised:
        vbpfx.prune_exported(program, [nested_inputs(4), wrong], ratio=0.5, progress=False)
    assert "batch 2 (counted from 1)" in str(raised.value)


def test_a_value_that_is_built_in_may_not_change() -> None:
    _, program = nested()
    args, kwargs = nested_inputs(4)
    with pytest.raises(CalibrationError, match="power is 3 in the program"):
        vbpfx.prune_exported(program, [(args, kwargs | {"power": 2})], ratio=0.5, progress=False)


def test_batches_name_arguments_in_any_order() -> None:
    _, program = nested()
    (x,), kwargs = nested_inputs(20)
    reverse = {"power": kwargs["power"], "scale": kwargs["scale"], "x": {"y": x["y"], "x": x["x"]}}
    found, expected = (
        vbpfx.prune_exported(program, [batch], ratio=0.5, progress=False) for batch in (reverse, ((x,), kwargs))
    )
    assert all(torch.equal(value, expected.state_dict[name]) for name, value in found.state_dict.items())


def test_no_batches() -> None:
    _, program = nested()
    with pytest.raises(CalibrationError, match="empty"):
        vbpfx.prune_exported(program, [], ratio=0.5, progress=False)
    with pytest.raises(CalibrationError, match="one Tensor"):
        vbpfx.prune_exported(program, torch.randn(3, 6), ratio=0.5, progress=False)


class Remembers(nn.Module):
    """A network that counts its calls in a buffer, through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4))
        self.register_buffer("calls", torch.zeros(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.view(-1)[:1].add_(1)
        return self.mlp(x)


@pytest.mark.parametrize("decomposed", [False, True])
def test_programs_that_write_to_buffers_are_refused(decomposed: bool) -> None:
    program = torch.export.export(Remembers().eval(), (torch.randn(3, 4),))
    program = program.run_decompositions() if decomposed else program
    with pytest.raises(CaptureError, match="writes to calls"):
        vbpfx.prune_exported(program, [torch.randn(3, 4)], ratio=0.5)


def test_programs_in_training_mode_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 4)).train()
    program = torch.export.export(model, (torch.randn(3, 4),))
    with pytest.raises(CaptureError, match=r"training mode \(node dropout .* export model.eval\(\)"):
        vbpfx.prune_exported(program, [torch.randn(3, 4)], ratio=0.5, progress=False)


def test_what_is_no_program_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"expected a torch.export.ExportedProgram, got Linear"):
        vbpfx.prune_exported(nn.Linear(3, 3), [torch.randn(2, 3)], ratio=0.5)  # type: ignore[arg-type]
    program = torch.export.export(nn.Sequential(nn.Linear(4, 4)).eval(), (torch.randn(3, 4),))
    with pytest.raises(vbpfx.AnalysisError):
        vbpfx.prune_exported(program, [torch.randn(3, 4)], ratio=0.5, progress=False)
    program.example_inputs = None
    with pytest.raises(CaptureError, match="no example inputs"):
        vbpfx.prune_exported(program, [torch.randn(3, 4)], ratio=0.5, progress=False)


def test_what_cannot_be_exported_says_so() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, 3)

    with pytest.raises(ExportError, match="cannot export the network"):
        export_program(Fixed(), Inputs((torch.randn(2, 3),), {}))


def test_a_program_that_computes_something_else_is_refused() -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (2 if torch.compiler.is_exporting() else 1)

    with pytest.raises(ExportError, match=r"the program differs from the network by 1\.00e\+00"):
        export_program(Other(), Inputs((torch.randn(2, 3),), {}))


@pytest.mark.parametrize("chosen", ["all", "by module"])
def test_pt2e_quantises_the_result(chosen: str) -> None:
    pytest.importorskip("torchao")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        model = randomize(nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8))).eval()
        data = [torch.randn(64, 16) for _ in range(4)]
        program = torch.export.export(model, (data[0],), dynamic_shapes=({0: Dim("n")},))
        small = vbpfx.prune_exported(program, data, ratio=0.5, progress=False)
        config = x86.get_default_x86_inductor_quantization_config()
        quantizer = x86.X86InductorQuantizer()
        quantizer = quantizer.set_global(config) if chosen == "all" else quantizer.set_module_name_qconfig("0", config)
        prepared = prepare_pt2e(small.module(), quantizer)
        for batch in data:
            prepared(batch)
        quantized = convert_pt2e(prepared)
    per_channel = torch.ops.quantized_decomposed.dequantize_per_channel.default
    weights = [node.args[0] for node in quantized.graph.find_nodes(op="call_function", target=per_channel)]
    tensors = dict(quantized.named_buffers()) | dict(quantized.named_parameters())
    stored = [tensors[str(weight.target)] for weight in weights]
    shapes = [(32, 16), (8, 32)] if chosen == "all" else [(32, 16)]
    assert [(w.dtype, tuple(w.shape)) for w in stored] == [(torch.int8, shape) for shape in shapes]
    fresh = torch.randn(100, 16)
    # An 8-bit step is 1/255 of a range of about 6 standard deviations, which gives 0.7 % of noise at each of three values.
    error = (quantized(fresh) - small.module()(fresh)).std() / small.module()(fresh).std()
    assert 1e-4 < error < 0.03


@pytest.mark.parametrize("dynamic", [False, True])
def test_tvm_compiles_the_result(dynamic: bool) -> None:
    tvm = pytest.importorskip("tvm")
    from tvm.relax import VirtualMachine
    from tvm.relax.frontend.torch import from_exported_program

    model, data = randomize(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4))).eval(), [torch.randn(16, 8)]
    program = torch.export.export(model, (data[0],), dynamic_shapes=({0: Dim("n")},) if dynamic else None)
    small = vbpfx.prune_exported(program, data, ratio=0.5, progress=False)
    machine = VirtualMachine(tvm.compile(from_exported_program(small), "llvm"), tvm.cpu())
    (found,) = machine["main"](tvm.runtime.tensor(data[0].numpy()))
    assert relative_error([torch.from_numpy(found.numpy())], [small.module()(data[0])]) < 1e-5
