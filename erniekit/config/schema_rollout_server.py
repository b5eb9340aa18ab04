"""Keys about a server of others that generates the completions of reinforcement learning."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from erniekit.config.fields import key


@dataclass(frozen=True, kw_only=True)
class RolloutServerArgs:
    """Rollouts of text from an OpenAI-compatible server (docs/rl-server.md)."""

    group: ClassVar[str] = "rollout server"

    rollout_base_url: str | None = key(
        None,
        "The address of a server that generates the completions, such as http://localhost:8000/v1; null: the model "
        "that is trained generates them. ERNIEKIT_ROLLOUT_API_KEY in the environment is the key.",
    )
    rollout_model: str | None = key(
        None, "The model's name on that server, for LoRA the base's; null: the first one that it lists."
    )
    rollout_update_command: str | None = key(
        None,
        "A command that makes the server use the weights in a directory, which is put in the place of {directory}; "
        "needed unless fine_tuning: LoRA, whose adapters the server loads by itself.",
    )
    rollout_timeout: float = key(600.0, "Seconds that an answer of the server, or the command, takes at most.", gt=0)
    rollout_max_retries: int = key(5, "Further attempts after an error of the server that may pass.", ge=0)
    rollout_tolerance: float = key(
        0.2,
        "The mean difference, in nats a token, between the server's log-probabilities and those of the training "
        "computation, above which the run ends: the server then has other weights.",
        gt=0,
    )


def server_problems(cfg: Any) -> Iterator[str]:
    """What is wrong with the keys, each as "key: what is wrong, and what to do"."""
    if cfg.rollout_base_url is None:
        return
    if not cfg.rollout_base_url.startswith(("http://", "https://")):
        yield f"rollout_base_url: {cfg.rollout_base_url}: expected an address that begins with http:// or https://"
    if cfg.method.vision:
        yield "rollout_base_url: prompts with pictures are not sent to a server. Leave it out, or set stage: RL"
    if cfg.temperature != 1:
        yield (
            f"temperature: {cfg.temperature:g}: the log-probabilities of servers are those of temperature 1, so "
            "rollout_base_url needs temperature: 1.0"
        )
    if cfg.rollout_dtype is not None:
        yield "rollout_dtype: the server of rollout_base_url has its own precision. Leave it out"
    if cfg.router_replay != "none":
        yield (
            f"router_replay: {cfg.router_replay}: the server of rollout_base_url does not say which experts it used. "
            "Leave one of them out"
        )
    if cfg.rollout_update_command is None and cfg.fine_tuning != "LoRA":
        yield (
            "rollout_update_command: needed with rollout_base_url unless fine_tuning: LoRA, so that the server gets "
            "the weights of each update"
        )
    if cfg.rollout_update_command is not None and "{directory}" not in cfg.rollout_update_command:
        yield "rollout_update_command: it has to contain {directory}, where the directory of the weights is put"
