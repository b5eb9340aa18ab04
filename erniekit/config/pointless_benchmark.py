"""Keys of `eval` that a benchmark makes pointless, or that need one (see pointless.py)."""

from erniekit.config.methods import option_names
from erniekit.config.pointless_rule import Rule, always
from erniekit.config.schema import Config
from erniekit.config.schema_use import GenerateArgs

_KEYS = "eval_benchmark_path num_fewshot eval_benchmark_mode eval_chat_template"
_GENERATION = " ".join(name for name in option_names(GenerateArgs) if name != "enable_thinking")


def _has_mode(cfg: Config, mode: str) -> bool:
    return cfg.eval_benchmark is not None and cfg.eval_benchmark_mode == mode


BENCHMARK_RULES = [
    Rule(f"eval_benchmark {_KEYS}", always, "read only by eval", ("train", "chat", "server", "export", "split")),
    Rule(_KEYS, lambda c, f: c.eval_benchmark is None, "eval_benchmark is not given", ("eval",)),
    Rule(
        "eval_dataset_path eval_dataset_type eval_dataset_prob max_evaluate_steps predict_with_generate max_seq_len "
        "truncation packing greedy_intokens buffer_size dataset_type input_dir split isolate_documents",
        lambda c, f: c.eval_benchmark is not None,
        "eval_benchmark: {eval_benchmark} is evaluated instead of other data",
        ("eval",),
    ),
    Rule(
        "on_bad_line",
        lambda c, f: c.eval_benchmark is not None,
        "a benchmark is scored with all its questions, or not at all",
        ("eval",),
    ),
    Rule(
        _GENERATION,
        lambda c, f: _has_mode(c, "loglikelihood"),
        "eval_benchmark_mode: loglikelihood generates no text",
        ("eval",),
    ),
    Rule(
        "batch_size",
        lambda c, f: _has_mode(c, "generate"),
        "eval_benchmark_mode: generate answers up to 128 questions at a time",
        ("eval",),
    ),
    Rule(
        "enable_thinking",
        lambda c, f: c.eval_benchmark is not None and not c.eval_chat_template,
        "eval_chat_template is False",
        ("eval",),
    ),
    Rule(
        "chat_template",
        lambda c, f: _has_mode(c, "loglikelihood") and not c.eval_chat_template,
        "eval_chat_template is False",
        ("eval",),
    ),
]
