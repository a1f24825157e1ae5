"""The key of TREAD: routes as an object, as JSON text, or in a file. Importing this costs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from tuner.config.options import Options, option
from tuner.config.resolve import read_object
from tuner.config.vocabulary import did_you_mean, nearest
from tuner.errors import ConfigError

KEY = "tread_config"


class _Given(BaseModel):
    """An object of the configuration; a field that it does not know is named with the nearest that it does."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: object) -> object:
        for name in value if isinstance(value, dict) else ():
            if name not in cls.model_fields:
                advice = did_you_mean(nearest(str(name), list(cls.model_fields)))
                raise ValueError(f"has no field {name!r}; {advice or 'it has ' + ', '.join(cls.model_fields)}")
        return value


class TreadRoute(_Given):
    """A share of the tokens that is left out of a range of blocks."""

    selection_ratio: float = Field(ge=0, lt=1, description="The share of the video tokens that leaves; 0: none.")
    start_layer_idx: int = Field(description="They leave before this block; negative counts from the end.")
    end_layer_idx: int = Field(description="They come back after this block; negative counts from the end.")


class TreadConfig(_Given):
    """All routes."""

    routes: list[TreadRoute] = Field(description="Ranges of blocks that do not overlap.")

    @field_validator("routes")
    @classmethod
    def _any(cls, value: list[TreadRoute]) -> list[TreadRoute]:
        if not value:
            raise ValueError("holds no route; leave the key out to train without")
        return value


def read(value: object) -> object:
    """An object as it is; text as JSON or else as a file that holds it, where it may stand under the key's own name.

    Raises `ValueError` for text that is neither.
    """
    if not isinstance(value, str):
        return value
    text = value.strip()
    found = _parsed(text) if text.startswith("{") else _from_file(Path(text).expanduser())
    return found[KEY] if isinstance(found, dict) and list(found) == [KEY] else found


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON: {error.msg} at column {error.colno}") from error


def _from_file(path: Path) -> object:
    try:
        return dict(read_object(path))
    except ConfigError as error:
        raise ValueError(f"{error.where}: {error.message}") from error


class TreadOptions(Options):
    """Video tokens that skip blocks in training (arXiv 2501.04765)."""

    title: ClassVar[str] = "TREAD"

    tread_config: Annotated[TreadConfig | None, BeforeValidator(read, json_schema_input_type=TreadConfig | str | None)] = option(
        None, metavar="JSON|FILE",
        help='Routes, or a JSON file with them: {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 2, "end_layer_idx": -2}]}.',
        ask="Routes of video tokens that skip blocks in training (TREAD), as JSON or a file? Enter for none",
        effect="A step costs less, since these tokens pass fewer blocks; in sampling all tokens pass all blocks.",
    )

    def enabled(self) -> bool:
        return self.tread_config is not None
