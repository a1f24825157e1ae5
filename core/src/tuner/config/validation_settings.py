"""Keys of what is made and measured of a model while it trains, and none of which changes what is trained."""

from __future__ import annotations

from typing import ClassVar, Literal

from tuner.config.options import Options, option, unsupported

LATER = "not part of this version"
USER_LIBRARY = "config/user_prompt_library.json"


class ValidationSettings(Options):
    """Samples and held-out losses before, during and after training."""

    title: ClassVar[str] = "Validation"
    changes_numbers: ClassVar[bool] = False

    validation_disable: bool = option(False, help="Make no samples and compute no held-out losses.")
    disable_benchmark: bool = option(False, help="Leave out the samples and losses before the first step.")
    validation_step_interval: int = option(
        0, ge=0, help="Samples and held-out losses every so many steps; 0: only before the first step and at the end.", unit="steps",
        aliases=("validation_steps",)
    )
    validation_prompt: str = option(
        "", help="Prompt of a sample, called `sample`; none when empty.", ask="Prompt of a sample to look at? Enter for none",
        ask_if={"validation_disable": False}, effect="A clip is made before the first step and at the end, to see what training changed.",
    )
    validation_prompt_library: str | bool = option(
        False, help="A JSON file of further prompts, {name: prompt} or a list; true: that of `user_prompt_library`.", metavar="FILE"
    )
    user_prompt_library: str = option(
        "", help=f"A file as for `validation_prompt_library`, which then need not be given; `{USER_LIBRARY}` where that is true.",
        metavar="FILE"
    )
    validation_disable_unconditional: bool = option(True, help="Leave out the sample with the empty prompt, called `unconditional`.")
    validation_using_datasets: bool = option(False, help="Samples from held-out files too: from first frames and pictures, and to sounds.")
    eval_dataset_id: str = option("", help="Ids of entries of dataset_type `eval`, separated by commas; all when empty.")
    validation_given: Literal["both", "picture", "sound"] = option(
        "both", help="What samples from held-out files are given: the first frame, the sound, or one sample for each that a file has."
    )
    validation_num_dataset_samples: int = option(4, ge=1, help="Held-out files that samples are made from, at most.", unit="files")
    validation_negative_prompt: str = option("", help="What guidance leads away from.")
    validation_guidance: float = option(5.0, ge=1, help="Classifier-free guidance of samples; 1 switches it off.")
    validation_audio_guidance: float | None = option(None, ge=1, help="The same for the sound; that of the picture when empty.")
    validation_num_inference_steps: int = option(40, ge=1, help="Steps of a sample.", unit="steps")
    validation_num_video_frames: int = option(
        81, ge=1, help="Length of a sample; one to a held-out sound is no longer than that.", unit="frames"
    )
    validation_resolution: str = option(
        "768x512", help="Width x height of a sample; one from a held-out file has that file's size.", unit="pixels",
        ask="Width x height of the sample?", ask_if={"validation_prompt": True}, effect="Larger takes longer, and more memory.",
    )
    validation_seed: int = option(42, ge=0, help="Seed of every sample.")
    validation_adapter_path: str = option(
        "", help="An adapter to put beside the trained one for samples: file, folder, or `repository:file` of the hub."
    )
    validation_adapter_strength: float = option(1.0, help="Scale of that adapter.")
    validation_adapter_config: str | dict[str, object] | list[object] | None = option(
        None, help="Several adapters to compare: {name: path}, {name: {path, strength}}, {name: [several at once]}, or a JSON file of it."
    )
    validation_adapter_mode: Literal["adapter_only", "comparison"] = option(
        "adapter_only", help="With such adapters make each sample with every one of them, or once without any, too."
    )
    num_eval_images: int = option(
        16, ge=0, help="Held-out files whose loss is computed, at most; 0: no held-out losses.", unit="files"
    )
    eval_timesteps: int = option(4, ge=1, help="Noise levels at which each of them is computed, evenly over (0, 1).")
    evaluation_type: str = unsupported(help="Scores for samples.", reason="scores are " + LATER, changes_results=False, default="none")
