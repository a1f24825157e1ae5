"""Model cards, read back by the hub's own reader."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

from tuner.interfaces.services import CardFacts
from tuner.model.licence import UNKNOWN_LICENCE, Licence, base_licence
from tuner.train.publish.card import Base, Card, publishable

COMMIT = "c0ffee" + "0" * 34
LICENCE = Licence("other", "some: community licence", "https://hub/licence")
CARD = Card(
    repository="ann/waves", base=Base(f"maker/model@{COMMIT}", "maker/model", COMMIT), licence=LICENCE, variant="family 1.0", full=False,
    task="text-to-video", tags=("family", "lora"), use=CardFacts(pipeline="DiffusionPipeline", repository="maker/model"),
    triggers=("blue waves",), training=(("Steps", "40"), ("Sizes", "64x64@9 (2) | rest")), versions=(("torch", "2"),),
    files=("lora.safetensors",), samples=("samples/sample.mp4",), prompt='waves: "blue"\n# and more',
)  # fmt: skip


def fenced(text: str, language: str) -> str:
    """The only block in `language`."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return str(found)


def test_the_front_matter_says_what_the_hub_indexes() -> None:
    data = ModelCard(CARD.text()).data.to_dict()
    assert data == {
        "base_model": "maker/model", "base_model_relation": "adapter", "library_name": "diffusers", "pipeline_tag": "text-to-video",
        "license": "other", "license_name": "some: community licence", "license_link": "https://hub/licence",
        "tags": ["family", "lora"], "instance_prompt": "blue waves",
        "widget": [{"text": CARD.prompt, "output": {"url": "samples/sample.mp4"}}],
    }  # fmt: skip


def test_the_text_shows_how_to_use_it_and_how_it_was_made() -> None:
    text = CARD.text()
    code = ast.parse(fenced(text, "python"))
    called = {ast.unparse(node.func): ast.unparse(node.args[0]) for node in ast.walk(code) if isinstance(node, ast.Call) and node.args}
    assert called == {"DiffusionPipeline.from_pretrained": "'maker/model'", "pipeline.load_lora_weights": "'ann/waves'"}
    assert "| Steps | 40 |" in text and r"64x64@9 (2) \| rest" in text and "`lora.safetensors`" in text and "`blue waves`" in text
    assert f"at commit `{COMMIT}`" in text and "[some: community licence](https://hub/licence)" in text
    assert "(samples/sample.mp4)" in text and "<Gallery />" in text and "\n# and more" not in text.split("---", 2)[2]


def test_what_is_not_known_is_not_claimed() -> None:
    bare = replace(CARD, base=Base("mine.safetensors"), licence=None, triggers=(), samples=(), prompt="", use=CardFacts())
    text = bare.text()
    assert ModelCard(text).data.to_dict() == {
        "license": "other", "library_name": "diffusers", "pipeline_tag": "text-to-video", "tags": ["family", "lora"],
    }  # fmt: skip
    assert UNKNOWN_LICENCE in text and "`mine.safetensors`" in text and "PATH_OF_THE_BASE_MODEL" in text
    assert "Gallery" not in text and "Trigger" not in text


def test_full_weights_are_a_fine_tune_and_no_adapter() -> None:
    text = replace(CARD, full=True, files=("transformer.safetensors",)).text()
    data = ModelCard(text).data
    assert data.base_model_relation == "finetune" and data.library_name is None
    assert "tuner sample --family family --weights transformer.safetensors" in fenced(text, "sh") and "load_lora_weights" not in text


def test_a_token_in_any_field_does_not_get_out() -> None:
    token = "hf_" + "x" * 30
    assert token not in replace(CARD, prompt=token, triggers=(token,), training=(("Optimizer", token),)).text()


def test_a_prompt_that_repeats_a_caption_is_not_shown() -> None:
    captions = ["A cat sleeps ", "blue waves"]
    assert publishable("a CAT sleeps", captions) == publishable("at night a cat sleeps.", captions) == publishable("cat", captions) == ""
    assert publishable(" a dog by blue waves", captions) == "" and publishable("a dog", captions) == "a dog"
    assert publishable(" a dog by blue waves", captions, ["Blue waves"]) == "a dog by blue waves"


@pytest.mark.parametrize(
    ("description", "location", "expected"),
    [
        (f"maker/model@{COMMIT}", "/cache/file.safetensors", ("maker/model", COMMIT)),
        ("maker/model", "/cache/file.safetensors", ("maker/model", "")),
        ("file.safetensors", "/home/user/file.safetensors", ("", "")),
        ("a.safetensors + b.safetensors", "/cache/gathered", ("", "")),
        ("f.safetensors", f"/hub/models--maker--model-2.0/snapshots/{COMMIT}/f.safetensors", ("maker/model-2.0", COMMIT)),
        (COMMIT, f"/hub/models--maker--model/snapshots/{COMMIT}", ("maker/model", COMMIT)),
    ],
)
def test_the_base_model_is_a_repository_or_unknown(description: str, location: str, expected: tuple[str, str]) -> None:
    base = Base.of(description, Path(location))
    assert (base.repository, base.commit) == expected


@pytest.mark.parametrize(
    ("front_matter", "expected"),
    [
        ("license: apache-2.0", Licence("apache-2.0")),
        ("license: [mit]", Licence("mit")),
        ("license_name: own\nlicense_link: ./LICENSE", Licence("other", "own", f"{constants.ENDPOINT}/maker/model/blob/main/LICENSE")),
        ("license: other\nlicense_link: https://x/y", Licence("other", "", "https://x/y")),
        ("tags: [a]", None),
        ("license: [", None),
    ],
)
def test_a_licence_is_the_base_cards_own(
    front_matter: str, expected: Licence | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--maker--model" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text(f"---\n{front_matter}\n---\n# Model\n", encoding="utf-8")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert base_licence("maker/model", COMMIT, online=False) == expected
    assert base_licence("maker/other", COMMIT, online=False) is None and base_licence("", "", online=False) is None
