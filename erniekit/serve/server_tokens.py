"""`/tokenize` and `/detokenize`."""

from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from erniekit.data.vision.prompt import PicturePrompt
from erniekit.serve import server_fields as fields
from erniekit.serve.prompts import prompt_of
from erniekit.serve.server_body import read_body
from erniekit.serve.server_errors import ApiError
from erniekit.serve.server_messages import read_tools
from erniekit.serve.server_responses import json_response
from erniekit.serve.server_state import Served


async def tokenize(request: HttpRequest, served: Served) -> Response:
    """The token ids of a text, or of a conversation as the model gets it."""
    values = fields.read_fields(await read_body(request, served.max_body_bytes), fields.TOKENIZE)
    served.adapter_of(values.get("model"))
    if ("prompt" in values) == ("messages" in values):
        raise ApiError(400, "prompt: give either prompt or messages.", "prompt", "invalid_value")
    for name in ("tools", "chat_template_kwargs"):
        if "prompt" in values and values.get(name):
            raise ApiError(400, f"{name}: it is part of a conversation; give messages.", name, "invalid_value")

    def encode() -> list[int]:
        if "messages" not in values:
            tokenizer = served.chat_model.tokenizer
            is_marked = values.get("add_special_tokens", True)
            return (tokenizer.encode if is_marked else tokenizer.encode_plain)(values["prompt"])
        tools = read_tools(values.get("tools", []), None)
        prompt = prompt_of(values, served, tools, values.get("add_generation_prompt", True))
        return prompt.ids if isinstance(prompt, PicturePrompt) else prompt

    ids = await served.in_pool(encode)
    body: dict[str, Any] = {"count": len(ids), "max_model_len": served.context, "tokens": ids, "token_strs": None}
    if values.get("return_token_strs"):
        body["token_strs"] = [served.token(number)[0] for number in ids]
    return json_response(body)


async def detokenize(request: HttpRequest, served: Served) -> Response:
    """The text of token ids."""
    values = fields.read_fields(await read_body(request, served.max_body_bytes), fields.DETOKENIZE)
    served.adapter_of(values.get("model"))
    model = served.chat_model
    ids = fields.id_list(values["tokens"], "tokens", model.model.config.vocab_size)
    return json_response({"prompt": await served.in_pool(lambda: model.tokenizer.decode(ids))})
