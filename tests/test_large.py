"""Models that do not fit in memory: pruning from files gives the result of pruning in memory, bit for bit."""

from __future__ import annotations

import copy
import functools
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import randomize, state
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vbpfx
from vbpfx.data.inputs import as_inputs
from vbpfx.graph.capture import Frontend, named_tensors
from vbpfx.models.weightless import Weightless
from vbpfx.pipeline import files as large
from vbpfx.pipeline.loading import Loading, Loans, pieces, runnable
from vbpfx.rewrite.narrow import Changes
from vbpfx.rewrite.verify import Outputs, judge
from vbpfx.storage.tensors import Stored, write_shards

KIB = 2**-20  # one KiB in GiB, the unit of memory=
WIDTH, HIDDEN, WORDS, BLOCKS = 16, 24, 50, 4


class Residual(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(WIDTH), nn.GELU()
        self.first, self.second = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.act(self.first(self.norm(x))))


class Words(nn.Module):
    """Tied weights, a BatchNorm with running statistics, and a non-persistent buffer."""

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.Sequential(*(Residual(HIDDEN + 2 * number) for number in range(BLOCKS)))
        self.norm = nn.BatchNorm1d(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("frequencies", torch.arange(WIDTH).float().sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.blocks(self.embed(ids) + self.frequencies)
        return self.head(self.norm(x.transpose(1, 2)).transpose(1, 2))


def _words() -> nn.Module:
    model = randomize(Words()).eval()
    model.frequencies.copy_(torch.arange(WIDTH).float().sin())
    return model


BATCHES = [torch.randint(0, WORDS, (n, 5), generator=torch.Generator().manual_seed(n)) for n in (6, 8, 3)]
# Room for the weights of two blocks, and for all samples with 16 float32 at 5 positions each.
TIGHT = 16 * KIB


def _files(model: nn.Module, folder: Path) -> list[Path]:
    """Write the state dict to three files, with tied weights stored once."""
    folder.mkdir(exist_ok=True)
    tied = ("head.weight", "second.0.", "second.2.")
    tensors = {name: t.contiguous() for name, t in model.state_dict().items() if not name.startswith(tied)}
    parts = [dict(list(tensors.items())[n::3]) for n in range(3)]
    for number, part in enumerate(parts):
        save_file(part, folder / f"{number}.safetensors")
    return sorted(folder.glob("*.safetensors"))


def _hollow() -> nn.Module:
    with vbpfx.without_weights():
        return Words()


def _assert_same_plan(found: vbpfx.Plan, expected: vbpfx.Plan) -> None:
    assert found.removed == expected.removed > 0
    assert dict(found.settings) == dict(expected.settings)
    for a, b in zip(found.blocks, expected.blocks, strict=True):
        assert (a.block, a.kept) == (b.block, b.kept)
        assert all(torch.equal(x, y) for x, y in zip(a.constants, b.constants, strict=True))
        for x, y in zip(a.predictions, b.predictions, strict=True):
            assert (x is None) == (y is None)
            assert x is None or torch.equal(x, y)


def _assert_files_hold(out: Path, network: nn.Module) -> None:
    """Assert that the files hold every parameter and buffer of the network under its name, bit for bit."""
    found = named_tensors(vbpfx.load(out))
    expected = named_tensors(network)
    assert found.keys() >= expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


OPTIONS: dict[str, dict[str, Any]] = {
    "vbp": {"ratio": 0.3},
    "rounded": {"ratio": 0.4, "round_to": 4, "exclude": "*1*"},
    "weights in the scores": {"macs": 0.8, "criterion": "output_variance", "allocation": "normalised"},
    "no statistics": {"params": 0.8, "criterion": "magnitude", "compensation": "none"},
    "covariances": {"ratio": 0.4, "criterion": "greedy_obs", "allocation": "equal", "compensation": "ridge"},
    "covariances in the fold": {"ratio": 0.4, "compensation": "ridge"},
    "auto without reconstruction": {"ratio": 0.4, "method": "auto", "allocation": "equal", "compensation": "mean"},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_the_result_is_that_of_the_path_in_memory(case: str, tmp_path: Path) -> None:
    model, options = _words(), {"method": "vbp"} | OPTIONS[case]
    expected = vbpfx.prune(model, BATCHES, progress=False, **options)
    files = _files(model, tmp_path)
    result = vbpfx.prune_files(
        _hollow(), BATCHES, tmp_path / "out", weights=files, memory=TIGHT, progress=False, **options
    )
    _assert_same_plan(result.plan, expected.plan)
    _assert_files_hold(tmp_path / "out", expected.graph_module)
    with torch.no_grad():
        assert torch.equal(vbpfx.load(tmp_path / "out")(BATCHES[0]), expected.graph_module(BATCHES[0]))
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert result.verification is not None
    assert result.verification.effect > 1e-3
    assert result.verification.error < 1e-5
    assert result.report.params == expected.report.params
    assert result.report.macs == expected.report.macs
    assert all(m.co is None for found in result.statistics.moments.values() for m in found)


def _padded() -> nn.Module:
    """Return padded and grouped convolutions, the first of which read neurons that hardly vary."""
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1, groups=2)]
    return nn.Sequential(*layers, nn.BatchNorm2d(24), nn.ReLU(), nn.ConvTranspose2d(24, 5, 3, 2, 1))


@pytest.mark.parametrize("compensation", ["mean", "ridge"])
def test_convolutions_with_constant_channels(compensation: str, tmp_path: Path) -> None:
    model, batches = randomize(_padded()).eval(), [torch.randn(5, 3, 8, 8), torch.randn(3, 3, 8, 8)]
    with torch.no_grad():
        model[1].weight.mul_(0.1)
        nn.init.uniform_(model[1].bias, 1.0, 2.0)
    with vbpfx.without_weights():
        hollow = _padded()
    options: dict[str, Any] = {"ratio": 0.5, "compensation": compensation, "method": "vbp", "progress": False}
    expected = vbpfx.prune(model, batches, **options)
    assert compensation == "ridge" or any(entry.constants_in for entry in expected.plan.blocks)
    result = vbpfx.prune_files(
        hollow, batches, tmp_path / "out", weights=_files(model, tmp_path / "in"), memory=TIGHT, **options
    )
    _assert_same_plan(result.plan, expected.plan)
    assert [e.constants_in for e in result.plan.blocks] == [e.constants_in for e in expected.plan.blocks]
    _assert_files_hold(tmp_path / "out", expected.graph_module)


class ReadsAPart(nn.Module):
    """Its forward pass reads the weight of a module that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(nn.functional.linear(x, self.first.weight, self.first.bias)))


def _encoder() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.TransformerEncoderLayer(WIDTH, 2, HIDDEN, batch_first=True))


@pytest.mark.parametrize("make", [_encoder, ReadsAPart])
def test_modules_that_read_the_weights_of_others(make: Any, tmp_path: Path) -> None:
    model, batches = randomize(make()).eval(), [torch.randn(5, 7, WIDTH)]
    with vbpfx.without_weights():
        hollow = make()
    options: dict[str, Any] = {"weights": _files(model, tmp_path), "ratio": 0.4, "progress": False}
    expected = vbpfx.prune(model, batches, ratio=0.4, method="vbp", progress=False)
    if make is ReadsAPart:
        with pytest.raises(vbpfx.VerificationError, match=r"ReadsAPart does not run .*verify=False"):
            vbpfx.prune_files(hollow, batches, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
        options["verify"] = False
    result = vbpfx.prune_files(hollow, batches, tmp_path / "out", **options)
    _assert_same_plan(result.plan, expected.plan)
    _assert_files_hold(tmp_path / "out", expected.graph_module)


class Twice(nn.Module):
    """One block under two names, of which the graph uses the first, and a non-persistent buffer that counts calls."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH, bias=False))
        self.second = self.first
        self.register_buffer("calls", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x + self.second(x + self.first(x))


@pytest.mark.parametrize("names", [("first",), ("second",), ("first", "second")], ids=str)
def test_tied_weights_under_any_of_their_names(names: tuple[str, ...], tmp_path: Path) -> None:
    model, batches = randomize(Twice()).eval(), [torch.randn(5, WIDTH)]
    save_file(
        {name: t.clone() for name, t in model.state_dict().items() if name.startswith(names)},
        tmp_path / "model.safetensors",
    )
    with vbpfx.without_weights():
        hollow = Twice()
    expected = vbpfx.prune(model, batches, ratio=0.4, method="vbp", progress=False)
    vbpfx.prune_files(hollow, batches, tmp_path / "out", weights=tmp_path, ratio=0.4, progress=False)
    assert torch.equal(vbpfx.load(tmp_path / "out")(batches[0]), expected.graph_module(batches[0]))
    widths = {name: len(t) for name, t in load_file(tmp_path / "out" / "model.safetensors").items() if ".0." in name}
    (kept,) = expected.plan.widths.values()
    assert widths == {f"{names[0]}.0.weight": kept, f"{names[0]}.0.bias": kept}


def test_buffers_that_forward_writes_stay_the_callers_own(tmp_path: Path) -> None:
    model, batches = randomize(Twice()).eval(), [torch.randn(5, WIDTH), torch.randn(3, WIDTH)]
    with vbpfx.without_weights():
        hollow = Twice()
    files = _files(model, tmp_path / "dense")
    vbpfx.prune_files(hollow, batches, tmp_path / "out", weights=files, ratio=0.4, progress=False)
    assert not hollow.calls.any()


@dataclass
class Answer:
    half: Tensor
    rest: tuple[Tensor, ...]


class Answering(Residual):
    """A network whose output is ``answer`` applied to the output of a block."""

    def __init__(self, answer: Any) -> None:
        super().__init__(HIDDEN)
        self.answer = answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(super().forward(x))


@pytest.mark.parametrize(
    "answer",
    [
        lambda y: y.chunk(2, -1),
        lambda y: {"a": y, "b": [y.max(-1), None]},
        lambda y: Answer(y + 1, y.chunk(2, -1)),
    ],
    ids=["tuple", "dict", "dataclass"],
)
def test_the_oracle_sees_outputs_of_any_structure(answer: Any, tmp_path: Path) -> None:
    model, batches = randomize(Answering(answer)).eval(), [torch.randn(5, WIDTH)]
    with vbpfx.without_weights():
        hollow = Answering(answer)
    files, common = _files(model, tmp_path), {"ratio": 0.4, "progress": False}
    expected = vbpfx.prune(model, batches, method="vbp", **common).verification
    found = vbpfx.prune_files(hollow, batches, tmp_path / "out", weights=files, **common).verification
    assert expected is not None
    assert found is not None
    assert found.effect > 1e-3
    assert found.effect == pytest.approx(expected.effect)


class InAutocast(Residual):
    """Its hidden layer runs under CPU autocast."""

    def __init__(self, enabled: bool) -> None:
        super().__init__(HIDDEN)
        self.enabled = enabled

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            return super().forward(x)


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_autocast_regions_of_the_cpu_are_judged_as_in_memory(frontend: Frontend, enabled: bool, tmp_path: Path) -> None:
    """The graph is captured on the meta device, which has no autocast, and later runs on the CPU."""
    model, batches = randomize(InAutocast(enabled)).eval(), [torch.randn(5, WIDTH)]
    with vbpfx.without_weights():
        hollow = InAutocast(enabled)
    files, out = _files(model, tmp_path), tmp_path / "out"
    options: dict[str, Any] = {"ratio": 0.4, "progress": False, "frontend": frontend}
    if not enabled:
        result = vbpfx.prune_files(hollow, batches, out, weights=files, **options)
        _assert_same_plan(result.plan, vbpfx.prune(model, batches, method="vbp", **options).plan)
        return
    message = r"torch\.autocast\('cpu', dtype=torch\.bfloat16\)"
    with pytest.raises(vbpfx.CaptureError, match=message):
        vbpfx.prune(model, batches, method="vbp", **options)
    with pytest.raises(vbpfx.CaptureError, match=message):
        vbpfx.prune_files(hollow, batches, out, weights=files, **options)
    assert not out.exists()


class OfLengths(Residual):
    """Its code reads the length of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).reshape(x.shape[0], x.shape[1], WIDTH)


def test_sizes_in_which_batches_differ_stay_open_as_in_memory(tmp_path: Path) -> None:
    model, batches = randomize(OfLengths(HIDDEN)).eval(), [torch.randn(4, length, WIDTH) for length in (5, 7)]
    with vbpfx.without_weights():
        hollow = OfLengths(HIDDEN)
    options: dict[str, Any] = {"ratio": 0.4, "method": "vbp", "progress": False, "frontend": "export"}
    expected = vbpfx.prune(model, batches, **options)
    files = _files(model, tmp_path)
    result = vbpfx.prune_files(hollow, batches, tmp_path / "out", weights=files, **options)
    _assert_same_plan(result.plan, expected.plan)
    assert torch.equal(vbpfx.load(tmp_path / "out")(batches[1]), expected.graph_module(batches[1]))


def test_an_output_that_nothing_can_be_compared_of_is_not_proven() -> None:
    kept = Outputs([], [], [], [])
    plan = vbpfx.prune(
        randomize(Residual(HIDDEN)), [torch.randn(5, WIDTH)], ratio=0.4, method="vbp", progress=False
    ).plan
    with pytest.raises(vbpfx.VerificationError, match="holds no tensor"):
        judge(kept, plan)


def test_half_precision_on_the_cpu_is_refused_as_in_memory(tmp_path: Path) -> None:
    model = randomize(Residual(HIDDEN)).eval()
    with vbpfx.without_weights():
        hollow = Residual(HIDDEN).half()
    files, batches = _files(model.half(), tmp_path), [torch.randn(5, WIDTH).half()]
    with pytest.raises(vbpfx.ModelError, match=r"norm.weight of Residual is float16 .*without \.half\(\)"):
        vbpfx.prune_files(hollow, batches, tmp_path / "out", weights=files, ratio=0.4, progress=False)
    with vbpfx.without_weights():
        hollow = Residual(HIDDEN)
    batches = [batches[0].float()]
    vbpfx.prune_files(hollow, batches, tmp_path / "out", weights=files, ratio=0.4, progress=False)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float16}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shard_size", [None, 2000])
def test_half_precision_in_files_is_loaded_in_the_precision_of_the_pruning(
    dtype: torch.dtype, shard_size: int | None, tmp_path: Path
) -> None:
    """Weights are loaded from half precision and computed in float32, including tied tensors and separate buffers."""
    model, out = _words(), tmp_path / "out"
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(tensor.to(dtype))
    halves = {name: t.to(dtype) if t.is_floating_point() else t for name, t in model.state_dict().items()}
    del halves["head.weight"]
    save_file(halves, tmp_path / "half.safetensors")
    files, options = tmp_path / "half.safetensors", {"ratio": 0.3, "progress": False}
    vbpfx.prune_files(_hollow(), BATCHES, out, weights=files, shard_size=shard_size, **options)
    stored, expected = Stored.of(out), vbpfx.prune(model, BATCHES, method="vbp", **options).graph_module
    assert {shape.dtype for shape in stored.shapes.values() if shape.is_floating_point()} == {dtype}
    with torch.no_grad():
        for name in named_tensors(expected).keys() & stored.files.keys():
            named_tensors(expected)[name].copy_(stored.read(name))
    for network in (vbpfx.load(out), vbpfx.load(out, into=_words()).eval()):
        assert {p.dtype for p in network.parameters()} == {torch.float32}
        assert torch.equal(network(BATCHES[0]), expected(BATCHES[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_are_those_of_the_files(dtype: torch.dtype, tmp_path: Path) -> None:
    """Sizes follow the dtype in the files and not the float32 in which the model is built."""
    with vbpfx.without_weights():
        hollow = Residual(HIDDEN)
    files = _files(randomize(Residual(HIDDEN)).to(dtype), tmp_path)
    given = {"weights": files, "ratio": 0.4, "progress": False}
    report = vbpfx.prune_files(hollow, [torch.randn(5, WIDTH)], tmp_path / "out", **given).report
    sizes = [
        sum(t.nbytes for f in found for t in load_file(f).values())
        for found in (files, tmp_path.glob("out/model*.safetensors"))
    ]
    assert report.size == tuple(sizes)
    if dtype == torch.float32:
        assert report.size == tuple(4 * n for n in report.params)


def test_saving_over_shards(tmp_path: Path) -> None:
    """A new artifact replaces old shards and their buffer file, which must not be loaded any more."""
    model, out = _words(), tmp_path / "out"
    files, options = _files(model, tmp_path), {"ratio": 0.3, "method": "vbp", "progress": False}
    vbpfx.prune_files(_hollow(), BATCHES, out, weights=files, shard_size=2000, **options)
    assert (out / "model.safetensors.index.json").exists()
    assert (out / "buffers.safetensors").exists()
    with torch.no_grad():
        model.norm.weight.mul_(2)
        model.frequencies.mul_(3)
    other = vbpfx.prune(model, BATCHES, **options)
    other.save(out)
    assert torch.equal(vbpfx.load(out)(BATCHES[0]), other.graph_module(BATCHES[0]))
    assert {path.name for path in out.glob("*.safetensors*")} == {"model.safetensors", "plan.safetensors"}


def test_texts_of_unequal_length_enter_covariances_as_in_memory(tmp_path: Path) -> None:
    """Rows are selected by the number of their sample and not by the number of earlier rows."""
    texts = [
        torch.randint(0, WORDS, (4, length), generator=torch.Generator().manual_seed(length)) for length in (5, 9, 4)
    ]
    model, options = _words(), {"method": "vbp", "ratio": 0.4, "compensation": "ridge", "progress": False}
    expected = vbpfx.prune(model, texts, **options)
    result = vbpfx.prune_files(_hollow(), texts, tmp_path / "out", weights=_files(model, tmp_path), **options)
    _assert_same_plan(result.plan, expected.plan)


def test_an_artifact_in_shards_loads_into_the_class(tmp_path: Path) -> None:
    model = _words()
    expected = vbpfx.prune(model, BATCHES, ratio=0.3, method="vbp", progress=False)
    files = _files(model, tmp_path)
    vbpfx.prune_files(_hollow(), BATCHES, tmp_path / "out", weights=files, memory=TIGHT, ratio=0.3, progress=False)
    loaded = vbpfx.load(tmp_path / "out", into=randomize(Words()).eval())
    own = expected.apply_to(model)
    assert all(torch.equal(t, named_tensors(loaded)[name]) for name, t in named_tensors(own).items())


def test_batches_that_do_not_fit_at_once_go_through_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A residual stream of 17 samples, 5 positions and 16 float32 takes 5440 bytes, more than half of 8 KiB."""
    model, ways = _words(), []
    run = Loading.run
    monkeypatch.setattr(
        Loading, "run", lambda self, batches, **how: [ways.append(len(batches)), run(self, batches, **how)][1]
    )
    files = _files(model, tmp_path)
    options = {"weights": files, "memory": 8 * KIB, "ratio": 0.3, "progress": False, "verify": False}
    result = vbpfx.prune_files(_hollow(), BATCHES, tmp_path / "out", **options)
    assert ways == [1, 2]  # 4 KiB hold 12 samples; the batches have 6, 8 and 3
    _assert_same_plan(result.plan, vbpfx.prune(model, BATCHES, ratio=0.3, method="vbp", progress=False).plan)
    with pytest.raises(vbpfx.CalibrationError, match=r"17 samples need . passes .* memory="):
        vbpfx.prune_files(_hollow(), BATCHES, tmp_path / "other", compensation="ridge", **options)


def test_pieces_hold_no_more_weights_than_allowed(tmp_path: Path) -> None:
    model = _words()
    hollow = Weightless.of(_hollow(), _files(model, tmp_path))
    captured = vbpfx.capture(hollow.model, BATCHES[0])
    graph = runnable(copy.deepcopy(captured.graph_module))
    tensors = named_tensors(graph)
    one_block = 4 * (2 * WIDTH * (HIDDEN + 6) + HIDDEN + 6 + 2 * WIDTH)
    assert captured.batch is not None
    found = pieces(graph, captured.batch, one_block)
    names = [node.name for node in graph.graph.nodes]
    lasts = [names.index(piece.last) for piece in found]
    assert lasts == sorted(set(lasts))
    assert names[lasts[-1]] == "head"  # only the output follows
    assert len(found) >= BLOCKS
    for piece in found:
        size = sum(4 * tensors[name].numel() for name in piece.tensors)
        assert size <= max(one_block, 4 * WORDS * WIDTH)
    # Between blocks, a sample only needs the residual stream: 5 positions with 16 float32.
    assert max(piece.live_bytes for piece in found[:-1]) == 5 * WIDTH * 4

    loans = Loans(hollow.stored, hollow.names, hollow.buffers)
    before = state(graph)["identities"]
    seen: list[int] = []

    def look(number: int) -> None:
        seen.append(sum(4 * t.numel() for t in dict.fromkeys(graph.parameters()) if not t.is_meta))

    loading = Loading(graph, loans, captured.batch, one_block)
    (outputs,) = loading.run([as_inputs(BATCHES[0], model)], before=look)
    with torch.no_grad():
        assert torch.equal(outputs[0], model(BATCHES[0]))
    assert max(seen) <= max(one_block, 4 * WORDS * WIDTH)
    assert state(graph)["identities"] == before
    assert all(parameter.is_meta for parameter in graph.parameters())


def test_without_weights_leaves_buffers_and_ties() -> None:
    hollow = _hollow()
    assert all(parameter.is_meta for parameter in hollow.parameters())
    assert hollow.head.weight is hollow.embed.weight
    assert torch.equal(hollow.frequencies, torch.arange(WIDTH).float().sin())
    assert not nn.Linear(2, 2).weight.is_meta  # the context has ended


def test_the_model_given_stays_as_it_was(tmp_path: Path) -> None:
    hollow = _hollow()
    identities, modes = state(hollow)["identities"], state(hollow)["modes"]
    files = _files(_words(), tmp_path)
    contents = [path.read_bytes() for path in files]
    vbpfx.prune_files(hollow, BATCHES, tmp_path / "out", weights=files, ratio=0.3, progress=False)
    assert (state(hollow)["identities"], state(hollow)["modes"]) == (identities, modes)
    assert [path.read_bytes() for path in files] == contents


def _missing(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if name != "blocks.0.first.weight"}


def _reshaped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"blocks.0.first.weight": torch.zeros(3, 3)}


def _quantised(dtype: torch.dtype, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"blocks.0.first.weight": tensors["blocks.0.first.weight"].to(dtype)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_missing, "blocks.0.first.weight is missing"),
        (_reshaped, r"blocks.0.first.weight has shape \(3, 3\)"),
        (
            functools.partial(_quantised, torch.int8),
            "first.weight is stored as torch.int8, and vbpfx does not read quantised",
        ),
        (functools.partial(_quantised, torch.float8_e4m3fn), "first.weight is stored as torch.float8_e4m3fn, and"),
    ],
)
def test_files_that_do_not_fit(change: Any, message: str, tmp_path: Path) -> None:
    tensors = {name: t for name, t in _words().state_dict().items() if name != "head.weight"}
    save_file(change(tensors), tmp_path / "model.safetensors")
    with pytest.raises(vbpfx.ModelError, match=message):
        vbpfx.prune_files(_hollow(), BATCHES, tmp_path / "out", weights=tmp_path, ratio=0.3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model.safetensors": b"no tensors"}, "cannot read .*model.safetensors as safetensors"),
        ({"model.safetensors.index.json": b'{"weights": 3}'}, "is not an index of safetensors files"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "../a.safetensors"}}'}, "outside of its folder"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "a.safetensors"}}'}, "a.safetensors as safetensors"),
        ({}, "model.safetensors is missing"),
    ],
)
def test_folders_without_weights_to_read(files: Mapping[str, bytes], message: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(vbpfx.ModelError, match=message):
        Stored.of(tmp_path)


def test_two_files_that_hold_the_same(tmp_path: Path) -> None:
    for name in "ab":
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(vbpfx.ModelError, match=r"b.safetensors holds x, and so does .*a.safetensors"):
        Stored.of([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


def test_buffers_whose_values_nobody_knows(tmp_path: Path) -> None:
    with torch.device("meta"):
        hollow = Words()
    with pytest.raises(vbpfx.ModelError, match=r"buffer frequencies is on the meta device .*without_weights"):
        Weightless.of(hollow, _files(_words(), tmp_path))


def test_models_whose_weights_are_in_memory(tmp_path: Path) -> None:
    with pytest.raises(vbpfx.ModelError, match=r"parameter embed.weight of Words is in memory"):
        Weightless.of(_words(), _files(_words(), tmp_path))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"ratio": 0.3, "method": "auto"}, vbpfx.BudgetError, "gradients through the whole model"),
        ({"ratio": 0.3, "allocation": "sensitivity"}, vbpfx.BudgetError, "once for every block"),
        ({"latency": 0.7}, vbpfx.BudgetError, "latency="),
        (
            {"ratio": 0.3, "shard_size": "20GB"},
            vbpfx.ArtifactError,
            "18.6 GiB does not fit in memory=4 .* held in memory",
        ),
        ({"ratio": 0.3, "shard_size": "much"}, vbpfx.ArtifactError, "shard_size='much' is not a size"),
        ({}, vbpfx.BudgetError, "exactly one budget"),
        ({"ratio": 0.3, "memory": 0}, vbpfx.BudgetError, "memory=0 is not a number of GiB"),
        ({"ratio": 0.3, "memory": float("nan")}, vbpfx.BudgetError, "memory=nan is not a number of GiB"),
        ({"ratio": 0.3, "memory": "4GB"}, vbpfx.BudgetError, "memory='4GB' is not a number of GiB"),
    ],
)
def test_what_is_not_offered(options: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=message):
        vbpfx.prune_files(_hollow(), BATCHES, tmp_path / "out", weights=_files(_words(), tmp_path), **options)
    assert not (tmp_path / "out").exists()


def test_batches_that_do_not_run_or_overflow(tmp_path: Path) -> None:
    model = _words()
    with torch.no_grad():
        model.embed.weight[7] = torch.inf
    files = _files(model, tmp_path)
    fine = torch.ones(2, 5, dtype=torch.long)
    common: dict[str, Any] = {"weights": files, "ratio": 0.3, "progress": False}
    with pytest.raises(vbpfx.CalibrationError, match=r"batch 2 .* block blocks.0"):
        vbpfx.prune_files(_hollow(), [fine, 7 * fine], tmp_path / "out", **common)
    with pytest.raises(vbpfx.CalibrationError, match=r"batch 2 .* does not fit the model(?s:.)*that did"):
        vbpfx.prune_files(_hollow(), [fine, WORDS * fine], tmp_path / "out", **common)
    with pytest.raises(vbpfx.CalibrationError, match=r"empty"):
        vbpfx.prune_files(_hollow(), [], tmp_path / "out", **common)
    assert sorted(tmp_path.iterdir()) == files


def test_what_a_criterion_raises_is_not_said_of_a_batch(tmp_path: Path) -> None:
    def own(scoring: Any) -> Tensor:
        raise ValueError("mine")

    files = _files(_words(), tmp_path)
    with pytest.raises(ValueError, match=r"^mine$"):
        vbpfx.prune_files(_hollow(), BATCHES, tmp_path / "out", weights=files, ratio=0.3, criterion=own, progress=False)


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        (lambda x: x, vbpfx.CaptureError, "expected a torch.nn.Module, got function"),
        ("nowhere", vbpfx.ModelError, "nowhere is not a folder of Hugging Face"),
    ],
    ids=["a function", "no folder"],
)
def test_what_is_no_model(model: Any, kind: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=message):
        vbpfx.prune_files(model, BATCHES, tmp_path / "out", weights=_files(_words(), tmp_path), ratio=0.3)


def test_nothing_is_written_over(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    with pytest.raises(vbpfx.ArtifactError, match=r"exists already and is not overwritten"):
        vbpfx.prune_files(_hollow(), BATCHES, out, weights=_files(_words(), tmp_path), ratio=0.3)
    assert [path.name for path in out.iterdir()] == ["precious"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    files = _files(_words(), tmp_path)
    monkeypatch.setattr(large, "save_beside_weights", full)
    with pytest.raises(vbpfx.ArtifactError, match=r"out: No space left on device"):
        vbpfx.prune_files(_hollow(), BATCHES, tmp_path / "out", weights=files, ratio=0.3, progress=False)
    assert sorted(tmp_path.iterdir()) == files


def test_the_oracle_reads_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = _files(_words(), tmp_path)
    true = Changes.of

    def wrong(self: Changes, name: str, dense: Any) -> Tensor:
        new = true(self, name, dense)
        return new * 1.01 if name == "blocks.2.second.weight" else new

    monkeypatch.setattr(Changes, "of", wrong)
    with pytest.raises(vbpfx.VerificationError, match=r"differs from the substitution reference"):
        vbpfx.prune_files(_hollow(), BATCHES, tmp_path / "out", weights=files, ratio=0.3, progress=False)
    assert sorted(tmp_path.iterdir()) == files


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    files = _files(_words(), tmp_path)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    remains = tmp_path / f".out.{socket.gethostname()}-{gone.pid}.xyz"
    remains.mkdir()
    (remains / "model.safetensors").write_bytes(b"half")
    vbpfx.prune_files(_hollow(), BATCHES, tmp_path / "out", weights=files, ratio=0.3, progress=False)
    assert sorted(tmp_path.iterdir()) == [*files, tmp_path / "out"]
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {
        files[0].with_name("out").stat().st_mode & 0o666
    }


MEASURED = """
import resource, sys, torch, vbpfx
from safetensors.torch import save_file
from torch import nn

def build(blocks):
    one = lambda: nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512), nn.Softmax(-1))
    return nn.Sequential(*(one() for _ in range(blocks)))

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def prune(blocks, folder):
    with vbpfx.without_weights():
        model = build(blocks)
    shapes = model.state_dict()
    vbpfx.storage.tensors.write_shards(shapes, lambda name: torch.randn(shapes[name].shape) / 50, folder, 2**24)
    data = [torch.randn(64, 512) for _ in range(4)]
    vbpfx.prune_files(model, data, folder / "out", weights=folder, memory=1 / 32, ratio=0.3, progress=False)
    return sum(4 * p.numel() for p in model.parameters()) / 2**20

from pathlib import Path
torch.set_num_threads(1)
folder = Path(sys.argv[1])
for part in ("small", "large"):
    (folder / part).mkdir()
prune(2, folder / "small")  # what torch loads when it is first used
before = peak()
size = prune(32, folder / "large")
print(size, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_a_model_never_is_in_memory(tmp_path: Path) -> None:
    """A model of 32 blocks of 8 MiB is pruned with memory= of 32 MiB, in less than a third of the size of the model."""
    done = subprocess.run([sys.executable, "-c", MEASURED, str(tmp_path)], check=True, capture_output=True, text=True)
    size, extra = map(float, done.stdout.split()[-2:])
    assert 256 < size < 260
    assert extra < size / 3


def test_shards_are_no_larger_than_said(tmp_path: Path) -> None:
    tensors = {f"t{n}": torch.full((n,), n, dtype=torch.float32) for n in (10, 20, 100, 5)}
    shapes = {name: tensor.to("meta") for name, tensor in tensors.items()}
    write_shards(shapes, tensors.__getitem__, tmp_path, 130)
    held = {path.name: set(load_file(path)) for path in tmp_path.glob("*.safetensors")}
    assert list(dict(sorted(held.items())).values()) == [{"t10", "t20"}, {"t100"}, {"t5"}]
    stored = Stored.of(tmp_path)
    assert all(torch.equal(stored.read(name), tensor) for name, tensor in tensors.items())
