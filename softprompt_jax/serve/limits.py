"""The limits of a server, and the error for a request beyond them."""

from __future__ import annotations

from pydantic import Field

from softprompt_jax.config import Settings, UserError


class Limits(Settings):
    """Limits of a server; the compiled shapes follow from the first five."""

    slots: int = Field(32, ge=1)  # answers that are decoded at once
    max_input_tokens: int = Field(512, ge=1)  # tokens of a text, with its EOS
    max_tokens: int = Field(64, ge=1)  # tokens of an answer, with its EOS
    max_prompt_rows: int = Field(128, ge=1)  # rows of a prompt, with the words of its template
    max_decoder_rows: int = Field(
        0, ge=0
    )  # rows before the decoder's input; raised to the most that a prompt of the bank has
    max_waiting: int = Field(256, ge=1)  # requests that wait for a slot
    max_body_bytes: int = Field(1 << 20, ge=1)  # size of a request
    max_prompt_bytes: int = Field(16 << 20, ge=1)  # size of an uploaded prompt
    timeout_s: float = Field(60.0, gt=0, allow_inf_nan=False)  # seconds for a request, waiting included


class RequestError(UserError):
    """A request that cannot be answered: an HTTP status and one line."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status
