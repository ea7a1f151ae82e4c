"""Made-up opinions that are known to be good or bad, from a small grammar and the adjectives of a lexicon."""

from __future__ import annotations

from random import Random

from softprompt_jax.pretraining.lexicon import Lexicon
from softprompt_jax.pretraining.phrases import pick


def compose(draw: Random, lexicon: Lexicon, good: bool) -> str:
    """Return a good opinion, or a bad one if not `good`, with capitals and punctuation in a random style."""
    text = draw.choice(_FORMS)(draw, lexicon, good)
    style = draw.random()
    if style < 0.45:
        text = text[0].upper() + text[1:] + draw.choice((".", ".", ".", "!"))
        return text.replace(" i ", " I ")
    if style < 0.75:
        return text + draw.choice((".", " .", "!", "...", ""))
    return text.upper() + "!" if style < 0.8 else text


def _adjective(draw: Random, lexicon: Lexicon, good: bool) -> str:
    return draw.choice(lexicon.strong_adjectives[good])


def _described(draw: Random, lexicon: Lexicon, good: bool) -> str:
    """ "very good", "dull and slow", "not bad", "anything but boring"..."""
    form = draw.random()
    if form < 0.35:
        return _adjective(draw, lexicon, good)
    if form < 0.55:
        return f"{pick(draw, 'very')} {_adjective(draw, lexicon, good)}"
    if form < 0.72:
        joint = draw.choice((" and ", ", ", " and "))
        return f"{_adjective(draw, lexicon, good)}{joint}{_adjective(draw, lexicon, good)}"
    return f"{pick(draw, 'negation of an adjective')} {_adjective(draw, lexicon, not good)}"


def _thing(draw: Random) -> str:
    return f"{pick(draw, 'determiners')} {pick(draw, 'things')}"


def _thing_is(draw: Random) -> str:
    """Draw a thing and a verb; one of the things is a plural."""
    thing = _thing(draw)
    return f"{thing} {draw.choice(('are', 'were')) if thing.endswith(' shoes') else pick(draw, 'be')}"


def _article(text: str) -> str:
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def _is(draw: Random, lexicon: Lexicon, good: bool) -> str:
    return f"{_thing_is(draw)} {_described(draw, lexicon, good)}"


def _contrast(draw: Random, lexicon: Lexicon, good: bool) -> str:
    """Join a bad and a good part so that the second, such as the one after "but", decides."""
    first, second = _is(draw, lexicon, not good), _is(draw, lexicon, good)
    form = draw.random()
    if form < 0.5:
        return f"{first}{draw.choice((', but ', ' but ', '; however, '))}{second}"
    if form < 0.75:
        return f"{draw.choice(('although', 'even though', 'while'))} {first}, {second}"
    return f"{_thing_is(draw)} {_adjective(draw, lexicon, not good)} but {_adjective(draw, lexicon, good)}"


def _noun_phrase(draw: Random, lexicon: Lexicon, good: bool) -> str:
    noun = pick(draw, "things")
    phrase = _article(f"{_adjective(draw, lexicon, good)} {noun}")
    form = draw.random()
    if form < 0.3:
        return f"what {phrase}"
    if form < 0.6:
        return f"it {draw.choice(('is', 'was'))} {phrase}"
    if form < 0.75:
        return f"{phrase} with {_adjective(draw, lexicon, good)} {pick(draw, 'things')}"
    return f"{phrase}, {_adjective(draw, lexicon, good)} and {_adjective(draw, lexicon, good)}"


def _feeling(draw: Random, lexicon: Lexicon, good: bool) -> str:
    who = pick(draw, "people")
    form = draw.random()
    thing = _thing(draw)
    if form < 0.6:
        return f"{who} {draw.choice(('', 'really ', 'always '))}{pick(draw, 'verbs', good)} {thing}"
    if form < 0.8:
        verb = pick(draw, "negated verbs", good)
        return f"{who} {pick(draw, 'negation of a verb')} {verb} {thing}"
    verb = pick(draw, "again")
    return f"{who} {draw.choice(('will', 'would'))} {'' if good else 'never '}{verb} it again"


def _quality(draw: Random, lexicon: Lexicon, good: bool) -> str:
    thing, quality = _thing(draw), pick(draw, "qualities")
    text = f"{thing} {pick(draw, 'has', good)} {quality}"
    return text + (f" and {pick(draw, 'qualities')}" if draw.random() < 0.3 else "")


def _verdict(draw: Random, lexicon: Lexicon, good: bool) -> str:
    noun = pick(draw, "nouns", good)
    form = draw.random()
    if form < 0.5:
        return f"{_thing(draw)} {draw.choice(('is', 'was'))} {_article(noun)}"
    if form < 0.75:
        return f"{_article(_adjective(draw, lexicon, good))} {noun}"
    return f"{draw.choice(('simply', 'such', 'what'))} {_article(noun)}"


def _comparison(draw: Random, lexicon: Lexicon, good: bool) -> str:
    template, words = pick(draw, "comparisons", good), {"thing": _thing(draw), "noun": pick(draw, "things")}
    if not good:
        words |= {"much": pick(draw, "too much"), "works": pick(draw, "never works")}
    return template.format(**words)


_FORMS = (_is, _is, _is, _contrast, _noun_phrase, _noun_phrase, _feeling, _quality, _verdict, _comparison)
