"""A real run and its outbox, with a hub that fails at the end; what the model card says of the run, and what it never says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

from core.hub_stub import HubStub, refusal
from integration.project import Project, add_clip

COMMIT = "c0ffee" + "0" * 34
TOKEN = "hf_" + "q" * 32
PROMPT = "waves roll in under a green sky"


@pytest.fixture
def published(project: Project, monkeypatch: pytest.MonkeyPatch) -> str:
    """The base model as it lies in the hub's cache, with its card, and two datasets, one of them with trigger words; the weights' path."""
    snapshot = project.folder / "hub" / "models--maker--tiny" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    weights = shutil.copy(project.tiny.checkpoint, snapshot)
    (snapshot / "README.md").write_text("---\nlicense: other\nlicense_name: makers-own\nlicense_link: LICENSE\n---\n", encoding="utf-8")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(project.folder / "hub"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    add_clip(project.folder / "styled", "private-name", frames=9, caption="a caption that stays here")
    entries = [
        {"id": "secret-dataset", "instance_data_dir": str(project.folder / "clips"), "video": {"num_frames": 9}},
        {"id": "styled", "instance_data_dir": str(project.folder / "styled"), "video": {"num_frames": 9, "is_i2v": True},
         "instance_prompt": "sks waves", "prepend_instance_prompt": True},
    ]  # fmt: skip
    (project.folder / "dataset.json").write_text(json.dumps(entries))
    return str(weights)


def test_a_finished_run_survives_a_failing_hub(
    project: Project, published: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = HubStub().install(monkeypatch)
    hub.failing["upload_folder"] = refusal(500)
    hub.cards["maker/tiny"] = {"license": "apache-2.0"}
    code = project.train(
        pretrained_model_name_or_path=published, data=None, data_backend_config="dataset.json", output_dir="sea/green waves",
        push_to_hub=True, max_train_steps=1, train_batch_size=1, checkpoint_step_interval=0, validation_disable=False,
        validation_prompt=PROMPT, validation_resolution="64x64", validation_num_video_frames=9,
        validation_num_inference_steps=1, validation_guidance=1,
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert code == 0 and "tuner push 'sea/green waves'" in shown and "HTTP 500" in shown
    assert project.events("push_failed", "sea/green waves") and project.events("finished", "sea/green waves")
    run = project.folder / "sea" / "green waves"
    box = run / "outbox" / "green-waves"
    found = sorted(str(path.relative_to(box)) for path in box.rglob("*") if path.is_file())
    assert found == ["README.md", "lora.safetensors", "pytorch_lora_weights.safetensors", "samples/sample.mp4"]
    assert all((box / name).samefile(run / name) for name in found[1:3])
    assert (box / "samples/sample.mp4").samefile(run / "validation/step_1/sample.mp4")
    check_card(project, (box / "README.md").read_text(encoding="utf-8"))

    del hub.failing["upload_folder"]
    assert project.tuner("push", run) == 0
    assert hub.private == {"ann/green-waves": True} and sorted(hub.files["ann/green-waves"]) == found


def check_card(project: Project, text: str) -> None:
    """What the card says, and that nothing private is in it."""
    card = ModelCard(text)
    assert card.data.to_dict() == {
        "base_model": "maker/tiny", "base_model_relation": "adapter", "library_name": "diffusers", "license": "apache-2.0",
        "pipeline_tag": "image-to-video", "instance_prompt": "sks waves",
        "tags": ["ltxvideo2", "lora", "diffusers", "text-to-video", "image-to-video"],
        "widget": [{"text": PROMPT, "output": {"url": "samples/sample.mp4"}}],
    }  # fmt: skip
    rows = {cells[0]: cells[1] for line in text.splitlines() if len(cells := line.strip("| ").split(" | ")) == 2}
    assert (rows["Rank and alpha"], rows["Steps"], rows["Batch"]) == ("4 and 8", "1", "1 x 1 accumulated")
    assert rows["Dataset"] == f"5 clips, {5 * 9 / 25:.1f} s, 4 of the clips with sound"
    assert rows["Sizes"] == "64x64@9 (5)" and rows["Frame rate"] == "25 frames/s" and rows["Streams"] == "video + audio"
    assert rows["Learning rate"].startswith("0.001, ") and rows["Seed"] == "42" and "adamw" in rows["Optimizer"]
    assert "torch" in rows and "tuner-ltxvideo2" in rows
    assert f"[maker/tiny]({constants.ENDPOINT}/maker/tiny) at commit `{COMMIT}`" in text and 'load_lora_weights("ann/green-waves")' in text
    captions = [path.read_text() for path in project.folder.glob("*/*.txt")]
    names = [path.stem for path in project.folder.glob("*/*.mp4")]
    private = [*captions, *names, str(project.folder), str(Path.home()), TOKEN, "hf_secret", "secret-dataset", "clips/"]
    assert len(captions) == 5 and not [text_ for text_ in private if text_ in text]


def test_without_a_token_nothing_begins(project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    HubStub().install(monkeypatch, token=None)
    assert project.train(push_to_hub=True) == 8
    assert "hf auth login" in capsys.readouterr().err and not (project.folder / "out").exists() and not (project.folder / "cache").exists()
