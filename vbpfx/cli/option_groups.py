"""Groups of options that several commands share. A group is a dataclass with one field for each option.

    @dataclass(eq=False, repr=False)
    class Reading:
        batch: Annotated[int, typer.Option(min=1, help="Samples in a batch.")] = 32

    @with_groups
    def prune(model: Model, reading: Reading) -> None: ...

gives ``vbpfx prune`` the option ``--batch``, and its value is ``reading.batch``. The dataclasses have no ``__eq__`` and no
``__repr__``, because generating them would make ``vbpfx --help`` slower.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with every parameter whose type is a dataclass replaced by the fields of that dataclass.

    typer reads these fields as single options.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}

    def run(**given: Any) -> None:
        made = {
            name: group(**{field.name: given.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**given, **made)

    parameters = [
        flat.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(command).parameters.items()
        for flat in (_fields(groups[name]) if name in groups else [parameter.replace(annotation=hints[name])])
    ]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _fields(group: Any) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
