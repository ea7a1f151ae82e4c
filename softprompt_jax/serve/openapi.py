"""What /openapi.json says of the requests, answers and errors that FastAPI cannot see."""

from __future__ import annotations

from typing import Any

from softprompt_jax.serve.engine import Engine
from softprompt_jax.serve.openai import ChatRequest, CompletionRequest
from softprompt_jax.serve.requests import Request

_ASKED = {  # the bodies of requests for answers
    "/v1/generate": Request,
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
}
_REFUSED = (400, 404, 408, 413, 415, 429, 500, 503, 504)
_STATUSES = {
    "post /v1/generate": (*_REFUSED, 422),
    "post /v1/completions": _REFUSED,
    "post /v1/chat/completions": _REFUSED,
    "get /v1/models": (),
    "get /v1/models/{name}": (404,),
    "get /v1/prompts": (),
    "put /v1/prompts/{name}": (408, 413, 422, 429, 503, 504, 507),
    "delete /v1/prompts/{name}": (404, 503, 504, 507),
    "get /health": (),
    "get /metrics": (),
}
_NAME = r"^[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*$"  # also other letters, which few clients escape alike


def described(schema: dict[str, Any], engine: Engine, token: bool) -> dict[str, Any]:
    """Complete FastAPI's description: bodies, media types, errors, and the token if there is one."""
    text = {"type": "string"}
    error = _object(error=_object(message=text, type=text, param={"type": ["string", "null"]}, code=text))
    asked = {path: kind for path, kind in _ASKED.items() if path in schema["paths"]}
    schemas = {"Error": error}
    for kind in asked.values():
        schemas[kind.__name__] = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schemas[kind.__name__].pop("$defs", {})
    _bound(schemas, engine)
    schema["components"] = {"schemas": schemas}
    refused = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    for path, methods in schema["paths"].items():
        for method, about in methods.items():
            statuses = [*_STATUSES[f"{method} {path}"], *([401 if token else 403] if path != "/health" else [])]
            about["responses"].pop("422", None)
            about["responses"] |= {str(status): {"description": "Refused"} | refused for status in sorted(statuses)}
            for parameter in about.get("parameters", ()):
                parameter["schema"] |= {"pattern": _NAME, "maxLength": 100}
    paths = schema["paths"]
    for path, kind in asked.items():
        about = paths[path]["post"]
        about["responses"]["200"]["content"]["text/event-stream"] = {"schema": text}
        reference = {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}
        about["requestBody"] = {"required": True, "content": {"application/json": reference}}
    paths["/metrics"]["get"]["responses"]["200"]["content"] = {"text/plain": {"schema": text}}
    paths["/health"]["get"]["responses"]["503"] = {"description": "No request is answered"} | {
        "content": {"application/json": {"schema": {"type": "object"}}}
    }
    file = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    paths["/v1/prompts/{name}"]["put"]["requestBody"] = {"required": True, "content": file}
    if token:
        schema["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path in (path for path in paths if path != "/health"):
            for about in paths[path].values():
                about["security"] = [{"token": []}]
    return schema


def _bound(schemas: dict[str, Any], engine: Engine) -> None:
    """Write the limits of this server, and what its backbone can do, into the schemas of requests."""
    limits, causal = engine.limits, engine.bank.tokenizer.form.causal
    for name in ("Greedy", "Sampling"):
        schemas[name]["required"] = ["kind"]  # by which they are told apart
    schemas["Sampling"]["properties"]["samples"]["maximum"] = limits.slots
    schemas["Request"]["properties"]["words"]["maxItems"] = limits.slots
    for name in ("Request", "CompletionRequest", "ChatRequest"):
        if name in schemas:
            fields = schemas[name]["properties"]
            fields["max_tokens"]["anyOf"][0]["maximum"] = limits.max_tokens
            if name == "ChatRequest" or (name == "CompletionRequest" and not causal):
                fields["max_tokens"]["anyOf"][0]["minimum"] = 1  # 0 only scores words or an echo
            if name != "Request":
                fields["n"]["anyOf"][0]["maximum"] = limits.slots
    if not causal:
        schemas["CompletionRequest"]["properties"]["echo"] = {"enum": [False, None]}


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}
