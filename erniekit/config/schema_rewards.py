"""Keys of stage RL about rewards: which functions score a completion, and what is done where one fails."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from erniekit.config.fields import key, list_of
from erniekit.utils.wording import count_of

# The built-in functions, each with what it is about; erniekit/rewards/table.py has the functions themselves.
REWARD_FUNCS = {
    "accuracy": "the final answer is the record's: numbers by value, other answers as texts",
    "math": "the same by math-verify, which reads formulas (extra `rl`)",
    "exact": "the whole answer is the record's text, apart from case, spaces and punctuation at its ends",
    "choice": "the chosen letter, or the set of letters, is the record's",
    "format": "one thought, <think> ... </think>, and an answer behind it",
    "json_schema": "the answer is JSON that fits the record's `json_schema` (extra `rl`)",
    "length": "the completion has from reward_min_length to reward_max_length tokens",
    "cosine": "right and short is best, wrong and short is worst (arXiv 2502.03373)",
    "repetition": "0 to -1: the share of repeated sequences of three words",
    "language": "the share of the letters that are of the wanted language",
    "box_iou": "the mean overlap of the record's boxes with those of the answer",
    "box_f1": "F1 of the boxes at an overlap of 0.5",
    "point_in_box": "the point that the answer names lies in the record's box",
    "tool_calls": "names and arguments of the calls are the record's, with partial credit",
    "code": "the program in the answer passes the record's tests (code_sandbox)",
    "judge": "another model's mark (judge_base_url)",
    "reward_model": "the score of a model that stage: RM trained (reward_model_path)",
}
READS_ANSWER = tuple("accuracy math exact choice cosine box_iou box_f1 point_in_box tool_calls judge".split())
RIGHT_OR_WRONG = ("accuracy", "math", "exact", "choice")  # what the reward cosine takes correctness from


@dataclass(frozen=True, kw_only=True)
class RewardArgs:
    """Which functions score a completion, and what is done where one fails (docs/rewards.md)."""

    group: ClassVar[str] = "rewards"

    reward_funcs: tuple[str, ...] = list_of(
        str,
        f"What scores a completion (docs/rewards.md): {', '.join(REWARD_FUNCS)}, or your own path.py:name.",
        ("accuracy", "format"),
    )
    reward_weights: tuple[float, ...] = list_of(
        float, "A weight for each of reward_funcs in the sum of a completion's rewards; empty: 1 each."
    )
    answer_key: str = key("answer", "The field of a record that holds the right answer.")
    reward_timeout: float = key(
        10.0, "Seconds that a function may take for a completion, or for all of a prompt if it is your own.", gt=0
    )
    reward_workers: int = key(2, "Processes that compute rewards.", ge=1)
    reward_on_failure: str = key(
        "drop",
        "What a completion gets from a function that raises, hangs or gives no finite number: stop ends the run, zero "
        "is a reward of 0, drop none.",
        choices=("stop", "zero", "drop"),
    )
    reward_max_failures: float = key(
        0.5,
        "The run stops if a function fails for more than this share of the completions that a rollout has scored "
        "so far.",
        ge=0,
        le=1,
    )
    domain_normalize: bool = key(
        False,
        "Scale the sum of rewards by the mean and the standard deviation that the record's `domain` has had so far.",
    )
    reward_min_length: int = key(1, "The reward length: the smallest number of tokens that is worth 1.", ge=0)
    reward_max_length: int = key(512, "The reward length: the largest number of tokens that is worth 1.", ge=1)
    cosine_max_length: int = key(
        512,
        "The reward cosine: the tokens from which on length makes no difference; as a rule max_completion_length.",
        ge=1,
    )
    reward_language: str = key(
        "prompt", "The reward language: zh, en, or the language of the prompt.", choices=("prompt", "zh", "en")
    )
    reward_coordinates: str = key(
        "relative",
        "Boxes and points of answers and records: relative (0 to 1000) or pixels.",
        choices=("relative", "pixels"),
    )
    code_sandbox: str = key(
        "none",
        "Where the reward code runs programs: subprocess, a limited process of this machine, which is no protection "
        "against attacks (docs/rewards.md); none: nowhere.",
        choices=("none", "subprocess"),
    )
    code_network: bool = key(
        False, "Let the programs run although this system has no network namespaces to keep them from the network."
    )
    code_time_limit: float = key(
        5.0, "Processor time of a program for each test of the reward code, in seconds, rounded up to whole ones.", gt=0
    )
    code_memory_mb: int = key(512, "Memory of a program of the reward code, in MB.", ge=32)
    code_score: str = key(
        "all",
        "The reward code: 1 if every test passes (all), or the share of tests that pass (fraction).",
        choices=("all", "fraction"),
    )
    judge_base_url: str | None = key(
        None, "The address of an OpenAI-compatible server whose model judges answers; it ends in /v1 as a rule."
    )
    judge_model: str | None = key(None, "The name of the judging model on that server.")
    judge_prompt: str | None = key(
        None,
        "A file with the judge's instruction; {prompt}, {completion}, {answer} and {max_score} are replaced in it.",
        path=True,
    )
    judge_max_score: float = key(
        10.0, "The best mark that the judge gives; the reward is the mark divided by it.", gt=0
    )
    judge_concurrency: int = key(8, "Questions that the judge is asked at a time.", ge=1)
    judge_timeout: float = key(60.0, "Seconds to wait for an answer of the judge.", gt=0)
    judge_max_retries: int = key(3, "How often a question to the judge is repeated after an error.", ge=0)
    judge_cache: str | None = key(
        None, "A file in which the judge's marks are kept, so that equal answers are judged once.", path=True
    )
    reward_model_path: str | None = key(
        None, "The reward reward_model: the directory of a model that stage: RM trained.", path=True
    )


def reward_names(reward_funcs: tuple[str, ...]) -> tuple[str, ...]:
    """The names of reward functions in tables and logs: path.py:name is `name`."""
    return tuple(name.rpartition(":")[2] for name in reward_funcs)


def reward_problems(args: RewardArgs) -> Iterator[str]:
    """What is wrong with these keys, each as "key: what is wrong, and what to do"."""
    yield from _name_problems(args)
    yield from _weight_problems(args)
    yield from _option_problems(args)


def _name_problems(args: RewardArgs) -> Iterator[str]:
    if not args.reward_funcs:
        yield "reward_funcs: empty: name at least one function, such as accuracy"
    for name in args.reward_funcs:
        path, colon, function = name.rpartition(":")
        if not colon and name not in REWARD_FUNCS:
            known = ", ".join(REWARD_FUNCS)
            yield f"reward_funcs: {name}: there is no such function. Choose from {known}, or path.py:name"
        elif colon and not (path.endswith(".py") and function.isidentifier()):
            yield f"reward_funcs: {name}: expected path.py:name, a Python file and a function in it"
    short = reward_names(args.reward_funcs)
    for name in sorted({name for name in short if short.count(name) > 1}):
        yield f"reward_funcs: {name}: two functions have this name; it has to be one of each"


def _weight_problems(args: RewardArgs) -> Iterator[str]:
    weights, count = args.reward_weights, len(args.reward_funcs)
    if weights and len(weights) != count:
        yield f"reward_weights: {count_of(len(weights), 'weight')} for {count} of reward_funcs; give one for each"
    if weights and not any(weights):
        yield "reward_weights: all weights are 0, so every completion has the same reward"


def _option_problems(args: RewardArgs) -> Iterator[str]:
    """The options of single functions."""
    names = args.reward_funcs
    if "length" in names and args.reward_min_length > args.reward_max_length:
        yield f"reward_min_length: {args.reward_min_length} is more than reward_max_length: {args.reward_max_length}"
    if "cosine" in names and not set(names) & set(RIGHT_OR_WRONG):
        yield f"reward_funcs: cosine needs one of {', '.join(RIGHT_OR_WRONG)} beside it, which says what is right"
    if "code" in names and args.code_sandbox == "none":
        yield (
            "code_sandbox: none, but reward_funcs has code, which runs what the model writes. Set code_sandbox: "
            "subprocess if that may happen on this machine"
        )
    needs = (
        ("judge", "judge_base_url", "an address such as http://localhost:8000/v1"),
        ("judge", "judge_model", "the name of a model on that server"),
        ("reward_model", "reward_model_path", "a directory that stage: RM wrote"),
    )
    for name, key_name, what in needs:
        if name in names and not vars(args)[key_name]:
            yield f"{key_name}: needed, since reward_funcs has {name}; {what}"
    if args.judge_base_url and not args.judge_base_url.startswith(("http://", "https://")):
        yield f"judge_base_url: {args.judge_base_url}: expected an address that begins with http:// or https://"
