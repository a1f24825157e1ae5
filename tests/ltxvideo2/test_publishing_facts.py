"""What LTX-2 contributes to a model card: pipelines that exist and take adapters, and repositories only for published weights."""

from __future__ import annotations

import diffusers
import pytest

from tuner.config.settings import ModelSettings
from tuner_ltxvideo2.card import REPOSITORIES, card_facts
from tuner_ltxvideo2.options import LTX2Options
from tuner_ltxvideo2.variants import FLAVOURS


@pytest.mark.parametrize(
    ("given", "probability", "task"),
    [((), 0.0, ""), (("mask",), 0.0, ""), (("first_frame",), 0.0, "image-to-video"), ((), 0.5, "image-to-video"),
     (("reference", "first_frame"), 0.5, "video-to-video")],
)  # fmt: skip
def test_the_pipeline_suits_what_was_trained(given: tuple[str, ...], probability: float, task: str) -> None:
    facts = card_facts(ModelSettings(), LTX2Options(i2v_conditioning_probability=probability), frozenset(given))
    assert facts.task == task and facts.repository == "Lightricks/LTX-2"
    assert callable(getattr(diffusers, facts.pipeline).load_lora_weights)


def test_the_repository_is_that_of_the_flavour_and_of_nothing_else() -> None:
    def repository(**model: str) -> str:
        return card_facts(ModelSettings(**model), LTX2Options(), frozenset()).repository

    assert set(REPOSITORIES) < set(FLAVOURS)
    assert repository(model_flavour="2.3-dev") == "diffusers/LTX-2.3-Diffusers" == REPOSITORIES["2.3-dev"]
    assert repository(model_flavour="dev", pretrained_model_name_or_path="Lightricks/LTX-2") == "Lightricks/LTX-2"
    assert repository(pretrained_model_name_or_path="someone/else") == repository(model_flavour="tiny") == ""
