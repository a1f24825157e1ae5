"""One declaration per key: it gives the flag, the config key, `--help`, the JSON Schema, the reference page and the question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field


class Options(BaseModel):
    """Base of all option models. A key has one owner: the class that declares it.

    Fields are declared with `option(...)` (implemented) or `unsupported(...)` (recognised, with the reason why not).
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), allow_inf_nan=False, coerce_numbers_to_str=True
    )

    title: ClassVar[str] = ""
    """Heading of this group on the reference page and in `--help`."""
    changes_numbers: ClassVar[bool] = True
    """Whether these keys can change what a training step computes, bit for bit; if not, a run may be resumed with other values."""

    alternatives: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Pairs of keys of which one takes the other's place: of a flag and a file, say, the flag's counts."""

    def enabled(self) -> bool:
        """Whether the component is switched on by these values; components chosen by name leave it True."""
        return True

    def follows_length(self) -> bool:
        """Whether what a step computes depends on the length of the run; such a run cannot be made longer afterwards."""
        return False


def option(
    default: Any,
    *,
    help: str,
    unit: str = "",
    aliases: Sequence[str] = (),
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    examples: Sequence[object] = (),
    metavar: str = "",
    ask: str = "",
    effect: str = "",
    ask_if: Mapping[str, object] = {},
    suggest: object = None,
) -> Any:
    """A key that works. `help` is one sentence; `unit` is seconds, frames, pixels, ...; `aliases` are accepted too.

    `ask`: the question of `tuner configure`; a key without one is not asked. The first question of a group is always asked, the
    others while the group is `enabled()`, and one with `ask_if` only where those other keys have those values. `effect`: what another
    value leads to, shown on `?`. `suggest`: what the question offers where that is not the default.
    """
    extra: dict[str, Any] = {"unit": unit, "aliases": list(aliases), "metavar": metavar}
    if ask:
        extra.update(ask=ask, effect=effect, ask_if=dict(ask_if), suggest=suggest)
    return Field(default, description=help, ge=ge, gt=gt, le=le, lt=lt, examples=list(examples) or None, json_schema_extra=extra)


def unsupported(*, help: str, reason: str, changes_results: bool, default: Any = None, aliases: Sequence[str] = ()) -> Any:
    """A key that other tools' configurations contain and this tool does not act on.

    A value other than `default`, null, "", false and "none" is an error when `changes_results`, else a notice with `reason`.
    """
    extra: dict[str, Any] = {"unit": "", "aliases": list(aliases), "metavar": "", "unsupported": reason, "changes_results": changes_results}
    return Field(default, description=help, json_schema_extra=extra)


def field_facts(options: type[Options], key: str) -> Mapping[str, Any]:
    """The extra facts declared for `key`: unit, aliases, metavar, and for unsupported keys `unsupported`, `changes_results`."""
    extra = options.model_fields[key].json_schema_extra
    return extra if isinstance(extra, dict) else {}
