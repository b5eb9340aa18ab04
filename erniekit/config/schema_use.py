"""Keys about using a model: generating, evaluating with generation, exporting."""

from dataclasses import dataclass
from typing import ClassVar

from erniekit.config.fields import key, list_of

# What `chat` can execute for a model that sees pictures (tools/image_tools.py).
CHAT_TOOLS = ("image_zoom_in_tool", "image_search")

# The multiple-choice benchmarks whose files and prompts `eval` knows (evaluate/benchmark_prompts.py).
BENCHMARKS = ("mmlu", "ceval", "cmmlu")


LEAST_LEARNED_TEMPERATURE = 1e-3  # of logits that training divides by it; far smaller ones leave fp32


@dataclass(frozen=True, kw_only=True)
class GenerateArgs:
    """Sampling: of `chat` and `server`, of evaluations that generate, and of methods that generate while they train."""

    group: ClassVar[str] = "generation"

    max_new_tokens: int = key(1024, "The largest number of tokens to generate.", ge=1)
    min_tokens: int = key(
        0, "The number of tokens to generate before an end token, or a text of `stop`, may end the answer.", ge=0
    )
    temperature: float = key(
        0.95, "Randomness of the choice; 0: always the likeliest token, as `eval` does when it is not given.", ge=0
    )
    top_p: float = key(0.7, "Choose among the likeliest tokens that together reach this probability.", gt=0, le=1)
    top_k: int = key(0, "Choose among the k likeliest tokens; 0: all.", ge=0)
    repetition_penalty: float = key(1.0, "Divide the scores of tokens already seen by this; 1: off.", gt=0)
    frequency_penalty: float = key(0.0, "Lower a token's score by this for each time it was generated.", ge=-2, le=2)
    presence_penalty: float = key(0.0, "Lower a token's score by this once it was generated.", ge=-2, le=2)
    stream: bool = key(True, "Print the answer as it is generated.")
    enable_thinking: bool | None = key(
        None, "Whether a model that can think before it answers does so; null: as its template does by itself."
    )


@dataclass(frozen=True, kw_only=True)
class ChatArgs:
    """What `erniekit chat` does for a model that thinks with images."""

    group: ClassVar[str] = "chat"

    chat_tools: tuple[str, ...] = list_of(
        str,
        "Tools that `chat` offers to a vision-language model and executes: image_zoom_in_tool, image_search.",
        choices=CHAT_TOOLS,
    )
    image_search_dir: str | None = key(
        None, "The directory of pictures in which the tool image_search looks for similar ones.", path=True
    )
    max_tool_rounds: int = key(8, "How often a model may call tools before it has to answer a question.", ge=1)


@dataclass(frozen=True, kw_only=True)
class ServerArgs:
    """What `erniekit server` listens to and how much it takes on."""

    group: ClassVar[str] = "server"

    host: str = key(
        "127.0.0.1", "The address that `server` listens to; one that other machines reach needs a key (api_key_file)."
    )
    port: int = key(8188, "The port that `server` listens to; 0: a free one.", ge=0, le=65535)
    served_model_name: str | None = key(
        None, "The model's name in requests and in /v1/models; not given: the name of its directory."
    )
    lora_modules: tuple[str, ...] = list_of(
        str, "LoRA adapters that requests may name as their model, as name=directory; all on the model that is served."
    )
    lora_directory: str | None = key(
        None,
        "A directory below which POST /v1/load_lora_adapter may find adapters while the server runs; not given: it is "
        "refused.",
        path=True,
    )
    max_model_len: int | None = key(
        None, "The largest number of tokens of a prompt and its answer together; not given: the model's context.", ge=2
    )
    num_speculative_tokens: int = key(
        0,
        "1: the model's prediction block (num_nextn_predict_layers) drafts a token each step; same answers.",
        ge=0,
        le=1,
    )
    max_num_seqs: int = key(16, "The number of answers that `server` generates at a time.", ge=1)
    max_num_batched_tokens: int = key(16384, "The number of tokens of prompts that go through the model at once.", ge=1)
    max_waiting_requests: int = key(
        64, "The number of answers that may wait for one to end; a request beyond it is refused (429).", ge=1
    )
    queue_timeout: float = key(60.0, "Seconds that a request waits at most before it is refused (408).", gt=0)
    request_timeout: float = key(600.0, "Seconds that an answer takes at most (408).", gt=0)
    max_request_mb: int = key(64, "The largest body of a request, in MB, pictures included.", ge=1, le=4096)
    max_request_images: int = key(8, "The largest number of pictures and videos in a request.", ge=0)
    api_key_file: str | None = key(
        None,
        "A file with one API key a line; requests then have to carry one. ERNIEKIT_API_KEY is another key.",
        path=True,
    )
    allowed_hosts: tuple[str, ...] = list_of(
        str, "Further names by which clients on this machine may address the server, beside localhost."
    )


@dataclass(frozen=True, kw_only=True)
class EvalArgs:
    """What `erniekit eval` does in addition to the loss."""

    group: ClassVar[str] = "evaluation"

    predict_with_generate: bool = key(
        False, "`eval` also answers the last question of each sample and scores the answers."
    )
    eval_benchmark: str | None = key(
        None,
        "`eval` scores the multiple-choice questions of a benchmark instead: mmlu, ceval or cmmlu.",
        choices=BENCHMARKS,
    )
    eval_benchmark_path: str | None = key(None, "The directory with that benchmark's files, csv or jsonl.", path=True)
    num_fewshot: int = key(5, "Solved examples before each question of a benchmark, from its split dev.", ge=0)
    eval_benchmark_mode: str = key(
        "loglikelihood",
        "How a benchmark's answer is found: the letter of the highest probability (loglikelihood), or the one that the "
        "model writes (generate).",
        choices=("loglikelihood", "generate"),
    )
    eval_chat_template: bool = key(
        False, "Put a benchmark's questions into the chat template, a turn for each example; False: plain text."
    )
    eval_output: str | None = key(None, "Directory for eval_results.json; not given: output_dir.", path=True)
    checkpoint: str | None = key(
        None,
        "The model directory that eval, export, split, chat and server read; not given: the final model in output_dir "
        "or, of an unfinished run, its newest checkpoint.",
        path=True,
    )


@dataclass(frozen=True, kw_only=True)
class ExportArgs:
    """What `erniekit export` and `split` write."""

    group: ClassVar[str] = "export"

    format: str = key("pt", "Layout of exported weights: pt (Hugging Face) or paddle.", choices=("pt", "paddle"))
    max_shard_size: float = key(5.0, "Largest weight file, in GB, or with its unit (500MB, 2GiB).", gt=0, size=True)
    copy_tokenizer: bool = key(True, "Copy the tokenizer's files beside the exported weights.")
