"""Variables that go with a slot. Owns their names and how they are checked; who sets them is the worker itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mpworker.errors import ConfigurationError
from mpworker.settings import is_variable

Variables = Mapping[str, str | int]
#: … as a worker process knows them: by slot, or asked there.
SlotVariables = dict[int, dict[str, str]] | Callable[[int], dict[str, str]]
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
        if not isinstance(variables, Mapping) or not all(is_variable(*item) for item in variables.items()):
            raise ConfigurationError(f"slot_env must be names and values, for slot {slot} not {variables!r:.80}")
    return {slot: {name: str(value) for name, value in variables.items()} for slot, variables in found.items()}
