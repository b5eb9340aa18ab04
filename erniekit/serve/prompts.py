"""The prompts of conversations. Shared by the server and `erniekit.LLM`."""

from pathlib import Path
from typing import Any, NamedTuple

from erniekit.data.vision.media import MediaReader
from erniekit.data.vision.parts import media_of
from erniekit.data.vision.plan import plan_media
from erniekit.data.vision.prompt import PicturePrompt, picture_prompt
from erniekit.data.vision.sequence import MediaTokens
from erniekit.generation.guided import Compiled
from erniekit.generation.thinking import ids_open_thought, opens_thought
from erniekit.serve import server_fields as fields
from erniekit.serve.guides import compiled_guide
from erniekit.serve.request_plan import reading
from erniekit.serve.served_model import ServedModel
from erniekit.serve.server_errors import ApiError
from erniekit.serve.server_messages import Messages, read_tools
from erniekit.serve.server_text import Reading
from erniekit.serve.server_video import decoded, placed, video_options
from erniekit.utils import log


def thinking_of(values: dict[str, Any], served: ServedModel) -> bool | None:
    """Whether the model is to think; None: as the template does by itself. Raises ApiError for what it cannot do."""
    kwargs = fields.read_fields(
        values.get("chat_template_kwargs", {}), fields.TEMPLATE_OPTIONS, "chat_template_kwargs."
    )
    given = {
        name: source["enable_thinking"]
        for name, source in (("enable_thinking", values), ("kwargs", kwargs))
        if "enable_thinking" in source
    }
    mode = kwargs.get("options", {}).get("thinking_mode")
    if mode is not None:
        if mode not in ("open", "close"):
            raise ApiError(
                400, "chat_template_kwargs.options.thinking_mode: expected open or close.", "chat_template_kwargs"
            )
        given["thinking_mode"] = mode == "open"
    if values.get("reasoning_effort") == "none":
        given["reasoning_effort"] = False
    if len(set(given.values())) > 1:
        raise ApiError(400, f"enable_thinking: {' and '.join(given)} contradict each other.", "enable_thinking")
    if not given:
        return served.chat_model.enable_thinking
    wanted = next(iter(given.values()))
    template = served.chat_model.template
    if "enable_thinking" not in template.source:
        thinks = opens_thought(template.render([{"role": "user", "content": "q"}], add_generation_prompt=True))
        if wanted != thinks:
            state = "always thinks" if thinks else "never thinks"
            raise ApiError(
                400,
                f"enable_thinking: {str(wanted).lower()}: chat template {template.name} {state}.",
                "enable_thinking",
                "unsupported_value",
            )
        return None
    return wanted


def prompt_of(
    values: dict[str, Any], served: ServedModel, tools: Any, answers: bool = True, is_local: bool = False
) -> list[int] | PicturePrompt:
    """The prompt of a conversation; `is_local` as in Messages. Raises ApiError, UserError or BadRecord."""
    model = served.chat_model
    reader = Messages(model.template, model.vision, served.cfg.max_request_images, is_local)
    messages = reader.read(values["messages"])
    ids = model.template.prompt_ids(messages, tools, thinking_of(values, served), answers)
    media = list(media_of(messages))
    if not media:
        return ids
    vision = model.vision
    assert vision is not None, "Messages refuses pictures for models of text"
    files, options = MediaReader(Path("/nonexistent")), video_options(vision.video)
    plans, places = [], [reader.places[id(part)] for part in media]
    for part, place in zip(media, places, strict=True):
        with placed(place):
            plans += plan_media([part], files, vision.settings, options, reader.notes)
    plans = decoded(plans, places, served.context, reader.notes)
    for doubt in sorted(reader.notes.doubts):
        log.info(doubt)
    return picture_prompt(ids, plans, MediaTokens.of(model.tokenizer), vision)


class ChatPrompt(NamedTuple):
    """The prompt of a conversation, how its answers are read, and the grammar that they follow."""

    prompt: list[int] | PicturePrompt
    reading: Reading
    grammar: Compiled | None


def chat_prompt(values: dict[str, Any], served: ServedModel, is_local: bool = False) -> ChatPrompt:
    """The prompt of a request with `messages`. Raises as `prompt_of`."""
    tools = read_tools(values.get("tools", []), values.get("tool_choice"))
    prompt = prompt_of(values, served, tools, is_local=is_local)
    ids = prompt.ids if isinstance(prompt, PicturePrompt) else prompt
    opened = ids_open_thought(ids, served.chat_model.tokenizer.decode)
    grammar = compiled_guide(values, served, tools, opened)
    how = reading(values, served, grammar, opened=opened, has_thoughts=True, has_calls=tools is not None)
    return ChatPrompt(prompt, how, grammar)
