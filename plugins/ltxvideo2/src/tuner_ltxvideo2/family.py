"""LTX-2 as the core sees it: what a checkpoint holds, which encoders feed it, its forward pass, its LoRA targets, its samples.

Special here: nothing is computed in this file. It names the streams and hands each question to the module that answers it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from tuner.config.options import Options
from tuner.errors import CheckpointError
from tuner.interfaces.blocks import BlockSet, BlockState
from tuner.interfaces.encoders import LatentEncoder
from tuner.interfaces.family import (
    Batch,
    BlockFunction,
    BuildContext,
    Generated,
    Geometry,
    ModelFacts,
    ModelFamily,
    Noise,
    Prediction,
    Sample,
    SampleRequest,
    TokenShift,
)
from tuner.interfaces.services import TensorHeader, WeightSource
from tuner_ltxvideo2 import inputs, keys, loading, previews, transformer
from tuner_ltxvideo2.options import LTX2Options
from tuner_ltxvideo2.variants import variant_of

ATTENTION_TARGETS = (".to_q", ".to_k", ".to_v", ".to_out.0")
"""LoRA targets in every attention of every block: 1,152 of them in the 48 blocks with both streams."""
AUDIO_TARGETS = ("audio_proj_in", "audio_proj_out", "audio_caption_projection.linear_1", "audio_caption_projection.linear_2")
"""Further targets where sound is trained, beside each block's `audio_ff`: what the base model knows least of a new voice."""
