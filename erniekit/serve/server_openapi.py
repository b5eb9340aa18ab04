"""The OpenAPI document of a server, made of the tables of fields that requests are read by."""

from collections.abc import Mapping, Sequence
from typing import Any

from erniekit.serve import server_fields as fields
from erniekit.serve.server_fields import Field
from erniekit.utils.version import __version__

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {"type": ["string", "array", "null"]},
    },
}
_STATUSES = {
    "400": "The request is wrong; `param` names the field.",
    "401": "The key is missing or wrong.",
    "403": "The Host or Origin header is not allowed.",
    "404": "There is no such model.",
    "408": "The request has waited, or the answer has taken, too long.",
    "413": "The body is too large.",
    "429": "The queue is full.",
    "500": "The engine, or this answer, has failed.",
    "503": "The engine has ended, or the server is closing.",
}


def document(names: Sequence[str]) -> dict[str, Any]:
    """The whole document of a server of models with these names."""
    parameter = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "enum": [*names]}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "erniekit server", "version": __version__},
        "paths": {
            "/v1/chat/completions": {"post": _post("Answer a conversation.", fields.CHAT, names, streams=True)},
            "/v1/completions": {"post": _post("Continue texts.", fields.COMPLETION, names, streams=True)},
            "/tokenize": {"post": _post("The token ids of a text.", fields.TOKENIZE, names)},
            "/detokenize": {"post": _post("The text of token ids.", fields.DETOKENIZE, names)},
            "/v1/load_lora_adapter": {"post": _post("Load an adapter.", fields.LOAD_ADAPTER, names)},
            "/v1/unload_lora_adapter": {"post": _post("Forget an adapter.", fields.UNLOAD_ADAPTER, names)},
            "/v1/models": {"get": _get("The model that is served.")},
            "/v1/models/{name}": {"get": _get("One model.", "404") | {"parameters": [parameter]}},
            "/health": {"get": _get("Whether the engine answers.", "503")},
            "/ping": {"get": _get("The same as /health.", "503")},
            "/version": {"get": _get("The version of erniekit.")},
            "/metrics": {"get": _get("What the server measures, for Prometheus.", kind="text/plain")},
        },
        "components": {
            "schemas": {"Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _post(summary: str, table: Mapping[str, Field], names: Sequence[str], streams: bool = False) -> dict[str, Any]:
    properties = {name: field.schema() for name, field in table.items()}
    if "model" in properties:
        properties["model"] |= {"enum": [*names, None]}
    if "messages" in properties:
        properties["messages"] |= {"items": _MESSAGE, "minItems": 1}
    schema = {
        "type": "object",
        "additionalProperties": False,
        "required": [name for name, field in table.items() if field.required],
        "properties": properties,
    }
    kinds = {"application/json": {"schema": {"type": "object"}}}
    if streams:
        kinds["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {"200": {"description": summary, "content": kinds}, **_errors(*_STATUSES)},
    }


def _get(summary: str, *statuses: str, kind: str = "application/json") -> dict[str, Any]:
    schema = {"type": "object" if kind == "application/json" else "string"}
    answer = {"description": summary, "content": {kind: {"schema": schema}}}
    return {"summary": summary, "responses": {"200": answer, **_errors("400", "401", "403", *statuses)}}


def _errors(*statuses: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {status: {"description": _STATUSES[status], "content": content} for status in statuses}
