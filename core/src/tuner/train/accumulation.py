"""Whether accumulated batches go through each block together, or one after the other through all blocks."""

from __future__ import annotations

from tuner.config.settings import OptimizerSettings


def batches_together(settings: OptimizerSettings, *, streamed: bool, outside: bool, regularized: bool) -> int:
    """How many batches of an optimizer step each block takes while its weights are there.

    `auto` chooses it where weights come and go (`streamed`), so that they come once for all batches, and where the numbers stay the same
    to the last bit: gradients of a block are added up in the order of the batches either way, those of trained weights `outside` the
    blocks are not. Regularizers prepare one batch at a time.
    """
    order = settings.gradient_accumulation_order
    wanted = order == "layer" or (order == "auto" and streamed and not outside)
    return settings.gradient_accumulation_steps if wanted and not regularized else 1
