"""Read ONNX files without copying their weights, and write them either completely or not at all."""

from __future__ import annotations

import itertools
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.passes.common import InlinePass

from vbpfx.errors import ArtifactError, CaptureError, ExportError, VbpfxError, first_line
from vbpfx.onnx_graph.axes import open_negative_sizes
from vbpfx.onnx_graph.branches import take_constant_branches
from vbpfx.onnx_graph.versions import converted
from vbpfx.storage.files import Write, write_atomically

_QUANTIZED = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearMatMul", "QLinearConv",
                        "MatMulInteger", "ConvInteger", "QLinearAdd", "QGemm", "MatMulNBits", "DynamicQuantizeMatMul",
                        "MatMulIntegerToFloat", "QAttention", "QLinearGlobalAveragePool"})  # fmt: skip
_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
)
# Protobuf cannot hold more than this in one message. The weights of a larger model go to a second file.
_MOST_IN_ONE_FILE = 2**31 - 2**24
_SMALLEST_OUTSIDE = 1024  # bytes; smaller tensors stay in the first file


def read_model(path: Path) -> ir.Model:
    """Read an ONNX file, check it, and bring it to an opset that the operator tables know.

    Weights in external data stay there and are mapped into memory. Local functions are inlined, and an If with a
    constant condition is replaced by the branch that it takes.

    Raises:
        ArtifactError: the file or its external data is missing, damaged or truncated, or the external data lies outside
            the file's folder.
        CaptureError: the file is quantized, draws random numbers, or holds bfloat16. Or its opset is too old, or its
            local functions cannot be inlined.
    """
    try:
        model = ir.load(path)
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
    # DecodeError is protobuf's; a truncated message raises the others
    except (DecodeError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ArtifactError(f"{path} is not an ONNX file, or it is damaged: {first_line(error)}") from error
    if not model.graph.outputs or not model.opset_imports:
        raise ArtifactError(f"{path} is not an ONNX file, or it is damaged: it holds no graph")
    for name, tensor in _external(model):  # before anything reads these files
        _require_inside(path, name, tensor)
    for value in _initializers(model):
        _require_data(path, str(value.name), value.const_value)
    if model.functions:
        try:
            InlinePass()(model)
        except Exception as error:  # the pass wraps any exception in one of its own class
            said = first_line(error.__cause__ or error)
            raise CaptureError(f"the local functions of {path} cannot be inlined: {said}") from error
    _load_beside_the_graph(path, model)
    open_negative_sizes(model)
    model = converted(model, path)
    take_constant_branches(model)
    if not _is_in_order(model.graph):  # ONNX Runtime accepts any order, and some converters append nodes at the end
        model.graph.sort()
    for node in model.graph.all_nodes():
        if node.op_type in _QUANTIZED:
            raise CaptureError(
                f"{path} is quantized ({node.op_type}, node {node.name!r}): prune the float network, then quantize"
            )
        if node.op_type in _RANDOM:
            raise CaptureError(
                f"{path} draws random numbers ({node.op_type}, node {node.name!r}), so no two runs of it can be compared"
            )
    for value in (*true_inputs(model), *model.graph.initializers.values()):
        if value.dtype == ir.DataType.BFLOAT16:
            raise CaptureError(
                f"{path}: {value.name} has the type bfloat16, and ONNX Runtime does not compute in bfloat16 on the CPU. Convert the file to float16 or float32, or prune the PyTorch model"
            )
    return model


def _load_beside_the_graph(path: Path, model: ir.Model) -> None:
    """Load the external tensors of subgraphs and of node attributes such as a Constant's value.

    Parts of the model are later run by themselves, without a folder in which external data could be found.
    """
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor) and graph is not model.graph:
                value.const_value = _in_memory(value.const_value)
    for _, attributes, attribute in _tensor_attributes(model):
        if isinstance(attribute.value, ir.ExternalTensor):
            _require_data(path, attribute.value.name or attribute.name, attribute.value)
            attributes[attribute.name] = ir.AttrTensor(attribute.name, _in_memory(attribute.value))


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    """Yield the initializers of the graph and of all its subgraphs, such as the branches of an If."""
    return itertools.chain.from_iterable(graph.initializers.values() for graph in model.graphs())


def _tensor_attributes(model: ir.Model) -> Iterator[tuple[ir.Node, Any, ir.Attr]]:
    """Yield every attribute that holds one tensor, with its node and the mapping that contains it."""
    inside = (node for function in model.functions.values() for node in function.all_nodes())
    for node in (*model.graph.all_nodes(), *inside):
        for attribute in tuple(node.attributes.values()):
            if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                yield node, node.attributes, attribute


def _external(model: ir.Model) -> Iterator[tuple[str, ir.ExternalTensor]]:
    """Yield the name and the tensor of everything that is stored in another file."""
    for value in _initializers(model):
        if isinstance(value.const_value, ir.ExternalTensor):
            yield str(value.name), value.const_value
    for node, _, attribute in _tensor_attributes(model):
        if isinstance(attribute.value, ir.ExternalTensor):
            yield attribute.value.name or str(node.outputs[0].name), attribute.value


def _require_inside(path: Path, name: str, tensor: ir.ExternalTensor) -> None:
    """Refuse external data outside the file's folder.

    A file of unknown origin must not make us read other files on the machine. The checks in onnx-ir do not suffice:
    some of its releases have none, and they do not work when the folder is the working directory.
    """
    location = os.fspath(tensor.location)
    folder = path.absolute().parent
    data = folder / location
    named_outside = os.path.isabs(location) or not Path(os.path.normpath(data)).is_relative_to(os.path.normpath(folder))
    if named_outside or not data.resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(
            f"{path} keeps {name} in {location!r}, which is outside the folder of the file"
            + ("" if named_outside else f": a link leads to {data.resolve()}")
            + "; if you trust the file, put a copy of the data into its folder, and name it there"
        )
    if data.is_file() and data.stat().st_nlink > 1:
        raise ArtifactError(
            f"{path} keeps {name} in {location!r}, which is also a file of another name (a hard link); if you trust the file, "
            f"put a copy of the data in its place"
        )


def _in_memory(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    return ir.Tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=tensor.name)


def _is_in_order(graph: ir.Graph) -> bool:
    """Return whether every node comes after the nodes whose outputs it reads."""
    waiting = set(graph)
    for node in graph:
        waiting.discard(node)
        if any(value is not None and value.producer() in waiting for value in node.inputs):
            return False
    return True


def true_inputs(model: ir.Model) -> list[ir.Value]:
    """Return the inputs that a caller has to provide, without the initializers that a file may list as inputs, too."""
    return [value for value in model.graph.inputs if str(value.name) not in model.graph.initializers]


def fixed_batch(model: ir.Model) -> int | None:
    """Return the batch size that the file is fixed to, or None if it accepts any."""
    shape = true_inputs(model)[0].shape
    return shape[0] if shape is not None and len(shape) and isinstance(shape[0], int) else None


def _require_data(path: Path, name: str, tensor: object) -> None:
    if isinstance(tensor, ir.ExternalTensor):
        data = Path(tensor.path)
        try:
            size = data.stat().st_size
        except OSError as error:
            raise ArtifactError(
                f"{path} keeps {name} in {data.name}, which cannot be read ({error.strerror}); put it beside the file"
            ) from error
        start = tensor.offset or 0
        if start < 0 or size < start + tensor.nbytes:
            raise ArtifactError(f"{path} keeps {name} in {data.name}, which is too short: it is truncated")
    elif isinstance(tensor, ir.TensorProtocol):
        try:
            tensor.numpy()
        except (ValueError, TypeError) as error:
            raise ArtifactError(f"{path} is damaged: initializer {name}: {first_line(error)}") from error


def has_external_data(model: ir.Model) -> bool:
    """Return whether the model keeps weights in a second file."""
    return any(True for _ in _external(model))


def stored_bytes(model: ir.Model) -> int:
    """Return the number of bytes of all stored tensors: initializers and constants, in the precision of the file."""
    stored = [value.const_value for value in model.graph.initializers.values()]
    stored += [node.attributes["value"].as_tensor() for node in model.graph if _holds_tensor(node)]
    return sum(tensor.nbytes for tensor in stored if tensor is not None)


def _holds_tensor(node: ir.Node) -> bool:
    return node.op_type == "Constant" and "value" in node.attributes


def release_pages(model: ir.Model) -> None:
    """Release the memory pages of external data that were read so far; they are read again when needed."""
    if not hasattr(mmap, "MADV_DONTNEED"):  # Windows does not have it
        return
    for _, tensor in _external(model):
        if isinstance(tensor.raw, mmap.mmap):
            tensor.raw.madvise(mmap.MADV_DONTNEED)


def require_writable(source: Path, out: Path) -> None:
    """Check before any work is done that the output can be written safely.

    Raises:
        ArtifactError: the folder does not exist, ``out`` is a folder, or two files that belong together would have to
            be replaced at once.
    """
    if not out.parent.is_dir():
        raise ArtifactError(f"cannot write {out}: there is no folder {out.parent}; make it first")
    if out.is_dir():
        raise ArtifactError(f"cannot write {out}: it is a folder")
    if data_file(out).exists():
        same = out.exists() and out.samefile(source)
        raise ArtifactError(
            f"cannot write {out}: {data_file(out).name} lies beside it, and two files cannot be replaced at once; "
            + ("choose another name" if same else "delete both, or choose another name")
        )


def data_file(out: Path) -> Path:
    """Return the path of the second file, which holds the weights that are not in the first."""
    return out.with_name(f"{out.name}.data")


def _mover(staged: Path) -> Write:
    def move(temporary: Path) -> None:
        staged.replace(temporary)

    return move


def _rejection(path: Path) -> str | None:
    """Return the reason why ONNX's checker rejects a file, or None if it accepts it."""
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        return first_line(error)
    return None


def write_model(model: ir.Model, out: Path, *, source: Path, external: bool, check: Callable[[Path], None]) -> None:
    """Write a model under a temporary name, check it, and rename it to ``out`` only if the checks pass.

    Args:
        source: the file that the model was read from. If ONNX's checker rejects the source as well, its verdict on the
            new file is ignored: ONNX Runtime runs operators that the checker does not know.
        external: keep the weights in a second file, ``<name>.data``, as the source did. This happens in any case when
            they do not fit in one file.
        check: is called with the path of the written file, and raises an error if the file is not correct.

    Raises:
        ArtifactError: the file cannot be written.
        ExportError: ONNX's checker rejects the file.
    """
    external = external or stored_bytes(model) > _MOST_IN_ONE_FILE
    for value in _initializers(model):
        # onnx-ir would copy these small tensors and close their memory map, which the graphs in memory still use
        if isinstance(value.const_value, ir.ExternalTensor) and value.const_value.nbytes <= _SMALLEST_OUTSIDE:
            value.const_value = _in_memory(value.const_value)
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
            staged = Path(folder) / out.name
            ir.save(
                model, staged, format="protobuf", external_data=data_file(out).name if external else None,
                size_threshold_bytes=_SMALLEST_OUTSIDE,
            )  # fmt: skip
            rejected = _rejection(staged)
            if rejected is not None and _rejection(source) is None:
                raise ExportError(f"ONNX's checker rejects the narrowed file: {rejected}; nothing was written")
            check(staged)
            parts = [data_file(staged)] if data_file(staged).exists() else []
            write_atomically({out.with_name(part.name): _mover(part) for part in (*parts, staged)})
    except VbpfxError:
        raise
    except OSError as error:
        raise ArtifactError(f"cannot write {out}: {error.strerror or error}; choose another folder") from error
