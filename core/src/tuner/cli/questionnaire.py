"""The order of the questions of `tuner configure`, and what is known beyond the declarations: installed names, the clips, what fits."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from tuner.cli.interview import Interview, as_json
from tuner.cli.plan import parse_size
from tuner.component import Component
from tuner.config import edit, entry_edit
from tuner.config.options import Options
from tuner.config.questions import Choices, DatasetAnswers, MachineAnswers, questions_of
from tuner.config.resolve import Settings, resolve
from tuner.config.settings import (
    CORE_OPTIONS,
    AdapterSettings,
    DataSettings,
    ModelSettings,
    OptimizerSettings,
    RunSettings,
    TrainSettings,
)
from tuner.config.validation_settings import ValidationSettings
from tuner.config.vocabulary import Vocabulary, did_you_mean, nearest
from tuner.errors import ConfigError, TunerError
from tuner.plugins.record import Kind
from tuner.plugins.registry import CHOSEN_BY, Registry

if TYPE_CHECKING:
    from tuner.data.survey import Survey
    from tuner.train.forecast.machine import Machine
    from tuner.train.forecast.row import Row
    from tuner.train.plan import ModelPlan

PRECISION = "base_model_precision"
NAMED: Mapping[str, Kind] = {key: kind for kind, key in CHOSEN_BY.items()}
SWITCHED: tuple[Kind, ...] = ("regularizer", "loss_term", "latent_encoder")
OFFERED = 5
"""Rows of the memory table that can be chosen from."""
NO_CHANGE = ("no_change", "the weights as they are")
NOBODY = ("", "none", NO_CHANGE[0])
"""Values that name no component."""


class Questionnaire:
    """One run of `tuner configure` up to the writing. `raw`: the entries of an existing dataset file."""

    def __init__(self, registry: Registry, settings: Settings, own: Settings, raw: Sequence[object], terminal: bool) -> None:
        self._registry = registry
        self._settings = settings
        self._raw = raw
        self._given = {name for source in (settings, own) for name in source.explicit() if source.origin(name) == "flag"}
        self._survey: Survey | None = None
        self._ask = Interview(settings, own, self._check, self._choices, terminal)

    def go_through(self) -> Interview:
        """All questions in their order. Raises `TunerError`, KeyboardInterrupt, EOFError."""
        ask = self._ask
        self._machine()
        self._title(ModelSettings)
        self._suggest("model_family", self._only_family())
        ask.one(ModelSettings, "model_family")
        self._suggest("model_flavour", next((name for name, _ in self._choices("model_flavour")), ""))
        ask.group(ModelSettings, leave_out=("model_family", PRECISION))
        self._clips()
        if (family := self._component("family", "model_family")) is not None:
            self._title(family.options)
            ask.group(family.options)
        for options in (AdapterSettings, TrainSettings, OptimizerSettings, RunSettings, ValidationSettings):
            self._title(options)
            ask.group(options)
        self._techniques()
        self._memory()
        ask.require()
        self._keep_flags()
        return ask

    # --- parts -----------------------------------------------------------------------------------------------------
    def _machine(self) -> None:
        from tuner.doctor.machine import driver_cards  # asks the driver, imports no torch

        cards = driver_cards()
        if cards and cards[0].memory:
            self._suggest("gpu_memory", f"{cards[0].memory // 2**20}MiB")
        self._title(MachineAnswers)
        if cards and self._ask.terminal:
            self._ask.note(f"  here is {cards[0].name}")
        if self._ask.terminal or "gpu_memory" in self._given:
            self._ask.group(MachineAnswers)
        if not self._ask.value("gpu_memory") and not cards:
            self._suggest("mixed_precision", "no")

    def _clips(self) -> None:
        ask, named = self._ask, self._ask.value("dataset_id")
        self._title(DataSettings)
        for name, value in entry_edit.suggestions(self._raw, str(named)).items():
            self._suggest(name, value)
        ask.one(DataSettings, "data")
        if self._survey is not None:
            self._suggest_from(self._survey)
            ask.answers["dataset_type"] = self._survey.kind
            leave = [] if self._survey.kind == "video" else ["num_frames", "min_frames", "allow_zero_audio"]
            for question in questions_of(DatasetAnswers):
                if question.name not in leave and self._concerns(question.name, self._survey):
                    ask.ask(question)
                elif question.name not in ask.answers:
                    ask.answers[question.name] = ask.value(question.name)
        ask.group(DataSettings, leave_out=("data",))
        ask.suggestions.setdefault("output_dir", f"output/{ask.value('dataset_id')}")

    def _suggest_from(self, survey: Survey) -> None:
        suggested = self._ask.suggestions
        suggested.setdefault("dataset_id", entry_edit.name_for(str(self._ask.value("data"))))
        if not survey.captioned:
            suggested.setdefault("caption_strategy", "filename")

    def _concerns(self, name: str, survey: Survey) -> bool:
        """Whether a question matters for these clips; what was given or stands in the file always does."""
        if name in self._given or name in self._ask.suggestions:
            return True
        if name == "min_frames":
            frames = self._ask.value("num_frames")
            return isinstance(frames, int) and survey.shorter(frames) > 0
        return name != "allow_zero_audio" or 0 < survey.silent < len(survey.clips)

    def _techniques(self) -> None:
        """Everything that plugins ask and no other part does."""
        elsewhere = {component.options for kind in CHOSEN_BY for component in self._registry.components(kind)}
        elsewhere |= {component.options for component in self._registry.components("memory_strategy")}
        for options in self._registry.option_types:
            if options not in {*CORE_OPTIONS, *elsewhere} and questions_of(options):
                self._title(options)
                self._ask.group(options)

    def _memory(self) -> None:
        """The table of what fits where a GPU is known, else the questions of the strategies one by one."""
        keys = {PRECISION, *(key for c in self._registry.components("memory_strategy") for key in c.options.model_fields)}
        size = str(self._ask.value("gpu_memory") or "")
        if self._ask.terminal:
            self._ask.note("\nMemory")
        if size and not keys & self._given:
            try:
                self._planned(parse_size(size, "gpu_memory"))
                return
            except TunerError as error:
                if not self._ask.terminal:  # asked for by a flag: done, or an error
                    raise
                self._ask.note(f"  what fits cannot be planned now: {error.message}; `tuner plan` does it later")
        elif not size and self._ask.terminal:
            self._ask.note("  `tuner plan --gpu_memory 24GiB` finds the settings for a GPU later")
        if size or keys & self._given:
            self._one_by_one()

    def _one_by_one(self) -> None:
        self._ask.one(ModelSettings, PRECISION)
        for component in self._registry.components("memory_strategy"):
            self._ask.group(component.options)
            if questions_of(component.options) and self._ask.enabled(component.options):
                return  # two strategies cannot hold the same blocks

    def _planned(self, memory: int) -> None:
        """Raises `TunerError` where the model cannot be looked at or nothing fits."""
        from tuner.train.forecast.advise import describe

        ranked, machine, model = _fitting(self._registry, self._flags_so_far, memory)
        if not ranked:
            raise ConfigError(f"nothing fits into {memory / 2**30:.1f} GiB; `tuner plan` says what lacks least")
        chosen = ranked[self._ask.choose("Which of these?", [describe(row, model, machine) for row in ranked])]
        vocabulary = Vocabulary(self._registry.option_types)
        for key, value in chosen.keys.items():
            if value != vocabulary.keys[key].default or self._settings.origin(key) != "default":
                self._ask.answers[key] = value

    def _flags_so_far(self, folder: Path) -> dict[str, object]:
        """The answers as flags, the dataset in a file in `folder`."""
        ask, known = self._ask, Vocabulary(self._registry.option_types)
        dataset = folder / "dataset.json"
        edit.write(dataset, entry_edit.with_answers([], str(ask.value("data")), str(ask.value("dataset_type")), ask.answers))
        flags = {name: as_json(known.keys[name].owner, name, value) for name, value in ask.answers.items() if name in known.keys}
        return {**flags, "data": "", "data_backend_config": str(dataset)}

    def _keep_flags(self) -> None:
        """What was given and is not asked."""
        for name in sorted(self._given - set(self._ask.answers)):
            self._ask.answers[name] = self._ask.value(name)
            self._check(name, self._ask.value(name))

    # --- what is known ---------------------------------------------------------------------------------------------
    def _title(self, options: type[Options]) -> None:
        if self._ask.terminal and questions_of(options):
            self._ask.note(f"\n{options.title}")

    def _suggest(self, name: str, value: object) -> None:
        if value not in (None, ""):
            self._ask.suggestions[name] = value

    def _only_family(self) -> str:
        names = [component.name for component in self._registry.components("family")]
        return names[0] if len(names) == 1 else ""

    def _component(self, kind: Kind, key: str) -> Component | None:
        name = str(self._ask.value(key))
        return next((component for component in self._registry.components(kind) if component.name == name), None)

    def _choices(self, name: str) -> Choices:
        if name == "model_flavour":
            family = self._component("family", "model_family")
            return family.flavours if family else ()
        if name in NAMED and name != "report_to":
            found = [(component.name, component.summary) for component in self._registry.components(NAMED[name])]
            return [NO_CHANGE, *found] if name == PRECISION else found
        return ()

    def _check(self, name: str, value: object) -> str:
        """What the declarations cannot know. Returns a remark for people; raises `TunerError`."""
        text = str(value)
        if name in NAMED:
            words = [word.strip() for word in text.split(",")] if name == "report_to" else [text]
            return "; ".join(filter(None, [self._lacks(NAMED[name], word) for word in words if word not in NOBODY]))
        if name == "model_flavour" and text:
            known = [flavour for flavour, _ in self._choices(name)]
            if known and text not in known:
                advice = did_you_mean(nearest(text, known)) or f"there is {', '.join(known)}"
                raise ConfigError("there is no such checkpoint", where=name, value=text, remedy=advice)
        if name == "gpu_memory" and text:
            parse_size(text, name)
        if name == "data":
            return self._look(text)
        if name == "instance_prompt" and not text and self._ask.value("caption_strategy") == "instanceprompt":
            raise ConfigError("is the caption of every clip with caption_strategy `instanceprompt`, so it is needed", where=name)
        return self._remark(name, text)

    def _lacks(self, kind: Kind, name: str) -> str:
        """What the component of this name needs and is not installed. Raises `ConfigError`, `PluginError`."""
        from tuner.doctor.software import lacking

        words, pip = lacking(self._registry, kind, self._registry.component(kind, name))
        return f"{words}: {pip}" if words else ""

    def _look(self, folder: str) -> str:
        from tuner.data.survey import look_at  # with PyAV

        self._survey = look_at(Path(folder).expanduser(), str(self._ask.value("dataset_type")))
        return self._survey.describe()

    def _remark(self, name: str, text: str) -> str:
        survey = self._survey
        if name == "caption_strategy" and text == "textfile" and survey is not None and survey.captioned < survey.files:
            return f"{survey.files - survey.captioned} of {survey.files} have no text file beside them and could not be trained"
        return ""


def _fitting(
    registry: Registry, flags_in: Callable[[Path], Mapping[str, object]], memory: int
) -> tuple[list[Row], Machine, ModelPlan]:
    """The first rows of `tuner plan`'s table for the answers so far, the machine and the model. Raises `TunerError`."""
    import torch

    from tuner.cli.plan import find_job
    from tuner.train.forecast.advise import rank, rows
    from tuner.train.forecast.machine import find_machine

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = find_machine(device, memory)
    with TemporaryDirectory() as scratch:
        settings = resolve(registry.option_types, flags=flags_in(Path(scratch)), environ=os.environ)
        job, _ = find_job(registry, settings, {"shape": None, "host_memory": None}, device, Path(scratch))
        ranked = [row for row in rank(list(rows(job, machine)), machine) if row.fits(machine)]
    return ranked[:OFFERED], machine, job.model
