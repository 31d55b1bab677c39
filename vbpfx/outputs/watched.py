"""Run a network and keep the results to compare: its logits or values, its other outputs, and those of watched modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from vbpfx.data.inputs import Inputs
from vbpfx.distributed.meeting import exchanging
from vbpfx.errors import RankError, VbpfxError, first_line
from vbpfx.outputs.fields import path_name, result_paths

OutputKind = Literal["logits", "values"]

# Kind of output -> the names under which a model's output may hold it.
_NAMES: dict[OutputKind, tuple[str, ...]] = {"logits": ("logits",), "values": ("last_hidden_state", "logits")}


@dataclass(frozen=True)
class Signals:
    """The results of one run of a network.

    Attributes:
        output: the output that is compared.
        features: watched module -> its outputs, one for each call.
        others: name -> further floating-point outputs.
    """

    output: Tensor
    features: dict[str, list[Tensor]]
    others: dict[str, Tensor] = field(default_factory=dict)


class Watched:
    """A network with hooks that keep the outputs of some modules in every run. :meth:`stop` removes the hooks.

    Args:
        network: the network. Nothing but forward hooks is added to it.
        names: the names of the modules to watch.
        compared: the kind of output that is compared. With None, the first run decides: logits if there are any,
            otherwise values.
        error: the class of the errors that are raised for a batch that cannot be compared.

    Attributes:
        compared: the kind of output, which the first run sets if it was None.
    """

    def __init__(
        self, network: nn.Module, names: Iterable[str], compared: OutputKind | None, error: type[VbpfxError]
    ) -> None:
        self.network, self.compared, self.error = network, compared, error
        self._seen: dict[str, list[Tensor]] = {}
        self._handles = [self._watch(network.get_submodule(name), name) for name in names]

    def _watch(self, module: nn.Module, name: str) -> RemovableHandle:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            tensors = _floats(output)
            if tensors:
                self._seen.setdefault(name, []).append(tensors[0])

        return module.register_forward_hook(keep)

    def __call__(self, inputs: Inputs) -> Signals:
        """Run the network.

        Raises:
            VbpfxError: of the class ``error``: the network does not run on the batch, or its output holds nothing to compare.
            RankError: the network is sharded over processes, and another process has ended.
        """
        self._seen = {}
        try:
            with exchanging():
                output = inputs.run(self.network)
        except RankError:
            raise
        except Exception as failure:  # the model may raise any exception
            raise self.error(
                f"a batch does not run through {type(self.network).__name__}: {first_line(failure)}\n"
                f"  the batch: {inputs.describe()}"
            ) from failure
        self.compared = self.compared or ("logits" if _tensors_compared(output, "logits") else "values")
        tensors = _tensors_compared(output, self.compared)
        if not tensors:
            raise self.error(_nothing_compared(output, self.compared))
        compared = tensors[0]
        others = {
            path_name(path): tensor
            for path, tensor in result_paths(output)
            if tensor is not compared and tensor.is_floating_point() and tensor.ndim
        }
        return Signals(compared, self._seen, others)

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def _tensors_compared(output: Any, compared: OutputKind) -> list[Tensor]:
    """Return the tensors of an output that are its logits or values. The first one is compared."""
    named = [output.get(n) if isinstance(output, Mapping) else getattr(output, n, None) for n in _NAMES[compared]]
    tensors = [value for value in named if isinstance(value, Tensor)]
    if not tensors and not (compared == "logits" and isinstance(output, Mapping)):
        tensors = [tensor for tensor in _floats(output) if tensor.ndim > 1]
    return tensors


def _nothing_compared(output: Any, compared: OutputKind) -> str:
    """Return the error message for an output without logits or values."""
    found = f" with {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
    hint = (
        "for embeddings fine-tuning takes loss='mse', and evaluations compare='values'"
        if compared == "logits"
        else "wrap the model in one that returns a tensor"
    )
    return f"the model's output, a {type(output).__name__}{found}, holds no logits or values (samples, ..., classes); {hint}"


def _floats(output: Any) -> list[Tensor]:
    values = list(output.values()) if isinstance(output, Mapping) else output
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
