"""What validation will make and measure, decided while planning: samples with their requests, held-out files, text to encode before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from tuner.config.datasets import DatasetEntry, EvalEntry
from tuner.config.validation_settings import ValidationSettings
from tuner.config.vocabulary import did_you_mean, nearest
from tuner.data.items import Item
from tuner.data.manifest import Manifest
from tuner.errors import ConfigError, TunerError
from tuner.interfaces.encoders import Record
from tuner.interfaces.family import SampleRequest
from tuner.train.samples.adapters import adapter_runs, check_runs
from tuner.train.samples.prompts import label, prompts, unused
from tuner.train.samples.validate import planned_request
from tuner.train.samples.wanted import AdapterRun, Mode, SampleJob, ValidationPlan

if TYPE_CHECKING:
    from tuner.train.plan import ModelPlan, Plan

LATER_MADE: Final = Record({})
"""Stands for a record while planning, when none is made yet."""


def validation_of(
    model: ModelPlan, entries: Sequence[DatasetEntry], manifest: Manifest, streams: Sequence[str], *, preview: bool
) -> ValidationPlan:
    """What the keys ask for and the dataset has. Raises `ConfigError` for a library or an adapter list that cannot be read.

    `preview`: for a plan that is only looked at; adapters on the hub are named as downloads.
    """
    settings = model.settings.get(ValidationSettings)
    if settings.validation_disable:
        return ValidationPlan()
    problems = _dataset_problems(settings, entries)
    held_out = _held_out(settings, manifest)
    jobs = list(_text_jobs(model, streams))
    if settings.validation_using_datasets and not problems:
        found, refused = _dataset_jobs(model, held_out, streams, {job.label for job in jobs})
        jobs += found
        problems += refused
    runs = adapter_runs(settings)
    downloads: tuple[str, ...] = ()
    if jobs and runs:
        checked = check_runs(model, runs, preview=preview)
        runs, downloads = checked.runs, checked.downloads
        problems += checked.problems
    if runs:
        jobs = list(_with_adapters(jobs, runs, plain=settings.validation_adapter_mode == "comparison"))
    plan = ValidationPlan(
        tuple(jobs), _measured(settings, held_out, model.family.learned_streams(streams)), settings.eval_timesteps,
        settings.validation_step_interval, not settings.disable_benchmark, downloads, problems=tuple(problems),
    )  # fmt: skip
    return replace(plan, notices=tuple(_notices(settings, plan, bool(runs))))


def _notices(settings: ValidationSettings, plan: ValidationPlan, adapters: bool) -> Iterator[str]:
    """What is asked for and comes to nothing."""
    ways = "set validation_prompt, or add an entry of dataset_type `eval`"
    if settings.validation_step_interval and not plan.wanted and not plan.problems:
        yield f"validation_step_interval: there is nothing to sample or to measure; {ways}"
    if adapters and not plan.jobs:
        yield "validation_adapter_path, validation_adapter_config: no samples are made that an adapter could be put to"


# --- samples from text -------------------------------------------------------------------------------------------
def _text_jobs(model: ModelPlan, streams: Sequence[str]) -> Iterator[SampleJob]:
    named = prompts(model.settings.get(ValidationSettings))
    if not named:
        return
    plain = planned_request(model.family, model.settings, sound="audio" in streams)
    for name, prompt in named.items():
        yield SampleJob(name, "t2v" if "video" in streams else "audio", replace(plain, prompt=prompt))


# --- samples from held-out files ---------------------------------------------------------------------------------
def _dataset_problems(settings: ValidationSettings, entries: Sequence[DatasetEntry]) -> list[TunerError]:
    """Ids that name no held-out entry, and samples that are to be made from none."""
    ids = [entry.id for entry in entries if isinstance(entry, EvalEntry)]
    kinds = {entry.id: entry.dataset_type for entry in entries}
    found: list[TunerError] = []
    for name in _wanted_ids(settings):
        if name in kinds and name not in ids:
            problem, remedy = f"{name!r} is an entry of dataset_type `{kinds[name]}`", "name an entry of dataset_type `eval`"
            found.append(ConfigError(problem, where="eval_dataset_id", value=name, remedy=remedy))
        elif name not in kinds:
            near = did_you_mean(nearest(name, ids)) or ("there are: " + ", ".join(ids) if ids else "add an entry of dataset_type `eval`")
            found.append(ConfigError("the dataset file has no such entry", where="eval_dataset_id", value=name, remedy=near))
    if settings.validation_using_datasets and not ids and not found:
        problem, remedy = "there is no held-out dataset to make samples from", "add an entry of dataset_type `eval` to the dataset file"
        found.append(ConfigError(problem, where="validation_using_datasets", value=True, remedy=remedy))
    return found


def _wanted_ids(settings: ValidationSettings) -> list[str]:
    return [name.strip() for name in settings.eval_dataset_id.split(",") if name.strip()]


def _held_out(settings: ValidationSettings, manifest: Manifest) -> list[Item]:
    wanted = _wanted_ids(settings)
    return [item for item in manifest.held_out if not wanted or item.dataset in wanted]


def _dataset_jobs(
    model: ModelPlan, held_out: Sequence[Item], streams: Sequence[str], taken: set[str]
) -> tuple[list[SampleJob], list[TunerError]]:
    """At most so many files, in the order of their names, each with what it can give."""
    settings = model.settings.get(ValidationSettings)
    plain = planned_request(model.family, model.settings, sound="audio" in streams)
    usable = [(item, modes) for item in held_out if (modes := _modes(item, streams, settings.validation_given))]
    if not usable:
        what = {"both": "a first frame or a sound", "picture": "a first frame", "sound": "a sound"}[settings.validation_given]
        return [], [ConfigError(
            f"no held-out file can give {what} to a model with {' and '.join(streams)}", where="validation_using_datasets", value=True,
            remedy="change validation_given, or the entry of dataset_type `eval`",
        )]  # fmt: skip
    jobs: list[SampleJob] = []
    problems: list[TunerError] = []
    for item, modes in usable[: settings.validation_num_dataset_samples]:
        for mode in modes:
            request = _given_request(model, plain, item, mode)
            try:
                model.family.check_request(request)
            except ConfigError as error:
                problem = f"no sample can be made from {item.path.name} of {item.dataset!r}: {error.message}"
                problems.append(ConfigError(problem, where="validation_using_datasets", value=error.value, remedy=error.remedy))
            name = unused(label(f"{item.dataset}-{item.path.stem}-{mode}"), taken)
            taken.add(name)
            jobs.append(SampleJob(name, mode, replace(request, first_frame=None, given_sound=None), item))
    return jobs, problems


def _modes(item: Item, streams: Sequence[str], given: str) -> list[Mode]:
    modes: list[Mode] = ["i2v"] if item.kind != "audio" and "video" in streams and given != "sound" else []
    return modes + (["s2v"] if item.has_audio and {"video", "audio"} <= set(streams) and given != "picture" else [])


def _given_request(model: ModelPlan, plain: SampleRequest, item: Item, mode: Mode) -> SampleRequest:
    """Of the item's size and with its caption; to its sound no longer than that."""
    request = replace(plain, prompt=item.caption)
    if item.kind != "audio":
        request = replace(request, width=item.bucket.width, height=item.bucket.height)
    if mode == "i2v":
        return replace(request, first_frame=LATER_MADE)
    frames = min(plain.frames, model.family.geometry.snap_frames(int(item.seconds * plain.frame_rate + 1e-6)))
    return replace(request, frames=frames, given_sound=LATER_MADE)


def _with_adapters(jobs: Sequence[SampleJob], runs: Sequence[AdapterRun], *, plain: bool) -> Iterator[SampleJob]:
    for job in jobs:
        if plain:
            yield job
        for run in runs:
            yield replace(job, label=f"{job.label}-with-{run.name}", adapters=run)


# --- losses ------------------------------------------------------------------------------------------------------
def _measured(settings: ValidationSettings, held_out: Sequence[Item], learned: Sequence[str]) -> tuple[Item, ...]:
    """Those that have a stream that is learned; at most so many, chosen by their bytes and not by their names or places."""
    able = [item for item in held_out if ("video" in learned and item.kind != "audio") or ("audio" in learned and item.has_audio)]
    return tuple(sorted(able, key=lambda item: (item.content, item.key))[: settings.num_eval_images])


def family_encoders(plan: Plan) -> frozenset[str]:
    """Names of the encoders that held-out files go through: a regularizer's teacher is not needed for them."""
    return frozenset(encoder.name for encoder in plan.encoders if encoder.name not in plan.extras)


def describe_losses(losses: Mapping[str, float]) -> str:
    """`video 0.1234 | audio 0.0456`."""
    return " | ".join(f"{name} {value:.4f}" for name, value in losses.items())
