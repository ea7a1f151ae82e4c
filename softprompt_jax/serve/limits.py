"""The limits of a server, and the error for a request beyond them."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from softprompt_jax.config import Settings, UserError
from softprompt_jax.models.decode import MAX_TOKENS

MOST_S = 1e6
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {
    **{401: "invalid_api_key", 403: "wrong_host", 404: "not_found", 405: "method_not_allowed", 408: "timeout"},
    **{413: "too_large", 415: "unsupported_media_type", 422: "invalid_value", 429: "rate_limit_exceeded"},
    **{507: "insufficient_storage"},
    **{499: "client_closed", 500: "internal_error", 503: "unavailable", 504: "timeout"},
}


class Limits(Settings):
    """Limits of a server; the compiled shapes follow from the first five."""

    slots: int = Field(32, ge=1)  # answers that are decoded at once
    max_input_tokens: int = Field(512, ge=1)  # tokens of a text, with its EOS
    max_tokens: int = Field(MAX_TOKENS, ge=1)  # tokens of an answer, with its EOS
    max_prompt_rows: int = Field(128, ge=1)  # rows of a prompt, with the words of its template
    max_decoder_rows: int = Field(0, ge=0)  # rows before the decoder's input; at least those of the bank's prompts
    max_waiting: int = Field(256, ge=1)  # requests that wait for a slot
    max_body_bytes: int = Field(1 << 20, ge=1)  # size of a request
    max_prompt_bytes: int = Field(16 << 20, ge=1)  # size of an uploaded prompt
    max_prompts: int = Field(1024, ge=1)  # prompts besides those that it started with
    max_uploads: int = Field(8, ge=1)  # uploads that are received and read at once
    timeout_s: float = Field(60.0, gt=0, le=MOST_S)  # seconds for a request, waiting included, and for its body
    header_timeout_s: float = Field(10.0, gt=0, le=MOST_S)  # seconds for the header of a request
    keep_alive_s: float = Field(5.0, gt=0, le=MOST_S)  # seconds that a connection stays open between two requests


class RequestError(UserError):
    """A request that cannot be answered: an HTTP status, one line, the field of the body that is at fault, a code."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code or _CODES.get(status, "bad_request")


def error_body(error: UserError) -> dict[str, Any]:
    """Return the body of an error as OpenAI's API has it."""
    told = error if isinstance(error, RequestError) else RequestError(422, str(error))
    kind = "server_error" if told.status >= 500 else _TYPES.get(told.status, "invalid_request_error")
    return {"error": {"message": " ".join(str(told).split()), "type": kind, "param": told.param, "code": told.code}}
