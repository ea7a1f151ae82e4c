"""The page in a browser: by keyboard alone, a text under several prompts, with the scores of the words."""

from __future__ import annotations

import dataclasses

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


def test_on_a_phone_all_of_a_long_name_is_read_and_bars_are_aligned(page, engine, monkeypatch):
    """A name of 100 letters without a break, long label words, and nothing to be scrolled to the side."""
    bank, long = engine.bank, "a" * 100
    words = ("yes", "a_complaint_about_a_parcel_that_has_not_come_at_all", "no")
    monkeypatch.setitem(bank._prompts, long, dataclasses.replace(bank.prompt("p0"), label_words=words, task="b" * 80))
    monkeypatch.setitem(bank._prompts, "p1", dataclasses.replace(bank.prompt("p1"), label_words=("yes", "no")))
    page.size(390, 844)
    try:
        with served.serving(engine) as port:
            page.go(f"http://127.0.0.1:{port}/")
            page.wait("return document.querySelectorAll('#prompts input').length", lambda count: count == 9)
            page.run("document.getElementById('inputs').focus()")
            page.press(*"warm", CONTROL + ENTER)
            page.wait("return document.querySelectorAll('article').length", lambda count: count == 4)
            answered(page)
            wide, inner = page.run(
                "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
            )
            assert wide <= inner
            cut = """return [...document.querySelectorAll("label, label span, h2, th, td, .text, .score")].filter(
              (box) => box.scrollWidth > box.clientWidth + 1 && getComputedStyle(box).display !== "inline"
            ).map((box) => box.textContent)"""
            assert page.run(cut) == []
            edges = """return [...document.querySelectorAll("meter")].map((meter) => {
              const { left, right } = meter.getBoundingClientRect(); return `${left} ${right}`; })"""
            found = page.run(edges)
            assert (len(found), len(set(found))) == (5, 1)
            assert page.run("return document.querySelector('caption').textContent").endswith("(together 100%)")
    finally:
        page.size(1200, 900)
        for name in (long, "p1"):
            engine.call(lambda name=name: bank.device.forget(name)).result(served.PATIENCE_S)


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
