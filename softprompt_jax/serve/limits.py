"""What a server takes at most, and how it says no."""

from __future__ import annotations

from pydantic import Field

from softprompt_jax.config import Settings, UserError


class Limits(Settings):
    """What a server takes at most; the shapes that are compiled follow from the first five."""

    slots: int = Field(32, ge=1)  # answers in the making at once
    max_input_tokens: int = Field(512, ge=1)  # of a text, with its EOS
    max_tokens: int = Field(64, ge=1)  # of an answer, with its EOS
    max_prompt_rows: int = Field(128, ge=1)  # of a prompt, with the words of its template
    max_decoder_rows: int = Field(0, ge=0)  # of these on the decoder's side; at least what the bank's prompts have
    max_waiting: int = Field(256, ge=1)  # requests that wait for a slot
    max_body_bytes: int = Field(1 << 20, ge=1)
    max_prompt_bytes: int = Field(16 << 20, ge=1)  # of a prompt that is sent
    timeout_s: float = Field(60.0, gt=0, allow_inf_nan=False)  # of a request, waiting included


class RequestError(UserError):
    """A request that is not answered: an HTTP status and one line."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status
