"""The options of :func:`vbpfx.make_plan`: the named methods, and the checks that need no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from typing_extensions import TypedDict

from vbpfx.errors import BudgetError
from vbpfx.planning.allocation import ALLOCATIONS
from vbpfx.planning.budget import Budget, require_positive
from vbpfx.planning.compensate import COMPENSATIONS
from vbpfx.planning.importance import Criterion
from vbpfx.planning.scores import CRITERIA, NEED_COVARIANCE, name_of
from vbpfx.plans.records import DEFAULT_KINDS, KINDS, Kind


@dataclass(frozen=True)
class Method:
    """A named combination of criterion, allocation and compensation, with its ``min_width`` and ``round_to``.

    None for one of the last two means that it is chosen for every block.
    """

    criterion: str
    allocation: str
    compensation: str
    min_width: int | None
    round_to: int | None


METHODS = {
    # Variance-Based Pruning as published: raw variance, one global ranking, mean shift, no floor, any width.
    "vbp": Method("variance", "global", "mean", min_width=1, round_to=1),
    "auto": Method("greedy_obs", "sensitivity", "ridge", min_width=None, round_to=None),
}


class PlanArguments(TypedDict, total=False):
    """The keyword arguments of :func:`vbpfx.make_plan`, which :func:`vbpfx.prune` passes on to it."""

    ratio: float | Mapping[Kind, float] | None
    macs: float | None
    params: float | None
    latency: float | None
    method: str
    criterion: str | Criterion | None
    allocation: str | None
    compensation: str | None
    round_to: int | None
    min_width: int | None
    uniform: bool
    include: Sequence[str] | str | None
    exclude: Sequence[str] | str | None
    kinds: Sequence[Kind] | Kind | None


@dataclass(frozen=True)
class PlanOptions:
    """The checked options of :func:`vbpfx.make_plan`; ``own_...`` is true if the method's own choice is used."""

    budget: Budget
    method: str
    criterion: str | Criterion
    allocation: str
    compensation: str
    round_to: int | None
    min_width: int | None
    uniform: bool
    include: Sequence[str] | str | None
    exclude: Sequence[str] | str | None
    kinds: tuple[Kind, ...]
    own_criterion: bool
    own_allocation: bool
    own_compensation: bool

    @classmethod
    def of(
        cls,
        *,
        ratio: float | Mapping[Kind, float] | None = None,
        macs: float | None = None,
        params: float | None = None,
        latency: float | None = None,
        method: str = "auto",
        criterion: str | Criterion | None = None,
        allocation: str | None = None,
        compensation: str | None = None,
        round_to: int | None = None,
        min_width: int | None = None,
        uniform: bool = False,
        include: Sequence[str] | str | None = None,
        exclude: Sequence[str] | str | None = None,
        kinds: Sequence[Kind] | Kind | None = None,
    ) -> PlanOptions:
        """Return the options after all checks that need no data.

        Raises:
            BudgetError: an option is out of range or unknown.
        """
        budget = Budget.of(ratio=ratio, macs=macs, params=params, latency=latency)
        recipe = METHODS[_listed("method", method, METHODS)]
        return cls(
            budget,
            method,
            criterion if callable(criterion) else _listed("criterion", criterion or recipe.criterion, CRITERIA),
            _listed("allocation", recipe.allocation if allocation is None else allocation, ALLOCATIONS),
            _listed("compensation", recipe.compensation if compensation is None else compensation, COMPENSATIONS),
            recipe.round_to if round_to is None else require_positive("round_to", round_to),
            recipe.min_width if min_width is None else require_positive("min_width", min_width),
            bool(uniform),
            include,
            exclude,
            _kinds(kinds, budget),
            criterion is None,
            allocation is None,
            compensation is None,
        )

    @property
    def reconstructs(self) -> bool:
        """Whether layers are fitted block after block: with ``method="auto"`` and no other compensation asked for."""
        return self.method == "auto" and self.own_compensation

    @property
    def combines(self) -> bool:
        """Whether linear combinations of attention's channels are kept: with ``method="auto"`` and no criterion asked for."""
        return self.method == "auto" and self.own_criterion

    @property
    def chooses_on_the_way(self) -> bool:
        """Whether reconstruction chooses the neurons: it does if no criterion was asked for."""
        return self.own_criterion

    @property
    def needs_covariance(self) -> bool:
        """Whether calibration must gather covariances, and not only variances."""
        return self.scores_need_covariance or self.compensation == "ridge"

    @property
    def scores_need_covariance(self) -> bool:
        """Whether the criterion needs covariances to score neurons."""
        return callable(self.criterion) or self.criterion in NEED_COVARIANCE


def in_words(options: PlanArguments) -> str:
    """Return the given options as text, so that two runs can be compared."""
    given = {key: value for key, value in sorted(options.items()) if value is not None}
    return ", ".join(f"{key}={name_of(value) if callable(value) else repr(value)}" for key, value in given.items())


def _kinds(given: Sequence[Kind] | Kind | None, budget: Budget) -> tuple[Kind, ...]:
    if budget.shares and given is not None:
        raise BudgetError(
            f"kinds={given!r} is stated beside ratio={dict(budget.shares)!r}, which states the kinds; leave kinds out"
        )
    if given is None:
        return tuple(budget.shares) or DEFAULT_KINDS
    asked = [given] if isinstance(given, str) else list(given) if isinstance(given, Sequence) else []
    if not asked or not set(asked) <= set(KINDS):
        raise BudgetError(f"kinds={given!r} names no kinds of blocks; choose from {', '.join(KINDS)}")
    return tuple(kind for kind in KINDS if kind in asked)


def _listed(name: str, value: str, table: Mapping[str, Any]) -> str:
    if not isinstance(value, str) or value not in table:
        raise BudgetError(f"{name}={value!r} is unknown; choose one of {', '.join(sorted(table))}")
    return value
