"""Lines that several processes answer: each a share of the chunks, written as a part, and all parts joined in order.

    chunk     0      1      2      3      4
    process   0      1      0      1      0      of two that each hold all weights

Processes over which the weights are cut compute together, and are one share (`mesh.process_block`).
"""

from __future__ import annotations

import contextlib
import io
import itertools
from pathlib import Path
from typing import NamedTuple

from softprompt_jax.config import UserError
from softprompt_jax.distributed import cloud_files

CHUNK = 1024  # lines that are answered together at most


class Share(NamedTuple):
    """Which chunks of `chunk` lines are answered here: every `count`th, from number `index` on."""

    index: int = 0
    count: int = 1
    chunk: int = CHUNK

    @classmethod
    def of_lines(cls, lines: int, index: int, count: int) -> Share:
        """Divide so many lines evenly."""
        return cls(index, count, min(CHUNK, max(1, -(-lines // count))))


ALL = Share()  # of one process


def part_name(output: str, share: Share) -> str:
    """Return where the lines of a share wait until all are there."""
    return f"{output}.part-{share.index + 1:03d}-of-{share.count:03d}"


def join(output: str, share: Share) -> None:
    """Write the lines of all parts in order, here or to gs://, and remove the parts.

    Errors: UserError for a part that is not there.
    """
    places = [part_name(output, share._replace(index=index)) for index in range(share.count)]
    with contextlib.ExitStack() as opened, cloud_files.writing(output) as path:
        parts = [opened.enter_context(_opened(place)) for place in places]
        with path.open("wb") as sink:
            while any(lines := [line for part in parts for line in itertools.islice(part, share.chunk)]):
                sink.writelines(lines)
    for place in places:
        cloud_files.remove_object(place) if cloud_files.is_remote(place) else Path(place).unlink()


def _opened(place: str) -> io.BufferedIOBase:
    if cloud_files.is_remote(place):
        content = cloud_files.read_object(place)
        if content is not None:
            return io.BytesIO(content)
    elif Path(place).exists():
        return open(place, "rb")
    raise UserError(f"{place}: not there; expected a folder that all processes see; use another --output, or gs://")
