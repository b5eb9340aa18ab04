"""The keys whose values may differ between the hosts of a job: where files lie, logging, time limits, data workers.

Files may have different paths; their content is compared instead (erniekit/join.py).
"""

from erniekit.config.methods import METHODS, option_names
from erniekit.config.schema_use import EvalArgs, ExportArgs, GenerateArgs

PER_HOST = {
    *("model_name_or_path", "download_hub", "lora_path", "train_dataset_path", "eval_dataset_path", "input_dir"),
    *("text_dataset_path", "chat_template", "ref_logps_cache", "logging_dir"),
    *("dataloader_num_workers", "prefetch_factor", "logging_steps", "report_to", "run_name", "project", "disable_tqdm"),
    *("distributed_timeout", "rendezvous_timeout", "max_restarts"),
    *(name for group in (GenerateArgs, EvalArgs, ExportArgs) for name in option_names(group)),
}

# Keys among these that decide how many steps the ranks of an evaluation or a conversation run together, and those by
# which methods that generate text train.
GENERATION = frozenset(option_names(GenerateArgs)) | {"predict_with_generate"}
BENCHMARK = frozenset({"eval_benchmark", "num_fewshot", "eval_benchmark_mode", "eval_chat_template"})
SAMPLING = GENERATION.intersection(key for facts in METHODS.values() for key in facts.also_reads)

# What the ranks of a command compare although other commands leave it to each host.
COMPARED = {"train": SAMPLING, "eval": GENERATION | BENCHMARK, "chat": GENERATION}


def compared(command: str, keys: list[str]) -> list[str]:
    """The keys that must be equal on all hosts that run `command`."""
    free = PER_HOST - COMPARED.get(command, frozenset())
    return [key for key in keys if key not in free]
