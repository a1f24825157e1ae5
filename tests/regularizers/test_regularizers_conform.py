"""TREAD and CREPA keep to what every regularizer promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import tuner_regularizers.plugin
from tuner.testing import RegularizerConformance

ROUTE: Mapping[str, object] = {"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -2}
ALIGNED: Mapping[str, object] = {"crepa_enabled": True, "crepa_encoder": "tiny", "crepa_encoder_image_size": 56, "crepa_block_index": 1}


def routed(**changes: object) -> Mapping[str, object]:
    """One route, with changes."""
    return {"tread_config": {"routes": [{**ROUTE, **changes}]}}


class TestTreadConforms(RegularizerConformance):
    plugin = tuner_regularizers.plugin
    component = "tread"
    options: ClassVar[Mapping[str, object]] = routed()
    zero: ClassVar[Mapping[str, object]] = routed(selection_ratio=0)
    refused: ClassVar[Sequence[tuple[Mapping[str, object], str]]] = [
        (routed(end_layer_idx=9), "tread_config.routes[0].end_layer_idx"), (routed(start_layer_idx=3), "tread_config.routes[0]"),
    ]  # fmt: skip


class TestCrepaConforms(RegularizerConformance):
    """With a threshold: the smoothed similarity, and values that no decision rests on yet, have to outlive a resume."""

    plugin = tuner_regularizers.plugin
    component = "crepa"
    options: ClassVar[Mapping[str, object]] = {**ALIGNED, "crepa_similarity_threshold": -1.0, "crepa_threshold_mode": "recoverable"}
    zero: ClassVar[Mapping[str, object]] = {"crepa_lambda": 0}
    refused: ClassVar[Sequence[tuple[Mapping[str, object], str]]] = [
        ({"crepa_block_index": 9}, "crepa_block_index"), ({"crepa_encoder_image_size": 57}, "crepa_encoder_image_size"),
        ({"crepa_encoder": "dinov9"}, "crepa_encoder"),
    ]  # fmt: skip


class TestCrepaInsideARouteConforms(TestCrepaConforms):
    """Over a bfloat16 model; the projector computes in float32."""

    options: ClassVar[Mapping[str, object]] = {**ALIGNED, **routed(), "mixed_precision": "bf16"}
    refused: ClassVar[Sequence[tuple[Mapping[str, object], str]]] = ()
