"""Pages that are facts say what configs, methods and committed results say; links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import xml.etree.ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def test_pages_and_tables_are_up_to_date():
    """Otherwise: python docs/build.py."""
    assert [str(path.relative_to(ROOT)) for path in build.outdated()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


def test_pictures_are_well_formed_and_described():
    for path in (ROOT / "docs").rglob("*.svg"):
        root = xml.etree.ElementTree.parse(path).getroot()
        assert root.get("role") == "img", path
        assert root.get("aria-label") or root.get("aria-labelledby"), path


def test_a_plot_shows_every_mean():
    value = {"mean": 70.0, "sd": 2.0, "values": [68.0, 72.0]}
    lines = {"one": {"a": value, "b": value | {"mean": 80.0, "sd": None}}, "two": {"a": value | {"mean": 60.0}}}
    for kind, mark in (("bars", "<rect"), ("lines", "<circle")):
        picture = build.plot("A title & more", lines, kind, "accuracy, %", {"task": 55.0})
        xml.etree.ElementTree.fromstring(picture)
        assert "A title &amp; more" in picture
        assert "majority class, task" in picture
        assert picture.count(mark) >= 3
        assert picture.count('stroke-width="1.4"') == 2  # of those that have a deviation
