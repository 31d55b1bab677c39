"""The compensation for removed neurons against NumPy, and the affine substitution oracle on every kind of block."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from oracle import double, randomize, stages
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo import FOUND, Case

import vbpfx
from vbpfx.calibration.moments import CoMoments, Moments
from vbpfx.errors import ArtifactError, BudgetError, CalibrationError
from vbpfx.planning import compensate
from vbpfx.planning.importance import Scoring
from vbpfx.planning.scores import CRITERIA
from vbpfx.plans.records import BlockPlan


def _rows(count: int = 400, width: int = 10, seed: int = 0) -> torch.Tensor:
    mix = torch.randn(4, width, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, 4, generator=generator, dtype=torch.float64) @ mix + 0.3 * noise + 5


def _moments(rows: torch.Tensor, held: torch.Tensor | None = None) -> Moments:
    every = rows if held is None else torch.cat([rows, held])
    return dataclasses.replace(
        Moments.of(every), co=CoMoments.of(rows), held_out=None if held is None else CoMoments.of(held)
    )


KEPT, PRUNED = torch.tensor([0, 2, 3, 5, 8, 9]), torch.tensor([1, 4, 6, 7])


def test_the_prediction_is_numpys_ridge_regression() -> None:
    rows = _rows()
    penalty = 0.07
    found = compensate.predict(CoMoments.of(rows), KEPT, PRUNED, penalty)
    centred = rows.numpy() - rows.numpy().mean(0)
    x, y = centred[:, KEPT], centred[:, PRUNED]
    scale = np.trace(x.T @ x) / (len(rows) - 1) / len(KEPT)
    # Ridge regression is least squares on data with extra rows.
    extra = math.sqrt(penalty * scale * (len(rows) - 1)) * np.eye(len(KEPT))
    expected = np.linalg.lstsq(np.vstack([x, extra]), np.vstack([y, np.zeros((len(KEPT), len(PRUNED)))]), rcond=None)[0]
    np.testing.assert_allclose(found, expected.T, rtol=1e-9, atol=1e-11)


def test_ridge_with_an_infinite_penalty_is_the_mean_fold() -> None:
    moments = _moments(_rows())
    mu = moments.mean[PRUNED]
    for penalty in (1e14, math.inf):
        prediction = compensate.predict(moments.all_co, KEPT, PRUNED, penalty)
        constants = mu - prediction @ moments.mean[KEPT]
        torch.testing.assert_close(constants, mu, rtol=1e-12, atol=0.0)
        assert float(prediction.abs().max()) < 1e-12


def test_the_penalty_is_chosen_on_what_was_held_out() -> None:
    rows = _rows(14)  # few rows, so that the smallest penalty fits noise
    held = _rows(5000, seed=1)
    moments = _moments(rows, held)
    errors = {}
    for penalty in compensate.PENALTIES:
        prediction = compensate.predict(CoMoments.of(rows), KEPT, PRUNED, penalty).numpy()
        centred = held.numpy() - held.numpy().mean(0)
        errors[penalty] = float(((centred[:, PRUNED] - centred[:, KEPT] @ prediction.T) ** 2).sum())
    best = min(errors, key=lambda p: errors[p])
    assert best not in (compensate.PENALTIES[0], math.inf)
    _, prediction = compensate.ridge(moments, KEPT, PRUNED, True)
    assert prediction is not None
    torch.testing.assert_close(prediction, compensate.predict(moments.all_co, KEPT, PRUNED, best))


def test_where_prediction_does_not_help_it_is_the_mean() -> None:
    generator = torch.Generator().manual_seed(2)
    rows, held = (torch.randn(n, 10, generator=generator, dtype=torch.float64) for n in (12, 4000))
    constants, prediction = compensate.ridge(_moments(rows, held), KEPT, PRUNED, True)
    assert prediction is None
    torch.testing.assert_close(constants, torch.cat([rows, held]).mean(0)[PRUNED], rtol=1e-12, atol=1e-14)


def double_batch(case: Case) -> object:
    """Return the case's example batch in float64."""
    return pytree.tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, case.batch())


@pytest.mark.parametrize("case", FOUND, ids=lambda case: case.name)
@pytest.mark.parametrize("criterion", ["greedy_obs", "output_variance"])
def test_the_affine_oracle_holds_on_every_kind_of_block(case: Case, criterion: str) -> None:
    torch.manual_seed(0)
    model, batch = double(randomize(case.make())), double_batch(case)
    result = stages(model, batch, frontend=case.frontends[0], ratio=0.5, criterion=criterion, compensation="ridge")
    generator = torch.Generator().manual_seed(1)

    def drawn(entry: BlockPlan) -> tuple[Tensor | None, ...]:
        """Draw a prediction for every source; calls of one layer share theirs, because they share the weight."""
        found: list[Tensor | None] = []
        for source in entry.block.sources:
            drawn = 0.3 * torch.randn(len(entry.pruned), len(entry.kept), generator=generator, dtype=torch.float64)
            together = entry.block.read_together(source)  # nothing is predicted from another group
            if together is not None:
                drawn *= together[list(entry.pruned)][:, list(entry.kept)]
            found.append(drawn if entry.block.takes_prediction(source) else None)
        for first, *others in entry.block.pools:
            for other in others:
                found[other] = found[first]
        return tuple(found)

    # The oracle holds for any a and B. They are drawn here because small samples would leave some B at zero.
    blocks = tuple(dataclasses.replace(entry, predictions=drawn(entry)) for entry in result.plan.blocks)
    plan = dataclasses.replace(result.plan, blocks=blocks)
    found = vbpfx.verify(result.captured, vbpfx.convert(result.captured, plan), plan, tolerance=1e-9)
    assert found.effect > 100 * found.error


def test_a_prediction_where_only_constants_are_exact_is_refused() -> None:
    model = randomize(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)))
    entry = stages(model, torch.randn(20, 4), ratio=0.5).plan.blocks[0]
    first = next(i for i, s in enumerate(entry.block.sources) if not entry.block.takes_prediction(s))
    wrong = [None] * len(entry.block.sources)
    wrong[first] = torch.zeros(len(entry.pruned), len(entry.kept))
    with pytest.raises(ArtifactError, match="can only be replaced by constants"):
        BlockPlan(entry.block, entry.kept, entry.constants, tuple(wrong))


def _scoring() -> Scoring:
    model = randomize(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
    data = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    result = stages(model, data, ratio=0.5)
    block = result.analysis.blocks[0]
    return Scoring(block, result.statistics.moments[block.name], model, 0.3, 200)


def test_criteria_are_their_formulas() -> None:
    about = _scoring()
    moments = about.moments[0]
    w = about.model[2].weight.detach().double().numpy()
    c = moments.all_co.covariance.numpy()
    np.testing.assert_allclose(CRITERIA["output_variance"](about), moments.variance.numpy() * (w**2).sum(0), rtol=1e-12)
    inverse = np.linalg.inv(c + 1e-3 * np.trace(c) / 8 * np.eye(8))
    np.testing.assert_allclose(CRITERIA["obs"](about), (w**2).sum(0) / np.diag(inverse), rtol=1e-8)
    values, vectors = np.linalg.eigh(c)
    edge = np.sort(values)[3] * (1 + math.sqrt(8 / 200)) ** 2  # torch takes the lower median
    denoised = (vectors**2 * np.where(values > edge, values, 0)).sum(1)
    expected = 0.7 * moments.variance.numpy() + 0.3 * denoised
    np.testing.assert_allclose(CRITERIA["denoised_variance"](about), expected, rtol=1e-9)


def test_a_criterion_of_the_users_own() -> None:
    model = randomize(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
    data = [torch.randn(50, 4)]

    def last_first(about: Scoring) -> torch.Tensor:
        return torch.arange(about.block.width, 0, -1)

    pruned = vbpfx.prune(model, data, ratio=0.5, criterion=last_first, progress=False)
    assert pruned.plan.blocks[0].kept == (0, 1, 2, 3)
    assert pruned.plan.settings["criterion"] == "last_first"
    with pytest.raises(BudgetError, match="must return a tensor of 8 finite numbers"):
        vbpfx.prune(model, data, ratio=0.5, criterion=lambda about: torch.ones(3), progress=False)


def test_methods_that_need_covariances_say_so() -> None:
    model = randomize(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
    captured = vbpfx.capture(model, torch.randn(5, 4))
    analysis = vbpfx.find_blocks(captured)
    observed = vbpfx.prepare(captured, analysis, covariance=False)
    vbpfx.calibrate(observed, [torch.randn(50, 4)])
    with pytest.raises(CalibrationError, match=r"prepare\(\.\.\., covariance=True\)"):
        vbpfx.make_plan(analysis, vbpfx.statistics(observed), ratio=0.5)
    assert vbpfx.make_plan(analysis, vbpfx.statistics(observed), ratio=0.5, method="vbp").removed == 4
