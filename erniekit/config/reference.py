"""The reference entries of all keys, from which `erniekit help` and docs/config.md are made."""

import dataclasses
from collections import Counter
from typing import Any

from erniekit.config.fields import limits, type_name
from erniekit.config.methods import BUILT, METHODS, join_names, option_names
from erniekit.config.pointless import never_read
from erniekit.config.schema import GROUPS, fields

# The keys about ranks that a command without training reads.
_RANKS = (
    "tensor_parallel_degree sequence_parallel pipeline_parallel_degree virtual_pp_degree pp_seg_method "
    "expert_parallel_degree distributed_timeout rendezvous_timeout"
)

# Keys of those groups that only a training reads; the rules of pointless.py name further ones.
_OF_TRAINING = set(
    """
    train_dataset_type train_dataset_path train_dataset_prob mix_strategy num_samples_each_epoch random_shuffle
    amp_master_grad scale_loss recompute recompute_granularity recompute_modules
    offload_activations use_recompute_moe use_recompute_mtp no_recompute_layers
    attention_probs_dropout_prob dropout_warmup_steps num_nextn_predict_layers z_loss_lambda multi_token_pred_lambda
    ref_model_update_steps
    """.split()
)

# With them eval and chat multiply as the exported model will.
_QAT = "qat apply_hadamard hadamard_block_size quantization_group_size"

# What methods that generate while they train read of the group generation; their defaults are in methods.py.
_SAMPLING = "max_new_tokens temperature top_p top_k repetition_penalty enable_thinking"

# What an evaluation of stage RL reads of the other groups of reinforcement learning.
_COMPLETIONS = "max_completion_length soft_max_length soft_cache_length difficulty_metric rollout_max_running"

# What an export with quantization_eval reads of the keys of `eval`; others are read as there, and seldom needed.
_MEASURED = (
    "stage compute_type batch_size eval_dataset_type eval_dataset_path max_evaluate_steps predict_with_generate "
    "max_new_tokens temperature"
)

# Command -> (the groups of keys that it reads, further single keys that it reads).
KEYS: dict[str, tuple[str, str]] = {
    "train": (
        "data,vision,text beside pictures,model,FP8,quantisation-aware training,shape,LoRA,preference,"
        "reward model,judged answers,distillation from a teacher,reinforcement learning,rewards,difficulty of prompts,"
        "tools in rollouts,rollout server,train,optimizer,parts of the model,parallel,mixture of experts",
        _SAMPLING,
    ),
    "eval": (
        "data,vision,model,preference,reward model,judged answers,rewards,tools in rollouts,shape,generation,"
        "evaluation",
        f"{_QAT} {_COMPLETIONS} output_dir batch_size max_evaluate_steps seed lora_path moe_group_experts disable_tqdm "
        f"{_RANKS} data_parallel_degree sharding_parallel_degree balance_pictures",
    ),
    "chat": (
        "vision,model,shape,generation,chat",
        f"{_QAT} checkpoint output_dir lora_path chat_template max_seq_len seed moe_group_experts {_RANKS}",
    ),
    "server": (
        "vision,model,shape,generation,server",
        "checkpoint output_dir lora_path chat_template max_seq_len seed moe_group_experts",
    ),
    "export": (
        "export,quantization",
        "qat model_name_or_path download_hub checkpoint output_dir lora_path chat_template overwrite_output_dir "
        f"tokenizer_name_or_path seed max_seq_len rope_theta rope_scaling moe_group_experts {_MEASURED}",
    ),
    "split": ("", "checkpoint output_dir overwrite_output_dir max_shard_size copy_tokenizer"),
}


@dataclasses.dataclass(frozen=True)
class KeyEntry:
    """The texts of one key. `limits` is empty if every value of the type is allowed."""

    name: str
    type: str
    default: str
    limits: str
    doc: str


def group_doc(name: str) -> str:
    """What a group of keys is about, and which methods read it where not all do."""
    readers = {key: _methods(key) for key in option_names(GROUPS[name])}
    of_group = Counter(readers.values()).most_common(1)[0][0]
    if of_group == tuple(BUILT):
        return _doc(name)
    others = {key: [method for method in methods if method not in of_group] for key, methods in readers.items()}
    also = "".join(f"; `{key}` also with {join_names(methods, 'or')}" for key, methods in others.items() if methods)
    return f"{_doc(name)} Read only with stage: {join_names(of_group, 'or')}{also}."


def key_doc(key: str) -> str:
    """What the group of a key is about, and which methods read the key where not all do."""
    doc = next(_doc(name) for name, group in GROUPS.items() if key in option_names(group))
    methods = _methods(key)
    return doc if methods == tuple(BUILT) else f"{doc} Read only with stage: {join_names(methods, 'or')}."


def _doc(group: str) -> str:
    return " ".join((GROUPS[group].__doc__ or "").split())


def _methods(key: str) -> tuple[str, ...]:
    return tuple(method for method in BUILT if METHODS[method].reads(key))


def method_defaults() -> list[tuple[str, str, str]]:
    """The defaults that methods have for themselves, as (key, default, the methods)."""
    methods: dict[tuple[str, str], list[str]] = {}
    for name in BUILT:
        for key, value in METHODS[name].defaults.items():
            methods.setdefault((key, f"{value}"), []).append(name)
    return [(key, value, join_names(names, "or")) for (key, value), names in methods.items()]


def entry(field: "dataclasses.Field[Any]") -> KeyEntry:
    """The reference entry of one key."""
    choices = ", ".join(choice or "nothing" for choice in field.metadata["choices"])
    return KeyEntry(field.name, type_name(field), _default(field), choices or limits(field), field.metadata["doc"])


def _default(field: "dataclasses.Field[Any]") -> str:
    """The default as a user would write it."""
    if field.default is None:
        return "not given"
    if field.default in ("", ()):
        return "empty"
    return (
        ",".join(str(item) if isinstance(item, str) else f"{item:g}" for item in field.default)
        if isinstance(field.default, tuple)
        else f"{field.default}"
    )


def by_group(command: str | None = None) -> dict[str, list[KeyEntry]]:
    """The keys by group in the schema's order: all, or those that a command reads (single keys under "others")."""
    names, single = (",".join(GROUPS), "") if command is None else KEYS[command]
    left_out: set[str] = set()
    if command is not None:
        left_out = never_read(command) | (set() if command == "train" else _OF_TRAINING)
    groups = {
        name: [entry(field) for field in dataclasses.fields(GROUPS[name]) if field.name not in left_out]
        for name in names.split(",")
        if name
    }
    if single:
        every = fields()
        groups["others"] = [entry(every[name]) for name in single.split()]
    return groups
