"""The two streams in the names of the transformer's modules, and which weights a stream needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Side:
    """The names under which one stream's modules are found. `prefix` is put before the names that both streams have."""

    name: str
    prefix: str
    cross_attention: str
    """The attention whose queries are this stream and whose keys are the other."""
    cross_norm: str
    cross_table: str
    cross_embedding: str
    cross_gate: str
    cross_rope: str

    def of(self, module: nn.Module, name: str) -> Any:
        """This stream's `name` in `module`: a submodule or parameter."""
        return getattr(module, self.prefix + name)


VIDEO = Side(
    name="video", prefix="",
    cross_attention="audio_to_video_attn", cross_norm="audio_to_video_norm", cross_table="video_a2v_cross_attn_scale_shift_table",
    cross_embedding="av_cross_attn_video_scale_shift", cross_gate="av_cross_attn_video_a2v_gate", cross_rope="cross_attn_rope",
)
AUDIO = Side(
    name="audio", prefix="audio_",
    cross_attention="video_to_audio_attn", cross_norm="video_to_audio_norm", cross_table="audio_a2v_cross_attn_scale_shift_table",
    cross_embedding="av_cross_attn_audio_scale_shift", cross_gate="av_cross_attn_audio_v2a_gate", cross_rope="cross_attn_audio_rope",
)
SIDES = (VIDEO, AUDIO)
BLOCKS = "transformer_blocks"

_CROSS_PREFIXES = ("av_cross_attn_", "cross_attn_", "audio_to_video_", "video_to_audio_", "video_a2v_", "audio_a2v_")


def streams_of(name: str) -> frozenset[str]:
    """The streams that all have to be there for the parameter or module `name` to be used: one, or both for cross-modal ones."""
    segments = name.split(".")
    head = segments[2] if segments[0] == BLOCKS and len(segments) > 2 else segments[0]
    if head.startswith(_CROSS_PREFIXES):
        return frozenset({VIDEO.name, AUDIO.name})
    return frozenset({AUDIO.name if head.startswith(AUDIO.prefix) else VIDEO.name})


def skip_for(streams: Sequence[str]) -> Callable[[str], bool]:
    """The predicate for loading: whether a parameter is of no use when only `streams` run."""
    present = frozenset(streams)
    return lambda name: not streams_of(name) <= present


def drop_unused(model: nn.Module, streams: Sequence[str]) -> None:
    """Deletes, in place, every module and parameter that `streams` do not need."""
    skip = skip_for(streams)
    blocks = [(f"{BLOCKS}.{i}.", block) for i, block in enumerate(transformer_blocks(model))]
    for prefix, owner in [("", model), *blocks]:
        children = [name for name, _ in owner.named_children() if name != BLOCKS]
        for name in children + [name for name, _ in owner.named_parameters(recurse=False)]:
            if skip(prefix + name):
                delattr(owner, name)


def drop_audio(model: nn.Module) -> None:
    """Deletes the audio branch and the cross-modal attentions: what training on video alone never touches."""
    drop_unused(model, (VIDEO.name,))


def drop_video(model: nn.Module) -> None:
    """Deletes the video branch and the cross-modal attentions: what training on sound alone never touches."""
    drop_unused(model, (AUDIO.name,))


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks, in order."""
    blocks = getattr(model, BLOCKS)
    return list(blocks)


def widths(model: nn.Module) -> dict[str, int]:
    """Stream -> channels of its tokens, of those that the model was loaded for."""
    return {side.name: int(side.of(model, "proj_in").out_features) for side in SIDES if hasattr(model, side.prefix + "proj_in")}


def text_widths(model: Any, streams: Sequence[str]) -> dict[str, int]:
    """Stream -> channels of the encoded captions that it takes."""
    if model.config.use_prompt_embeddings:
        return dict.fromkeys(streams, int(model.config.caption_channels))
    block = transformer_blocks(model)[0]
    return {side.name: int(side.of(block, "attn2").to_k.in_features) for side in SIDES if side.name in streams}
