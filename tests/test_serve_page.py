"""The page in a browser: by keyboard alone, a text under several prompts, with the scores of the words."""

from __future__ import annotations

import browser
import pytest
import served
from browser import CONTROL, ENTER, SPACE, TAB

TOKEN = "s3cret"
FOCUS = "return document.activeElement.id || document.activeElement.value"
CARDS = """return [...document.querySelectorAll("article")].map((card) => ({
  name: card.querySelector("h2").textContent,
  text: card.querySelector(".text").textContent,
  wrong: !!card.querySelector(".wrong"),
  words: [...card.querySelectorAll("tr")].map((row) => [row.cells[0].textContent, row.cells[2].textContent]),
}))"""


@pytest.fixture(scope="module")
def page():
    with browser.chromium() as found:
        found.size(1200, 900)
        yield found


def answered(page) -> list[dict]:
    page.wait('return document.getElementById("answers").getAttribute("aria-busy") === "false"')
    return page.run(CARDS)


def test_a_text_under_several_prompts_by_keyboard_alone(page, engine):
    with served.serving(engine) as port:
        page.go(f"http://127.0.0.1:{port}/")
        page.wait("return document.querySelectorAll('#prompts input').length", lambda count: count == 8)
        assert page.run(FOCUS) == "inputs"
        page.press(*"the garden is warm", TAB)  # to the search,
        for expected in ("filter", "all", "none", "p0", "p1"):
            assert page.run(FOCUS) == expected
            page.press(TAB)
        page.press(SPACE, TAB, SPACE)  # p2 and p3 are not wanted,
        for expected in ("p4", "p5", "p6", "p7"):
            page.press(TAB)
            assert page.run(FOCUS) == expected
        page.press(TAB, *"yes, no", CONTROL + ENTER)
        page.wait("return document.querySelectorAll('article').length", lambda count: count == 2)
        cards = answered(page)
        assert [card["name"] for card in cards] == ["p0", "p1"]
        expected = engine.call(lambda: engine.bank.generate(["the garden is warm"] * 2, ["p0", "p1"], 6)).result()
        for card, (text, _) in zip(cards, expected, strict=True):
            assert card["text"] == text or (not text and card["text"] == "(nothing)")
            assert [word for word, _ in card["words"]] == ["yes", "no"]
            assert sum(float(share.rstrip("%")) for _, share in card["words"]) == pytest.approx(100, abs=0.2)


def test_what_is_refused_is_shown(page, engine):
    with served.serving(engine) as port:
        page.go(f"http://127.0.0.1:{port}/")
        page.wait("return document.querySelectorAll('#prompts input').length", lambda count: count == 8)
        page.press(*"warm " * 20, CONTROL + ENTER)
        page.wait("return document.querySelectorAll('article .wrong').length", lambda count: count == 4)
        for card in answered(page):
            assert card["text"].startswith("422: inputs: 21 tokens; expected at most 16")


def test_a_server_with_a_token_asks_for_it(page, engine):
    with served.serving(engine, TOKEN) as port:
        page.go(f"http://127.0.0.1:{port}/")
        page.wait("return !document.getElementById('guard').hidden")
        assert page.run("return document.getElementById('told').textContent").startswith("401: ")
        page.run("document.getElementById('token').focus()")
        page.press(*TOKEN, TAB)
        page.wait("return document.querySelectorAll('#prompts input').length", lambda count: count == 8)
        assert page.run("return document.getElementById('told').textContent") == ""


def test_nothing_is_fetched_from_elsewhere(page, engine):
    with served.serving(engine) as port:
        page.go(f"http://127.0.0.1:{port}/")
        page.wait("return document.querySelectorAll('#prompts input').length", lambda count: count == 8)
        fetched = page.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
        assert fetched
        assert all(name.startswith((f"http://127.0.0.1:{port}/", "data:")) for name in fetched)
