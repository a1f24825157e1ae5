"""Keeps known, harmless messages of libraries off the screen. Errors stay, and so does everything of any other logger."""

from __future__ import annotations

import logging

HARMLESS = {
    "torchao": "which of its compiled kernels were built for other machines",
    "torch.utils._pytree": "a deprecation between two libraries",
    "diffusers.quantizers.torchao.torchao_quantizer": "a file format of quantized checkpoints that nobody here reads",
}
"""Logger -> what its warnings are about."""


def silence_libraries() -> None:
    """Raises the level of these loggers to ERROR. Imports nothing."""
    for name in HARMLESS:
        logging.getLogger(name).setLevel(logging.ERROR)
