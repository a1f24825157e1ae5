"""The model card of a result: what it is, how it is used, how it was trained.

Special here: of the dataset only numbers get in, and trigger words where it has them; no caption, no file name, no path. Nothing is
claimed about licences: the base model's is read from its own repository, else the card says visibly that it is not known.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from huggingface_hub import ModelCardData, constants

from tuner.config.entries import AudioEntry, CaptionedEntry, ImageEntry, VideoEntry
from tuner.config.masking import masked
from tuner.config.settings import AdapterSettings, ModelSettings, OptimizerSettings, TrainSettings
from tuner.config.validation_settings import ValidationSettings
from tuner.interfaces.services import CardFacts
from tuner.model.licence import UNKNOWN_LICENCE, Licence, base_licence
from tuner.train.publish.outbox import SAMPLES, Outbox, fill, last_samples
from tuner.train.samples.validate import wants_sample

if TYPE_CHECKING:
    from tuner.train.plan import Plan
    from tuner.train.publish.upload import Destination

UNNAMED: Final = "OWNER"
"""Stands for the namespace until it is known."""
LIBRARIES: Final = ("tuner-framework", "torch", "peft", "diffusers", "transformers")
"""Whose versions the card names, beside the plugins'."""
_ON_THE_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?:@([0-9a-f]{7,64}))?")
_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{7,64})(?:/|$)")


@dataclass(frozen=True)
class Base:
    """The base model."""

    described: str
    """For people: repository and commit, or a file's name."""
    repository: str = ""
    """On the hub; empty: not known."""
    commit: str = ""

    @staticmethod
    def of(description: str, location: Path) -> Base:
        """From a source's description; of a file that lies in the hub's cache also from where it lies."""
        if found := _ON_THE_HUB.fullmatch(description):
            return Base(description, found[1], found[2] or "")
        if cached := _SNAPSHOT.search(location.as_posix()):
            return Base(description, f"{cached[1]}/{cached[2]}", cached[3])
        return Base(description)


@dataclass(frozen=True)
class Card:
    """Everything that a model card says."""

    repository: str
    """`owner/name`; the owner is `UNNAMED` until it is known."""
    base: Base
    licence: Licence | None
    variant: str
    """Family and variant."""
    full: bool
    task: str
    tags: tuple[str, ...]
    use: CardFacts
    triggers: tuple[str, ...]
    training: tuple[tuple[str, str], ...]
    """(what, value): one row each."""
    versions: tuple[tuple[str, str], ...]
    files: tuple[str, ...]
    """Names of the weight files."""
    samples: tuple[str, ...]
    """Paths in the repository."""
    prompt: str
    """Of the samples; empty: not to be shown."""

    def text(self) -> str:
        """The whole README.md."""
        parts = [
            f"---\n{self.front_matter()}\n---",
            f"# {self.repository.rpartition('/')[2]}",
            self._what_it_is(),
            self.licence.sentence() if self.licence else UNKNOWN_LICENCE,
            *self._samples(),
            *(["## Trigger words\n\n" + ", ".join(f"`{words}`" for words in self.triggers)] if self.triggers else []),
            "## Use it",
            *(self._use_full() if self.full else self._use_adapter()),
            "## How it was trained\n\n" + _table(("Setting", "Value"), self.training),
            "## Versions\n\n" + _table(("Package", "Version"), self.versions),
        ]
        return str(masked("\n\n".join(parts) + "\n"))

    def front_matter(self) -> str:
        """The YAML between the dashes."""
        entries: dict[str, Any] = {"pipeline_tag": self.task, "tags": list(self.tags)}
        entries |= (self.licence or Licence("other")).front_matter()
        if self.base.repository:
            entries |= {"base_model": self.base.repository, "base_model_relation": "finetune" if self.full else "adapter"}
        if not self.full:
            entries["library_name"] = "diffusers"
        if self.triggers:
            entries["instance_prompt"] = self.triggers[0]
        if self.samples:
            entries["widget"] = [{"text": self.prompt or "-", "output": {"url": path}} for path in self.samples]
        return str(ModelCardData(**entries).to_yaml()).strip()

    def _what_it_is(self) -> str:
        kind = "All weights of a model, fine-tuned from" if self.full else "A LoRA for"
        base = f"`{self.base.described}`"
        if self.base.repository:
            base = f"[{self.base.repository}]({constants.ENDPOINT}/{self.base.repository})"
            base += f" at commit `{self.base.commit}`" if self.base.commit else ""
        return f"{kind} {base} ({self.variant}), trained with `tuner`."

    def _samples(self) -> list[str]:
        if not self.samples:
            return []
        links = "\n".join(f"- [{Path(path).name}]({path})" for path in self.samples)
        prompt = "Prompt: " + " ".join(self.prompt.split()) + "\n\n" if self.prompt else ""
        return [f"<Gallery />\n\n{prompt}{links}"]

    def _use_adapter(self) -> list[str]:
        base = self.use.repository or "PATH_OF_THE_BASE_MODEL"
        hint = "" if self.use.repository else " The path is that of the base model in diffusers' layout."
        lines = [
            "import torch", f"from diffusers import {self.use.pipeline}", "",
            f'pipeline = {self.use.pipeline}.from_pretrained("{base}", torch_dtype=torch.bfloat16)',
            f'pipeline.load_lora_weights("{self.repository}")',
            "pipeline.enable_model_cpu_offload()",
        ]  # fmt: skip
        code = "\n".join(lines)
        return [
            f"**diffusers**{':' + hint if hint else ':'}\n\n```python\n{code}\n```",
            f"**ComfyUI:** put `{self.files[0]}` into `ComfyUI/models/loras/` and a *LoraLoaderModelOnly* node between the base model and "
            "the sampler. Strength 1 is what was trained.",
        ]

    def _use_full(self) -> list[str]:
        return [
            f"`{self.files[0]}` holds the transformer under the names of the published checkpoint; everything else is the base model's.\n\n"
            f'```sh\ntuner sample --family {self.variant.split()[0]} --weights {self.files[0]} --prompt "..." --output sample.mp4\n```'
        ]


def card_of(plan: Plan, repository: str, licence: Licence | None, files: Sequence[str], samples: Sequence[str]) -> Card:
    """The card of a finished run; `files` and `samples`: their paths in the repository."""
    model = plan.settings.get(ModelSettings)
    base = Base.of(plan.source.description, plan.source.location)
    full = model.model_type == "full"
    given = _given(plan)
    use = plan.family.card_facts(model, given)
    if not use.repository and plan.source.location.is_dir():  # of repositories, only those in diffusers' layout become a folder
        use = CardFacts(use.task, use.pipeline, base.repository)
    task = use.task or _task(plan)
    tags = dict.fromkeys((plan.family_name, *(() if full else ("lora", "diffusers")), "text-to-video" if "video" in task else task, task))
    return Card(
        repository=repository, base=base, licence=licence, variant=f"{plan.family_name} {plan.facts.variant.name}", full=full, task=task,
        tags=tuple(tags), use=use, triggers=trigger_words(plan), training=training_rows(plan), versions=versions(plan),
        files=tuple(files), samples=tuple(samples), prompt=shown_prompt(plan) if samples else "",
    )  # fmt: skip


def fill_outbox(plan: Plan, run: Path, files: Sequence[Path], destination: Destination) -> Outbox:
    """Puts the result of a run and its card into the run's outbox; where the hub answers, it is asked for the base model's licence.

    Raises `DiskError`.
    """
    repository = destination.repository or f"{UNNAMED}/{destination.name}"
    base = Base.of(plan.source.description, plan.source.location)
    licence = base_licence(base.repository, base.commit, online=destination.online)
    samples = last_samples(run)
    card = card_of(plan, repository, licence, [file.name for file in files], [f"{SAMPLES}/{file.name}" for file in samples])
    outbox = Outbox(run, destination.name, repository, destination.repository, destination.private, base.repository, base.commit)
    return fill(outbox, card.text(), files, samples)


def _given(plan: Plan) -> frozenset[str]:
    first = {"first_frame" for item in plan.manifest.items if item.first_frame}
    return frozenset(first | plan.manifest.companions)


def _task(plan: Plan) -> str:
    """The hub's pipeline tag: what comes out of the streams that are learned."""
    return "text-to-video" if "video" in plan.family.learned_streams(plan.streams) else "text-to-audio"


def trigger_words(plan: Plan) -> tuple[str, ...]:
    """The instance prompts of entries that use them: these were chosen to be typed by others."""
    entries = [entry for entry in plan.entries if isinstance(entry, VideoEntry | ImageEntry | AudioEntry)]
    words = [entry.instance_prompt for entry in entries if _uses_prompt(entry)]
    return tuple(dict.fromkeys(" ".join(word.split()) for word in words if word.strip()))


def _uses_prompt(entry: CaptionedEntry) -> bool:
    return entry.caption_strategy == "instanceprompt" or entry.prepend_instance_prompt


def shown_prompt(plan: Plan) -> str:
    """The prompt of the samples, where it may be shown."""
    settings = plan.settings.get(ValidationSettings)
    captions = {item.caption for item in (*plan.manifest.items, *plan.manifest.held_out)}
    return publishable(settings.validation_prompt, captions, trigger_words(plan)) if wants_sample(settings) else ""


def publishable(prompt: str, captions: Iterable[str], public: Iterable[str] = ()) -> str:
    """`prompt`, unless it repeats a caption of the dataset or a part of one: captions are not published, but for those in `public`."""
    known = {text.strip().casefold() for text in public} | {""}
    asked = prompt.strip().casefold()
    private = {caption.strip().casefold() for caption in captions} - known
    return "" if any(caption in asked or asked in caption for caption in private) else prompt.strip()


def training_rows(plan: Plan) -> tuple[tuple[str, str], ...]:
    """What decides the result, in words; empty values are left out."""
    settings = plan.settings
    train, optimizer, model = settings.get(TrainSettings), settings.get(OptimizerSettings), settings.get(ModelSettings)
    devices = f" x {plan.world} devices" if plan.world > 1 else ""
    warmup = f", {optimizer.lr_warmup_steps} steps of warm-up" if optimizer.lr_warmup_steps else ""
    products = f", multiplied in {model.base_model_compute}" if model.base_model_compute else ""
    base_precision = "" if model.base_model_precision == "no_change" else f", base in {model.base_model_precision}{products}"
    rows = [
        *_adapter_rows(plan),
        ("Steps", str(plan.total_steps)),
        ("Batch", f"{train.train_batch_size} x {optimizer.gradient_accumulation_steps} accumulated{devices}"),
        ("Learning rate", f"{optimizer.learning_rate:g}, {optimizer.lr_scheduler}{warmup}"),
        ("Optimizer", f"{optimizer.optimizer}, gradient norm at most {optimizer.max_grad_norm:g}"),
        ("Precision", f"{str(plan.context.dtype).removeprefix('torch.')}{base_precision}"),
        ("Streams", _streams(plan)),
        ("Noise levels", f"{train.sigma_sampler}, {train.sigma_pairing} between streams"),
        ("Caption dropout", f"{train.caption_dropout_probability:g}" if train.caption_dropout_probability else ""),
        ("Regularizers", ", ".join(regularizer.name for regularizer in plan.regularizers)),
        ("Seed", str(train.seed)),
        ("Dataset", dataset_size(plan)),
        ("Sizes", ", ".join(f"{bucket} ({count})" for bucket, count in plan.manifest.bucket_counts().items())),
        ("Frame rate", ", ".join(f"{rate:g}" for rate in sorted({item.frame_rate for item in plan.manifest.items})) + " frames/s"),
    ]
    return tuple((what, value) for what, value in rows if value)


def _adapter_rows(plan: Plan) -> list[tuple[str, str]]:
    if plan.settings.get(ModelSettings).model_type == "full":
        return [("Trained", "all weights of the transformer")]
    adapter = plan.settings.get(AdapterSettings)
    layers = "chosen linear layers" if adapter.peft_lora_target_modules else f"{plan.facts.adapter_targets} linear layers"
    alpha = adapter.lora_rank if adapter.lora_alpha is None else adapter.lora_alpha
    dropout = f", dropout {adapter.lora_dropout:g}" if adapter.lora_dropout else ""
    return [("Adapter", f"LoRA on {layers}"), ("Rank and alpha", f"{adapter.lora_rank} and {alpha:g}{dropout}")]


def _streams(plan: Plan) -> str:
    learned = plan.family.learned_streams(plan.streams)
    given = [name for name in plan.streams if name not in learned]
    return " + ".join(learned) + (f" (given: {', '.join(given)})" if given else "")


def dataset_size(plan: Plan) -> str:
    """How many of each kind, and how many seconds of clips and sound."""
    items = plan.manifest.items
    kinds = [("video", "clips"), ("image", "pictures"), ("audio", "sounds")]
    counts = [f"{sum(item.kind == kind for item in items)} {name}" for kind, name in kinds if any(item.kind == kind for item in items)]
    seconds = sum(item.seconds for item in items if item.kind != "image")
    sounding = sum(item.has_audio and not item.silence and item.kind == "video" for item in items)
    sound = f", {sounding} of the clips with sound" if sounding else ""
    return " and ".join(counts) + (f", {seconds:.1f} s" if seconds else "") + sound


def versions(plan: Plan) -> tuple[tuple[str, str], ...]:
    """Distribution and version of what took part."""
    plugins = {p.distribution or p.name: p.version for p in plan.registry.plugins if p.status == "loaded"}
    found = {**_installed(LIBRARIES), **plugins}
    return tuple(sorted((name, version) for name, version in found.items() if version))


def _installed(names: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _table(headers: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    lines = [headers, ("---", "---"), *rows]
    return "\n".join("| " + " | ".join(" ".join(cell.replace("|", r"\|").split()) for cell in line) + " |" for line in lines)
