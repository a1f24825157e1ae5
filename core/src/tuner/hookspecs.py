"""Every hook, in the order of a run. Plugin authors read this page first.

A plugin is a module (entry point group `tuner`) with functions decorated by `tuner.hookspecs.hookimpl`. Registration hooks run once
per process, import no torch, and return lists of `Component`; the factory that a component names is imported when a run
needs it. No hook is called per step: the step calls plain methods on objects that were built once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pluggy

from tuner.component import Component

if TYPE_CHECKING:
    import click

    from tuner.config.options import Options
    from tuner.errors import TunerError
    from tuner.train.plan import Plan
    from tuner.train.run import RunInfo

hookspec = pluggy.HookspecMarker("tuner")
hookimpl = pluggy.HookimplMarker("tuner")
"""Decorates a plugin's hook implementations."""


# --- registration: once per process, no torch --------------------------------------------------------------------
@hookspec
def tuner_register_options() -> list[type[Options]]:  # type: ignore[empty-body]
    """Option groups that belong to no component: keys that a plugin reads for itself, or recognises and declines with a reason."""


@hookspec
def tuner_register_families() -> list[Component]:  # type: ignore[empty-body]
    """Model families; factories are subclasses of `tuner.interfaces.family.ModelFamily`, called as `Family(options, context)`."""


@hookspec
def tuner_register_loaders() -> list[Component]:  # type: ignore[empty-body]
    """Layouts of model weights; factories are subclasses of `tuner.interfaces.services.Loader`, called without arguments."""


@hookspec
def tuner_register_latent_encoders() -> list[Component]:  # type: ignore[empty-body]
    """Encoders beside those a family or regularizer brings itself; subclasses of `tuner.interfaces.encoders.LatentEncoder`."""


@hookspec
def tuner_register_loss_terms() -> list[Component]:  # type: ignore[empty-body]
    """Loss terms that their options switch on; subclasses of `tuner.interfaces.losses.LossTerm`, called as `Term(options, context)`."""


@hookspec
def tuner_register_regularizers() -> list[Component]:  # type: ignore[empty-body]
    """Techniques that their options switch on; subclasses of `tuner.interfaces.losses.Regularizer`, called as `R(options, context)`."""


@hookspec
def tuner_register_memory_strategies() -> list[Component]:  # type: ignore[empty-body]
    """Memory strategies that their options switch on; subclasses of `tuner.interfaces.memory.MemoryStrategy`."""


@hookspec
def tuner_register_quantizers() -> list[Component]:  # type: ignore[empty-body]
    """Quantizers, chosen by `base_model_precision`; subclasses of `tuner.interfaces.memory.Quantizer`."""


@hookspec
def tuner_register_optimizers() -> list[Component]:  # type: ignore[empty-body]
    """Optimizers, chosen by `optimizer`; factories are called as `make(parameters, learning_rate, options)`."""


@hookspec
def tuner_register_trackers() -> list[Component]:  # type: ignore[empty-body]
    """Trackers, chosen by `report_to`; subclasses of `tuner.interfaces.services.Tracker`, called as `T(options, run_folder)`."""


@hookspec
def tuner_register_checkpoint_formats() -> list[Component]:  # type: ignore[empty-body]
    """File layouts of adapters; subclasses of `tuner.interfaces.services.CheckpointFormat`."""


@hookspec
def tuner_register_commands(cli: click.Group) -> None:
    """Adds commands to `tuner`."""


# --- planning: once per run, headers only ------------------------------------------------------------------------
@hookspec
def tuner_check_plan(plan: Plan) -> list[TunerError]:  # type: ignore[empty-body]
    """Rules across components. All problems of all plugins are shown, then the run stops."""


# --- running: a few times ------------------------------------------------------------------------------------------
@hookspec
def tuner_checkpoint_saved(run: RunInfo, path: Path, step: int) -> None:
    """A checkpoint was committed at `path`."""


@hookspec
def tuner_run_finished(run: RunInfo, outcome: str) -> None:
    """The run ended: "finished", "stopped" or "failed"."""
