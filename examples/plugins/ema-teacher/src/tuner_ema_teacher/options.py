"""The keys. Importing this costs no torch."""

from __future__ import annotations

from typing import ClassVar

from tuner.config.options import Options, option


class EmaTeacherOptions(Options):
    """The teacher, what it sees, and which tokens are compared."""

    title: ClassVar[str] = "Averaged teacher"

    ema_teacher_weight: float = option(0.0, ge=0, help="Weight of the term; 0 switches it off.")
    ema_teacher_decay: float = option(0.999, ge=0, lt=1, help="Of the teacher's weights: how much of them is kept in each step.")
    ema_teacher_sigma_scale: float = option(
        0.5, gt=0, le=1, help="The teacher sees the same draw at this multiple of the noise level; 1: what the student sees."
    )
    ema_teacher_block: int | None = option(
        None, help="The student's block, from 0; below 0 counted from the end. A third of the depth when empty.", unit="blocks"
    )
    ema_teacher_target_block: int | None = option(
        None, help="The teacher's block that it is aligned with; two thirds of the depth when empty.", unit="blocks"
    )
    ema_teacher_stream: str = option("video", help="Whose tokens are compared.")

    def enabled(self) -> bool:
        return self.ema_teacher_weight > 0
