"""Files that ask for something: one line and exit code 2, no code run, nothing fetched, no memory beyond a bound.

Most are those of the tests beside: uploads, GGUF files, numbers of a config, pickles.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import random
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from faults.child import call
from faults.damage import ASKED
from faults.place import Place

ASKS = "its settings ask for"
RAN = "ran"  # the folder or file that hostile code would make
RUN_CODE = f"__import__('os').mkdir({RAN!r})"
BACKBONE = ["--backbone", "../../small/backbone"]
File = bytes | str  # "-> PATH" is a link to it


class Case(NamedTuple):
    """Files, a command that reads them, and the code it must end with (None: 0 or 2)."""

    name: str
    files: Mapping[str, File]
    arguments: Sequence[str]
    code: int | None = 2
    says: str = ""  # part of the line: it is refused for what it asks, not by accident later


def prompt(**settings: Any) -> bytes:
    """Return a prompt file with such settings."""
    import numpy as np
    from safetensors.numpy import save

    run = {"task": "sentiment_movie", "methods": [{"kind": "prompt", "length": 3}]} | settings
    metadata = {"settings": json.dumps(run), "length": "3"}
    if isinstance(settings.get("backbone"), str):
        metadata["backbone"] = settings["backbone"]
    return save({"prompt": np.ones((3, 16), np.float32)}, metadata)


def sdist() -> bytes:
    """Return a source distribution whose build runs code."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in {"setup.py": RUN_CODE.encode(), "PKG-INFO": b"Name: evil\nVersion: 1.0\n"}.items():
            entry = tarfile.TarInfo(f"evil-1.0/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def sources() -> dict[str, Any]:
    package = {"kind": "package", "package": "evil", "version": "1.0", "reader": "sms", "sha256": "0" * 64}
    return {
        "an sdist": package | {"form": "sdist", "members": ["evil-1.0/rows.csv"]},
        "a wheel": package | {"form": "wheel", "members": ["evil/rows.csv"]},
        "a module": {"kind": "seqio", "name": "t", "module": "evil_module"},
        "a file": {"kind": "files", "train": "/etc/passwd", "validation": "/etc/passwd"},
        "a folder": {"kind": "folder", "path": "/etc"},
        "a device": {"kind": "files", "train": "/dev/zero", "validation": "/dev/zero"},
        "a bucket": {"kind": "files", "train": "gs://evil/a.jsonl", "validation": "gs://evil/a.jsonl"},
        "a data set of the hub": {"kind": "hub", "name": "evil/rows", "revision": "0" * 40},
    }


EVIL = {"evil_module.py": RUN_CODE, "index/evil-1.0.tar.gz": b""}  # the sdist is made when it is written


def prompts() -> Iterator[Case]:
    for name, source in sources().items():
        file = {
            "p.safetensors": prompt(task=source if name == "a module" else {"name": "evil", "source": source})
        } | EVIL
        yield Case(f"prompt whose task is {name}, eval", file, ["eval", "p.safetensors", *BACKBONE], says=ASKS)
        yield Case(
            f"prompt whose task is {name}, submit",
            file,
            ["submit", "p.safetensors", *BACKBONE, "--to", "out"],
            says=ASKS,
        )
        more = file | {"bank/p.safetensors": file["p.safetensors"]}
        yield Case(f"prompt whose task is {name}, bank", more, ["predict", "bank", *BACKBONE])  # needs prompts in lines
    sizes = {"vocabulary_rows": 160, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2}
    sizes |= {"num_layers": 1, "num_decoder_layers": 1}
    backbones = {
        "a path": "/etc",
        "a path above": "../../small/backbone",
        "a bucket": "gs://evil/t5",
        "a URL": "https://evil.example/t5",
        "random weights": {"tokenizer": "../../small/backbone", "settings": sizes},
    }
    for (name, backbone), how in itertools.product(backbones.items(), ("predict", "eval", "inspect")):
        says = ASKS if isinstance(backbone, str) else ""  # random weights: how it is refused depends on the command
        files = {"p.safetensors": prompt(backbone=backbone)}
        yield Case(f"prompt on {name}, {how}", files, [how, "p.safetensors"], says=says)
    for name, methods in {
        "a file to begin with": [{"kind": "prompt", "length": 3, "init": {"kind": "file", "path": "/etc/passwd"}}],
        "a huge prefix": [{"kind": "prefix", "length": 1_000_000}],
        "a huge network": [{"kind": "p_tuning", "length": 3, "hidden": 10**9}],
        "a huge rank": [{"kind": "lora", "rank": 10**9}],
        "teachers": [{"kind": "multitask", "length": 3, "tasks": 1, "teachers": ["/etc/passwd"]}],
    }.items():
        file = {"p.safetensors": prompt(methods=methods)}
        yield Case(f"prompt with {name}, predict", file, ["predict", "p.safetensors", *BACKBONE], None)
        yield Case(f"prompt with {name}, eval", file, ["eval", "p.safetensors", *BACKBONE, "--task", "evil"])


def uploads() -> Iterator[Case]:
    import test_serve_hostile

    for name, content in test_serve_hostile.UPLOADS.items():
        file = "p.npy" if content.startswith(b"\x93") else "p.safetensors"
        yield Case(f"prompt file: {name}", {file: content}, ["predict", file, *BACKBONE])
        yield Case(f"prompt file: {name}, show", {file: content}, ["show", file], None)


def arrays() -> Iterator[Case]:
    import numpy as np
    import test_serve_hostile

    np.save(buffer := io.BytesIO(), np.array([Pickled()], dtype=object), allow_pickle=True)
    header = test_serve_hostile.npy_header
    for name, content in {
        "objects": buffer.getvalue(),
        "code": header(f"({RUN_CODE}, 16)"),
        "a shape that multiplies to nothing": header("(1000000000000, 0)"),
        "a shape below zero": header("(-1, 16)") + bytes(64),
        "a version of the future": b"\x93NUMPY\x09\x00" + bytes(200),
        "a header of 4 GB": b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(200),
        "nothing behind its header": header("(3, 16)"),
    }.items():
        yield Case(f".npy: {name}", {"p.npy": content}, ["predict", "p.npy", *BACKBONE])
        yield Case(f".npy: {name}, import", {"p.npy": content}, ["import", "p.npy", "--to", "out.safetensors"])


class Pickled:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (RAN,)


def torch_files() -> Iterator[Case]:
    import numpy as np
    import test_torch_file as made

    def archive(pickled: bytes) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as opened:
            opened.writestr("archive/data.pkl", pickled)
            opened.writestr("archive/version", b"3\n")
        return buffer.getvalue()

    key = made.text("w")
    asked = {
        f"{function.__module__}.{function.__name__}, protocol {protocol}": pickle.dumps(
            {"w": made.Hostile(function, *given)}, protocol=protocol
        )
        for function, given in ((os.mkdir, (RAN,)), (eval, (RUN_CODE,)), (os.system, (f"mkdir {RAN}",)))
        for protocol in (0, 2, 4)
    }
    asked |= {
        name: b"\x80\x02}" + key + f"c{module}\n".encode() + b")Rs."
        for name, module in {
            "torch.load": "torch\nload",
            "a module": "evil_module\nf",
            "exec": "builtins\nexec",
        }.items()
    }
    asked |= {
        "a key that takes years to hash": b"\x80\x02}" + b")" + b"q\x00h\x00\x86" * 45 + b"Ns.",
        "a tuple of a million": b"\x80\x02}" + b")" + b"\x85" * 1_000_000 + b"Ns.",
        "an endless text": b"\x80\x04\x96" + (1 << 40).to_bytes(8, "little") + b".",
    }
    for name, pickled in asked.items():
        yield _torch(name, archive(pickled))
    path = Path(f"{os.environ['SOFTPROMPT_CACHE']}.bin")
    for name, changes in {
        "a huge shape": {"shape": (1 << 30, 1 << 30), "strides": (0, 0)},
        "a huge storage": {"count": 1 << 30},
        "infinities": {"values": np.full((6, 4), np.inf, np.float32)},
    }.items():
        yield _torch(name, made.of_values(path, **changes).read_bytes())
    made.save(path, b"}" + key + b"Ns", {"0": np.zeros((1 << 24,), np.float32)}, zipfile.ZIP_DEFLATED)
    yield _torch("a bomb of zeros", path.read_bytes())
    path.unlink()


def _torch(name: str, content: bytes) -> Case:
    files = {"b/pytorch_model.bin": content, "b/config.json": "copy", "b/spiece.model": "copy"} | EVIL
    return Case(f".bin: {name}", files, ["predict", "../../good/prompt.safetensors", "--backbone", "b"])


def ggufs() -> Iterator[Case]:
    import gguf_file
    import test_gguf

    def of(test: Any) -> list[Any]:
        return [values[0] for mark in test.pytestmark for values in mark.args[1]]

    path = Path(f"{os.environ['SOFTPROMPT_CACHE']}.gguf")
    contents = {
        f"head {number}": content
        for number, content in enumerate(of(test_gguf.test_a_damaged_file_is_named_before_anything_is_allocated))
    }
    for change in of(test_gguf.test_a_model_that_is_not_known_or_does_not_fit_is_named):
        contents[str(change)] = gguf_file.llama(path, **change).read_bytes()
    path.unlink()
    for name, content in contents.items():
        yield Case(f"GGUF: {name}", {"m.gguf": content}, ["import", "m.gguf", "--to", "out"])


def configs() -> Iterator[Case]:
    import test_backbone

    predict = ["predict", "../../good/prompt.safetensors", "--backbone", "b"]
    whole = dict.fromkeys(("b/config.json", "b/model.safetensors", "b/spiece.model"), "copy")
    (mark,) = test_backbone.test_senseless_numbers_of_a_config_are_refused_before_anything_is_built.pytestmark
    for key, value in mark.args[1]:
        yield Case(f"config.json: {key} {value}", whole | {"b/config.json": json.dumps({key: value})}, predict)
    evil = {"auto_map": {"AutoModel": "evil_module.Model"}, "trust_remote_code": True}
    for name, config in {
        "code of its own": evil | {"model_type": "evil", "architectures": ["EvilModel"]},
        "code of its own beside a T5": evil | {"model_type": "t5", "d_model": 10**9},
        "another type": {"model_type": ["t5"]},
    }.items():
        yield Case(f"config.json: {name}", whole | {"b/config.json": json.dumps(config)} | EVIL, predict)
    for name, text in {"nested": "[" * 100_000, "a list": "[]", "digits": '{"d_model": ' + "9" * 100_000 + "}"}.items():
        yield Case(f"config.json: {name}", whole | {"b/config.json": text + " "}, predict)
    yield Case("config.json: endless", whole | {"b/config.json": "-> /dev/zero"}, predict)
    index = "b/model.safetensors.index.json"
    del whole["b/model.safetensors"]
    for name, file in {"above": "../../../good/backbone/model.safetensors", "elsewhere": "/etc/passwd"}.items():
        yield Case(
            f"index: a file {name}", whole | {index: json.dumps({"weight_map": {"shared.weight": file}})}, predict
        )
    yield Case("index: nested", whole | {index: "[" * 100_000}, predict)
    yield Case("weights: endless", whole | {"b/model.safetensors": "-> /dev/zero"}, predict)
    tokenizer = {"b/tokenizer_config.json": json.dumps({"auto_map": {"AutoTokenizer": ["evil_module.T", None]}})}
    del whole["b/spiece.model"]
    files = whole | tokenizer | EVIL | {"b/model.safetensors": "copy", "b/evil_module.py": RUN_CODE}
    yield Case("tokenizer: code of its own", files, predict)
    yield Case("tokenizer: nested", files | {"b/tokenizer.json": "[" * 100_000}, predict)


def runs() -> Iterator[Case]:
    whole = dict.fromkeys(("run/prompt.safetensors", "run/trained.safetensors", "run/result.json"), "copy")
    ways = (["eval", "run"], ["predict", "run"], ["export", "run", "--format", "peft", "--to", "out"])

    def settings(**changes: Any) -> str:
        return json.dumps({"task": "sentiment_movie", "methods": [{"kind": "prompt", "length": 3}]} | changes)

    for name, source in sources().items():
        task = source if name == "a module" else {"name": "evil", "source": source}
        config = settings(task=task, backbone="../../small/backbone")
        yield Case(
            f"run whose task is {name}",
            whole | {"run/config.yaml": config} | EVIL,
            ["eval", "run", *BACKBONE],
            says=ASKS,
        )
    for name, config in {
        "python's tags": f"task: !!python/object/apply:os.mkdir [{RAN}]\n",
        "python's modules": "task: !!python/module:evil_module\n",
        "a bomb": "a: &a [1, 1]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(10**5)),
        "an endless base": "base: /dev/zero\n",
        "somebody's base": "base: /etc/passwd\n",
        "a backbone elsewhere": settings(backbone="/etc"),
        "a backbone of random weights": settings(backbone={"settings": {"vocabulary_rows": 10**12, "d_model": 16}}),
        "brackets": "[" * 100_000,
        "digits": settings(steps=0).replace('"steps": 0', '"steps": ' + "9" * 10_000),
        "an interpolation": settings(backbone="${oc.env:HOME}"),
    }.items():
        for way in ways:
            yield Case(f"run with {name}, {way[0]}", whole | {"run/config.yaml": config} | EVIL, way)
    good = settings(backbone="../../small/backbone")
    for name, file in itertools.product(("prompt.safetensors", "trained.safetensors"), ("/dev/zero", "/etc/passwd")):
        files = whole | {"run/config.yaml": good, f"run/{name}": f"-> {file}"}
        yield Case(f"run whose {name} is {file}", files, ["predict", "run", *BACKBONE], None)
        yield Case(f"run whose {name} is {file}, show", files, ["show", "run"], None)


def adapters() -> Iterator[Case]:
    config = {"peft_type": "PROMPT_TUNING", "task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": 3}
    for name, changes in {
        "a huge prompt": {"num_virtual_tokens": 10**9},
        "a huge rank": {"peft_type": "LORA", "r": 10**9},
        "code of its own": {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil_module"}},
        "a base elsewhere": {"base_model_name_or_path": "/etc"},
        "whole layers": {"modules_to_save": ["lm_head"]},
        "a pattern that takes years": {"peft_type": "LORA", "r": 2, "target_modules": "(a+)+$" * 30},
        "no kind": {"peft_type": "EVIL"},
    }.items():
        files = {"a/adapter_config.json": json.dumps(config | changes), "a/adapter_model.safetensors": "copy"} | EVIL
        for way in (["predict", "a", *BACKBONE], ["import", "a", "--to", "out"], ["show", "a"]):
            yield Case(f"adapter with {name}, {way[0]}", files, way, None if way[0] == "show" else 2)
    for name, text in {"nested": "[" * 100_000, "a list": "[]"}.items():
        files = {"a/adapter_config.json": text, "a/adapter_model.safetensors": "copy"}
        yield Case(f"adapter, {name}", files, ["predict", "a", *BACKBONE])
    old = pickle.dumps({"w": Pickled()}, protocol=2)
    files = {"a/adapter_config.json": json.dumps(config), "a/adapter_model.bin": old}
    for way in (["predict", "a", *BACKBONE], ["show", "a"]):
        yield Case(f"adapter whose .bin is a pickle, {way[0]}", files, way, 2)


GROUPS = (prompts, uploads, arrays, torch_files, ggufs, configs, runs, adapters)
GOOD = {"b": "torch", "run": "run", "a": "adapter"}  # where copies come from


def prepare(place: Place) -> list[list[Case]]:
    return [list(group()) for group in GROUPS]


def run(number: int, seed: int, place: Place, groups: list[list[Case]]) -> tuple[str, str]:
    """Run a hostile file, groups in turns; return its name and its problem."""
    group = groups[number % len(groups)]
    order = random.Random(f"hostile:{number % len(groups)}:{seed}").sample(group, len(group))
    case = order[number // len(groups) % len(group)]
    folder = place.fresh(f"hostile:{number}")
    for name, content in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content == "copy":
            good = GOOD[path.parent.name] if path.name != "model.safetensors" else "backbone"
            path.write_bytes((place.good / good / path.name).read_bytes())
        elif isinstance(content, str) and content.startswith("-> "):
            path.symlink_to(content[3:])
        else:
            path.write_bytes(
                sdist() if path.suffix == ".gz" else content.encode() if isinstance(content, str) else content
            )
    own = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "index", "XDG_STATE_HOME": str(folder / "nobody")}
    lines = b'{"inputs": "a", "prompt": "p"}\n' if "bank" in case.arguments else ASKED
    code = 0 if "bank" in case.arguments else case.code
    ended = call(case.arguments, folder, lines, **own, SOFTPROMPT_CACHE=str(folder / "cache"), PYTHONPATH=str(folder))
    problem = ended.problem(code) or (
        f"does not say {case.says!r}: {ended.last[:300]}" if case.says not in ended.last else ""
    )
    if any(path.name == RAN for path in folder.rglob("*")):
        problem = f"its code has run; {problem}"
    if (folder / "cache").exists():
        problem = f"something was fetched into the cache; {problem}"
    return case.name, problem
