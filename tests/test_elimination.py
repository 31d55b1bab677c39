"""Greedy elimination against brute force in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vbpfx.errors import CalibrationError
from vbpfx.planning import elimination
from vbpfx.planning.elimination import elimination_costs, ridge_inverse
from vbpfx.planning.ridge import ridge_factor

PENALTY = 1e-2


def _problem(width: int, out: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    covariance = mix @ mix.T / width + 0.05 * torch.eye(width, dtype=torch.float64)
    return covariance, torch.randn(out, width, generator=generator, dtype=torch.float64)


def _error(a: np.ndarray, w: np.ndarray, kept: list[int]) -> float:
    """Return the least error of W h from only the kept entries of h, which has covariance A, by a direct solve."""
    gone = [i for i in range(len(a)) if i not in kept]
    prediction = a[np.ix_(gone, kept)] @ np.linalg.inv(a[np.ix_(kept, kept)])
    left = a[np.ix_(gone, gone)] - prediction @ a[np.ix_(kept, gone)]
    return float(np.trace(w[:, gone] @ left @ w[:, gone].T))


@pytest.mark.parametrize("inputs", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_the_order_is_the_brute_force_greedy_one(seed: int, inputs: int) -> None:
    problems = [_problem(9, 4, 10 * seed + i) for i in range(inputs)]
    order, costs = elimination_costs(problems, penalty=PENALTY)
    regular = [c.numpy() + PENALTY * float(c.diagonal().mean()) * np.eye(9) for c, _ in problems]
    kept, before = list(range(9)), 0.0
    for chosen, cost in zip(order.tolist(), costs.tolist(), strict=True):
        errors = {
            j: sum(
                _error(a, w.numpy(), [i for i in kept if i != j]) for a, (_, w) in zip(regular, problems, strict=True)
            )
            for j in kept
        }
        best = min(errors, key=lambda j: errors[j])
        assert chosen == best
        np.testing.assert_allclose(cost, errors[best] - before, rtol=1e-8, atol=1e-10)
        kept.remove(best)
        before = errors[best]
    assert len(kept) == 1


@pytest.mark.parametrize("block", [1, 3, 8, 64, 1000])
def test_blocks_of_any_size_give_the_plain_result(block: int) -> None:
    problem = _problem(100, 7, 0)
    plain_order, plain_costs = elimination_costs([problem], block=1)
    order, costs = elimination_costs([problem], block=block)
    assert torch.equal(order, plain_order)
    torch.testing.assert_close(costs, plain_costs, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("block", [1, 4, 64])
def test_dropping_neurons_that_are_gone_changes_neither_order_nor_costs(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference removes neurons one by one from whole matrices, with two inputs and with neurons that must stay."""
    problems, among = [_problem(40, 5, 7), _problem(40, 3, 8)], torch.arange(0, 40, 2)
    narrowed = []
    keep = elimination._Elimination.keep

    def noting(self: elimination._Elimination, still: torch.Tensor) -> None:
        narrowed.append(len(still))
        keep(self, still)

    monkeypatch.setattr(elimination._Elimination, "keep", noting)
    order, costs = elimination_costs(problems, remove=18, among=among, penalty=PENALTY, block=block)
    assert bool(narrowed) == (block < 18)
    inverses = [np.linalg.inv(c.numpy() + PENALTY * float(c.diagonal().mean()) * np.eye(40)) for c, _ in problems]
    fits = [w.numpy().copy() for _, w in problems]
    open_ = set(among.tolist())
    for chosen, cost in zip(order.tolist(), costs.tolist(), strict=True):
        of = {j: sum(float(v[:, j] @ v[:, j]) / a[j, j] for a, v in zip(inverses, fits, strict=True)) for j in open_}
        assert chosen == min(of, key=lambda j: of[j])
        np.testing.assert_allclose(cost, of[chosen], rtol=1e-9)
        for a, v in zip(inverses, fits, strict=True):
            v -= np.outer(v[:, chosen], a[chosen]) / a[chosen, chosen]
            a -= np.outer(a[:, chosen], a[chosen]) / a[chosen, chosen]
        open_.remove(chosen)


def test_only_those_among_which_it_may_choose_go() -> None:
    among = torch.tensor([1, 4, 5, 8, 11])
    order, _ = elimination_costs([_problem(12, 3, 1)], remove=3, among=among)
    assert len(order) == 3
    assert set(order.tolist()) < set(among.tolist())


def test_the_inverse() -> None:
    covariance, _ = _problem(6, 2, 3)
    scale = float(covariance.diagonal().mean())
    expected = np.linalg.inv(covariance.numpy() + 0.5 * scale * np.eye(6))
    np.testing.assert_allclose(ridge_inverse(covariance, 0.5), expected, rtol=1e-10)


def test_where_nothing_varies_there_is_still_a_factor() -> None:
    noise = -1e-20 * torch.ones(4, 4, dtype=torch.float64)
    assert torch.equal(ridge_factor(noise, 1e-3), torch.eye(4, dtype=torch.float64))
    indefinite = torch.diag(torch.tensor([1.0, 1.0, -0.01], dtype=torch.float64))
    factor = ridge_factor(indefinite, 1e-3)
    added = (factor @ factor.T - indefinite).diagonal()
    scale = float(indefinite.diagonal().mean())
    torch.testing.assert_close(added, torch.full_like(added, 0.1 * scale))  # 1e-3 and 1e-2 are too small


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_decide_nothing(value: float) -> None:
    covariance, weight = _problem(5, 3, 0)
    weight[1, 2] = value
    with pytest.raises(CalibrationError, match="weights that read its neurons hold NaN or infinity"):
        elimination_costs([(covariance, weight)])
