"""YAML files and `key=value` overrides to validated settings and back, with one-line errors."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

S = TypeVar("S", bound=pydantic.BaseModel)


class Preempted(Exception):
    """A run has saved its state and ended before its last step, because the machine is being taken away."""


class Interrupted(Preempted):
    """A run has saved its state and ended before its last step, because of Ctrl-C."""


class UserError(Exception):
    """Bad input, told in one line: *where: what was found; what was expected; what to do.*

    The command line prints it without a traceback and exits with code 2. Everything else that is
    raised is a defect of ours and keeps its traceback.
    """


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


def nearest(name: str, known) -> str:
    """Return "; did you mean X or Y?" for a misspelt name, or the empty string."""
    close = difflib.get_close_matches(name, [str(word) for word in known], n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def parse(schema: type[S], values: Any, where: str) -> S:
    """Validate `values` as `schema`; the first problem becomes a UserError that names the key."""
    try:
        return schema.model_validate(values)
    except pydantic.ValidationError as error:
        raise UserError(f"{where}: {_first_problem(schema, error, values)}") from None


def read(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a YAML mapping and apply dotted `key=value` overrides (`task.name=x`, `methods.0.length=5`).

    Values of overrides are YAML too (`[1, 2]`, `null`, `1e-3`). `${}` is refused: nothing interpolates.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a YAML settings file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected a YAML settings file") from None
    values = _yaml(text, str(path))
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: found {type(values).__name__}; expected a mapping of settings")
    config = OmegaConf.create(_plain(values, str(path)))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(f"{override!r}: not an override; expected key=value, e.g. steps=100")
        parsed = _plain(_yaml(value, override), override)
        try:
            OmegaConf.update(config, key, parsed, merge=False, force_add=True)
        except (OmegaConfBaseException, TypeError, ValueError, IndexError) as error:
            raise UserError(
                f"{override}: no such place in the settings ({str(error).splitlines()[0]}); "
                "expected a dotted path as in the YAML file"
            ) from None
    return OmegaConf.to_container(config, resolve=False)  # type: ignore[return-value]


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


class _Loader(yaml.SafeLoader):
    """YAML 1.1 but with 1e-3 read as a number (the specification's grammar calls it a string)."""


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:float"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+|\d[\d_]*\.[\d_]*|\.\d[\d_]*|\.(?:inf|nan))$", 2),
    list("-+0123456789."),
)


class _Dumper(yaml.SafeDumper):
    """YAML that `_Loader` reads as it was: a text such as 1e5 gets quotes."""


_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, ()), *_Loader.yaml_implicit_resolvers.get(first, ())]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
}


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
    path = ".".join(_written_path(problem["loc"], values))
    if problem["type"] == "extra_forbidden":
        known = _known_keys(schema, problem["loc"][:-1])
        hint = nearest(str(problem["loc"][-1]), known)
        expected = f"expected one of {', '.join(known)}" if known else "expected a known setting"
        return f"{path}: unknown setting; {expected}{hint}"
    if problem["type"] == "missing":
        return f"{path}: missing; expected a value; add it to the settings"
    message = problem["msg"].removeprefix("Value error, ")
    shown = repr(problem.get("input"))
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return f"{path or schema.__name__}: found {shown}; {message[0].lower() + message[1:]}"


def _written_path(location: tuple, values: Any) -> list[str]:
    """Leave out of an error's location what pydantic adds to it: the kinds of tagged unions."""
    path = []
    for part in location:
        if isinstance(values, dict) and (part in values or part == location[-1]):
            values = values.get(part)
        elif isinstance(values, list | tuple) and isinstance(part, int):
            values = values[part]
        else:
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
