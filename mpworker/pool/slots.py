"""Variables that go with a slot. Owns their names and how they are checked; who sets them is the worker itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from mpworker.errors import ConfigurationError

#: Tells a worker, and what it starts, its slot.
SLOT_VARIABLE = "MPWORKER_SLOT"
Variables = Mapping[str, str | int]
SlotEnv = Mapping[int, Variables] | Callable[[int], Variables]


def variables_of_slots(given: SlotEnv | None, size: int) -> dict[int, dict[str, str]]:
    """The variables of each slot, as text.

    Raises:
        ConfigurationError: one of them cannot be set.
    """
    if given is None:
        return {}
    if not callable(given) and not isinstance(given, Mapping):
        raise ConfigurationError(f"slot_env must be a mapping or a callable, not {given!r:.40}")
    found = {slot: given(slot) if callable(given) else given.get(slot, {}) for slot in range(size)}
    for slot, variables in found.items():
        if not isinstance(variables, Mapping) or not all(map(_is_variable, variables.items())):
            raise ConfigurationError(f"slot_env must be names and values, for slot {slot} not {variables!r:.80}")
    return {slot: {name: str(value) for name, value in variables.items()} for slot, variables in found.items()}


def _is_variable(item: tuple[object, object]) -> bool:
    name, value = item
    if not isinstance(name, str) or not isinstance(value, str | int):
        return False
    try:
        text = os.fsencode(f"{name}{value}")
    except UnicodeEncodeError:
        return False
    return name != "" and "=" not in name and b"\0" not in text
