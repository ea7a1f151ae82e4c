"""YAML files and `key=value` overrides to validated settings and back, with one-line errors."""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin

import pydantic
import yaml

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(pydantic.BaseModel)

S = TypeVar("S", bound=pydantic.BaseModel)

# Limits of a file of settings; lists of label words are the largest that we know.
_MOST_CHARACTERS, _MOST_VALUES, _DEEPEST = 1 << 20, 100_000, 64

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


class SettingsError(UserError, ValueError):
    """Values that a class of settings refuses when it is made in Python; inside a validator a ValueError as any."""


class WrongSetting(ValueError):
    """What a validator of several settings says of one of them: its key and value."""

    def __init__(self, key: str, found: Any, message: str):
        super().__init__(message)
        self.key, self.found = key, found


class UnknownSetting(ValueError):
    """A key that a class of settings does not have."""

    def __init__(self, key: str, settings: type[pydantic.BaseModel]):
        super().__init__(f"{key}: unknown setting")
        self.key, self.settings = key, settings


class Diverged(UserError):
    """The loss of a run is no finite number after `step`."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


def cache_folder() -> Path:
    """Return the folder for what was fetched or computed: $SOFTPROMPT_CACHE, or ~/.cache/softprompt_jax."""
    return Path(os.environ.get("SOFTPROMPT_CACHE") or Path.home() / ".cache" / "softprompt_jax")


class _WithFieldComments(ModelMetaclass):
    """The class of classes of settings, whose documentation has a line for each field (see below)."""


def _documentation(cls: Any) -> str:
    from softprompt_jax.field_comments import described

    return described(cls)


_WithFieldComments.__doc__ = property(_documentation)  # type: ignore[assignment]


class Settings(pydantic.BaseModel, metaclass=_WithFieldComments):
    """Immutable, validated settings; an unknown key is an error, and so is a number without end."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    if not TYPE_CHECKING:  # type checkers see the fields as arguments

        def __init__(self, **values: Any):
            """Make settings. Errors: SettingsError, a UserError, for the first value that is refused."""
            try:
                super().__init__(**values)
            except pydantic.ValidationError as error:
                raise SettingsError(f"{type(self).__name__}: {_first_problem(error, values)}") from None

        __init__.__pydantic_base_init__ = True  # settings inside settings are validated without it, as ever

    def __repr_args__(self) -> Any:
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name != "kind" and (field.is_required() or value != field.get_default(call_default_factory=True)):
                yield name, value

    @pydantic.model_validator(mode="before")  # runs last, behind those that complete short forms
    @classmethod
    def _refuse_unknown(cls, values: Any) -> Any:
        for key, value in values.items() if isinstance(values, dict) else ():
            if key not in cls.model_fields:
                raise UnknownSetting(str(key), cls)
            kinds = get_args(annotation := cls.model_fields[key].annotation) or (annotation,)
            if isinstance(value, bool) and bool not in kinds and (int in kinds or float in kinds):
                raise WrongSetting(key, value, "input should be a number")  # pydantic takes true for 1
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise WrongSetting(key, value, "input should fit into 64 bits")
        return values


def by_kind(value: Any) -> Any:
    """Let a kind stand for settings of that kind with their defaults: `lora` for `{kind: lora}`."""
    return {"kind": value} if isinstance(value, str) else value


def nearest(name: str, known) -> str:
    """Return "; did you mean X or Y?" for a misspelt name, or the empty string."""
    close = difflib.get_close_matches(name, [str(word) for word in known], n=3, cutoff=0.6) if len(name) < 200 else ()
    return f"; did you mean {' or '.join(close)}?" if close else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type's name."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


def parse(schema: type[S], values: Any, where: str, strict: bool = False) -> S:
    """Validate `values` as `schema`; the first problem becomes a UserError that names the key.

    `strict`: a number that is written as text is none.
    """
    try:
        return schema.model_validate(values, strict=strict or None)
    except pydantic.ValidationError as error:
        raise UserError(f"{where}: {_first_problem(error, values)}") from None


def read(path: str | Path | Settings | dict[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML mapping, or settings, and apply dotted `key=value` overrides (`task.name=x`, `methods.0.length=5`).

    `base: FILE` in it, relative to the file, is read first; then the file's other settings are applied to it as
    overrides are, so that `optimizer.learning_rate: 0.1` changes a part and `optimizer: {...}` the whole.
    Values of overrides are YAML too (`[1, 2]`, `null`, `1e-3`). `${}` is refused: nothing interpolates.
    """
    if isinstance(path, Settings):
        values = path.model_dump(mode="json")
    else:
        values = copy.deepcopy(path) if isinstance(path, dict) else _read_with_base(Path(path), ())
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(f"{override!r}: not an override; expected key=value, e.g. steps=100")
        _set(values, key, read_text(value, override), override)
    return values


def shipped(path: Path) -> Path:
    """Return a path; where the working directory has no such `configs/...`, that of the package or its checkout."""
    package = Path(__file__).parent
    if path.parts[:1] == ("configs",) and not path.exists():
        return next((found for root in (package, package.parent) if (found := root / path).exists()), path)
    return path


def _read_with_base(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """Read a mapping and those it is based on; `above` are the files that led here."""
    path = shipped(path)
    if len(above) > _DEEPEST:
        raise UserError(f"{above[0]}: base: more than {_DEEPEST} files; expected a shorter chain")
    own = Path(os.path.realpath(path))  # a loop of links is left to the reader, which refuses it
    if own in above:
        raise UserError(f"{above[-1]}: base: {path} is based on this file; expected no circle; leave one base out")
    source = f"base of {above[-1]}; expected" if above else "expected"
    try:
        if not stat.S_ISREG(mode := path.stat().st_mode) and not stat.S_ISDIR(mode):
            raise OSError("no regular file")  # a pipe or a device may never end
        with path.open(encoding="utf-8") as file:
            text = file.read(_MOST_CHARACTERS + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {source} a YAML settings file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {source} a YAML settings file") from None
    values = read_text(text, str(path))
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise UserError(f"{path}: found {type(values).__name__}; expected a mapping of settings")
    if "base" not in values:
        return values
    base = values.pop("base")
    if not isinstance(base, str):
        raise UserError(f"{path}: base: found {base!r}; expected a YAML file, relative to this one")
    whole = _read_with_base(path.parent / base, (*above, own))
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
    if part in map(str, range(len(place))):
        return int(part)
    raise UserError(
        f"{where}: no such place in the settings ({part[:80]!r} of a list of {len(place)}); "
        "expected a dotted path as in the YAML file"
    )


def read_text(text: str, where: str) -> Any:
    """Read YAML that was given as text, and hold it to what settings can hold."""
    if len(text) > _MOST_CHARACTERS:
        raise UserError(
            f"{where[:80]}: more than {_MOST_CHARACTERS} characters; expected settings; put data into files"
        )
    loader = _Loader(text)
    try:
        depth = 0
        for event in yaml.parse(text, Loader=_Loader):  # first, since the composer recurses in C
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise ValueError(f"brackets or lists {depth} deep")
            if getattr(event, "tag", None) is not None:
                raise ValueError(f"line {event.start_mark.line + 1}: the tag {event.tag}")
        node = loader.get_single_node()
        if node is None:
            return None
        if _count(node, {}) >= _MOST_VALUES:
            raise ValueError(f"{_MOST_VALUES} values or more, with aliases written out")
        return _plain(loader.construct_document(node), where)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 5,000 digits, 2024-13-45
        where, reason = where[:200], " ".join(str(error).split())[:400]
        raise UserError(f"{where}: not YAML for settings ({reason}); expected valid YAML") from None
    finally:
        loader.dispose()


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Count the values below a node with aliases written out, up to the limit; a repeated key is a ValueError."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = _MOST_VALUES  # what holds itself has no end
    below = node.value if isinstance(node, yaml.CollectionNode) else ()
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in below if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"line {node.start_mark.line + 1}: the key {twice[:80]!r} stands twice")
        below = [child for pair in below for child in pair]
    known[id(node)] = min(_MOST_VALUES, 1 + sum(_count(child, known) for child in below))
    return known[id(node)]


def to_yaml(settings: pydantic.BaseModel | dict[str, Any]) -> str:
    """Write complete settings, or some as JSON has them, as YAML that `read` accepts again."""
    values = settings if isinstance(settings, dict) else settings.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def settings_hash(settings: pydantic.BaseModel, without: frozenset[str] = frozenset()) -> str:
    """Return a stable short hash of complete settings, some of them left out."""
    return values_hash(settings.model_dump(mode="json", exclude=set(without)))


def values_hash(values: dict[str, Any]) -> str:
    """Return the hash of settings as they were saved, whatever settings there are by now."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """List "key: old -> new" for every leaf in which two nested settings differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in old | new
            for line in differences(old.get(key, "(absent)"), new.get(key, "(absent)"), f"{prefix}.{key}".lstrip("."))
        ]
    return [] if old == new else [f"{prefix}: {old!r} -> {new!r}"]


_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C is several times as fast


class _Loader(_SafeLoader):
    """YAML with the scalars of version 1.2: `yes` and `on` are texts, 1:30 and 010 no numbers, 1e-3 is one."""


class _Dumper(yaml.SafeDumper):
    """Puts quotes around whatever version 1.1 or 1.2 would read as something else than a text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag.rpartition(":")[2] not in ("bool", "int", "float")]
    for first, forms in _Loader.yaml_implicit_resolvers.items()
}
_EXPONENT = r"[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+"
for _kind, _form, _first in (
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9]\d*(?:_\d+)*)", "-+0123456789"),
    ("float", rf"{_EXPONENT}|[-+]?(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*|\.inf)|\.nan", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_form})$", re.A), list(_first))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^{_EXPONENT}$"), list("-+0123456789."))


def _plain(value: Any, where: str) -> Any:
    """Return a YAML value as it is, if it is one that settings can hold."""
    if isinstance(value, str) and (
        "\0" in value or (not value.isascii() and value != value.encode("utf-8", "replace").decode())
    ):
        raise UserError(f"{where}: found {value[:80]!r}; expected text without NUL and halves of surrogate pairs")
    if isinstance(value, str) and "${" in value:
        raise UserError(f"{where}: found {value!r}; settings do not interpolate; write the value itself")
    if isinstance(value, dict):
        if odd := [key for key in value if not isinstance(key, str | int | float | bool)]:
            raise UserError(f"{where}: found the key {odd[0]!r}; expected text or a number; put it in quotes")
        return {key: _plain(item, f"{where}: {key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, where) for item in value]
    if not isinstance(value, str | int | float | None):  # YAML knows dates, bytes and sets, too
        raise UserError(f"{where}: found {value!r}; expected text, a number, a list or a mapping; quote a text")
    return value


def _first_problem(error: pydantic.ValidationError, values: Any) -> str:
    problem = error.errors()[0]
    path = _written_path(problem["loc"], values, problem["type"] == "missing")
    if problem["type"] == "missing":
        return f"{'.'.join(path)}: missing; expected a value; add it to the settings"
    context = problem.get("ctx", {})
    found, cause = problem.get("input"), context.get("error")
    if isinstance(cause, UnknownSetting):
        path, known = [*path, cause.key], ", ".join(cause.settings.model_fields)
        return f"{'.'.join(path)}: unknown setting; expected one of {known}{_meant(cause.settings, path)}"
    if isinstance(cause, WrongSetting):
        path, found = [*path, cause.key], cause.found
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "union_tag_invalid":
        tag, known = context["tag"], context["expected_tags"]
        message = f"kind {tag!r} is unknown; expected one of {known}"
        message += nearest(tag, known.replace("'", "").split(", "))
    shown = repr(found)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return f"{'.'.join(path) or error.title}: found {shown}; {message[0].lower() + message[1:]}"


def _meant(settings: type[pydantic.BaseModel], path: list[str]) -> str:
    """Return a hint at the setting that an unknown name may stand for: a nested or a similar one."""
    name, known = OTHER_NAMES.get(path[-1], path[-1]), settings.model_fields
    if name in known:
        return f"; did you mean {'.'.join([*path[:-1], name])}?"
    holders = {key: f for key, f in known.items() if any(name in m.model_fields for m in _models_in(f.annotation))}
    if not holders or len(path) > 1:
        return nearest(name, known)
    nested = [f"{key}.0.{name}" if get_origin(f.annotation) is list else f"{key}.{name}" for key, f in holders.items()]
    return f"; did you mean {' or '.join(nested[:3])}?"


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


def _models_in(annotation: Any) -> list[type[pydantic.BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]
