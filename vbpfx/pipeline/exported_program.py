"""prune_exported(): an ExportedProgram in, a smaller one out, for PT2E, ExecuTorch, AOTInductor and others that take one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.export import ExportedProgram

from vbpfx.data.inputs import Inputs, reader
from vbpfx.export.exported_program import Contract, export_program
from vbpfx.pipeline.calibration import require_batches
from vbpfx.pipeline.model import prune


def prune_exported(
    program: ExportedProgram,
    calibration: Iterable[Any],
    *,
    inputs: Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]] | None = None,
    **options: Any,
) -> ExportedProgram:
    """Make an exported program smaller: run :func:`vbpfx.prune` on its graph, and export the result.

    The result can replace the program: the arguments, their nesting, the open sizes with their ranges, the names in the
    state dict, and the structure of the output are the same. A layer without a bias may get one, named after the layer with
    ``.bias``. The graph of the result is as ``torch.export.export`` makes it, before decompositions. PT2E's
    ``prepare_pt2e(program.module(), ...)``, ``executorch.exir.to_edge_transform_and_lower``,
    ``torch._inductor.aoti_compile_and_package`` and ``openvino.convert_model`` take such a graph.

    To get the plan and the report as well, call the two steps yourself:

    >>> import torch, vbpfx
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 4)).eval()
    >>> data = [torch.randn(16, 8)]
    >>> program = torch.export.export(model, (data[0],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    >>> pruned = vbpfx.prune(program.module(check_guards=False), data, ratio=0.5, progress=False)
    >>> pruned.to_exported_program(like=program).state_dict["0.weight"].shape
    torch.Size([16, 8])

    Args:
        program: an exported program of a model in eval mode, as ``torch.export.export`` returned it. It is not changed.
        calibration: batches within the program's shapes and ranges. If the program has a fixed batch size, they have that size.
        inputs: as for :func:`vbpfx.prune`.
        options: the budget and all other arguments of :func:`vbpfx.prune`.

    Raises:
        CaptureError: the program is not an exported one, was exported in training mode, or writes to its buffers or inputs.
        CalibrationError: a batch does not fit the program's arguments, shapes or ranges; the message counts batches from 1.
        ExportError: the smaller program cannot be exported.
        VbpfxError: any other error of :func:`vbpfx.prune`.
    """
    contract = Contract.of(program)
    read = reader(contract.module, inputs)

    def checked() -> Iterator[Inputs]:
        for number, batch in enumerate(require_batches(calibration), start=1):
            found = read(batch)
            contract.require(found, number)
            yield found

    pruned = prune(contract.module, checked(), **options)
    return export_program(pruned.graph_module, pruned.captured.inputs, like=program)
