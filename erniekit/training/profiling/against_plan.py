"""A measured step beside the planned one (erniekit/plan): model FLOPs utilisation, time and memory."""

from erniekit.config.schema import Config
from erniekit.models.config import ModelConfig
from erniekit.plan.hardware import Hardware, hardware_names, load_hardware
from erniekit.plan.job import Cluster, Job, make_job
from erniekit.plan.launches import host_calls, kernels, options_of
from erniekit.plan.memory import plan_memory
from erniekit.plan.timing import StepTime, plan_time
from erniekit.training.outline import outline_stage
from erniekit.utils.errors import ConfigError

_MIB = 2**20


def lines(cfg: Config, model: ModelConfig, ranks: int, device: str, speed: float, peak_bytes: int) -> list[str]:
    """Lines for a profile's table. Without a plan for this device, one line that says why.

    Args:
        model: the model's configuration.
        ranks: their number.
        device: the device's name as its driver gives it, or "cpu".
        speed: measured tokens a second, of all ranks.
        peak_bytes: the most memory that a rank's tensors took.
    """
    try:
        card = card_of(device)
        job = make_job(cfg, model, Cluster(ranks, card.name, ranks))
        planned = plan_time(job, card)
        return [*_speed_lines(planned, card, ranks, speed), _memory_line(job, card, peak_bytes)]
    except ConfigError as error:
        return [f"no plan for this device: {error}"]


def card_of(device: str) -> Hardware:
    """The entry of the hardware table that a device's name contains ("NVIDIA H100 80GB HBM3"), the longest of several.
    ConfigError if there is none.
    """
    words = device.lower().replace("-", " ")
    found = [name for name in hardware_names() if name.lower().replace("-", " ") in words]
    return load_hardware(max(found, key=len) if found else device)


def _speed_lines(planned: StepTime, card: Hardware, ranks: int, speed: float) -> list[str]:
    peak = planned.model_flops_per_second() / planned.mfu()
    measured = {name: speed / ranks * flops for name, flops in _flops(planned).items()}
    causal, full = measured["causal"], measured["full"]
    return [
        f"model FLOPs: {causal / 1e12:.3g} TFLOP/s a rank = {causal / peak:.1%} MFU counting the causal half of "
        f"attention, {full / peak:.1%} counting its full square; peak {peak / 1e12:.4g} TFLOP/s ({card.name})",
        f"the plan of full rows: {planned.mfu():.1%} MFU, {planned.tokens_per_second:.0f} tokens/s, "
        f"{planned.seconds * 1e3:.1f} ms a step",
    ]


def _flops(planned: StepTime) -> dict[str, float]:
    return {"causal": planned.flops.causal, "full": planned.flops.full}


def _memory_line(job: Job, card: Hardware, peak_bytes: int) -> str:
    plan = plan_memory(job, card.memory_bytes, outline_stage)
    return f"tensor memory: {peak_bytes / _MIB:.1f} MiB measured, {plan.worst.peak / _MIB:.1f} MiB by the plan"


def launch_line(cfg: Config, model: ModelConfig, ranks: int) -> str:
    """Kernel launches and calls of the host in a step of one of `ranks` ranks, by formula; the line names the model
    that the formula describes, and what it leaves out of this run.
    """
    options = options_of(cfg)
    calls, launched = host_calls(model, options), kernels(model, options)
    uncounted = {
        "adapters": cfg.fine_tuning == "LoRA",
        "the reference": cfg.method.reads("loss_type"),
        "quantisation": cfg.fp8 != "none" or cfg.compute_type not in ("bf16", "fp16", "fp32"),
        "multi-token prediction": bool(model.num_nextn_predict_layers),
        "pictures": model.vision is not None,
        "biases": model.use_bias,
        "what ranks send": ranks > 1,
    }
    without = ", ".join(name for name, is_used in uncounted.items() if is_used)
    return (
        f"by formula, not measured: a rank's {cfg.gradient_accumulation_steps} microbatches and update of a step are "
        f"{calls} calls of operators by the host and {launched} kernel launches on the device, for a decoder whose "
        "weights are all trained in 16 bits, with the head in one chunk of tokens a microbatch"
        + (f"; not counted: {without}" if without else "")
    )
