"""YAML and overrides to settings and back; whatever is wrong is told in one line that names the key."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
import yaml
from pydantic import Field, model_validator

from softprompt_jax.config import (
    Settings,
    UserError,
    WrongSetting,
    differences,
    nearest,
    parse,
    read,
    settings_hash,
    to_yaml,
)


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


def test_an_override_of_a_mapping_with_numbers_as_keys_replaces_the_value(tmp_path):
    assert read(written(tmp_path, "words: {0: no, 1: yes}\n"), ["words.0=never"]) == {"words": {0: "never", 1: "yes"}}


def test_an_override_makes_the_mappings_that_it_needs(tmp_path):
    path = written(tmp_path, "note: null\nname: a\n")
    assert read(path, ["note.deep.er=1", "name.x=2", "more.0=3"]) == {
        "note": {"deep": {"er": 1}},
        "name": {"x": 2},
        "more": {"0": 3},
    }


def test_a_file_with_a_base_says_what_differs(tmp_path):
    (tmp_path / "inner").mkdir()
    written(tmp_path, "name: a\nrate: 0.1\ncolours: [{kind: red, depth: 2}, {kind: blue}]\n")
    middle, last = tmp_path / "inner" / "b.yaml", tmp_path / "inner" / "c.yaml"
    middle.write_text("# a comment\nrate: 0.2\nbase: ../a.yaml\ncolours.0.depth: 7\n")
    last.write_text("base: b.yaml\nname: c\ncolours: [{kind: blue}]\n")
    assert read(middle) == {"name": "a", "rate": 0.2, "colours": [{"kind": "red", "depth": 7}, {"kind": "blue"}]}
    assert read(last, ["rate=1"]) == {"name": "c", "rate": 1, "colours": [{"kind": "blue"}]}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("base: a.yaml", "a.yaml: base: {0}/a.yaml is based on this file; expected no circle; leave one base out"),
        ("base: b.yaml", "b.yaml: base: {0}/a.yaml is based on this file; expected no circle"),
        ("base: none.yaml", "{0}/none.yaml: no such file; base of {0}/a.yaml; expected a YAML settings file"),
        ("base: [b.yaml]", "{0}/a.yaml: base: found ['b.yaml']; expected a YAML file, relative to this one"),
        ("base: c.yaml\ncolours.3.depth: 1", "{0}/a.yaml: colours.3.depth: no such place in the settings"),
    ],
)
def test_a_base_that_cannot_be_is_one_line(tmp_path, content, expected):
    path = written(tmp_path, content)
    (tmp_path / "b.yaml").write_text("base: a.yaml")
    (tmp_path / "c.yaml").write_text("colours: [{kind: red}]")
    assert expected.format(tmp_path) in message(read, path)


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


class Shop(Settings):
    paint: Paint
    count: int = 1
    sample: Literal["red"] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Shop:
        if self.count > self.paint.count:
            raise WrongSetting("count", self.count, f"Expected at most paint.count, {self.paint.count}")
        return self


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"rate": 1}, "w: rate: unknown setting; expected one of paint, count, sample; did you mean paint.rate?"),
        ({"wide": 1}, "w: wide: unknown setting; expected one of paint, count, sample"),
        ({"paint": {"name": "a", "batch": 1}}, "w: paint.batch: unknown setting"),
        ({"count": 9}, "w: count: found 9; expected at most paint.count, 3"),
        ({"paint": {"name": "a", "colours": {"0": {"kind": "red", "dept": 1}}}}, "w: paint.colours: found {'0': "),
    ],
)
def test_what_may_be_meant_and_which_setting_is_wrong_are_said(values, expected):
    found = message(parse, Shop, {"paint": {"name": "a"}} | values, "w")
    assert found.startswith(expected)


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
