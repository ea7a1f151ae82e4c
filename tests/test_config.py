"""YAML and overrides to settings and back; whatever is wrong is told in one line that names the key."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
import yaml
from pydantic import Field

from softprompt_jax.config import Settings, UserError, differences, nearest, parse, read, settings_hash, to_yaml


class Red(Settings):
    kind: Literal["red"] = "red"
    depth: int = 1


class Blue(Settings):
    kind: Literal["blue"] = "blue"
    wide: float = 0.5


class Paint(Settings):
    name: str
    rate: float = 1e-5
    count: int = 3
    note: str | None = None
    colours: list[Annotated[Red | Blue, Field(discriminator="kind")]] = Field([Red()])


def written(tmp_path, text: str):
    path = tmp_path / "a.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def message(call, *args) -> str:
    with pytest.raises(UserError) as error:
        call(*args)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_complete_settings_are_settings_again(tmp_path):
    paint = Paint(name="no", rate=3e-7, note="é: 😀 # x", colours=[Blue(), Red(depth=4)])
    again = parse(Paint, read(written(tmp_path, to_yaml(paint))), "a.yaml")
    assert again == paint
    assert settings_hash(again) == settings_hash(paint) != settings_hash(Paint(name="no"))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("count=7", {"count": 7}),
        ("rate=1e-3", {"rate": 1e-3}),
        ("rate=1.5E+2", {"rate": 150.0}),
        ("note=null", {"note": None}),
        ("note=a=b", {"note": "a=b"}),
        ("note=", {"note": None}),
        ("name='12'", {"name": "12"}),
        ("colours.0.depth=9", {"colours": [Red(depth=9), Blue()]}),
        ("colours.1={kind: red}", {"colours": [Red(), Red()]}),
        ("colours=[{kind: blue, wide: 2}]", {"colours": [Blue(wide=2)]}),
    ],
)
def test_overrides_are_yaml_at_a_dotted_path(tmp_path, override, expected):
    path = written(tmp_path, "name: a\nnote: x\ncolours: [{kind: red}, {kind: blue}]\n")
    paint = parse(Paint, read(path, [override]), str(path))
    assert {key: getattr(paint, key) for key in expected} == expected


def test_later_override_wins(tmp_path):
    assert read(written(tmp_path, "count: 1\n"), ["count=2", "count=3"]) == {"count": 3}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("foo", "'foo': not an override; expected key=value"),
        ("=3", "'=3': not an override; expected key=value"),
        ("colours.5.depth=1", "no such place in the settings"),
        ("colours.x.depth=1", "no such place in the settings"),
        ("colours.-7=1", "no such place in the settings"),
        ("count=[1", "not YAML"),
        ("name=${oc.env:HOME}", "settings do not interpolate"),
        ("name=2024-01-01", "expected text, a number, a list or a mapping; quote a text"),
    ],
)
def test_override_that_fits_nowhere_is_one_line(tmp_path, override, expected):
    text = message(read, written(tmp_path, "name: a\ncolours: [{kind: red}]\n"), [override])
    assert expected in text
    assert override.partition("=")[0] in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("name: ${x}", "a.yaml: name: found '${x}'; settings do not interpolate; write the value itself"),
        ("colours: [{kind: '${x}'}]", "settings do not interpolate"),
        ("- 1\n- 2", "found list; expected a mapping"),
        ("name: [1", "not YAML"),
        ("name: a\n\tcount: 1", "not YAML"),
        ("name: 2024-01-01", "expected text, a number, a list or a mapping; quote a text"),
    ],
)
def test_file_that_is_no_settings_is_one_line(tmp_path, content, expected):
    assert expected in message(read, written(tmp_path, content))


def test_file_that_cannot_be_read_is_one_line(tmp_path):
    assert "no such file; expected a YAML settings file" in message(read, tmp_path / "none.yaml")
    assert "cannot be read" in message(read, tmp_path)
    (tmp_path / "latin.yaml").write_bytes("name: caf\xe9".encode("latin-1"))
    assert "cannot be read" in message(read, tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "w: name: missing; expected a value; add it to the settings"),
        ({"name": "a", "cuont": 1}, "w: cuont: unknown setting; expected one of name, rate, count, note, colours;"),
        ({"name": "a", "cuont": 1}, "; did you mean count?"),
        ({"name": "a", "count": "many"}, "w: count: found 'many'; input should be a valid integer"),
        ({"name": "a", "count": 1.5}, "w: count: found 1.5; input should be a valid integer"),
        ({"name": 3}, "w: name: found 3; input should be a valid string"),
        ({"name": "a", "colours": [{"kind": "red", "dept": 1}]}, "w: colours.0.dept: unknown setting; expected one of"),
        ({"name": "a", "colours": [{"kind": "red", "dept": 1}]}, "expected one of kind, depth; did you mean depth?"),
        ({"name": "a", "colours": [{"kind": "blue", "wide": "x"}]}, "w: colours.0.wide: found 'x'"),
        ({"name": "a", "colours": [{"kind": "green"}]}, "'red', 'blue'"),
        ([], "w: Paint: found []; input should be a valid dictionary"),
    ],
)
def test_value_that_does_not_fit_names_its_key(values, expected):
    assert expected in message(parse, Paint, values, "w")


def test_long_value_is_shortened_in_the_message():
    assert len(message(parse, Paint, {"name": "a", "count": "x" * 10_000}, "w")) < 250


def test_differences_name_every_leaf():
    old = {"a": 1, "b": {"c": [1, 2], "d": "x"}, "gone": None}
    new = {"a": 1, "b": {"c": [1, 3], "d": "y"}, "new": 2}
    assert differences(old, new) == [
        "b.c: [1, 2] -> [1, 3]",
        "b.d: 'x' -> 'y'",
        "gone: None -> '(absent)'",
        "new: '(absent)' -> 2",
    ]
    assert differences(old, yaml.safe_load(yaml.safe_dump(old))) == []


def test_nearest_is_silent_without_a_likeness():
    assert nearest("lenght", ["length", "kind"]) == "; did you mean length?"
    assert nearest("zzz", ["length", "kind"]) == ""


def test_texts_that_look_like_numbers_stay_texts(tmp_path):
    class Words(Settings):
        words: list[str]

    words = Words(words=["1e5", "5E10", "1.5", "yes", "007", "null", "2020-01-01", "=", "1e-3"])
    path = tmp_path / "a.yaml"
    path.write_text(to_yaml(words))
    assert parse(Words, read(path), "here") == words


@pytest.mark.parametrize("key", ["null", "2020-01-01"])
def test_a_key_that_no_setting_has_is_one_line(tmp_path, key):
    path = tmp_path / "a.yaml"
    path.write_text(f"task: {{target: {{{key}: unknown}}}}")
    with pytest.raises(UserError, match=r"task: target: found the key .*; expected text or a number; put it in quotes"):
        read(path)
