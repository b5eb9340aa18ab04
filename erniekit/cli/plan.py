"""`erniekit plan`: what a run will need and how long it will take, from its YAML and the name of a GPU."""

import dataclasses
import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erniekit import config, hub
from erniekit.checkpoint.model_shape import adds_vision, given_shape, model_config
from erniekit.checkpoint.vision_start import config_directory, joined_config
from erniekit.cli import launch, options
from erniekit.config import Config
from erniekit.config.paths import expand
from erniekit.config.values import to_bool
from erniekit.models.config import CONFIG_FILE, ModelConfig
from erniekit.models.overrides import training_overrides
from erniekit.parallel.mesh import ParallelDims
from erniekit.plan.hardware import Hardware, load_hardware
from erniekit.plan.job import CPU, Cluster, Job, make_job
from erniekit.plan.shapes import NAMES, published_shape
from erniekit.utils import atomic, log
from erniekit.utils.errors import ConfigError
from erniekit.utils.host_memory import host_memory

DEFAULT_GPU, MAX_GPUS_PER_NODE = "H800", 8


@dataclass(frozen=True)
class PlanOptions:
    """The options of `plan` that are not keys of the configuration."""

    gpus: int | None = None
    gpu: str = DEFAULT_GPU
    gpus_per_node: int | None = None
    memory: float | None = None
    tokens: float | None = None
    document_tokens: int | None = None
    picture_tokens: int | None = None
    hardware: str | None = None
    json: str = ""
    chart: str = ""
    search: bool = False
    timeline: str = ""
    trace: str = ""


def run(args: list[str]) -> int:
    """Plan a run, print the plan, and return the exit code: 0 if it fits, 3 if it does not."""
    if args[:1] == ["calibrate"]:
        return _calibrate(args[1:])
    values, command_args = options.read("plan", args, _OPTIONS)
    options.require("plan", command_args, "Missing configuration file. Give a YAML or JSON file, or key=value.")
    plan_options = PlanOptions(**values)
    path, overrides = launch.read_arguments(command_args)
    cfg = config.load(path, overrides, "train", allow_extra=launch.allows_extra())
    launch.log_notes(cfg)
    config.require_supported(cfg, "train")
    card = load_hardware(plan_options.gpu, plan_options.hardware)
    job = job_of(cfg, plan_options, card)
    report = _report(job, card, plan_options)
    print(report.to_text())
    values = report.to_dict() | _beyond(report, card, plan_options)
    if plan_options.json:
        atomic.write_text(Path(plan_options.json), json.dumps(values, ensure_ascii=False, indent=2) + "\n")
    if plan_options.chart:
        from erniekit.plan.chart import draw

        draw(report.memory, report.time, Path(plan_options.chart))
        log.info(f"chart: {plan_options.chart}")
    return 0 if report.memory.fits else 3


def job_of(cfg: Config, plan_options: PlanOptions, card: Hardware) -> Job:
    """The job that a configuration and the options describe. ConfigError where they do not fit together."""
    model = training_overrides(cfg).apply(_model(cfg))
    gpu = CPU if card.name.lower() == CPU else card.name
    gpus = plan_options.gpus or ParallelDims.from_config(cfg).world
    most = gpus if gpu == CPU else MAX_GPUS_PER_NODE  # one host with CPUs starts all that the degrees ask for
    per_node = plan_options.gpus_per_node or min(gpus, most)
    if gpus > per_node and gpus % per_node:
        raise ConfigError(
            f"gpus: {gpus} do not make whole hosts of gpus_per_node: {per_node} ({gpus} / {per_node} = "
            f"{gpus / per_node:.2f}). Give a multiple of {per_node}, or another gpus_per_node."
        )
    _check_precision(cfg, card)
    if gpu != CPU and cfg.context_parallel_degree > 1 and cfg.cp_comm_type == "p2p":
        raise ConfigError(
            f"cp_comm_type: p2p: the ring of context_parallel_degree: {cfg.context_parallel_degree} is for CPUs; "
            f"training on {card.name} would be refused. Set cp_comm_type: a2a, or plan gpu=cpu"
        )
    pictures = _picture_tokens(cfg, model, plan_options)
    return make_job(cfg, model, Cluster(gpus, gpu, per_node), plan_options.document_tokens, pictures)


def _picture_tokens(cfg: Config, model: ModelConfig, plan_options: PlanOptions) -> int:
    """Tokens of a row that stand for pictures. ConfigError for pictures or documents that a row cannot hold."""
    if cfg.method.vision and model.vision is None:
        raise ConfigError(
            f"stage: this one trains on pictures, and {cfg.model_name_or_path} is a model of text alone "
            f"({model.model_type}). Name a vision-language model, or choose a stage for text."
        )
    if plan_options.picture_tokens and (model.vision is None or not cfg.method.vision):
        reason = "the model has no vision" if model.vision is None else "this stage reads text alone"
        raise ConfigError(f"picture_tokens: {plan_options.picture_tokens}: {reason}. Leave it out.")
    if (plan_options.document_tokens or 0) > cfg.max_seq_len:
        raise ConfigError(
            f"document_tokens: {plan_options.document_tokens} is more than a row of max_seq_len: {cfg.max_seq_len} "
            "tokens holds. Give at most that."
        )
    pictures = plan_options.picture_tokens or 0
    if plan_options.picture_tokens is None and model.vision is not None and cfg.method.vision:
        pictures = cfg.max_seq_len // 2
    if pictures > cfg.max_seq_len:
        raise ConfigError(f"picture_tokens: {pictures} of a row of max_seq_len: {cfg.max_seq_len} tokens")
    return pictures


def _check_precision(cfg: Config, card: Hardware) -> None:
    """Refuse what the card has no units for, and what is for a CPU."""
    if cfg.matmul_precision != "fp32" and card.name.lower() != CPU:
        raise ConfigError(
            f"matmul_precision: {cfg.matmul_precision}: it is for a CPU; training on {card.name} would be refused. "
            "Remove the key, or plan gpu=cpu"
        )
    if cfg.compute_type not in ("fp16", "fp32") and not card.bf16:
        computes = "" if cfg.compute_type == "bf16" else "it computes in bf16, and "
        raise ConfigError(
            f"compute_type: {cfg.compute_type}: {computes}{card.name} has no bf16 units. Plan compute_type=fp16 or "
            "another card."
        )
    if card.name.lower() == CPU:
        return
    if cfg.fp8 == "none" and cfg.emulate_precision:
        raise ConfigError(
            f"emulate_precision: it is for a CPU; training on {card.name}, which has {cfg.compute_type} itself, would "
            "be refused. Remove the key, or plan gpu=cpu"
        )
    if cfg.fp8 == "none":
        return
    card.peak("fp8")  # refuses a card without it, by its name
    if cfg.emulate_precision:
        raise ConfigError(
            f"emulate_precision: FP8 that is emulated on {card.name} multiplies in fp32, which is not planned. Remove "
            "the key, or plan gpu=cpu"
        )
    from erniekit.precision import fp8, fp8_kernels

    if card.capability and (reason := fp8_kernels.refused(fp8.recipe_of(cfg), card.capability, cfg.compute_type)):
        raise ConfigError(
            f"fp8: {cfg.fp8}: gpu={card.name}: {reason}. Training would be refused; fp8: none trains without"
        )


def _model(cfg: Config) -> ModelConfig:
    """The model's shape, without its weights: from its directory, from the table of published models, or the YAML."""
    name = cfg.model_name_or_path
    directory = None if name is None else hub.find_model(name)
    if directory is not None:
        return model_config(cfg, directory)
    if name is None:
        tokenizer = hub.find_tokenizer(cfg.tokenizer_name_or_path or "")
        if tokenizer is None:
            raise ConfigError(f"tokenizer_name_or_path: {cfg.tokenizer_name_or_path}: give a directory on this machine")
        return model_config(cfg, tokenizer)
    shape = published_shape(name)
    if shape is not None and adds_vision(cfg, shape):
        return _with_vision(cfg, name, shape)
    if shape is not None:
        return dataclasses.replace(shape, **given_shape(cfg)) if not cfg.continue_training else shape
    known = [f"baidu/ERNIE-4.5-{each}-Paddle" for each in NAMES]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" The nearest name is {near[0]}." if near else ""
    raise ConfigError(
        f"model_name_or_path: {name} is neither a directory here nor a published ERNIE 4.5 model, whose shapes are "
        f"known: {', '.join(NAMES)}.{hint} Download its config.json and give the directory."
    )


def _with_vision(cfg: Config, name: str, text: ModelConfig) -> ModelConfig:
    """A published text model with the vision part of vision_config_path: a config.json, or a published model's name."""
    path = config_directory(cfg.vision_config_path or "")
    other = published_shape(f"baidu/{path.name}")
    if (path / CONFIG_FILE).is_file() or other is None or other.vision is None:
        return joined_config(text, Path(name), path)
    if (other.hidden_size, other.num_hidden_layers) != (text.hidden_size, text.num_hidden_layers):
        raise ConfigError(f"vision_config_path: {path}: the text part has other sizes than {name}. Name its own model.")
    return dataclasses.replace(text, model_type=other.model_type, vision=other.vision, num_nextn_predict_layers=0)


def _beyond(report: Any, card: Hardware, plan_options: PlanOptions) -> dict[str, Any]:
    """Print what goes beyond one step, write its timeline and trace, and return the values for the JSON file."""
    from erniekit.plan import outlook
    from erniekit.plan.memory import MemoryPlan, plan_memory
    from erniekit.training.outline import outline_stage

    def plan(job: Job) -> MemoryPlan:
        return plan_memory(job, report.memory.worst.capacity, outline_stage)

    beyond = outlook.outlook(report.memory, report.time, card, plan)
    print("\n".join(["", *beyond.to_lines()]))
    if plan_options.timeline or plan_options.trace:
        _write_timeline(report.time, plan_options)
    return beyond.to_dict()


def _write_timeline(time: Any, plan_options: PlanOptions) -> None:
    """Simulate the step of all ranks, and write that of the slowest data rank."""
    from erniekit.plan import outlook, timeline
    from erniekit.plan.simulate import Disturbance, simulate_step

    step = simulate_step(time, Disturbance(outlook.JITTER))
    after = [stage.after for stage in time.stages]
    finished = step.timeline.finished[:, step.slowest].tolist()
    if plan_options.timeline:
        title = f"{time.run.layout.gpus} x {time.card.name}: {step.seconds:.2f} s a step, the slowest data rank"
        timeline.draw_timeline(Path(plan_options.timeline), step.timeline.events, after, finished, title)
        log.info(f"timeline: {plan_options.timeline}")
    if plan_options.trace:
        timeline.write_trace(Path(plan_options.trace), timeline.chrome_trace(step.timeline.events, after, finished))
        log.info(f"trace: {plan_options.trace}")


def _report(job: Job, card: Hardware, plan_options: PlanOptions) -> Any:
    from erniekit.plan import advice
    from erniekit.plan.memory import plan_memory
    from erniekit.plan.report import Report
    from erniekit.plan.search import search
    from erniekit.plan.timing import plan_time
    from erniekit.quantize.trained import check_export
    from erniekit.training.freezing import check_frozen
    from erniekit.training.outline import outline_layers, outline_stage

    check_export(job.cfg.qat, job.model, job.cfg.quantization_group_size)
    if not job.cfg.lora_path:  # else what is trained follows from the saved adapter
        check_frozen(job.cfg, job.model)
    capacity = plan_options.memory or _capacity(job, card)
    memory = plan_memory(job, capacity, outline_stage)
    found = advice.changes(memory, capacity, outline_stage, card)
    cure = advice.cheapest_fit(found)
    needs_more = not memory.fits and cure is None
    return Report(
        memory=memory,
        time=plan_time(job, card),
        saving=advice.most_saving(found),
        cure=cure,
        least=advice.least_cluster(job, capacity, outline_stage) if needs_more else None,
        tokens=plan_options.tokens or _tokens(job),
        assumptions=_assumptions(job, card, plan_options),
        found=None
        if not plan_options.search
        else search(
            job,
            card,
            lambda each, stages: plan_memory(each, capacity, outline_stage, stages),
            capacity=capacity,
            outline=outline_layers,
        ),
    )


def _capacity(job: Job, card: Hardware) -> float:
    """Bytes that one rank has: a card's, or a share of this host's memory."""
    if not job.on_cpu:
        return card.memory_bytes
    return host_memory() / min(job.cluster.gpus, job.cluster.gpus_per_node)


def _tokens(job: Job) -> float | None:
    """Tokens of the whole training, where max_steps says how many steps it has."""
    return float(job.cfg.max_steps * job.step_tokens) if job.cfg.max_steps > 0 else None


def _assumptions(job: Job, card: Hardware, plan_options: PlanOptions) -> list[str]:
    lines = []
    if plan_options.gpu == DEFAULT_GPU:
        lines.append(f"gpu={DEFAULT_GPU}: give gpu=NAME for another one")
    documents = "one document each" if job.document_tokens is None else f"documents of {job.document_tokens} tokens"
    lines.append(f"rows are full ({job.row_tokens} tokens, {documents}); every token has a label")
    if job.model.moe_num_experts:
        lines.append(
            "tokens spread evenly over the experts; a rank with 20 % more tokens needs that much more for them"
        )
    if job.degrees.context > 1:
        lines.append(
            "what context ranks exchange is not in the time; the tokens that a rank has are taken to be the same share "
            "of every document"
        )
    if job.picture_tokens:
        lines.append(f"{job.picture_tokens} of the {job.row_tokens} tokens of a row stand for pictures")
    if job.on_cpu and card == load_hardware(CPU):
        lines.append(
            f"gpu={CPU}: time, MFU and what follows from them are placeholders: they come from the table's numbers for "
            "a CPU, not from this machine. `erniekit plan calibrate FILE` measures it, hardware=FILE uses the result"
        )
    if job.cfg.matmul_precision != "fp32":
        from erniekit.precision import policy

        key, missing = f"matmul_precision: {job.cfg.matmul_precision}", policy.products_missing(CPU)
        if missing:
            lines.append(f"{key}: training on this machine would be refused: {missing}")
        lines.append(
            f"{key}: memory and time are planned as for fp32; activations take up to 15 % less, and a step is faster"
        )
    if not job.on_cpu:
        lines.append(
            "memory on a GPU follows from what its kernels keep and has not been measured; on a CPU it is measured "
            "(docs/plan.md)"
        )
        lines.append(
            "time is 7 % off, in the median, where it was compared with published runs (docs/plan-accuracy.md)"
        )
    if card.contested:
        lines.append(f"{card.name}: {card.contested}")
    return lines


def _whole(most: int) -> Any:
    def read(text: str) -> int:
        if not text.isdecimal() or not 1 <= int(text) <= most:
            raise ValueError(f"expected a whole number from 1 to {most:,}")
        return int(text)

    return read


def _positive(most: float) -> Any:
    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = 0.0
        if not 0 < number <= most:
            raise ValueError(f"expected a positive number, at most {most:g}")
        return number

    return read


def _gigabytes(text: str) -> float:
    return float(_positive(10_000)(text)) * 1e9


def _calibrate(args: list[str]) -> int:
    """`erniekit plan calibrate FILE`: measure this machine and write a table for `hardware=FILE`."""
    values, paths = options.read_with_paths("plan", args, {"overwrite": to_bool})
    options.require("plan", len(paths) == 1, "`plan calibrate` takes the file to write, such as my_machine.yaml.")
    try:
        path = Path(options.new_file(paths[0]))
    except ValueError as error:
        raise ConfigError(f"plan calibrate {paths[0]}: {error}") from None
    if path.exists() and not values.get("overwrite", False):
        raise ConfigError(f"plan calibrate {path}: the file exists. Name another one, or add overwrite=true")
    from erniekit.plan.calibrate import calibrate

    measured = calibrate(path)
    print(
        f"products {measured.peak / 1e9:,.0f} GFLOP/s in fp32, memory {measured.memory / 1e9:.1f} GB/s, "
        f"{measured.launch * 1e6:.0f} microseconds an operation\n{path}: use it with hardware={path} gpu=cpu"
    )
    return 0


_OPTIONS: options.Readers = {
    "gpus": _whole(1_000_000),
    "gpu": str,
    "gpus_per_node": _whole(1024),
    "memory": _gigabytes,
    "tokens": _positive(1e16),
    "document_tokens": _whole(10**9),
    "picture_tokens": _whole(10**9),
    "hardware": expand,
    "json": options.new_file,
    "chart": options.new_file,
    "search": to_bool,
    "timeline": options.new_file,
    "trace": options.new_file,
}
