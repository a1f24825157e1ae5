"""What a plugin answers, checked where it is asked: a mistake of its author's is that plugin's, by name, and no bug of the core's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tuner.errors import PluginError, TunerError
from tuner.plugins.record import reason_of


def asked(who: str, what: str, call: Callable[[], object]) -> object:
    """What `call` returns. `who`: such as "regularizer x"; `what`: its method.

    Raises `PluginError` for any error but those that say by themselves what is wrong and a lack of memory.
    """
    try:
        return call()
    except (TunerError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
            raise
        raise PluginError(f"{what} failed: {reason_of(error)}", where=who, remedy="--debug shows where") from error


def listed(who: str, what: str, call: Callable[[], object], kind: type[Any]) -> list[Any]:
    """The same for a list or tuple of `kind`s; raises `PluginError` for another answer."""
    found = asked(who, what, call)
    wrong = [item for item in found if not isinstance(item, kind)] if isinstance(found, list | tuple) else [found]
    if wrong or not isinstance(found, list | tuple):
        raise PluginError(f"{what} must return a list of {kind.__name__}", where=who, value=type(wrong[0]).__name__)
    return list(found)
