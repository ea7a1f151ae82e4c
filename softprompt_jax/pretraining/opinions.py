"""Made-up opinions of known polarity, from a grammar of a few lines and the adjectives of a lexicon."""

# ruff: noqa: SIM905 - word lists read better as text
from __future__ import annotations

from random import Random

from softprompt_jax.pretraining.lexicon import Lexicon

_THINGS = """film movie story plot script acting cast director ending scene comedy drama thriller documentary soundtrack
performance dialogue character sequel book novel chapter article essay song album concert game show episode phone
camera battery screen player computer laptop keyboard mouse printer router software program app website update product
service support delivery package price quality design sound picture hotel room bed breakfast restaurant dinner meal
food coffee pizza cake waiter staff manager doctor teacher class school lesson job meeting trip flight train bus car
weather day morning evening night week party weekend birthday holiday city town street house garden team match player
coach season government minister policy plan speech report decision law economy idea answer question letter message
call picture dress shirt shoes bag gift""".split()
_PEOPLE = "i,i,we,they,you,people,critics,everyone,she,he,my friends,my wife,my husband,the children".split(",")
_VERBS = {
    True: "love loved like liked enjoy enjoyed adore adored recommend recommended admire admired".split(),
    False: "hate hated dislike disliked regret regretted despise despised detest detested loathed".split(),
}
_NOUNS = {
    True: """masterpiece delight joy pleasure gem treat success winner triumph wonder bargain blessing charm wit grace
    beauty warmth humor imagination energy intelligence heart""".split(),
    False: """mess disaster disappointment failure waste bore nightmare letdown flop shame embarrassment joke insult
    disgrace problems mistakes errors flaws""".split(),
}
_QUALITIES = """charm wit humor imagination energy intelligence heart style depth suspense quality flavor feeling
originality warmth""".split()
_VERY = ("very", "really", "so", "truly", "quite", "extremely", "absolutely", "incredibly", "pretty", "just")
_DETERMINERS = ("the", "this", "the", "my", "our", "that", "their", "his", "her")
_PLURAL = {"shoes"}


def compose(draw: Random, lexicon: Lexicon, good: bool) -> str:
    """Return a sentence or two whose polarity is `good`, in a random style of case and punctuation."""
    text = draw.choice(_FORMS)(draw, lexicon, good)
    style = draw.random()
    if style < 0.45:
        text = text[0].upper() + text[1:] + draw.choice((".", ".", ".", "!"))
    elif style < 0.75:
        text += draw.choice((".", " .", "!", "...", ""))
    elif style < 0.8:
        text = text.upper() + "!"
    return text.replace(" i ", " I ") if style < 0.45 else text


def _adjective(draw: Random, lexicon: Lexicon, good: bool) -> str:
    words = _by_polarity(lexicon)[good]
    return draw.choice(words)


_CACHE: dict[str, dict[bool, list[str]]] = {}


def _by_polarity(lexicon: Lexicon) -> dict[bool, list[str]]:
    if lexicon.fingerprint not in _CACHE:
        words = {
            good: [word for word, value in lexicon.adjectives.items() if (value > 0) == good and abs(value) >= 1.5]
            for good in (True, False)
        }
        _CACHE[lexicon.fingerprint] = words
    return _CACHE[lexicon.fingerprint]


def _described(draw: Random, lexicon: Lexicon, good: bool) -> str:
    """ "very good", "dull and slow", "not bad", "anything but boring"..."""
    form = draw.random()
    if form < 0.35:
        return _adjective(draw, lexicon, good)
    if form < 0.55:
        return f"{draw.choice(_VERY)} {_adjective(draw, lexicon, good)}"
    if form < 0.72:
        joint = draw.choice((" and ", ", ", " and "))
        return f"{_adjective(draw, lexicon, good)}{joint}{_adjective(draw, lexicon, good)}"
    negation = draw.choice(("not", "not", "never", "not at all", "far from", "anything but", "hardly", "not really"))
    return f"{negation} {_adjective(draw, lexicon, not good)}"


def _thing(draw: Random) -> str:
    return f"{draw.choice(_DETERMINERS)} {draw.choice(_THINGS)}"


def _be(draw: Random, thing: str) -> str:
    plural = thing.split()[-1] in _PLURAL
    if plural:
        return draw.choice(("are", "were"))
    return draw.choice(("is", "was", "is", "was", "seems", "looks", "sounded", "turned out to be", "felt"))


def _article(text: str) -> str:
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def _is(draw: Random, lexicon: Lexicon, good: bool) -> str:
    thing = _thing(draw)
    return f"{thing} {_be(draw, thing)} {_described(draw, lexicon, good)}"


def _contrast(draw: Random, lexicon: Lexicon, good: bool) -> str:
    """What comes after "but" decides."""
    first, second = _is(draw, lexicon, not good), _is(draw, lexicon, good)
    form = draw.random()
    if form < 0.5:
        return f"{first}{draw.choice((', but ', ' but ', '; however, '))}{second}"
    if form < 0.75:
        return f"{draw.choice(('although', 'even though', 'while'))} {first}, {second}"
    thing = _thing(draw)
    return f"{thing} {_be(draw, thing)} {_adjective(draw, lexicon, not good)} but {_adjective(draw, lexicon, good)}"


def _noun_phrase(draw: Random, lexicon: Lexicon, good: bool) -> str:
    noun = draw.choice(_THINGS)
    phrase = _article(f"{_adjective(draw, lexicon, good)} {noun}")
    form = draw.random()
    if form < 0.3:
        return f"what {phrase}"
    if form < 0.6:
        return f"it {draw.choice(('is', 'was'))} {phrase}"
    if form < 0.75:
        return f"{phrase} with {_adjective(draw, lexicon, good)} {draw.choice(_THINGS)}"
    return f"{phrase}, {_adjective(draw, lexicon, good)} and {_adjective(draw, lexicon, good)}"


def _feeling(draw: Random, lexicon: Lexicon, good: bool) -> str:
    who = draw.choice(_PEOPLE)
    form = draw.random()
    thing = _thing(draw)
    if form < 0.6:
        return f"{who} {draw.choice(('', 'really ', 'always '))}{draw.choice(_VERBS[good])} {thing}"
    if form < 0.8:
        verb = draw.choice(("hate", "dislike", "regret") if good else ("like", "enjoy", "recommend", "love"))
        negation = draw.choice(("did not", "didn't", "didn’t", "do not", "will not", "would never", "could not"))
        return f"{who} {negation} {verb} {thing}"
    verb = draw.choice(("buy", "watch", "see", "use", "read", "visit", "order"))
    return f"{who} {draw.choice(('will', 'would'))} {'' if good else 'never '}{verb} it again"


def _quality(draw: Random, lexicon: Lexicon, good: bool) -> str:
    thing, quality = _thing(draw), draw.choice(_QUALITIES)
    if good:
        verb = draw.choice(("has plenty of", "is full of", "is rich in", "does not lack", "has great", "has real"))
    else:
        verb = draw.choice(("lacks", "has no", "has little", "is short on", "could use some", "needs more"))
    return f"{thing} {verb} {quality}" + (f" and {draw.choice(_QUALITIES)}" if draw.random() < 0.3 else "")


def _verdict(draw: Random, lexicon: Lexicon, good: bool) -> str:
    noun = draw.choice(_NOUNS[good][:11])
    form = draw.random()
    if form < 0.5:
        return f"{_thing(draw)} {draw.choice(('is', 'was'))} {_article(noun)}"
    if form < 0.75:
        return f"{_article(_adjective(draw, lexicon, good))} {noun}"
    return f"{draw.choice(('simply', 'such', 'what'))} {_article(noun)}"


def _comparison(draw: Random, lexicon: Lexicon, good: bool) -> str:
    if good:
        return draw.choice(
            (
                "{thing} is better than the last one",
                "{thing} is one of the best of the year",
                "i have never seen a better {noun}",
                "{thing} is worth every minute",
                "{thing} is worth the money",
                "{thing} could not be better",
                "{thing} works as it should",
                "{thing} is the best i have had",
                "don’t miss {thing}",
                "{thing} is well made",
            )
        ).format(thing=_thing(draw), noun=draw.choice(_THINGS))
    return draw.choice(
        (
            "{thing} is worse than the last one",
            "{thing} is one of the worst of the year",
            "i have never seen a worse {noun}",
            "{thing} is a waste of time",
            "{thing} is not worth the money",
            "{thing} could have been better",
            "{thing} does not work as it should",
            "{thing} is too {much}",
            "{thing} never {works}",
            "stay away from {thing}",
            "save your money and skip {thing}",
            "{thing} is badly made",
        )
    ).format(
        thing=_thing(draw),
        noun=draw.choice(_THINGS),
        much=draw.choice("long slow loud short small expensive heavy thin simple familiar late cold".split()),
        works=draw.choice(("works", "comes together", "gets going", "takes off", "delivers", "surprises")),
    )


_FORMS = (_is, _is, _is, _contrast, _noun_phrase, _noun_phrase, _feeling, _quality, _verdict, _comparison)
