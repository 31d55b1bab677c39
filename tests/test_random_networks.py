"""Random networks from all operators and traps: blocks are found, results exact, models unchanged, and errors expected."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, given, settings
from random_check import check
from random_middles import ACROSS, PLAIN, TRAPS
from random_networks import EXPECTED, Spec, specs
from random_templates import SPELLED, TEMPLATES


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
@given(specs())
def test_random_networks(spec: Spec) -> None:
    check(spec)


def test_what_is_expected_exists() -> None:
    spellings = {spelled for names in SPELLED.values() for spelled in names}
    assert not PLAIN & ACROSS | PLAIN & TRAPS | ACROSS & TRAPS
    assert set(TEMPLATES) | PLAIN | ACROSS | TRAPS | spellings >= EXPECTED
