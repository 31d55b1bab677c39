"""Select the blocks that a plan may narrow, by include and exclude patterns."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Sequence

from vbpfx.analysis.blocks import Analysis
from vbpfx.calibration.prepare import no_blocks
from vbpfx.errors import AnalysisError
from vbpfx.plans.records import DEFAULT_KINDS, Block, Consumer, Kind


def select_blocks(
    analysis: Analysis,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    kinds: Sequence[Kind] = DEFAULT_KINDS,
) -> tuple[Block, ...]:
    """Return the blocks of some kinds that match a glob pattern of ``include`` (all by default) and none of ``exclude``.

    A pattern matches a block if it matches the block's name or the module path of one of its layers.

    Raises:
        AnalysisError: the model has no block, or none of these kinds; a pattern matches nothing (the message names similar
            ones), or no block is left.
    """
    if not analysis.blocks:
        raise AnalysisError(no_blocks(analysis))
    chosen = tuple(block for block in analysis.blocks if block.kind in kinds)
    if not chosen:
        others = list(dict.fromkeys(block.kind for block in analysis.blocks))
        raise AnalysisError(
            f"the model has no block of the kinds {', '.join(kinds)}, but {len(analysis.blocks)} blocks of other kinds: pass "
            f"kinds={others!r} to narrow them"
        )
    if include is not None:
        included = _matching(analysis, _as_list(include), "include")
        chosen = tuple(b for b in chosen if b.name in included)
    if exclude is not None:
        excluded = _matching(analysis, _as_list(exclude), "exclude")
        chosen = tuple(b for b in chosen if b.name not in excluded)
    if not chosen:
        raise AnalysisError(
            f"include={include!r}, exclude={exclude!r} and kinds={list(kinds)!r} leave none of {len(analysis.blocks)} blocks"
        )
    return chosen


def select_layers(
    layers: Iterable[Consumer], include: Sequence[str] | str | None = None, exclude: Sequence[str] | str | None = None
) -> tuple[Consumer, ...]:
    """Return the layers whose module paths match ``include`` (all by default) and do not match ``exclude``."""

    def matches(layer: Consumer, patterns: Sequence[str] | str) -> bool:
        return any(fnmatch.fnmatchcase(layer.weight.rpartition(".")[0], pattern) for pattern in _as_list(patterns))

    return tuple(
        layer
        for layer in layers
        if (include is None or matches(layer, include)) and (exclude is None or not matches(layer, exclude))
    )


def _matching(analysis: Analysis, patterns: list[str], option: str) -> set[str]:
    """Return the names of the blocks that match any pattern.

    It is a set of names because hashing a block would hash everything in it.
    """
    found: set[str] = set()
    for pattern in patterns:
        matches = {b.name for b in analysis.blocks if any(fnmatch.fnmatchcase(n, pattern) for n in (b.name, *b.layers))}
        if not matches and not select_layers(analysis.layers, include=pattern):
            names = list(dict.fromkeys(name for block in analysis.blocks for name in (block.name, *block.layers)))
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
            raise AnalysisError(
                f"{option} pattern {pattern!r} matches none of {len(analysis.blocks)} blocks; near it are {', '.join(near)}"
            )
        found |= matches
    return found


def _as_list(patterns: Sequence[str] | str) -> list[str]:
    listed = (
        [patterns] if isinstance(patterns, str) else list(patterns) if isinstance(patterns, Iterable) else [patterns]
    )
    if not listed or not all(isinstance(pattern, str) for pattern in listed):
        raise AnalysisError(f"include and exclude take glob patterns, found {patterns!r}")
    return listed
