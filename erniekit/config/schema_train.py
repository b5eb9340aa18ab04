"""Keys about the run: steps, evaluation, saving, logging, and the optimizer."""

from dataclasses import dataclass
from typing import ClassVar

from erniekit.config.fields import key, list_of

# Trackers know runs by name; the others only write files.
TRACKERS = ("wandb", "swanlab", "mlflow", "trackio")
BOARDS = ("visualdl", "tensorboard", *TRACKERS)


@dataclass(frozen=True, kw_only=True)
class TrainArgs:
    """How long to train, when to evaluate and save, and where the results go."""

    group: ClassVar[str] = "train"

    do_train: bool = key(True, "Train (ERNIEKit's default is False, with which `train` would do nothing).")
    do_eval: bool = key(False, "Evaluate at the end; implied when evaluation_strategy is steps or epoch.")
    seed: int = key(42, "Seed of the initial weights, the order of the data, dropout and noise.", ge=0, lt=2**32)
    batch_size: int = key(1, "Micro-batch size: rows per device and forward pass, in training and in evaluation.", ge=1)
    gradient_accumulation_steps: int = key(1, "Micro-batches that are accumulated for one optimizer step.", ge=1)
    num_train_epochs: float = key(1.0, "Epochs: how often the training data is read, when max_steps is -1.", gt=0)
    max_steps: int = key(-1, "Optimizer steps to train; -1: num_train_epochs decides.", ge=1, off=-1)
    evaluation_strategy: str = key(
        "no",
        "Evaluate while training: no, every eval_steps (steps), or after each epoch (epoch), and after the last step.",
        choices=("no", "steps", "epoch"),
        words={"false": "no"},
    )
    eval_steps: int | None = key(
        None, "Steps between evaluations; not given: logging_steps if that is given, else 500.", ge=1
    )
    max_evaluate_steps: int = key(
        -1, "Evaluate the first N batches of batch_size rows, counted over all ranks; -1: all.", ge=1, off=-1
    )
    save_strategy: str = key(
        "steps",
        "Write checkpoints: no, every save_steps (steps), or after each epoch (epoch).",
        choices=("no", "steps", "epoch"),
        words={"false": "no"},
    )
    save_steps: int = key(500, "Steps between checkpoints.", ge=1)
    save_total_limit: int | None = key(None, "Checkpoints kept: the newest, and the best one; null: all.", ge=1)
    save_format: str = key("pt", "Layout of saved weights: pt (Hugging Face) or paddle.", choices=("pt", "paddle"))
    use_async_save: bool = key(
        False, "Checkpoints are copied to host memory and written in the background while training continues."
    )
    load_best_model_at_end: bool = key(False, "The final model is the best checkpoint's, not the last step's.")
    metric_for_best_model: str | None = key(None, "Evaluation metric that ranks checkpoints; not given: loss.")
    greater_is_better: bool | None = key(
        None,
        "Whether that metric should be high; null: not for losses, perplexity, kl, truncated, reward_bad and "
        "reward_rejected.",
    )
    early_stopping_patience: int | None = key(
        None, "Stop after this many evaluations without a new best; null: never.", ge=1
    )
    logging_steps: int = key(
        1, "Steps between log lines (ERNIEKit's default is 500, which logs nothing in short runs).", ge=1
    )
    logging_dir: str | None = key(None, "Where report_to writes; not given: output_dir/runs.", path=True)
    report_to: tuple[str, ...] = list_of(
        str,
        "Also log to these: visualdl, tensorboard, wandb, swanlab, mlflow, trackio; metrics.jsonl and loss.png are "
        "always written.",
        choices=("none", *BOARDS),
    )
    run_name: str | None = key(
        None, "The run's name in wandb, swanlab, mlflow and trackio; not given: that of output_dir."
    )
    project: str | None = key(None, "The project of the run there, in mlflow the experiment; not given: erniekit.")
    output_dir: str | None = key(None, "Where checkpoints, the final model, metrics and results go.", path=True)
    overwrite_output_dir: bool = key(
        False,
        "Start from scratch although output_dir holds a run: its checkpoints, metrics and final model are removed. For "
        "export and split: replace another model in the directory that they write.",
    )
    profile: bool = key(False, "Measure where the time goes: a table, profile.json (a trace) and profile.png.")
    profile_step_start: int = key(
        3, "The first step that profile measures, counted from the start of the process.", ge=1
    )
    profile_step_end: int = key(5, "The last step that profile measures.", ge=1)
    disable_tqdm: bool = key(False, "No progress bar: plain log lines.")
    resume_from_checkpoint: str = key(
        "auto",
        "auto: the newest whole checkpoint in output_dir, if any; none: never resume; or a checkpoint directory.",
        path=True,
        words=dict.fromkeys(("auto", "true", "yes", "on"), "auto")
        | dict.fromkeys(("none", "false", "no", "off"), "none"),
    )
    ignore_load_lr_and_optim: bool = key(False, "Resume with the weights only; the optimizer starts with empty state.")
    ignore_save_lr_and_optim: bool = key(
        False, "Checkpoints hold no optimizer state: small, but not resumable exactly."
    )
    ckpt_quant_stage: str = key(
        "O0",
        "How checkpoints hold AdamW's moments: as they are (O0), in 8 bits (O1) or 4 bits (O2) for a matrix; weights "
        "and masters are never rounded. A resumed run then differs from an uninterrupted one.",
        choices=("O0", "O1", "O2"),
    )
    ignore_data_skip: bool = key(False, "Resume at the beginning of the data, not after the rows already seen.")


@dataclass(frozen=True, kw_only=True)
class OptimArgs:
    """The optimizer, the learning-rate schedule, and regularisation."""

    group: ClassVar[str] = "optimizer"

    optim: str = key(
        "adamw",
        "The optimizer: AdamW with decoupled weight decay, or muon (orthogonal momentum for the matrices of layers, "
        "AdamW for the rest; docs/muon.md).",
        choices=("adamw", "adamw_custom", "muon"),
    )
    muon_momentum: float = key(0.95, "Muon's momentum (Nesterov's).", ge=0, lt=1)
    muon_ns_steps: int = key(5, "Newton-Schulz steps by which Muon makes momentum orthogonal.", ge=1)
    muon_version: int = key(
        3,
        "What Muon multiplies the orthogonal update of a matrix [in, out] by: the root of max(1, out / in) (1), of "
        "out / in (2), or of max(in, out) (3).",
        ge=1,
        le=3,
    )
    muon_extra_scale_factor: float = key(
        0.2, "A further factor of Muon's updates; 0.2 with muon_version: 3 makes them as large as AdamW's.", gt=0
    )
    muon_qkv_update_mode: str = key(
        "split_head",
        "What Muon makes orthogonal of q|k|v: each head (split_head), q, k and v (split_qkv), or all (fused_qkv).",
        choices=("split_head", "split_qkv", "fused_qkv"),
    )
    muon_ffn_split: bool = key(False, "Muon makes gate and up orthogonal each by itself, instead of gate|up.")
    learning_rate: float = key(5e-5, "Highest learning rate.", ge=0)
    min_lr: float = key(0.0, "Lowest learning rate of the cosine and wsd schedules.", ge=0)
    lr_scheduler_type: str = key(
        "linear",
        "Learning rate over time: linear, cosine, polynomial, constant, constant_with_warmup, or wsd:N "
        "(warm-up, steady up to step N, decay; wsd alone: N is 0.9 of all steps).",
    )
    decay_function: str = key("half_life", "How wsd decays.", choices=("half_life", "1-sqrt"))
    decay_steps: int | None = key(None, "Step at which the schedule has ended; not given: the last step.", ge=1)
    warmup_steps: int = key(0, "Steps of linear warm-up.", ge=0)
    warmup_ratio: float = key(0.0, "Warm-up as a share of all steps, when warmup_steps is 0.", ge=0, le=1)
    num_cycles: float = key(0.5, "Cycles of the cosine schedule: 0.5 decays once.", gt=0)
    power: float = key(1.0, "Exponent of the polynomial schedule.", gt=0)
    lr_end: float = key(1e-7, "Last learning rate of the polynomial schedule.", ge=0)
    weight_decay: float = key(0.0, "Decoupled weight decay; not applied to norms and biases.", ge=0)
    adam_beta1: float = key(0.9, "Decay of AdamW's first moment.", ge=0, lt=1)
    adam_beta2: float = key(0.999, "Decay of AdamW's second moment.", ge=0, lt=1)
    adam_epsilon: float = key(1e-8, "AdamW's epsilon.", gt=0)
    moment_dtype: str = key(
        "fp32",
        "How AdamW's two moments are stored between steps: fp32, bf16 (half the memory) or 8bit (a quarter); they are "
        "computed in fp32.",
        choices=("fp32", "bf16", "8bit"),
        words={"float32": "fp32", "bfloat16": "bf16", "int8": "8bit"},
    )
    offload_optim: bool = key(
        False, "AdamW's state waits in host memory; each parameter's is on the GPU only while it is updated."
    )
    tensorwise_offload_optimizer: bool = key(
        False, "As offload_optim, but no state is fetched before it is needed: least GPU memory, no overlap."
    )
    max_grad_norm: float = key(1.0, "Gradients are clipped to this global norm; 0: never.", ge=0)
    layerwise_lr_decay_bound: float = key(
        1.0,
        "Layer-wise learning rate decay: multiplier at the lowest layer, rising linearly to 1 at the top; 1: none.",
        gt=0,
        le=1,
    )
    ema_decay: float | None = key(
        None,
        "Also keep an exponential average of the weights with this decay a step, saved as ema/; null: none.",
        gt=0,
        lt=1,
    )
    batch_size_warmup_steps: int = key(
        0, "Steps over which gradient_accumulation_steps grows linearly to its value; 0: no warm-up.", ge=0
    )
    neftune: bool = key(False, "Noise on the input embeddings while training (NEFTune).")
    neftune_noise_alpha: float = key(5.0, "Strength of that noise.", ge=0)
    token_balance_loss: str = key(
        "none",
        "What a sample's token losses are divided by: all supervised tokens of the step (none), its own length, then "
        "samples are averaged (sample), or in the gradient max_seq_len of each row (row, ERNIEKit's true).",
        choices=("none", "sample", "row"),
        words=dict.fromkeys(("true", "yes", "on", "1"), "row") | dict.fromkeys(("false", "no", "off", "0"), "none"),
    )
