"""Keys about tools that a model may call while it answers a prompt of reinforcement learning."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from erniekit.config.fields import key, list_of

CALCULATOR, DOCUMENTS = "calculator", "document_search"
ZOOM = "image_zoom_in_tool"
BUILT_IN_TOOLS = (CALCULATOR, DOCUMENTS, ZOOM)


@dataclass(frozen=True, kw_only=True)
class RolloutToolArgs:
    """Tools in the loop of reinforcement learning (docs/rl-prompts.md)."""

    group: ClassVar[str] = "tools in rollouts"

    tools: tuple[str, ...] = list_of(
        str,
        f"Tools that the model may call while it answers: {', '.join(BUILT_IN_TOOLS)} (the last one with pictures), or "
        "a function of your own, path.py:name.",
    )
    max_turns: int = key(
        4, "tools: turns of the model in one completion; calls in the last one are not executed.", ge=2
    )
    max_tool_calls: int = key(4, "tools: calls of one turn that are executed.", ge=1)
    max_tool_tokens: int = key(256, "tools: tokens of the text that a call returns; a longer text is cut.", ge=1)
    tool_timeout: float = key(10.0, "tools: seconds after which a call is stopped.", gt=0)
    document_search_path: str | None = key(
        None, "document_search: a text file, of which each line is a document, or a directory of such files.", path=True
    )


def tool_problems(args: RolloutToolArgs, sees_pictures: bool, num_steps: int) -> Iterator[str]:
    """What is wrong with the keys, each as "key: what is wrong, and what to do". `num_steps`: optimizer steps for which
    one rollout is used.
    """
    if not args.tools:
        return
    for name in args.tools:
        is_own = ".py:" in name and name.rpartition(":")[2].isidentifier()
        if name not in BUILT_IN_TOOLS and not is_own:
            yield f"tools: there is no tool {name}. Known are {', '.join(BUILT_IN_TOOLS)}, or give path.py:name"
        if name == ZOOM and not sees_pictures:
            yield f"tools: {name} is about pictures: set stage: VL-RL, or remove it"
        if name == ZOOM and num_steps > 1:
            yield (
                f"tools: {name}: its pictures are not in checkpoints, so a rollout can be used for one step only: set "
                "num_iterations: 1 and steps_per_generation: 1"
            )
    counts = Counter(name.rpartition(":")[2] for name in args.tools)
    name, count = max(counts.items(), key=lambda item: item[1])
    if count > 1:
        yield f"tools: {name}: two tools have this name, by which the model calls them; it has to be one of each"
    if DOCUMENTS in args.tools and args.document_search_path is None:
        yield f"document_search_path: needed with tools: {DOCUMENTS}; a file or directory of texts"
