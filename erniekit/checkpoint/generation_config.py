"""generation_config.json: its end tokens and padding belong to the model; sampling is chosen by the run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from erniekit.checkpoint.model_dir import GENERATION_CONFIG_FILE
from erniekit.models.config import ModelConfig, token_ids
from erniekit.utils.errors import CheckpointError
from erniekit.utils.user_files import JsonObject, kind, read_json_object

# Settings of transformers that change the generated text, with the values (in addition to null) that have no effect.
_NEUTRAL: Mapping[str, Any] = {
    "do_sample": False,
    "max_new_tokens": None,
    "min_new_tokens": 0,
    "max_length": None,
    "min_length": 0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "diversity_penalty": 0.0,
    "guidance_scale": 1.0,
}
# Caches, additional outputs, and choices among beams.
_HARMLESS = frozenset(
    (
        "_from_model_config",
        "assistant_confidence_threshold",
        "assistant_early_exit",
        "assistant_ensemble_weight",
        "assistant_lookbehind",
        "bos_token_id",
        "cache_config",
        "cache_implementation",
        "compile_config",
        "continuous_batching_config",
        "decoder_start_token_id",
        "disable_compile",
        "early_stopping",
        "eos_token_id",
        "generation_kwargs",
        "is_assistant",
        "length_penalty",
        "low_memory",
        "max_cache_len",
        "max_matching_ngram_size",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "pad_token_id",
        "prefill_chunk_size",
        "prompt_lookup_num_tokens",
        "remove_invalid_values",
        "renormalize_logits",
        "return_dict_in_generate",
        "speculation_type",
        "target_lookbehind",
        "token_healing",
        "transformers_version",
        "use_cache",
        "use_mtp",
    )
)


@dataclass(frozen=True)
class GenerationConfig:
    """What the model's files specify about generation. `end_ids` end an answer, `fill_id` fills rows that have ended.
    `settings` are the other values of `file` that would change what is generated; they are not used.
    """

    file: Path
    end_ids: tuple[int, ...]
    fill_id: int
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)


def read_generation_config(directory: str | Path, config: ModelConfig) -> GenerationConfig:
    """Read generation_config.json in `directory`; values that it lacks, or all without such a file, are those of
    `config`. A CheckpointError names the file and the key.
    """
    file = Path(directory) / GENERATION_CONFIG_FILE
    try:
        values = read_json_object(file, CheckpointError)
    except FileNotFoundError:
        values = {}
    content = JsonObject(values, str(file), CheckpointError)
    ends, pad = (token_ids(content, key, config.vocab_size) for key in ("eos_token_id", "pad_token_id"))
    settings = {
        key: value
        for key, value in values.items()
        if key not in _HARMLESS and value is not None and value not in ("", [], {}, False, _NEUTRAL.get(key))
    }
    return GenerationConfig(
        file,
        config.end_ids if ends is None else ends,
        config.fill_id if pad is None else next(iter(pad), 0),
        settings,
    )


def not_used(stored: GenerationConfig, run: Mapping[str, Any]) -> str | None:
    """A line that names the settings of generation_config.json whose value differs from the run's; None if there is
    none. `run`: transformers' name -> the run's value, for each setting that a run has a key for.
    """
    differing = {key: value for key, value in stored.settings.items() if key not in run or value != run[key]}
    if not run.get("do_sample", True):  # the result of greedy search does not depend on these
        differing = {key: value for key, value in differing.items() if key not in ("temperature", "top_p", "top_k")}
    if not differing:
        return None
    named = ", ".join(f"{key} {_shown(value)}" for key, value in sorted(differing.items()))
    return f"{stored.file}: {named}: not used; the keys of the run decide how tokens are chosen"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else kind(value)
