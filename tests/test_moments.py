"""Streaming moments against NumPy in float64."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vbpfx
from vbpfx.calibration.moments import CoMoments, Moments
from vbpfx.calibration.observer import Observer
from vbpfx.errors import ArtifactError, CalibrationError


def _reduce(pieces: list[torch.Tensor]) -> Moments:
    total = Moments.of(pieces[0])
    for piece in pieces[1:]:
        total = total | Moments.of(piece)
    return total


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 2**31))
@settings(deadline=None, max_examples=50)
def test_any_split_gives_numpys_moments(sizes: list[int], seed: int) -> None:
    data = torch.randn(sum(sizes), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3 + 7
    moments = _reduce(list(torch.split(data, sizes)))
    assert moments.count == len(data)
    np.testing.assert_allclose(moments.mean, data.numpy().mean(0), rtol=1e-13)
    np.testing.assert_allclose(moments.m2, ((data.numpy() - data.numpy().mean(0)) ** 2).sum(0), rtol=1e-12, atol=1e-12)


# A piece of float32 is summed in float32 with at most 4096 consecutive additions. Each rounds by 6e-8 of the sum so far, with
# random sign, which gives sqrt(4096) * 6e-8 = 4e-6. (bfloat16 has few values, so equal roundings repeat.)
SINGLE = 4e-6


def test_large_mean_and_small_spread_in_float32() -> None:
    data = (torch.randn(20000, 3, dtype=torch.float64) * 1e-2 + 1e4).float()
    moments = _reduce(list(torch.split(data, 777)))
    exact = data.double().numpy()
    # E[x^2] - E[x]^2 in float32 would be wrong in its first digit. The oracle is float64 arithmetic on the same numbers.
    np.testing.assert_allclose(moments.variance, exact.var(0, ddof=1), rtol=SINGLE)
    np.testing.assert_allclose(moments.mean, exact.mean(0), rtol=1e-12)  # the spread is 1e-6 of the mean


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, SINGLE), (torch.bfloat16, 3 * SINGLE)]
)
@pytest.mark.parametrize("layout", [(6000, 200), (50, 16, 1600), (30, 20, 50, 41)])
def test_several_pieces_of_any_layout(layout: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    data = (torch.randn(layout) * (torch.rand(layout[1]) + 0.2)[(...,) + (None,) * (len(layout) - 2)] + 3).to(dtype)
    rows = data.movedim(1, -1).flatten(0, -2)
    exact = rows.double().numpy()
    layouts = [(data, 1), (rows, -1)]
    layouts += [(data.contiguous(memory_format=torch.channels_last), 1)] if data.ndim == 4 else []
    for values, axis in layouts:
        moments = Moments.of(values, axis)
        assert moments.count == len(exact)
        np.testing.assert_allclose(moments.variance, exact.var(0, ddof=1), rtol=tolerance)
        np.testing.assert_allclose(moments.mean, exact.mean(0), rtol=tolerance)


def test_values_whose_squares_leave_float32() -> None:
    data = torch.tensor([[1e30, 1.0], [-2e30, 3.0]])
    np.testing.assert_allclose(Moments.of(data).variance, data.double().numpy().var(0, ddof=1), rtol=1e-12)
    np.testing.assert_allclose(CoMoments.of(data).covariance, np.cov(data.double().numpy().T), rtol=1e-12)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_observer_pools_every_other_axis(axis: int) -> None:
    data = torch.randn(4, 5, 6, dtype=torch.float64)
    observer = Observer("block", axis, 1, 2)
    assert observer(data) is data
    rows = data.movedim(axis, -1)[..., 1:3].reshape(-1, 2).numpy()
    assert observer.moments is not None
    assert observer.moments.count == len(rows)
    np.testing.assert_allclose(observer.moments.variance, rows.var(0, ddof=1), rtol=1e-12)


def test_observer_skips_an_empty_batch_and_marks_a_bad_one() -> None:
    observer = Observer("block", -1, 0, 3)
    observer(torch.randn(0, 3))
    observer(torch.ones(2, 3))
    observer(torch.tensor([[1.0, torch.inf, 0.0]]))
    assert observer.bad_call == 2
    assert observer.moments is not None
    assert observer.moments.count == 2
    assert not observer.state_dict()


@pytest.fixture
def deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Act as if on a GPU, where reading a value waits for all earlier work."""
    for name in ("moments", "observer", "calibrate"):
        monkeypatch.setattr(
            importlib.import_module(f"vbpfx.calibration.{name}"), "answers_at_once", lambda device: False
        )


@pytest.mark.parametrize("every", [0, 2])
@pytest.mark.usefixtures("deferred")
def test_no_value_is_looked_at_while_batches_run(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("this would wait for the device")

    data, observer = torch.randn(3, 40, 5), Observer("block", -1, 0, 5, every=every)
    with monkeypatch.context() as patched:
        for name in ("__bool__", "__int__", "__float__", "item", "tolist", "cpu", "numpy"):
            patched.setattr(torch.Tensor, name, refuse)
        for batch in data:
            observer(batch)
    assert observer.bad_call is None
    assert observer.moments is not None
    expected = data.double().flatten(0, 1).numpy()
    np.testing.assert_allclose(observer.moments.variance, expected.var(0, ddof=1), rtol=SINGLE)
    assert observer.moments.count == 120


@pytest.mark.usefixtures("deferred")
def test_a_bad_batch_is_named_at_the_end() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    captured = vbpfx.capture(model, torch.ones(2, 3))
    observed = vbpfx.prepare(captured, vbpfx.find_blocks(captured), covariance=False)
    batches = [torch.ones(2, 3)] * 5
    vbpfx.calibrate(observed, batches)
    batches[3] = torch.full((2, 3), torch.nan)
    with pytest.raises(
        CalibrationError, match=r"batch 4 \(counted from 1\) makes NaN or infinite activations in block 0->2"
    ):
        vbpfx.calibrate(observed, batches)
    with pytest.raises(CalibrationError, match="block 0->2: NaN or infinite"):
        vbpfx.statistics(observed)


@pytest.mark.parametrize("how", ["bfloat16 model", "autocast"])
def test_half_precision_activations_have_moments_of_full_precision(how: str) -> None:
    """The oracle is float64 arithmetic on the same activations, which are far from zero and close together."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Hardtanh(-1e3, 1e3), torch.nn.Linear(8, 2))
    model[0].bias.data += 50.0
    data = torch.randn(6, 500, 16)
    model, data = (model.bfloat16(), data.bfloat16()) if how == "bfloat16 model" else (model, data)
    captured = vbpfx.capture(model, data[0])
    observed = vbpfx.prepare(captured, vbpfx.find_blocks(captured))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        vbpfx.calibrate(observed, data)
        hidden = torch.cat([model[1](model[0](batch)) for batch in data])
    assert hidden.dtype == torch.bfloat16
    exact = hidden.double().numpy()
    (moments,) = vbpfx.statistics(observed).moments["0->2"]
    assert moments.mean.dtype == moments.m2.dtype == torch.float64
    np.testing.assert_allclose(moments.mean, exact.mean(0), rtol=SINGLE)
    np.testing.assert_allclose(moments.variance, exact.var(0, ddof=1), rtol=3 * SINGLE)


@pytest.fixture(scope="module")
def gathered() -> dict[int, vbpfx.Statistics]:
    """Gather statistics of the same 21 samples in a float64 network with batches of 1, 7 and 21."""
    torch.manual_seed(1)
    layers = [torch.nn.Linear(6, 20), torch.nn.GELU(), torch.nn.Linear(20, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3)]
    model = torch.nn.Sequential(*layers).double()
    data = torch.randn(21, 4, 6, dtype=torch.float64)
    captured = vbpfx.capture(model, data[:2])
    analysis = vbpfx.find_blocks(captured)
    found = {}
    for size in (1, 7, 21):
        observed = vbpfx.prepare(captured, analysis)
        with torch.no_grad():
            for batch in torch.split(data, size):
                observed(batch)
        found[size] = vbpfx.statistics(observed)
    return found


@pytest.mark.parametrize("size", [1, 7])
def test_statistics_do_not_depend_on_the_batch_size(gathered: dict[int, vbpfx.Statistics], size: int) -> None:
    for name, sources in gathered[21].moments.items():
        for whole, split in zip(sources, gathered[size].moments[name], strict=True):
            assert whole.count == split.count == 84
            torch.testing.assert_close(split.mean, whole.mean, rtol=1e-12, atol=1e-15)
            torch.testing.assert_close(split.m2, whole.m2, rtol=1e-12, atol=0)


def test_statistics_merge_and_survive_a_file(gathered: dict[int, vbpfx.Statistics], tmp_path) -> None:
    gathered[1].save(tmp_path / "stats.safetensors")
    loaded = vbpfx.Statistics.load(tmp_path / "stats.safetensors")
    both = loaded | gathered[7]
    for name, (moments,) in both.moments.items():
        (once,) = gathered[21].moments[name]
        assert moments.count == 2 * once.count
        torch.testing.assert_close(moments.mean, once.mean, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(moments.m2, 2 * once.m2, rtol=1e-12, atol=0)
    (tmp_path / "stats.safetensors").write_bytes(b"nothing of ours")
    with pytest.raises(ArtifactError, match="cannot be read as statistics"):
        vbpfx.Statistics.load(tmp_path / "stats.safetensors")
    with pytest.raises(CalibrationError, match="different blocks"):
        loaded | vbpfx.Statistics({})
