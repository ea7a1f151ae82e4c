"""YAML files and `key=value` overrides to validated settings and back, with one-line errors."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_origin

import pydantic
import yaml

S = TypeVar("S", bound=pydantic.BaseModel)

# What other libraries call a setting, and its name here.
OTHER_NAMES = {"lr": "learning_rate", "r": "rank", "lora_alpha": "alpha", "num_virtual_tokens": "length"}
OTHER_NAMES |= {"prompt_length": "length", "batch": "batch_size", "per_device_train_batch_size": "batch_size"}
OTHER_NAMES |= {"model": "backbone", "model_name_or_path": "backbone", "pretrained_model_name_or_path": "backbone"}
OTHER_NAMES |= dict.fromkeys(("epochs", "num_epochs", "num_train_epochs", "max_steps"), "steps")


class Preempted(Exception):
    """A run has saved its state and ended before its last step, because the machine is being taken away."""


class Interrupted(Preempted):
    """A run has saved its state and ended before its last step, because of Ctrl-C."""


class UserError(Exception):
    """Bad input, told in one line: *where: what was found; what was expected; what to do.*

    The command line prints it without a traceback and exits with code 2. Everything else that is
    raised is a defect of ours and keeps its traceback.
    """


class WrongSetting(ValueError):
    """What a validator of several settings says of one of them: its key and value."""

    def __init__(self, key: str, found: Any, message: str):
        super().__init__(message)
        self.key, self.found = key, found


class Diverged(UserError):
    """The loss of a run is no finite number after `step`."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


def cache_folder() -> Path:
    """Return the folder for what was fetched or computed: $SOFTPROMPT_CACHE, or ~/.cache/softprompt_jax."""
    return Path(os.environ.get("SOFTPROMPT_CACHE") or Path.home() / ".cache" / "softprompt_jax")


class Settings(pydantic.BaseModel):
    """Immutable, validated settings; an unknown key is an error."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", validate_default=True)


def by_kind(value: Any) -> Any:
    """Let a kind stand for settings of that kind with their defaults: `lora` for `{kind: lora}`."""
    return {"kind": value} if isinstance(value, str) else value


def nearest(name: str, known) -> str:
    """Return "; did you mean X or Y?" for a misspelt name, or the empty string."""
    close = difflib.get_close_matches(name, [str(word) for word in known], n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type's name."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


def parse(schema: type[S], values: Any, where: str) -> S:
    """Validate `values` as `schema`; the first problem becomes a UserError that names the key."""
    try:
        return schema.model_validate(values)
    except pydantic.ValidationError as error:
        raise UserError(f"{where}: {_first_problem(schema, error, values)}") from None


def read(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a YAML mapping and apply dotted `key=value` overrides (`task.name=x`, `methods.0.length=5`).

    `base: FILE` in it, relative to the file, is read first; then the file's other settings are applied to it as
    overrides are, so that `optimizer.learning_rate: 0.1` changes a part and `optimizer: {...}` the whole.
    Values of overrides are YAML too (`[1, 2]`, `null`, `1e-3`). `${}` is refused: nothing interpolates.
    """
    values = _read_with_base(Path(path), ())
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(f"{override!r}: not an override; expected key=value, e.g. steps=100")
        _set(values, key, _plain(_yaml(value, override), override), override)
    return values


def _read_with_base(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """Read a mapping and those it is based on; `above` are the files that led here."""
    if path.resolve() in above:
        raise UserError(f"{above[-1]}: base: {path} is based on this file; expected no circle; leave one base out")
    source = f"base of {above[-1]}; expected" if above else "expected"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {source} a YAML settings file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {source} a YAML settings file") from None
    values = _plain(_yaml(text, str(path)), str(path))
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: found {type(values).__name__}; expected a mapping of settings")
    if "base" not in values:
        return values
    base = values.pop("base")
    if not isinstance(base, str):
        raise UserError(f"{path}: base: found {base!r}; expected a YAML file, relative to this one")
    whole = _read_with_base(path.parent / base, (*above, path.resolve()))
    for key, value in values.items():
        _set(whole, str(key), value, f"{path}: {key}")
    return whole


def _set(settings: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set the value at a dotted path; mappings that are missing on the way, or are no mappings, are made."""
    place: Any = settings
    *outer, last = key.split(".")
    for part in outer:
        own = _own_key(place, part, where)
        inner = place[own] if isinstance(place, list) else place.get(own)
        if not isinstance(inner, dict | list):
            inner = place[own] = {}
        place = inner
    place[_own_key(place, last, where)] = value


def _own_key(place: dict[Any, Any] | list[Any], part: str, where: str) -> Any:
    """Return the key of a mapping that is written as `part`, or the index of a list."""
    if isinstance(place, dict):
        return next((key for key in place if str(key) == part), part)
    if part.isdecimal() and int(part) < len(place):
        return int(part)
    raise UserError(
        f"{where}: no such place in the settings ({part!r} of a list of {len(place)}); "
        "expected a dotted path as in the YAML file"
    )


def read_text(text: str, where: str) -> Any:
    """Read YAML that was given as text."""
    return _plain(_yaml(text, where), where)


def to_yaml(settings: pydantic.BaseModel | dict[str, Any]) -> str:
    """Write complete settings, or some as JSON has them, as YAML that `read` accepts again."""
    values = settings if isinstance(settings, dict) else settings.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def settings_hash(settings: pydantic.BaseModel, length: int = 12, without: frozenset[str] = frozenset()) -> str:
    """Return a stable short hash of complete settings, some of them left out."""
    return values_hash(settings.model_dump(mode="json", exclude=set(without)), length)


def values_hash(values: dict[str, Any], length: int = 12) -> str:
    """Return the hash of settings as they were saved, whatever settings there are by now."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:length]


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """List "key: old -> new" for every leaf in which two nested settings differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [
            line
            for key in keys
            for line in differences(old.get(key, "(absent)"), new.get(key, "(absent)"), f"{prefix}.{key}".lstrip("."))
        ]
    return [] if old == new else [f"{prefix}: {old!r} -> {new!r}"]


_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C is several times as fast


class _Loader(_SafeLoader):
    """YAML 1.1 that also reads 1e-3 as a number, which the specification's grammar calls a text."""


class _Dumper(yaml.SafeDumper):
    """Puts quotes around a text such as 1e5, which `_Loader` would read as a number."""


for _each in (_Loader, _Dumper):
    _each.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - derived from SafeLoader
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML ({' '.join(str(error).split())}); expected valid YAML") from None


def _plain(value: Any, where: str) -> Any:
    """Return a YAML value as it is, if it is one that settings can hold."""
    if isinstance(value, str) and "${" in value:
        raise UserError(f"{where}: found {value!r}; settings do not interpolate; write the value itself")
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str | int | float | bool):
                raise UserError(f"{where}: found the key {key!r}; expected text or a number; put it in quotes")
        return {key: _plain(item, f"{where}: {key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, where) for item in value]
    if not isinstance(value, str | int | float | None):  # YAML knows dates, bytes and sets, too
        raise UserError(f"{where}: found {value!r}; expected text, a number, a list or a mapping; quote a text")
    return value


def _first_problem(schema: type[pydantic.BaseModel], error: pydantic.ValidationError, values: Any) -> str:
    problem = error.errors()[0]
    path = _written_path(problem["loc"], values, problem["type"] == "missing")
    if problem["type"] == "extra_forbidden":
        known = _known_keys(schema, problem["loc"][:-1])
        expected = f"expected one of {', '.join(known)}" if known else "expected a known setting"
        return f"{'.'.join(path)}: unknown setting; {expected}{_meant(schema, path, known)}"
    if problem["type"] == "missing":
        return f"{'.'.join(path)}: missing; expected a value; add it to the settings"
    context = problem.get("ctx", {})
    found, cause = problem.get("input"), context.get("error")
    if isinstance(cause, WrongSetting):
        path, found = [*path, cause.key], cause.found
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "union_tag_invalid":
        tag, known = context["tag"], context["expected_tags"]
        message = f"kind {tag!r} is unknown; expected one of {known}"
        message += nearest(tag, known.replace("'", "").split(", "))
    shown = repr(found)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return f"{'.'.join(path) or schema.__name__}: found {shown}; {message[0].lower() + message[1:]}"


def _meant(schema: Any, path: list[str], known: list[str]) -> str:
    """Return a hint at the setting that an unknown name may stand for: a nested or a similar one."""
    name = OTHER_NAMES.get(path[-1], path[-1])
    if name in known:
        return f"; did you mean {'.'.join([*path[:-1], name])}?"
    nested = list(dict.fromkeys(_paths_to(name, schema, ()))) if len(path) == 1 else []
    return f"; did you mean {' or '.join(nested[:3])}?" if nested else nearest(name, known)


def _paths_to(name: str, annotation: Any, path: tuple[str, ...]) -> Iterator[str]:
    """Yield the dotted paths, one level down, at which a setting is called `name`."""
    for key, field in annotation.model_fields.items():
        index = ("0",) if get_origin(field.annotation) is list else ()
        for model in _models_in(field.annotation):
            if name in model.model_fields:
                yield ".".join((*path, key, *index, name))


def _written_path(location: tuple, values: Any, missing: bool) -> list[str]:
    """Leave out of an error's location what pydantic adds to it: the kinds of tagged unions."""
    path = []
    for number, part in enumerate(location, start=1):
        if isinstance(values, dict) and (part in values or str(part) in values):
            values = values[part] if part in values else values[str(part)]
        elif isinstance(values, list | tuple) and isinstance(part, int):
            values = values[part]
        elif not (missing and number == len(location)):
            continue
        path.append(str(part))
    return path


def _known_keys(schema: Any, location: tuple) -> list[str]:
    """Follow an error location through nested models, lists and tagged unions to its model's keys."""
    candidates = [schema]
    for part in location:
        following = []
        for candidate in candidates:
            if isinstance(candidate, type) and issubclass(candidate, pydantic.BaseModel):
                field = candidate.model_fields.get(str(part))
                if field is not None:
                    following += _models_in(field.annotation)
        candidates = (
            following
            or [c for c in candidates if isinstance(c, type) and _tag(c) == part]
            or [c for c in candidates if isinstance(c, type) and _tag(c) is None]
            or candidates
        )
    keys: dict[str, None] = {}
    for candidate in candidates:
        keys.update(dict.fromkeys(candidate.model_fields))
    return list(keys)


def _models_in(annotation: Any) -> list[type]:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]


def _tag(schema: type[pydantic.BaseModel]) -> str | None:
    field = schema.model_fields.get("kind")
    return field.default if field is not None else None
