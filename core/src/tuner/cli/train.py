"""`tuner train`: the plan, the cache, the training, the files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from tuner.cli.common import ConfiguredCommand
from tuner.cli.status_line import CacheBar, StatusLine, is_interactive
from tuner.cli.table import folded, visible
from tuner.config.resolve import Settings
from tuner.config.settings import OptimizerSettings, RunSettings, TrainSettings
from tuner.plugins.registry import Registry

if TYPE_CHECKING:
    from tuner.train.plan import Plan
    from tuner.train.session import Outcome


class Terminal:
    """Draws the plan, the progress of caching and the live line of training."""

    def __init__(self, settings: Settings, console: Console | None = None) -> None:
        self.console = console or Console(stderr=False, highlight=False)
        self.settings = settings
        self._bar: CacheBar | None = None
        self._line: StatusLine | None = None

    def plan(self, plan: Plan) -> None:
        """Prints what will be done."""
        self._end_bar()
        self._rows("Plan", plan_rows(plan))
        if "\n" in (verdicts := plan.manifest.table()):
            self.console.print(self._folded(visible(verdicts)), markup=False, soft_wrap=True)
        for notice in plan.notices:
            self.console.print(self._folded(visible(f"notice: {notice}")), markup=False, soft_wrap=True)

    def _rows(self, title: str, rows: list[tuple[str, str]]) -> None:
        if not self.console.is_terminal:  # a file or another program, which wants a row on one line
            width = max(len(label) for label, _ in rows)
            self.console.print("\n".join([title, *(f"{label:<{width}}  {text}" for label, text in rows)]), markup=False, soft_wrap=True)
            return
        table = Table(title=title, show_header=False, box=None, title_justify="left", pad_edge=False)
        table.add_column()
        table.add_column(overflow="fold")  # nothing is cut off, however narrow it is
        for label, text in rows:
            table.add_row(label, text)
        self.console.print(table)

    def note(self, text: str) -> None:
        """One sentence, above whatever is live."""
        self._end_bar()
        text = self._folded(visible(text))
        if self._line is not None:
            self._line.note(text)
        else:
            self.console.print(text, markup=False, soft_wrap=True)

    def _folded(self, text: str) -> str:
        return folded(text, self.console.width if self.console.is_terminal else 0)

    def caching(self, done: int, total: int, label: str) -> None:
        """Progress of finding or encoding clips."""
        if self._bar is None:
            self._bar = CacheBar(self.console, interactive=is_interactive(self.console))
        self._bar.report(done, total, label)

    def training(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """A step's numbers."""
        self._end_bar()
        if self._line is None:
            self._line = StatusLine(
                self.console, total, interactive=is_interactive(self.console),
                checkpoint_interval=self.settings.get(RunSettings).checkpoint_step_interval,
            )  # fmt: skip
        self._line.update(step, metrics)

    def finished(self, outcome: Outcome) -> None:
        """Names every file."""
        self.close()
        if outcome.exit_code:
            self.console.print(self._folded(f"stopped at step {outcome.step}; go on with --resume_from_checkpoint latest"), markup=False)
        files = [("checkpoint", outcome.checkpoint), *(("trained", file) for file in outcome.files)]
        for label, path in [*files, ("sample", outcome.sample), ("to publish", outcome.outbox)]:
            if path is not None:
                self.console.print(self._folded(f"{label:>10}  {path}"), markup=False, soft_wrap=True)

    def close(self) -> None:
        """Ends whatever is live."""
        self._end_bar()
        if self._line is not None:
            self._line.close()
            self._line = None

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def plan_rows(plan: Plan) -> list[tuple[str, str]]:
    """Label and text of each line of the plan."""
    from tuner.train.plan import memory_facts  # torch
    from tuner.train.rules import training_facts

    settings, facts, manifest = plan.settings, plan.facts, plan.manifest
    optimizer, train = settings.get(OptimizerSettings), settings.get(TrainSettings)
    buckets = ", ".join(f"{bucket} ({count})" for bucket, count in manifest.bucket_counts().items())
    return [
        ("model", f"{plan.family_name} {facts.variant.name}, {plan.source.description}"),
        ("streams", " + ".join(plan.streams)),
        ("size", f"{facts.parameters / 1e9:.3f} B parameters, {facts.blocks} blocks, {facts.bytes / 2**30:.2f} GiB"),
        ("training", describe_training(plan)),
        ("clips", manifest.describe()),
        ("sound", manifest.describe_sound(train.train_batch_size, train.seed)),
        ("buckets", f"{buckets} (width x height @ frames)"),
        ("length", describe_length(plan)),
        ("optimizer", f"{optimizer.optimizer}, learning rate {optimizer.learning_rate:g}, {optimizer.lr_scheduler}"),
        ("device", f"{plan.context.device}, {str(plan.context.dtype).removeprefix('torch.')}"),
        ("output", str(plan.context.output_dir)),
        *(("download", text) for text in plan.downloads),
        *(("regularizer", ": ".join(filter(None, [r.name, r.describe(training_facts(plan))]))) for r in plan.regularizers),
        *(("loss term", f"{term.name}, of a plugin") for term in plan.loss_terms),
        *(("precision", text) for text in describe_precision(plan)),
        *(("memory", f"{strategy.name}: {strategy.plan(memory_facts(plan)).summary}") for strategy in plan.memory.strategies),
        *([("memory", plan.predicted.describe())] if plan.predicted else []),
        *plan.validation.describe(),
    ]  # fmt: skip


def describe_length(plan: Plan) -> str:
    """Steps and what is in one; without a length (`tuner cache`) what an epoch is."""
    accumulated, size = plan.settings.get(OptimizerSettings).gradient_accumulation_steps, plan.settings.get(TrainSettings).train_batch_size
    each = f" on each of {plan.world} devices" if plan.world > 1 else ""
    steps = f"{plan.total_steps} steps of {accumulated} x {size} clips{each}, " if plan.total_steps else ""
    return f"{steps}{plan.batches_per_epoch} batches an epoch"


def describe_precision(plan: Plan) -> list[str]:
    """A line for each part that is quantized; for the transformer with its size before and after."""
    from tuner.config.settings import ModelSettings
    from tuner.train.plan import NO_CHANGE, quantized_bytes

    model = plan.settings.get(ModelSettings)
    base, text = model.base_model_precision, model.text_encoder_1_precision
    sizes = f"{plan.facts.bytes / 2**30:.2f} -> {quantized_bytes(plan) / 2**30:.2f} GiB"
    products = f", multiplied in {model.base_model_compute}" if model.base_model_compute else ""
    return [*([f"{base}: {sizes}{products}"] if base != NO_CHANGE else []), *([f"text encoder {text}"] if text != NO_CHANGE else [])]


def describe_training(plan: Plan) -> str:
    """LoRA with its rank, or full fine-tuning."""
    from tuner.config.settings import AdapterSettings, ModelSettings

    if plan.settings.get(ModelSettings).model_type == "full":
        return "all weights"
    adapter = plan.settings.get(AdapterSettings)
    chosen = "your target modules" if adapter.peft_lora_target_modules else f"{plan.facts.adapter_targets} linear layers"
    return f"LoRA of rank {adapter.lora_rank}, alpha {adapter.lora_alpha or adapter.lora_rank:g}, on {chosen}"


def run(registry: Registry, settings: Settings, arguments: Mapping[str, Any]) -> int:
    """Plans and trains."""
    from tuner.train.session import train  # torch

    terminal = Terminal(settings)
    try:
        return train(registry, settings, terminal, dry_run=arguments["dry_run"]).exit_code
    finally:
        terminal.close()


command = ConfiguredCommand(
    "train",
    "Train a model on a folder of clips. Every configuration key is a flag too; flags win over environment, file and defaults.",
    run,
    [click.Option(["--dry-run", "dry_run"], is_flag=True, help="Check everything and print the plan, then stop.")],
)
