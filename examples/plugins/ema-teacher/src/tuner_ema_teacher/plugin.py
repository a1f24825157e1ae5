"""Registers the averaged teacher."""

from __future__ import annotations

from tuner.component import Component
from tuner.hookspecs import hookimpl
from tuner_ema_teacher.options import EmaTeacherOptions

TUNER_HOOKSPEC_VERSION = 1


@hookimpl
def tuner_register_regularizers() -> list[Component]:
    """One component, switched on by `ema_teacher_weight`."""
    return [
        Component(
            "ema_teacher", "aligns tokens with those of an averaged, less noisy teacher", EmaTeacherOptions,
            "tuner_ema_teacher.teacher:EmaTeacher", "Tarvainen and Valpola 2017, arXiv:1703.01780; Chefer et al. 2026, arXiv:2603.06507",
        )
    ]  # fmt: skip
