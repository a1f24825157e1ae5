"""The core's own keys: everything that belongs to no plugin."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import model_validator

from tuner.config.options import Options, option, unsupported
from tuner.config.rollout_settings import RolloutSettings
from tuner.config.validation_settings import ValidationSettings

FP8_WEIGHTS = "fp8-torchao"
"""The precision that `base_model_compute: fp8` implies."""


class ModelSettings(Options):
    """Which model is trained, and how."""

    title: ClassVar[str] = "Model"

    model_family: str = option(
        "", help="Which family of models to train, by the name that `tuner plugins` lists.", aliases=("family",),
        ask="Which family of models?", effect="A family is a plugin: another one is there once its plugin is installed.",
    )  # fmt: skip
    model_flavour: str = option(
        "", help="Which published checkpoint of the family; the family's default when empty.", ask="Which checkpoint of it?",
        effect="The files are fetched from the model hub when training begins, tens of gigabytes for a large model. What is trained on "
        "one checkpoint works best with that one.",
    )
    model_type: Literal["lora", "full"] = option(
        "lora", help="Train low-rank adapters, or every weight.", ask="Train low-rank adapters, or every weight?",
        effect="`full` holds gradients and optimizer state of all weights: several times the memory of `lora`, and the result is as "
        "large as the model. An adapter is a file of some hundred megabytes.",
    )
    pretrained_model_name_or_path: str = option(
        "", help="Hub repository, folder or single .safetensors file; the flavour's own repository when empty.",
        ask="Weights of your own? A .safetensors file, a folder or a hub repository; Enter for the checkpoint's own",
        effect="Files that lie on this disk already are not fetched again.",
    )
    revision: str = option("", help="Commit, tag or branch of the hub repository; resolved to a commit and recorded.")
    text_encoder_path: str = option(
        "", help="Hub repository or folder of the text encoder, where the checkpoint does not bring one.",
        aliases=("pretrained_text_encoder_model_name_or_path",),
    )
    mixed_precision: Literal["no", "bf16"] = option(
        "bf16", help="What frozen weights are held and computed in: bf16, or fp32 for `no`.", ask="Compute in bf16, or in fp32?",
        effect="bf16 is for GPUs. A processor is very slow in it: choose `no` there, which takes twice the memory.",
    )
    gradient_checkpointing: bool | Literal["auto"] = option(
        True, help="Recompute blocks in backward instead of keeping their activations. "
        "`auto`: keeps those of as many blocks as fit on the GPU."
    )
    gradient_checkpointing_interval: int = option(
        1, ge=1, help="Keep the activations of every k-th block: 1 recomputes all, 2 every other one.", unit="blocks"
    )
    base_model_precision: str = option(
        "no_change", help="Precision of the frozen blocks: `no_change`, or the name of a quantizer.",
        ask="Precision of the frozen weights?", ask_if={"model_type": "lora"},
        effect="8 bits take half the memory and are close to the original, 4 bits take a quarter and are coarser. The adapter itself "
        "is not rounded.",
    )
    base_model_compute: Literal["", "fp8"] = option(
        "", help="What frozen linear layers multiply in: their own dtype when empty, or 8-bit floats, which cards from compute capability "
        "8.9 on do at twice the rate. `fp8` holds the blocks in `fp8-torchao` unless `base_model_precision` says `fp8-quanto`."
    )
    text_encoder_1_precision: str = option("no_change", help="The same for the text encoder.")
    cuda_graphs: Literal["auto", "on", "off"] = option(
        "auto", help="Replay forward and backward of each shape of batch as one CUDA graph: the step no longer waits for the CPU. "
        "`auto`: where nothing speaks against it."
    )
    cuda_graph_lanes: int = option(
        2, ge=1, le=2, help="With 2, a replayed step does small work of a block, such as that of a stream with few tokens, beside the "
        "large work. The numbers are the same with 1."
    )
    dynamo_mode: Literal["", "no", "off", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = option(
        "", help="Compile the blocks with torch.compile, in this mode; empty, `no` or `off`: not. "
        "CUDA graphs are a matter of `cuda_graphs`."
    )

    @model_validator(mode="before")
    @classmethod
    def _hold_what_is_multiplied(cls, given: Any) -> Any:
        """8-bit products need 8-bit weights."""
        precision = "base_model_precision"
        if isinstance(given, dict) and given.get("base_model_compute") == "fp8" and given.get(precision, "no_change") == "no_change":
            return {**given, precision: FP8_WEIGHTS}
        return given


class AdapterSettings(Options):
    """LoRA."""

    title: ClassVar[str] = "Adapter"

    lora_rank: int = option(
        16, ge=1, help="Rank of the adapters.", ask="Rank of the adapters?", ask_if={"model_type": "lora"},
        effect="Higher learns more detail, and more of what is only in your clips; memory and the file grow with it. 8 to 64 are usual.",
    )
    lora_alpha: float | None = option(None, gt=0, help="Scale: the adapter's product is multiplied by alpha / rank; the rank when empty.")
    lora_dropout: float = option(0.0, ge=0, lt=1, help="Dropout on the adapter's input.")
    peft_lora_target_modules: list[str] | str | None = option(
        None, help="Names or name endings of the linear layers to adapt; the family's defaults when empty."
    )
    lycoris_config: str | dict[str, object] | None = unsupported(
        help="LyCORIS adapters.", reason="adapters are LoRA through peft; the file is read only where lora_type asks for it",
        changes_results=False,
    )
    lora_type: str = unsupported(
        help="Kind of adapter.", reason="adapters are LoRA through peft (`standard`)", changes_results=True, default="standard"
    )


class OptimizerSettings(Options):
    """Optimizer and learning rate."""

    title: ClassVar[str] = "Optimizer"

    optimizer: str = option("adamw_bf16", help="Which optimizer, by the name that `tuner plugins` lists.")
    learning_rate: float = option(
        1e-4, gt=0, help="Peak learning rate.", ask="Learning rate?",
        effect="Higher learns faster and is sooner unstable. 1e-4 to 2e-4 are usual for adapters, a tenth of that for full fine-tuning.",
    )
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"] = option(
        "constant_with_warmup", help="Course of the learning rate over the run."
    )
    lr_warmup_steps: int = option(0, ge=0, help="Steps over which the learning rate rises from 0.", unit="steps")
    lr_num_cycles: int = option(1, ge=1, help="Cycles of `cosine_with_restarts`.")
    lr_power: float = option(1.0, gt=0, help="Power of `polynomial`.")
    max_grad_norm: float = option(1.0, ge=0, help="Gradients are scaled down to this norm; 0 leaves them.")
    gradient_accumulation_steps: int = option(1, ge=1, help="Batches per optimizer step.", unit="batches")
    gradient_accumulation_order: Literal["auto", "batch", "layer"] = option(
        "auto", help="Each batch through all blocks, or each block takes all batches before the next one is brought in. "
        "`auto`: the second where weights are brought in from host memory and no bit of the result changes."
    )


class TrainSettings(Options):
    """Length, batches, seed."""

    title: ClassVar[str] = "Training"
    alternatives: ClassVar[tuple[tuple[str, str], ...]] = (("max_train_steps", "num_train_epochs"),)

    train_batch_size: int = option(
        1, ge=1, help="Clips per batch and device.", unit="clips", ask="How many clips in a batch?",
        effect="More is steadier, and takes memory and time with each clip.",
    )
    max_train_steps: int = option(
        0, ge=0, help="Optimizer steps; 0: `num_train_epochs` decides.", unit="steps", ask="How many steps?", suggest=2000,
        ask_if={"num_train_epochs": 0}, effect="Steps times the batch, divided by the number of clips, is how often each clip is seen. "
        "Too few: the result shows little effect; too many: it copies your clips.",
    )
    num_train_epochs: int = option(0, ge=0, help="Passes over the dataset; 0: `max_train_steps` decides.", unit="epochs")
    seed: int = option(42, ge=0, help="Every random draw derives from it.")
    caption_dropout_probability: float = option(0.0, ge=0, le=1, help="How often a clip is trained with the empty caption.")
    sigma_sampler: Literal["shifted_logit_normal", "logit_normal", "uniform", "beta"] = option(
        "shifted_logit_normal", help="Distribution of the noise level."
    )
    flow_schedule_shift: float = option(3.0, gt=0, help="S in S·s / (1 + (S - 1)·s), for `logit_normal`.")
    sigma_pairing: Literal["independent", "shared"] = option("independent", help="Whether streams of a sample draw their own noise level.")


class DataSettings(Options):
    """Datasets and their cache."""

    title: ClassVar[str] = "Data"
    alternatives: ClassVar[tuple[tuple[str, str], ...]] = (("data_backend_config", "data"),)

    data_backend_config: str = option("", help="The dataset file: a JSON list of entries.", metavar="FILE")
    data: str = option(
        "", help="A folder of clips with .txt captions: short for a dataset file with one video entry.", metavar="DIR",
        ask="Folder with your clips?", effect="Subfolders count. Beside each clip lies a text file of the same name with its caption. "
        "No file there is ever changed.",
    )
    cache_dir: str = option("cache", help="Where encoded clips and captions are kept, unless an entry names its own.", metavar="DIR")
    resolution: float = option(
        512, gt=0, help="Side of the square whose area a clip is resized to, or megapixels for `area`.",
        ask="Resolution? The side of a square of the area that clips are resized to",
        effect="Their shape stays. More shows finer detail; memory and time grow with the area, and faster for long clips.",
    )
    resolution_type: Literal["pixel", "pixel_area", "area"] = option(
        "pixel_area", help="What `resolution` means: shorter side, side of the square of equal area, or megapixels."
    )
    minimum_image_size: float = option(
        0, ge=0, help="Clips and pictures whose shorter side is below it are skipped; with `area` it counts megapixels. 0: none.",
        unit="pixels"
    )
    frame_rate: float | None = option(
        None, gt=0, help="Clips are resampled to it by presentation time; the family's default when empty.", unit="frames/s",
        aliases=("framerate",)
    )
    vae_batch_size: int = option(1, ge=1, help="Clips encoded at once.", unit="clips")
    dataloader_prefetch: int = option(2, ge=0, help="Batches prepared ahead of the step.", unit="batches")
    strict: bool = option(False, help="Whatever would be adjusted or skipped is an error instead.")
    override_dataset_config: bool = unsupported(
        help="Accept a dataset whose settings changed.", reason="cache entries are named by content and settings, so they cannot go stale",
        changes_results=False, default=False,
    )
    skip_file_discovery: str = unsupported(
        help="Skip scanning.", reason="files are found anew at each start, which costs one directory listing",
        changes_results=False, default=""
    )


class RunSettings(Options):
    """Output folder, checkpoints, trackers."""

    title: ClassVar[str] = "Run"

    output_dir: str = option(
        "output", help="The run folder.", metavar="DIR", ask="Folder for the result?",
        effect="Checkpoints, the trained files, samples and logs go there; a run of its own needs a folder of its own.",
    )
    checkpoint_step_interval: int = option(
        500, ge=0, help="A checkpoint every so many steps; 0: only at the end.", unit="steps", aliases=("checkpointing_steps",),
        ask="A checkpoint every how many steps?", effect="A run that is interrupted goes on from the newest one.",
    )
    checkpoints_total_limit: int = option(5, ge=0, help="Older checkpoints beyond this number are deleted; 0: keep all.")
    resume_from_checkpoint: str = option("", help="`latest`, or a checkpoint folder.", metavar="DIR")
    report_to: str = option("none", help="Trackers beside metrics.jsonl, separated by commas: `tensorboard`, `wandb`, `trackio`; `none`.")
    tracker_project_name: str = option("tuner", help="Project name for trackers.")
    tracker_run_name: str = option("", help="Run name for trackers; the output folder's name when empty.")
    log_interval: int = option(1, ge=1, help="Steps between two rows of metrics.jsonl and of trackers.", unit="steps")
    push_to_hub: bool = option(False, help="Upload the result to the model hub at the end; `tuner push` sends it later.")
    hub_model_id: str = option(
        "", help="Repository to upload to, as `owner/name`; when empty one of your own, called as the run is for trackers."
    )
    hub_private: bool = option(True, help="Only you, or the members of the owning organization, see the repository.")


CORE_OPTIONS: tuple[type[Options], ...] = (
    ModelSettings, AdapterSettings, OptimizerSettings, TrainSettings, RolloutSettings, DataSettings, RunSettings, ValidationSettings,
)
