"""The questions of `tuner configure`, as the keys declare them: which apply, what an answer means, what is shown on `?`.

Special here: an answer takes the way of a flag, so that both mean the same and fail with the same words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from tuner.config.options import Options, field_facts, option
from tuner.config.resolve import resolve
from tuner.config.vocabulary import Key, keys_of

Choices = Sequence[tuple[str, str]]
"""Value and one line about it."""
NOTHING = "-"
"""The answer that empties a key which may be empty."""


class MachineAnswers(Options):
    """What is asked and stands in no file: which machine is planned for."""

    title: ClassVar[str] = "Machine"

    gpu_memory: str = option(
        "", help="Memory of the GPU that will train, such as 24GiB: the memory settings are planned for it.", metavar="SIZE",
        ask="Memory of the GPU that will train, such as 24GiB? Enter for none", effect="What fits there is found from the model's file "
        "headers, before anything is loaded; `tuner plan` does the same later.",
    )  # fmt: skip


class DatasetAnswers(Options):
    """Keys of one entry of the dataset file."""

    title: ClassVar[str] = "Clips"

    dataset_id: str = option("", help="Name of the entry; another name adds an entry.", ask="A name for these clips?",
                             effect="An entry of this name is changed; another name adds one, and both are trained together.")  # fmt: skip
    dataset_type: Literal["", "video", "image", "audio"] = option("", help="What the folder holds; found from the files when empty.")
    caption_strategy: Literal["textfile", "filename", "instanceprompt"] = option(
        "textfile", help="Captions from text files beside the clips, from their names, or one prompt for all.",
        ask="Where are the captions?", effect="`textfile`: cat.txt beside cat.mp4; `filename`: a_cat_jumps.mp4 is \"a cat jumps\"; "
        "`instanceprompt`: one prompt for every clip. Captions that say what is seen and heard learn most.",
    )  # fmt: skip
    instance_prompt: str = option(
        "", help="A word or sentence in front of every caption; with `instanceprompt` the caption itself.",
        ask="A trigger word in front of every caption? Enter for none",
        effect="An invented word that is in every caption becomes the word that calls up what was learned.",
    )  # fmt: skip
    num_frames: int | None = option(
        None, ge=1, help="Frames taken from each clip; as many as it has, at most 121, when empty.", unit="frames",
        ask="How many frames of each clip? Enter for as many as it has, at most 121", effect="Counted at the model's frame rate. More "
        "shows longer motion, and memory and time grow with it. Lengths that the model cannot take are rounded down, and the plan says so.",
    )  # fmt: skip
    min_frames: int | None = option(
        None, ge=1, help="Shorter clips are skipped; `num_frames` when empty.", unit="frames",
        ask="Some clips are shorter. From how many frames on are they used? Enter to skip them",
        effect="Shorter ones are trained at their own length.",
    )  # fmt: skip
    allow_zero_audio: bool = option(
        False, help="Train clips without a sound track with silence as their sound.",
        ask="Some clips have no sound. Train them with silence?", effect="The model then learns that such clips are silent; without it "
        "only their picture is trained.",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Question:
    """One key that is asked."""

    key: Key
    text: str
    effect: str
    ask_if: Mapping[str, object]
    suggest: object

    @property
    def name(self) -> str:
        """Of the key."""
        return self.key.name

    def applies(self, value: Callable[[str], object]) -> bool:
        """Whether the other keys have the values that it depends on; `value` tells them. True and False stand for anything and nothing."""
        held = ((value(name), wanted) for name, wanted in self.ask_if.items())
        return all(bool(found) is wanted if isinstance(wanted, bool) else found == wanted for found, wanted in held)

    def parse(self, text: str, beside: Mapping[str, object] = {}) -> object:
        """The value that an answer means; `beside`: answers to other keys of the same group. Raises `ConfigError`."""
        given = "" if text == NOTHING and self.key.default in (None, "") else text
        return resolve([self.key.owner], flags={**beside, self.name: given}).value(self.name)

    def explain(self, choices: Choices) -> str:
        """What `?` shows."""
        facts = [_kind(self.key, choices), *limits(self.key), self.key.unit, f"flag --{self.name}"]
        return "\n".join(filter(None, [self.key.help, self.effect, f"({', '.join(filter(None, facts))})"]))


def _kind(key: Key, choices: Choices) -> str:
    return "yes or no" if key.annotation is bool else "" if choices else key.type_name


def questions_of(options: type[Options]) -> tuple[Question, ...]:
    """Those that an option model declares, in order; none for keys without effect."""
    found = []
    for key in keys_of(options):
        facts = field_facts(options, key.name)
        if facts.get("ask") and not key.unsupported:
            found.append(Question(key, facts["ask"], facts["effect"], facts["ask_if"], facts["suggest"]))
    return tuple(found)


def limits(key: Key) -> list[str]:
    """`at least 1`, as the declaration limits the values."""
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    rules: Sequence[Any] = key.owner.model_fields[key.name].metadata
    return [f"{text} {getattr(rule, name):g}" for rule in rules for name, text in words.items() if hasattr(rule, name)]


def shown(value: object) -> str:
    """A value as it would be typed."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
