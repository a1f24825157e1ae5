"""Attention over diffusers' own modules and functions: what `LTX2AudioVideoAttnProcessor` computes, with projections taken together.

Special here: queries, keys and values of one input share their adapters' products (`tuner.model.low_rank.project`), and a norm is taken
together with the turn by the rotary angles (`tuner.model.fused`). No mask is taken: none reaches the model.

Dimensions: B samples, S query tokens, T key tokens, D channels, H heads, r half the channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_ltx2 import apply_interleaved_rotary_emb
from torch import Tensor

from tuner.model.fused import rms_norm, rms_rotated
from tuner.model.low_rank import project

Rotary = tuple[Tensor, Tensor]
"""(cos, sin): (B, H, S, r) split or (B, S, D) interleaved."""


def attend(
    attention: Any, hidden: Tensor, context: Tensor | None = None, query_rotary: Rotary | None = None, key_rotary: Rotary | None = None
) -> Tensor:
    """hidden (B, S, D) reads `context` (B, T, ·), or itself: (B, S, D).

    `attention`: diffusers' `LTX2Attention`. Keys turn by `key_rotary`, or by that of the queries.
    """
    if context is None:
        query, key, value = project((attention.to_q, attention.to_k, attention.to_v), hidden)
    else:
        query = attention.to_q(hidden)
        key, value = project((attention.to_k, attention.to_v), context)
    query = _placed(query, attention.norm_q, query_rotary)
    key = _placed(key, attention.norm_k, key_rotary or query_rotary)
    heads = [tensor.view(*tensor.shape[:2], attention.heads, -1) for tensor in (query, key, value)]
    attended = dispatch_attention_fn(*heads, dropout_p=0.0, is_causal=False, backend=attention.processor._attention_backend)
    if attention.to_gate_logits is not None:  # 2.3 on: twice a sigmoid, so that a gate of zeros lets everything pass
        attended = attended * (2.0 * torch.sigmoid(attention.to_gate_logits(hidden))).unsqueeze(-1)
    result: Tensor = attention.to_out[0](attended.flatten(2, 3).to(query.dtype))
    return result


def _placed(tokens: Tensor, norm: Any, rotary: Rotary | None) -> Tensor:
    """Normed, and turned by the angles of their places. The tables' shape tells which pairs turn: halves of a head, or neighbours."""
    if rotary is not None and rotary[0].ndim == 4:
        return rms_rotated(tokens, norm.eps, norm.weight, *rotary)
    normed = rms_norm(tokens, norm.eps, norm.weight)
    return normed if rotary is None else apply_interleaved_rotary_emb(normed, rotary)
