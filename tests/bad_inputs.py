"""Bad inputs for the command line, as a table: what is written, what is called, and how it must end.

`cases()` is all of it, `sample(300)` a part. `python tests/bad_inputs.py FOLDER [PART|COUNT]` runs it (those whose
names hold PART, or a sample), each case in a child that is forked after the imports, and prints what ends otherwise.
Each case has a folder of its own beside `small/` (a backbone and a task) and `run/` (a finished run).
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

GIB = 2**30
LIMIT_S, LIMIT_BYTES = 20, 4 * GIB  # of a case; bytes on top of what the parent has


class Case(NamedTuple):
    """A call of the command line in a folder with some files; a file with the content None is a folder."""

    name: str
    arguments: Sequence[str]
    files: Mapping[str, bytes | str | None] = MappingProxyType({})
    stdin: bytes = b""
    code: int = 2  # with 2 there is one line on standard error

    def write(self, folder: Path) -> None:
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                path.mkdir()
            elif content == "fifo":
                os.mkfifo(path)
            elif isinstance(content, str) and content.startswith("-> "):
                path.symlink_to(content[3:])
            else:
                path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)


def _train(name: str, *overrides: str, code: int = 2) -> Case:
    return Case(f"set {name}", ["train", "../base.yaml", "--out", "run", *overrides], code=code)


def _yaml(name: str, content: bytes | str, code: int = 2) -> Case:
    """Return the case of a file of settings, which stands on the small run's."""
    if isinstance(content, str):
        content = content.encode()
    return Case(
        f"yaml {name}", ["train", "a.yaml", "--out", "run"], {"a.yaml": b"base: ../base.yaml\n" + content}, code=code
    )


def _whole(name: str, content: bytes | str, code: int = 2) -> Case:
    return Case(f"yaml {name}", ["train", "a.yaml", "--out", "run"], {"a.yaml": content}, code=code)


def _rows(name: str, train: bytes | str, suffix: str = "jsonl", code: int = 2, **task: object) -> Case:
    """Return the case of a file of training rows."""
    task = {"name": "rows", "label_words": ["yes", "no"], **task}
    source = {"kind": "files", "train": f"train.{suffix}", "validation": "../small/validation.jsonl"}
    settings = json.dumps({"base": "../base.yaml", "task": {"source": source, **task}})
    return Case(
        f"rows {name}", ["train", "a.yaml", "--out", "run"], {"a.yaml": settings, f"train.{suffix}": train}, code=code
    )


def _task(title: str, /, *, code: int = 2, **task: object) -> Case:
    """Return the case of a task's settings over good rows."""
    source = {"kind": "files", "train": "../small/train.jsonl", "validation": "../small/validation.jsonl"}
    settings = json.dumps({"base": "../base.yaml", "task": {"name": "rows", "source": source, **task}})
    return Case(f"task {title}", ["train", "a.yaml", "--out", "run"], {"a.yaml": settings}, code=code)


GOOD = '{"text": "the garden is bright today", "label": "yes"}\n{"text": "the garden is dull today", "label": "no"}\n'
_COUNTS = [
    "steps",
    "batch_size",
    "accumulate",
    "seed",
    "max_input_tokens",
    "max_target_tokens",
    "shapes",
    "evaluate_every",
    "evaluation_batch_size",
    "evaluation_examples",
    "result_examples",
    "checkpoint_every",
    "log_every",
    "methods.0.length",
    "schedule.warmup_steps",
]
_RATES = [
    "clip_norm",
    "z_loss",
    "label_smoothing",
    "dropout",
    "optimizer.learning_rate",
    "optimizer.decay",
    "optimizer.weight_decay",
    "optimizer.clipping",
    "schedule.final",
]
_OTHERS = [
    "dtype",
    "quantize",
    "loss",
    "attention",
    "remat",
    "unroll",
    "truncate_targets",
    "packing",
    "text",
    "mesh",
    "decoding",
    "backbone",
    "task",
    "methods",
]
_MEGABYTE = "x" * 10**6


def _settings() -> Iterator[Case]:
    for key in _COUNTS:
        for value in ("-1", "many", "1.5", "true", ".nan", "9" * 30, "[1]"):
            yield _train(f"{key}={value}", f"{key}={value}")
    for key in _RATES:
        for value in ("-1", "fast", "true", ".nan", ".inf", "-.inf", "1e999"):
            yield _train(f"{key}={value}", f"{key}={value}")
    for key in _OTHERS:
        for value in ("-1", "{a: 1}", "''"):
            yield _train(f"{key}={value}", f"{key}={value}")
    for key in ("steps", "batch_size", "z_loss", "loss", "task", "methods", "seed", "text", "mesh"):
        yield _train(f"{key}=null", f"{key}=null")
    yield _train("steps of 5,000 digits", "steps=" + "9" * 5000)
    yield _train("rate of 5,000 digits", "optimizer.learning_rate=" + "9" * 5000)
    yield _train("index of 5,000 digits", "methods." + "9" * 5000 + ".length=3")
    yield _train("index of superscripts", "methods.².length=3")
    yield _train("index below zero", "methods.-1.length=3")
    yield _train("a long path", ".".join("a" * 2000) + "=3")
    yield _train("a path of dots", "....=3")
    yield _train("no value", "steps")
    yield _train("no key", "=3")
    yield _train("nothing", "")
    yield _train("a megabyte's name", "backbone=" + "x" * 100_000)
    yield _train("NUL in the backbone", r'backbone="a\0b"')
    yield _train("surrogate in the backbone", r'backbone="a\ud800b"')
    yield _train("backbone with ..", "backbone=../../../..")
    yield _train("backbone is a file", "backbone=../small/train.jsonl")
    yield _train("backbone is an endless file", "backbone=/dev/zero")
    yield _train("sexagesimal", "steps=1:30")
    yield _train("octal", "steps=010:00")
    yield _train("yes for a number", "steps=yes")
    yield _train("on for a number", "seed=on")
    yield _train("a date", "seed=2024-01-01")
    yield _train("a wrong date", "seed=2024-13-45")
    yield _train("interpolation", "backbone=${oc.env:HOME}")
    yield _train("deep override", "task=" + "[" * 100_000)
    yield _train("deep closed override", "task=" + "[" * 3000 + "]" * 3000)
    yield _train("alias to nothing", "task=*a")
    yield _train("warmup past the end", "schedule.warmup_steps=100", code=0)
    yield _train("reversed bounds", "methods.0.init={kind: random, low: 1, high: -1}")
    yield _train("bounds that are equal", "methods.0.init={kind: random, low: 1, high: 1}")
    yield _train("bounds without end", "methods.0.init={kind: random, low: -.inf, high: .inf}")
    yield _train("huge prompt", "methods.0.length=1000000000000")
    yield _train("large prompt", "methods.0.length=1000000000")
    yield _train("huge batch", "batch_size=1000000000000")
    yield _train("large batch", "batch_size=1000000000")
    yield _train("huge rank", "methods=[{kind: lora, rank: 1000000000}]")
    yield _train("large prefix", "methods=[{kind: prefix, length: 1000000000}]")
    yield _train("wide adapter", "methods=[{kind: adapter, width: 10000000000}]")
    yield _train("deep p_tuning", "methods=[{kind: p_tuning, layers: 1000000000}]")
    yield _train("wide p_tuning", "methods=[{kind: p_tuning, hidden: 1000000000}]")
    yield _train("huge accumulate", "accumulate=10000000000", "batch_size=10000000000")
    yield _train("huge packed rows", "packing={length: 1000000000000}")
    yield _train("huge packed targets", "packing={target_length: 1000000000}")
    yield _train("huge mesh", "mesh={data: 1000000000000}")
    yield _train("mesh of nothing", "mesh={data: 0}")
    yield _train("many beams", "decoding={kind: beam, beams: 1000000000}")
    yield _train("many samples", "decoding={kind: sampling, samples: 1000000000}")
    yield _train("hot sampling", "decoding={kind: sampling, temperature: .inf}")
    yield _train("cold sampling", "decoding={kind: sampling, temperature: 1e-310}")
    yield _train("scratch without width", "backbone={settings: {vocabulary_rows: 160, d_model: 0}}")
    scratch = (
        "backbone={{tokenizer: ../small/backbone, settings: {{vocabulary_rows: {}, d_model: {}, d_kv: 8, "
        "d_ff: 32, num_heads: 2, num_layers: {}, num_decoder_layers: 1}}}}"
    )
    yield _train("scratch with a huge vocabulary", scratch.format(10**12, 16, 1))
    yield _train("scratch with a huge width", scratch.format(160, 10**10, 1))
    yield _train("scratch with many layers", scratch.format(160, 16, 10**9))
    yield _train("scratch with layers below zero", scratch.format(160, 16, -1))
    yield _train("many methods", "methods=[" + "{kind: prompt, length: 1}," * 1000 + "]")
    yield _train("huge population", "optimizer={kind: cma_es, population: 1000000000}", "methods=[{kind: black_box}]")
    yield _train("huge dimensions", "methods=[{kind: black_box, dimensions: 1000000000000}]")
    yield _train(
        "place with a huge prompt", "methods=[{kind: prompt, length: 9, place: '{prompt:" + "9" * 5000 + "} {text}'}]"
    )
    yield _train("place without a text", "methods=[{kind: prompt, length: 9, place: '{prompt:9}'}]")
    yield _train("place of one brace", "methods=[{kind: prompt, length: 9, place: '{'}]")
    yield _train(
        "init of many digits",
        "methods=[{kind: prompt, length: 3, init: {kind: text, text: '<extra_id_" + "9" * 5000 + ">'}}]",
    )
    yield _train("stop that is empty", "text.stop=''")
    yield _train("seed of 65 bits", f"seed={2**64}")
    yield _train("seed of few_shot of 65 bits", f"task.few_shot={{count: 1, seed: {2**200}}}")
    yield _train("few_shot of too many", "task.few_shot={count: 1000000000000}")
    yield _train("good settings", code=0)


def _files() -> Iterator[Case]:
    bomb = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    yield _whole("alias bomb", bomb)
    yield _yaml("alias bomb in a setting", "task: " + "&a [" * 1 + "1]\n" + bomb)
    yield _whole("mapping bomb", bomb.replace("[", "{x: [").replace("]", "]}"))
    yield _whole(
        "merge bomb",
        "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 30)),
    )
    yield _whole("circle", "task: &a [*a]\n")
    yield _whole("circle of mappings", "task: &a {x: *a}\n")
    yield _whole("circle of merges", "task: &a {<<: *a}\n")
    for brackets in ("[", "{a: ", "- ", "? "):
        yield _whole(f"deep {brackets}", brackets * (900_000 // len(brackets)))
        yield _whole(f"10,000 {brackets}", brackets * 10_000)
    yield _whole("500 deep and closed", "task: " + "[" * 500 + "]" * 500)
    yield _whole("2,000 deep and closed", "task: " + "{a: " * 2000 + "1" + "}" * 2000)
    for tag, value in (
        ("python/object/apply:os.system", "['true']"),
        ("python/name:os.system", "''"),
        ("python/module:os", "''"),
        ("python/tuple", "[1]"),
        ("python/object/new:os.system", "['true']"),
        ("int", "x"),
        ("int", "''"),
        ("float", "x"),
        ("bool", "x"),
        ("timestamp", "x"),
        ("binary", "x"),
        ("null", "x"),
        ("set", "{a}"),
        ("omap", "[a: 1]"),
        ("pairs", "[a: 1]"),
        ("set", "x"),
        ("omap", "x"),
        ("seq", "x"),
        ("map", "x"),
        ("map", "[1]"),
        ("str", "[1]"),
        ("merge", "x"),
        ("value", "x"),
        ("unknown", "x"),
    ):
        yield _yaml(f"tag {tag} {value}", f"steps: !!{tag} {value}\n")
    yield _yaml("own tag", "steps: !mine 3\n")
    yield _yaml("duplicate key", "steps: 2\nsteps: 3\n")
    yield _yaml("duplicate key inside", "optimizer: {kind: adamw, learning_rate: 1, learning_rate: 2}\n")
    yield _yaml("duplicate key as a number and a text", "task: {target: {1: yes, '1': no}}\n")
    yield _yaml("dotted key and its mapping", "optimizer.learning_rate: 1\noptimizer.learning_rate: 2\n")
    for value in (
        "yes",
        "Yes",
        "on",
        "1:30",
        "1:30:10",
        "0x10",
        "0o7",
        "0b1",
        "010",
        "1_000_",
        "2024-01-01",
        "2024-13-45",
        "0.0.0",
        "!!int 1:30",
        "~",
        "=",
        "<<",
        "1e-999",
        "[yes]",
    ):
        yield _yaml(f"steps {value}", f"steps: {value}\n", code=0 if value == "010" else 2)
    yield _yaml("list as a key", "? [1]\n: 2\n")
    yield _yaml("mapping as a key", "? {a: 1}\n: 2\n")
    yield _yaml("null as a key", "null: 2\n")
    yield _yaml("number as a key", "1: 2\n")
    yield _yaml("NaN as a key", ".nan: 2\n")
    yield _yaml("true as a key", "true: 2\n")
    yield _yaml("date as a key", "2024-01-01: 2\n")
    yield _yaml("empty key", ": 2\n")
    yield _yaml("key of a megabyte", f"? {_MEGABYTE}\n: 2\n")
    yield _yaml("value of a megabyte", f"task: {_MEGABYTE}\n")
    yield _yaml("quoted value of a megabyte", f'task: "{_MEGABYTE}"\n')
    yield _yaml("many megabytes", f"task: {_MEGABYTE * 60}\n")
    yield _yaml("many keys", "".join(f"a{number}: 1\n" for number in range(60_000)))
    yield _yaml("list of a million", "task: [" + "1," * 10**6 + "]\n")
    yield _yaml("comment of many megabytes", "# " + _MEGABYTE * 60 + "\n")
    yield _yaml("tab", "optimizer:\n\tkind: adamw\n")
    yield _yaml("NUL", b"steps: \0\n")
    yield _yaml("control character", b"steps: \x01\n")
    yield _yaml("latin-1", b"task: caf\xe9\n")
    yield _yaml("half of a surrogate pair", b"task: \xed\xa0\x80\n")
    yield _yaml("escaped surrogate", 'task: "\\ud800"\n')
    yield _yaml("two documents", "---\nsteps: 2\n---\nsteps: 3\n")
    yield _whole("percent directive", "%YAML 9.9\n---\nsteps: 2\n")
    yield _yaml("unclosed quote", 'task: "abc\n')
    yield _yaml("unclosed bracket", "methods: [\n")
    yield _yaml("only a dash", "-\n")
    yield _whole("a text", "hello")
    yield _whole("a number", "3")
    yield _whole("a list", "- 1\n- 2\n")
    yield _whole("empty", "")
    yield _whole("only a comment", "# nothing\n")
    yield _whole("null", "null\n")
    yield _whole("UTF-16", "steps: 2\n".encode("utf-16"))
    yield _whole("UTF-32", "steps: 2\n".encode("utf-32"))
    yield _whole("binary", bytes(range(256)) * 100)
    yield _whole("gzip", b"\x1f\x8b\x08" + bytes(1000))
    yield _whole("base is itself", "base: a.yaml\n")
    yield _whole("base is a folder", "base: ..\n")
    yield _whole("base is a list", "base: [a.yaml]\n")
    yield _whole("base is endless", "base: /dev/zero\n")
    yield _whole("base with NUL", 'base: "a\\0b"\n')
    yield _whole("base of 300 characters", f"base: {'x' * 300}\n")
    chain = {f"b{number}.yaml": f"base: b{number + 1}.yaml\n" for number in range(2000)}
    yield Case("yaml long chain of bases", ["train", "b0.yaml"], chain)
    for brackets in ("[" * 10**5, '{"a":' * 10**5):
        yield _whole(f"JSON {brackets[:5]}", brackets)
    yield _yaml("good with a mark", b"\n# caf\xc3\xa9\nsteps: 2\n", code=0)
    yield _whole("good with BOM", b"\xef\xbb\xbfbase: ../base.yaml\n", code=0)
    yield _yaml(
        "good merge", "optimizer: &o {kind: adamw, learning_rate: 0.1}\nmethods: [{kind: prompt, length: 2}]\n", code=0
    )


def _data() -> Iterator[Case]:
    one = GOOD.splitlines()[0] + "\n"
    yield _rows("good", GOOD, code=0)
    yield _rows("empty file", "")
    yield _rows("blank lines only", "\n\n \n")
    yield _rows("one class only", one * 20)
    yield _rows("empty texts", GOOD.replace("the garden is bright today", ""))
    yield _rows("texts of spaces", GOOD.replace("the garden is bright today", "   "))
    yield _rows("null text", GOOD.replace('"the garden is bright today"', "null"))
    yield _rows("text is NaN", GOOD.replace('"the garden is bright today"', "NaN"))
    yield _rows("text is Infinity", GOOD.replace('"the garden is bright today"', "Infinity"))
    yield _rows("text is a list", GOOD.replace('"the garden is bright today"', "[1, 2]"))
    yield _rows("text is an object", GOOD.replace('"the garden is bright today"', '{"a": {"b": 1}}'))
    yield _rows("text with NUL", GOOD.replace("bright", "br\\u0000ight"), code=0)
    yield _rows("half of a surrogate pair", GOOD.replace("bright", "br\\ud83dight"), code=0)
    yield _rows("text of a megabyte", GOOD.replace("bright", "bright " * 150_000), code=0)
    yield _rows("word of a megabyte", GOOD.replace("bright", _MEGABYTE), code=0)
    yield _rows("sentinel of 5,000 digits", GOOD.replace("bright", f"<extra_id_{'9' * 5000}>"))
    yield _rows("sentinel that is missing", GOOD.replace("bright", "<extra_id_99999>"))
    yield _rows("sentinel in superscripts", GOOD.replace("bright", "<extra_id_²>"), code=0)
    yield _rows("unknown label", GOOD + one.replace("yes", "maybe"))
    yield _rows("empty label", GOOD + one.replace("yes", ""))
    yield _rows("label with a space", GOOD + one.replace("yes", " yes"))
    yield _rows("null label", GOOD + one.replace('"yes"', "null"))
    yield _rows("label is a list", GOOD + one.replace('"yes"', '["yes"]'))
    yield _rows("label is an object", GOOD + one.replace('"yes"', '{"a": 1}'))
    yield _rows("hidden label", GOOD + one.replace('"yes"', "-1"))
    yield _rows("label missing", GOOD + '{"text": "a"}\n')
    yield _rows("text missing", GOOD + '{"label": "yes"}\n')
    yield _rows("row is a list", GOOD + "[1, 2]\n")
    yield _rows("row is a number", GOOD + "1\n")
    yield _rows("row is null", GOOD + "null\n")
    yield _rows("not JSON", GOOD + "{'text': 1}\n")
    yield _rows("deep JSON", GOOD + "[" * 10**5 + "\n")
    yield _rows("deep object", GOOD + '{"a":' * 10**5 + "\n")
    yield _rows("number of 5,000 digits", GOOD.replace('"the garden is bright today"', "9" * 5000))
    yield _rows("not UTF-8", GOOD.encode() + b'{"text": "caf\xe9", "label": "yes"}\n')
    yield _rows("UTF-16", GOOD.encode("utf-16"))
    yield _rows("BOM", b"\xef\xbb\xbf" + GOOD.encode(), code=0)
    yield _rows("JSON not a list", "{}", "json")
    yield _rows("JSON of numbers", "[1, 2]", "json")
    yield _rows("JSON empty", "", "json")
    yield _rows("JSON empty list", "[]", "json")
    yield _rows("JSON deep", "[" * 10**5, "json")
    yield _rows("JSON of 5,000 digits", "[" + "9" * 5000 + "]", "json")
    yield _rows("csv good", "text,label\nbright garden,yes\ndull garden,no\n", "csv", code=0)
    yield _rows("csv header only", "text,label\n", "csv")
    yield _rows("csv empty", "", "csv")
    yield _rows("csv unclosed quote", 'text,label\n"bright,yes\ndull,no\n', "csv")
    yield _rows("csv text after a quote", 'text,label\n"bright"x,yes\ndull,no\n', "csv")
    yield _rows("csv more columns", "text,label\na,yes,b\nc,no\n", "csv")
    yield _rows("csv less columns", "text,label\na\nc,no\n", "csv")
    yield _rows("csv twice a column", "text,label,label\na,yes,no\n", "csv")
    yield _rows("csv NUL", b"text,label\na\0b,yes\nc,no\n", "csv", code=0)
    yield _rows("csv semicolons", "text;label\na;yes\nc;no\n", "csv")
    yield _rows("csv other columns", "sentence,class\na,yes\nc,no\n", "csv")
    yield _rows("csv no name of a column", "text,,\na,yes,\n", "csv")
    yield _rows("csv many columns", ",".join(f"c{i}" for i in range(100_000)) + "\n", "csv")
    yield _rows("parquet of zeros", bytes(1000), "parquet")
    yield _rows("parquet empty", b"", "parquet")
    yield _rows("parquet marks only", b"PAR1" + bytes(100) + b"\xff\xff\xff\x7fPAR1", "parquet")
    yield _rows("unknown suffix", GOOD, "xyz")
    for name, where in (
        ("a folder", ".."),
        ("missing", "none.jsonl"),
        ("endless", "/dev/zero"),
        ("a fifo", "f.jsonl"),
        ("dangling", "d.jsonl"),
        ("300 characters", "x" * 300 + ".jsonl"),
        ("NUL", "a\0b.jsonl"),
    ):
        source = {"kind": "files", "train": where, "validation": "../small/validation.jsonl"}
        settings = json.dumps(
            {"base": "../base.yaml", "task": {"name": "rows", "source": source, "label_words": ["yes", "no"]}}
        )
        yield Case(
            f"rows path {name}",
            ["train", "a.yaml", "--out", "run"],
            {"a.yaml": settings, "f.jsonl": "fifo", "d.jsonl": "-> none"},
        )
    yield _task("two ids for one label", target={"1": "yes", "1.0": "no"}, target_field="label")
    yield _task("two labels for one word", target={"yes": "yes", "no": "yes"}, target_field="label")
    yield _task("template without a field", input="always the same", label_words=["yes", "no"])
    yield _task("empty template", input="", label_words=["yes", "no"])
    yield _task("target without a field", target="always", label_words=["yes", "no"])
    yield _task("empty target", target="")
    yield _task("unknown field", input="{nothing}")
    yield _task("attribute of a field", input="{text.__class__}")
    yield _task("index of a field", input="{text[0]}")
    yield _task("conversion", input="{text!r}")
    yield _task("huge width", input="{text:>99999999999}")
    yield _task("wide format", input="{text:>1000000000}")
    yield _task("format of 5,000 digits", input="{text:" + "9" * 5000 + "}")
    yield _task("nested format", input="{text:{label}}")
    yield _task("one brace", input="{")
    yield _task("one label word", label_words=["yes"])
    yield _task("no label words", label_words=[])
    yield _task("empty label word", label_words=["yes", ""])
    yield _task("repeated label word", label_words=["yes", "yes"])
    yield _task("label words that differ by a space", label_words=["yes", "yes "])
    yield _task("label words as booleans", label_words=[True, False])
    yield _task("unknown metric", metrics=["mood"])
    yield _task("no metric", metrics=[])
    yield _task("repeated metric", metrics=["accuracy", "accuracy"])
    yield _task("keep nothing", keep={"label": "maybe"})
    yield _task("unknown preprocessor", prepare="nothing")
    yield _task("preprocessor of others", prepare="wsc")
    yield _task("empty name", name="")
    for name in ("../../etc", "a/b", "..", "x" * 300, "a\0b", "a\nb"):
        yield _task(f"name {name[:10]!r}", name=name, label_words=["yes", "no"], code=2 if "\0" in name else 0)


def _sweeps() -> Iterator[Case]:
    axes = (
        "seed=7..0",
        "seed=0..1000000000",
        "seed=0..99999999999999999999",
        "seed=0.." + "9" * 5000,
        "seed=0..",
        "seed=..7",
        "seed=0...7",
        "seed=0..7..0",
        "seed=a..b",
        "seed=0.5..1",
        "seed=",
        "seed",
        "=1,2",
        "seed=1,1",
        "seed=1,1.0",
        "seed=1,true",
        "seed=-1,0",
        "seed=.nan,1",
        "seed=1e9..1e10",
        "seed=log(1,-1)",
        "seed=[1",
        "seed=1],[2",
        "seed=*a",
        "seed=2024-01-01",
        "learning_rate=-0.1,0.1",
        "learning_rate=.inf,1",
        "learning_rate=0,0.1",
        "learning_rate=yes",
        "length=0,1",
        "length=1000000000000,1",
        "nothing=1,2",
        "methods.9.length=1,2",
        "task=nothing,boolq",
        "seed=" + "[" * 10**5,
        "seed=" + ",".join(map(str, range(20_000))),
        "out=1,2",
        "steps=0,1",
        "seed=null",
        "seed={a: 1}",
    )
    for axis in axes:
        yield Case(f"sweep {axis[:40]}", ["sweep", "../base.yaml", "--over", axis, "--out", "out", "--quiet"])
    yield Case(
        "sweep of a billion",
        [
            "sweep",
            "../base.yaml",
            *(["--over", "seed=0..999", "--over", "steps=1..1000", "--over", "batch_size=1..1000"]),
            "--out",
            "out",
        ],
    )
    yield Case(
        "sweep twice the same", ["sweep", "../base.yaml", "--over", "seed=0,1", "--over", "seed=2,3", "--out", "out"]
    )
    yield Case(
        "sweep nothing together", ["sweep", "../base.yaml", "--over", "seed=0,1", "--out", "out", "--together", "0"]
    )
    for budget in ("", "0", "-5", "nan", "1e9", "20 minutes", "9" * 100, "0.0s", "3"):
        yield Case(
            f"tune with the budget {budget[:20]!r}",
            ["tune", "../base.yaml", "--out", "out", "--budget", budget, "--quiet"],
        )
    yield Case("tune in a file", ["tune", "../base.yaml", "--out", "../base.yaml"])
    yield Case("tune of one", ["tune", "../base.yaml", "--out", "out", "--over", "seed=1"])
    yield Case("tune of a broken race", ["tune", "../base.yaml", "--out", "out"], {"out/tune.json": "["})
    yield Case("tune of another race", ["tune", "../base.yaml", "--out", "out"], {"out/tune.json": '{"rounds": 3}'})
    asked = ["compress", "a.txt", "--inputs", "in.jsonl", "--backbone", "../small/backbone", "--out", "out", "--quiet"]
    rows = '{"inputs": "the mill is warm"}\n' * 10
    for name, text, inputs, more in (
        ("an empty context", "", rows, []),
        ("bytes as a context", b"\xff\xfe", rows, []),
        ("no inputs", "a text", None, []),
        ("inputs of another schema", "a text", '{"text": "warm"}\n' * 10, []),
        ("empty inputs", "a text", '{"inputs": ""}\n' * 10, []),
        ("one input", "a text", '{"inputs": "warm"}\n', []),
        ("no rows", "a text", rows, ["--rows", "0"]),
        ("another method", "a text", rows, ["methods=[full]"]),
        ("questions too", "a text", rows, ["--ask", "3"]),
        ("packed rows", "a text", rows, ["packing=true"]),
        ("another task", "a text", rows, ["task=boolq"]),
    ):
        files = {"a.txt": text} | ({} if inputs is None else {"in.jsonl": inputs})
        yield Case(f"compress with {name}", [*asked, *more], files)
    yield Case("sweep in a file", ["sweep", "../base.yaml", "--over", "seed=0,1", "--out", "../base.yaml"])
    yield Case("sweep with a broken config", ["sweep", "a.yaml", "--over", "seed=0,1", "--out", "out"], {"a.yaml": "["})


_NAMES = {
    "300 characters": "x" * 300,
    "a line break": "a\nb",
    "a file": "../base.yaml",
    "below a file": "../base.yaml/x",
    "a device": "/dev/null",
    "below a device": "/dev/null/x",
    "proc": "/proc/nothing",
    "dangling": "d",
    "root": "/",
    "a fifo": "f",
    "empty": "",
    "bucket": "gs://",
    "4,200 characters": "x/" * 2100,
}


def _paths() -> Iterator[Case]:
    odd: dict[str, bytes | str | None] = {
        "d": "-> none",
        "f": "fifo",
        "empty": None,
        "text.txt": "hello",
        "zero.safetensors": bytes(100),
        "a.npy": b"",
        "loop": "-> loop",
    }
    odd |= {
        "half.safetensors": b"\xff" * 8 + b"{",
        "deep.safetensors": (10**5).to_bytes(8, "little") + b"[" * 10**5,
        "deep.npy": b"\x93NUMPY\x01\x00" + (9000).to_bytes(2, "little") + b"(" * 9000,
    }
    for name, out in _NAMES.items():
        yield Case(f"out {name}", ["train", "../base.yaml", "--out", out], odd, code=0 if name == "a line break" else 2)
    for name, path in {
        **_NAMES,
        "endless": "/dev/zero",
        "missing": "none.yaml",
        "folder": "empty",
        "loop": "loop",
        "proc memory": "/proc/self/mem",
    }.items():
        if name != "a file":
            yield Case(f"config {name}", ["train", path, "--out", "run"], odd)
    sources = [
        *_NAMES.values(),
        "/dev/zero",
        "none",
        "empty",
        "text.txt",
        "zero.safetensors",
        "a.npy",
        "half.safetensors",
        "deep.safetensors",
        "deep.npy",
        "loop",
        "a/b",
        "https://localhost:1/x",
    ]
    for source in sources:
        yield Case(f"eval {source[:30]}", ["eval", source], odd)
    for source in (
        "none",
        "empty",
        "text.txt",
        "zero.safetensors",
        "a.npy",
        "half.safetensors",
        "deep.safetensors",
        "deep.npy",
        "f",
        "d",
        "/dev/zero",
        "x" * 300,
        "../base.yaml",
        "/",
        "",
    ):
        for command in (
            ["predict"],
            ["show"],
            ["inspect"],
            ["export", "--to", "x", "--format", "npy"],
            ["import", "--to", "y"],
            ["ensemble", "../run"],
            ["submit", "--to", "z"],
            ["recycle", "--onto", "embedded", "--to", "r.safetensors"],
        ):
            yield Case(
                f"{command[0]} {source[:30]}",
                [
                    command[0],
                    *([source] if command[0] != "ensemble" else ["../run", source]),
                    *(command[1:] if command[0] != "ensemble" else []),
                ],
                odd,
                code=0 if source == "../base.yaml" and command == ["show"] else 2,
            )
        if source != "/":  # which is only large
            yield Case(f"report {source[:30]}", ["report", source, "--to", "page"], odd)
        yield Case(f"average {source[:30]}", ["average", "glue", source], odd)
        yield Case(f"push {source[:30]}", ["push", source, "owner/name", "--dry-run"], odd)
        yield Case(f"task {source[:30]}", ["task", source], odd, code=0 if source == "../base.yaml" else 2)
        yield Case(f"serve {source[:30]}", ["serve", source, "--port", "0"], odd)


def _commands() -> Iterator[Case]:
    yield Case("no such command", ["nothing"])
    yield Case("no such option", ["train", "../base.yaml", "--nothing"])
    yield Case("task of nothing", ["task", "nothing"])
    yield Case("task with a split of nothing", ["task", "sentiment_movie", "--split", "nothing"])
    yield Case("task shows less than nothing", ["task", "sentiment_movie", "--show", "-1"])
    yield Case("task shows very much", ["task", "sentiment_movie", "--show", "9" * 5000])
    yield Case("task counts very much", ["task", "sentiment_movie", "--most", "9" * 30])
    yield Case("task of a huge limit", ["task", "sentiment_movie", "--max-input-tokens", "9" * 30], code=0)
    yield Case("task with a strange backbone", ["task", "sentiment_movie", "--backbone", "a\0b"[:1] + "/../.."])
    for topology in (
        "v5e",
        "v5e:",
        "v5e:0x1",
        "v5e:2x",
        "nothing:1",
        "h100:" + "9" * 5000,
        "h100:1000000000",
        "v5e:-1",
        "h100:1x" + "x1" * 5000,
    ):
        yield Case(f"plan {topology[:20]}", ["plan", "../base.yaml", "--topology", topology])
    yield Case("plan at no share", ["plan", "../base.yaml", "--topology", "h100:1", "--utilisation", "nan"])
    yield Case("methods of nothing", ["methods", "--backbone", "none/none"])
    yield Case("tokenizer of no pre-training", ["tokenizer", "../base.yaml", "--to", "x"])
    yield Case("tokenizer of less than nothing", ["tokenizer", "../base.yaml", "--to", "x", "--size", "-1"])
    yield Case("paper of nothing", ["paper", "nothing"])
    yield Case("paper of no seeds", ["paper", "length", "--seeds", "0"])
    yield Case("paper of a file", ["paper", "a.yaml"], {"a.yaml": "[" * 10**5})
    yield Case("paper of many seeds", ["paper", "length", "--seeds", "9" * 5000])
    yield Case("push to nothing", ["push", "../run", "", "--dry-run"])
    yield Case("push to a strange place", ["push", "../run", "../../x", "--dry-run"])
    yield Case("import as a strange type", ["import", "../small/backbone", "--to", "x", "--dtype", "int1"])
    yield Case("export in a strange form", ["export", "../run", "--to", "x", "--format", "nothing"])
    yield Case("export over a folder", ["export", "../run", "--to", "..", "--format", "npy"])
    yield Case("export of no tokens", ["export", "../run", "--to", "x", "--format", "stablehlo", "--max-tokens", "0"])
    yield Case(
        "export of many tokens", ["export", "../run", "--to", "x", "--format", "stablehlo", "--max-tokens", "9" * 30]
    )
    yield Case("inspect no neighbours", ["inspect", "../run", "--neighbours", "1"])
    yield Case("inspect many neighbours", ["inspect", "../run", "--neighbours", "9" * 30], code=0)
    yield Case("ensemble of one", ["ensemble", "../run"])
    yield Case("eval of a split of nothing", ["eval", "../run", "--split", "nothing"])
    yield Case("eval of a task of nothing", ["eval", "../run", "--task", "nothing"])
    yield Case("eval on nothing", ["eval", "../run", "--backbone", "none"])
    yield Case("serve with a strange limit", ["serve", "../run", "--limit", "slots=" + "9" * 5000])
    yield Case("serve with a limit without end", ["serve", "../run", "--limit", "timeout_s=.inf"])
    yield Case("serve without a token", ["serve", "../run", "--token-file", "none"])
    yield Case("serve on a strange port", ["serve", "../run", "--port", "70000"])
    yield Case("processes without a coordinator", ["train", "../base.yaml", "--processes", "2", "--process", "7"])
    yield Case(
        "processes below zero", ["train", "../base.yaml", "--coordinator", "x:1", "--processes", "-1", "--process", "0"]
    )
    yield Case(
        "coordinator of nothing",
        ["train", "../base.yaml", "--coordinator", "nothing", "--processes", "2", "--process", "0"],
    )
    for name, line in {
        "good": b'{"text": "the garden is bright today"}\n',
        "not JSON": b"hello\n",
        "a list": b"[1]\n",
        "no text": b'{"a": 1}\n',
        "null": b'{"text": null}\n',
        "a list as text": b'{"inputs": [1]}\n',
        "deep": b"[" * 10**5 + b"\n",
        "deep object": b'{"a":' * 10**5 + b"\n",
        "digits": b'{"inputs": ' + b"9" * 5000 + b"}\n",
        "not UTF-8": b'{"text": "\xe9"}\n',
        "NUL": b"\0\n",
        "sentinel": b'{"inputs": "<extra_id_' + b"9" * 5000 + b'>"}\n',
        "megabyte": b'{"inputs": "' + b"x" * 10**6 + b'"}\n',
        "half a pair": b'{"inputs": "a \\ud83d"}\n',
        "empty": b'{"inputs": ""}\n',
        "NaN": b'{"inputs": NaN}\n',
        "blank": b"\n \n",
    }.items():
        fine = name in ("good", "megabyte", "half a pair", "empty", "blank")
        yield Case(f"predict line {name}", ["predict", "../run"], stdin=line, code=0 if fine else 2)
    for how in (
        "nothing",
        "{kind: beam, beams: 0}",
        "{kind: beam, beams: 1000000000}",
        "{kind: sampling, samples: 1000000000}",
        "{kind: sampling, temperature: .inf}",
        "{kind: sampling, temperature: 0}",
        f"{{kind: sampling, seed: {2**64}}}",
        "[" * 10**5,
        "{kind: sampling, top_p: 1e-300}",
        "!!python/name:os.system ''",
        "&a [*a]",
        "2024-13-45",
    ):
        yield Case(
            f"predict decoding {how[:40]}",
            ["predict", "../run", "--decoding", how],
            stdin=b'{"inputs": "the garden"}\n',
            code=0 if "1e-300" in how else 2,
        )
    yield Case("predict from a folder", ["predict", "../run", "--input", ".."])
    yield Case("predict from an endless file", ["predict", "../run", "--input", "/dev/zero"])
    yield Case("predict into a folder", ["predict", "../run", "--output", ".."], stdin=b"{}\n")
    yield Case("predict into its input", ["predict", "../run", "--input", "a", "--output", "a"], {"a": "{}"})


def cases() -> list[Case]:
    """Return the whole table; every name is there once."""
    made = [case for part in (_settings, _files, _data, _sweeps, _paths, _commands) for case in part()]
    assert len({case.name for case in made}) == len(made), sorted(
        c.name for c in made if [d.name for d in made].count(c.name) > 1
    )
    return made


def sample(count: int) -> list[Case]:
    """Return so many cases: those that were once bad, and of the others every so many."""
    every = cases()
    first = [case for case in every if case.name.startswith(ONCE_BAD)][:count]
    rest = [case for case in every if not case.name.startswith(ONCE_BAD)]
    return first + [rest[i * len(rest) // (count - len(first))] for i in range(count - len(first))]


# Beginnings of the names of cases that ended otherwise before: endless, with a traceback, or accepted.
ONCE_BAD = (
    *(
        "set steps=9",
        "set seed=9",
        "set max_input_tokens=9",
        "set methods.0.length=9",
        "set steps=true",
        "set seed=true",
    ),
    *("set clip_norm=.inf", "set z_loss=1e999", "set optimizer.learning_rate=.inf", "set dropout=true"),
    *(
        "set steps of",
        "set rate of",
        "set index of 5,000",
        "set a megabyte",
        "set sexagesimal",
        "set yes for",
        "set on for",
    ),
    *("set a wrong date", "set deep", "set reversed", "set bounds", "set huge", "set large", "set wide adapter"),
    *("set wide p_tuning", "set many beams", "set many samples", "set hot", "set cold", "set scratch with"),
    *("set init of many", "set seed of", "yaml alias bomb", "yaml mapping bomb", "yaml merge bomb", "yaml circle"),
    *(
        "yaml deep",
        "yaml 10,000",
        "yaml 500 deep",
        "yaml 2,000 deep",
        "yaml tag int",
        "yaml tag float",
        "yaml tag bool",
    ),
    *("yaml tag timestamp", "yaml duplicate", "yaml dotted key", "yaml steps yes", "yaml steps on", "yaml steps 1:30"),
    *(
        "yaml steps 0x10",
        "yaml steps 0b1",
        "yaml steps 1_000_",
        "yaml steps 2024-13",
        "yaml steps !!int",
        "yaml key of",
    ),
    *(
        "yaml list of a million",
        "yaml base is endless",
        "yaml base with NUL",
        "yaml long chain",
        "yaml JSON",
        "rows one class",
    ),
    *(
        "rows empty texts",
        "rows texts of spaces",
        "rows text is",
        "rows sentinel of 5,000",
        "rows deep",
        "rows number of",
    ),
    *("rows JSON deep", "rows JSON of"),
    *(
        "rows csv many",
        "task no label words",
        "task repeated metric",
        "task empty name",
        "task counts very",
        "task two ids",
    ),
    *("task template", "out empty", "config loop", "plan h100:", "export of many", "sweep seed=0..", "sweep length="),
)


# ---------------------------------------------------------------------------------------------- running


class Outcome(NamedTuple):
    """How a case has ended: `code` below 0 is a signal, of which -9 is ours after LIMIT_S."""

    case: Case
    code: int
    error: str
    seconds: float
    grown_bytes: int

    @property
    def problem(self) -> str:
        """What is wrong with it; empty if it ended as it must."""
        lines = self.error.strip().splitlines()
        if self.code == -signal.SIGKILL:
            return "hangs"
        if "Traceback" in self.error or self.code < 0 or self.code == 1:
            return f"traceback: {lines[-1][:200] if lines else self.code}"
        if self.code != self.case.code:
            return f"code {self.code}, expected {self.case.code}: {lines[-1][:300] if lines else ''}"
        if self.code == 2 and (len(lines) != 1 or not lines[0].startswith("softprompt: ")):
            return f"{len(lines)} lines: {lines[:3]}"
        if self.code == 2 and len(lines[0]) > 2000:
            return f"a line of {len(lines[0])} characters"
        if self.code == 2 and (self.seconds > 10 or self.grown_bytes > GIB):
            return f"{self.seconds:.1f} s, {self.grown_bytes / GIB:.1f} GiB"
        return ""


def prepare(folder: Path) -> None:
    """Write the small backbone, its task, the config that cases stand on and a finished run into a folder."""
    import small_runs

    from softprompt_jax import load_run, train

    files = small_runs.write_files(folder / "small")
    few = {"steps": 2, "evaluation_examples": 1, "result_examples": 1}
    small_runs.write_config(folder / "base.yaml", small_runs.short_run(files.task, files.backbone) | few)
    train(load_run(folder / "base.yaml"), folder / "run")


def call(case: Case, folder: Path) -> None:
    """Call the command line in this process, which the call ends."""
    from softprompt_jax.cli.main import main
    from softprompt_jax.training import loop

    loop.Training.fit = lambda self: os._exit(0)  # accepted: all that could be refused has been read
    os.chdir(folder)
    sys.argv = ["softprompt", *case.arguments]
    try:
        main()
    except SystemExit as stopped:
        code = stopped.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def run(case: Case, folder: Path) -> Outcome:
    """Run a case in a forked child, in a new folder below `folder`; JAX must not have started in this process."""
    own = Path(tempfile.mkdtemp(dir=folder))
    case.write(own)
    (own / ".stdin").write_bytes(case.stdin)
    error, stdin = os.open(own / ".error", os.O_RDWR | os.O_CREAT), os.open(own / ".stdin", os.O_RDONLY)
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        null = os.open(os.devnull, os.O_WRONLY)
        for target, number in ((stdin, 0), (null, 1), (error, 2)):
            os.dup2(target, number)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + LIMIT_BYTES, size + LIMIT_BYTES))
        call(case, own)
    while True:
        done, status, used = os.wait4(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > start + LIMIT_S:
            os.killpg(child, signal.SIGKILL)
            _, status, used = os.wait4(child, 0)
            break
        time.sleep(0.005)
    seconds = time.monotonic() - start
    os.close(stdin)
    os.close(error)
    said = (own / ".error").read_text(encoding="utf-8", errors="replace")
    return Outcome(case, os.waitstatus_to_exitcode(status), said, seconds, (used.ru_maxrss - before) * 1024)


def run_all(chosen: Sequence[Case], folder: Path) -> Iterator[Outcome]:
    """Yield the outcome of each case; a folder with what they read is made in `folder`."""
    for module in ("cli.main", "analysis.plan", "export.show", "inference.ensemble", "training.sweep"):
        importlib.import_module(f"softprompt_jax.{module}")
    if not (folder / "run").exists():
        made = (
            f"import bad_inputs, pathlib; bad_inputs.prepare(pathlib.Path({str(folder)!r}))"  # JAX is not to start here
        )
        subprocess.run([sys.executable, "-c", made], check=True, cwd=Path(__file__).parent)
    for case in chosen:
        yield run(case, folder)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("SOFTPROMPT_CACHE", f"{sys.argv[1]}/cache")
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
    root = Path(sys.argv[1]).resolve()
    root.mkdir(parents=True, exist_ok=True)
    part = sys.argv[2] if len(sys.argv) > 2 else ""
    bad, outcomes = 0, []
    began = time.monotonic()
    chosen = sample(int(part)) if part.isdecimal() else [case for case in cases() if part in case.name]
    for outcome in run_all(chosen, root):
        outcomes.append(outcome)
        if outcome.problem:
            bad += 1
            print(f"{outcome.case.name}\n    {outcome.problem}", flush=True)
        if "-v" in sys.argv:
            print(
                f"    {outcome.seconds:.1f} s {outcome.grown_bytes >> 20} MiB: {outcome.error.strip()[:300]}",
                flush=True,
            )
    slow = sorted(outcomes, key=lambda outcome: -outcome.seconds)[:5]
    print(f"{len(outcomes)} bad inputs, {bad} end otherwise; {time.monotonic() - began:.0f} s")
    print("slowest:", ", ".join(f"{outcome.case.name} {outcome.seconds:.1f} s" for outcome in slow))
