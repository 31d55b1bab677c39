"""Find lines in a model's own code that read a hidden width from a tensor.

If such a line computes with the width, changing the model's tensors cannot correct the result.
"""

from __future__ import annotations

import linecache
import os
import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vbpfx.data.inputs import Inputs
from vbpfx.plans.records import Plan

_NOT_USER_CODE = tuple(os.path.dirname(os.path.abspath(file)) + os.sep for file in (torch.__file__, __file__))
_MOST = 3


def where_widths_are_used(small: nn.Module, plan: Plan, inputs: Inputs) -> str:
    """Describe the lines of code that read a narrowed width from a tensor; return "" if there are none.

    Args:
        small: the narrowed model in its own class.
        plan: the plan by which ``small`` was narrowed.
        inputs: the batch to run it on.
    """
    now = {entry.width for entry in plan.blocks} - {entry.block.width for entry in plan.blocks}
    watch = _SizesRead(now)
    try:
        with torch.no_grad(), watch:
            inputs.run(small)
    except Exception:  # a model that does not run is reported elsewhere
        pass
    read = watch.sizes or watch.shapes
    return "; ".join(f"{place} reads a narrowed width: {line}" for place, line in list(read.items())[:_MOST])


class _SizesRead(TorchFunctionMode):
    """Records every line outside torch that reads a wanted size from a tensor, by itself or as part of a shape."""

    def __init__(self, wanted: set[int]) -> None:
        super().__init__()
        self._wanted = wanted
        self.sizes: dict[str, str] = {}
        self.shapes: dict[str, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        whole = isinstance(result, torch.Size)
        if isinstance(args[0], Tensor) and not self._wanted.isdisjoint(
            result if whole else {result} if type(result) is int else ()
        ):
            frame: FrameType | None = sys._getframe(1)
            while frame is not None and frame.f_code.co_filename.startswith(_NOT_USER_CODE):
                frame = frame.f_back
            if frame is not None:
                file, number = frame.f_code.co_filename, frame.f_lineno
                (self.shapes if whole else self.sizes)[f"{file}:{number}"] = linecache.getline(file, number).strip()
        return result
