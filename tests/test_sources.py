"""Rows out of files, the hub and packages; every failure is one line that names the place."""

from __future__ import annotations

import json
import os

import pandas
import pytest

from softprompt_jax import tasks
from softprompt_jax.config import UserError, parse
from softprompt_jax.data.sources import Files, Folder, Hub, available_splits, pin, read_file, read_rows

ROWS = [{"text": 'she said "hi", twice', "label": 1}, {"text": "NA", "label": 0}, {"text": "naïve\tcafé", "label": 1}]


def rows_of(path, **settings):
    return [row for _, row in read_file(path, **settings)]


def error_of(call, *arguments, **settings) -> str:
    with pytest.raises(UserError) as error:
        list(call(*arguments, **settings))
    assert "\n" not in str(error.value)
    return str(error.value)


# --------------------------------------------------------------------------------------------- files


def test_jsonl_keeps_rows_and_numbers_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8")
    assert rows_of(path) == ROWS
    assert [place for place, _ in read_file(path)] == [f"{path}:{line}" for line in (1, 3, 5)]


def test_csv_and_tsv_keep_text_as_it_is(tmp_path):
    comma, tab = tmp_path / "rows.csv", tmp_path / "rows.tsv"
    comma.write_text('text,label\n"she said ""hi"", twice",1\nNA,0\n"naïve\tcafé",1\n', encoding="utf-8")
    tab.write_text('text\tlabel\n"half a quote\t1\n', encoding="utf-8")
    assert rows_of(comma) == [{**row, "label": str(row["label"])} for row in ROWS]
    assert rows_of(tab, quotes=False) == [{"text": '"half a quote', "label": "1"}]
    assert error_of(read_file, tab).startswith(f"{tab}:2: not a csv row")


def test_csv_places_are_the_lines_where_rows_start(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('text\n"two\nlines"\nlast\n', encoding="utf-8")
    assert list(read_file(path)) == [(f"{path}:2", {"text": "two\nlines"}), (f"{path}:4", {"text": "last"})]


def test_parquet_keeps_types(tmp_path):
    path = tmp_path / "rows.parquet"
    pandas.DataFrame(ROWS).to_parquet(path)
    assert rows_of(path) == ROWS
    path.write_bytes(b"PAR1 nonsense")
    assert "expected a parquet file" in error_of(read_file, path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": "y"\n', "a.jsonl:2: not JSON ("),
        ("a.jsonl", b'{"text": "x"}\n["y"]\n', "a.jsonl:2: found list; expected a JSON object"),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl: not UTF-8 ("),
        ("a.csv", b"text,label\nx,1,2\n", "a.csv:2: found 3 columns; expected 2 (text, label)"),
        ("a.csv", b"text,label,label\nx,1,2\n", "a.csv:1: two columns 'label'; expected each once"),
        ("a.csv", b"text;label\nx;1\n", "a.csv:1: found columns separated by ';'; expected ','"),
        ("a.tsv", b"text,label\nx,1\n", r"a.tsv:1: found columns separated by ','; expected '\t'"),
        ("a.txt", b"x", "found the suffix '.txt'; expected .jsonl, .csv, .tsv or .parquet"),
        ("a.jsonl", None, "a.jsonl: no such file; expected a data file"),
    ],
)
def test_broken_file_is_told_by_name_and_line(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert message in error_of(read_file, path)


def test_jsonl_row_without_a_field_is_told_by_name_and_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x", "label": "a"}\n{"txt": "y", "label": "a"}\n', encoding="utf-8")
    task = tasks.resolve({"name": "mine", "source": {"kind": "files", "train": str(path)}})
    assert error_of(tasks.load, task, "train").startswith(f"task mine: {path}:2: no field 'text'; found txt, label")


def test_split_that_the_source_lacks_names_those_it_has():
    source = Files(train="a.jsonl", validation="b.jsonl")
    assert "no split 'test'; found train, validation" in error_of(read_rows, source, "test", "here")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_hub_out_of_reach_says_what_is_cached(tmp_path, monkeypatch):
    import datasets.config

    (tmp_path / "someone___something").mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    message = error_of(read_rows, Hub(name="nobody/nothing"), "train", "task mine")
    assert message.startswith("task mine: nobody/nothing could not be loaded from the hub (")
    assert message.endswith("cached are: someone/something")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_converted_hub_repository_is_read_by_config_and_split(tmp_path, monkeypatch):
    import datasets
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    labels = datasets.ClassLabel(names=["False", "True"])
    features = datasets.Features({"text": datasets.Value("string"), "label": labels})
    for config in ("boolq", "cb"):
        for split, rows in (("train", ROWS), ("dev", ROWS[:1])):
            folder = tmp_path / "hub" / config / split
            folder.mkdir(parents=True)
            made = datasets.Dataset.from_list([row | {"text": f"{config} {split}"} for row in rows], features)
            made.to_parquet(folder / "0000.parquet")
    source = Hub(
        name=str(tmp_path / "hub"), config="cb", converted=True, splits={"train": "train", "validation": "dev"}
    )
    assert [row for _, row in read_rows(source, "validation", "here")] == [{"text": "cb dev", "label": 1}]
    assert len(list(read_rows(source, "train", "here"))) == len(ROWS)
    with pytest.raises(UserError, match="converted: the conversion has a folder per config; expected `config`"):
        parse(Hub, {"name": "x", "converted": True}, "source")


def test_pinned_revision_is_recorded_and_read(tmp_path, monkeypatch):
    import types

    import datasets
    import huggingface_hub

    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    asked = []

    def dataset_info(self, name, revision):
        asked.append((name, revision))
        return types.SimpleNamespace(sha="c0ffee")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    converted, plain = Hub(name="a/b", config="c", converted=True), Hub(name="a/b")
    assert (converted.read_revision, plain.read_revision) == ("refs/convert/parquet", None)
    assert pin(converted, "task mine").revision == "c0ffee"
    assert asked == [("a/b", "refs/convert/parquet")]
    assert (converted.read_revision, plain.read_revision) == ("c0ffee", None)
    assert converted.model_copy(update={"revision": "v1"}).read_revision == "v1"

    read = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: read.append((args, kwargs)) or [{"x": 1}])
    assert [row for _, row in read_rows(converted, "test", "here")] == [{"x": 1}]
    files = {"test": "c/test/*.parquet"}
    assert read == [(("a/b",), {"data_files": files, "split": "test", "revision": "c0ffee"})]

    def unreachable(self, name, revision):
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    assert "the revision of a/b could not be asked for (no route); expected a hub" in error_of(pin, plain, "task mine")


# ------------------------------------------------------------------------------------------- folders


def test_folder_has_a_file_or_a_folder_of_files_per_split(tmp_path):
    (tmp_path / "train").mkdir()
    for name, text in (("train/b.csv", "two"), ("train/a.csv", "one"), ("test.csv", "three")):
        (tmp_path / name).write_text(f"text,label\n{text},x\n", encoding="utf-8")
    (tmp_path / "train" / "README.md").write_text("not data")
    source = Folder(path=str(tmp_path))
    assert available_splits(source) == ["train", "test"]
    assert [row["text"] for _, row in read_rows(source, "train", "here")] == ["one", "two"]
    assert list(read_rows(source, "test", "here")) == [(f"{tmp_path}/test.csv:2", {"text": "three", "label": "x"})]
    assert "here: no split 'validation'; found train, test" in error_of(read_rows, source, "validation", "here")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (None, "no such folder; expected one with train.jsonl"),
        ([], "found nothing; expected train, validation or test with .jsonl, .csv, .tsv, .parquet"),
        (["dev.jsonl", "trains.jsonl"], "found dev.jsonl, trains.jsonl; expected train, validation or test with"),
        (["train.jsonl", "train.csv"], "expected one file train, or a folder train/ with all"),
    ],
)
def test_folder_without_splits_is_one_line(tmp_path, names, message):
    folder = tmp_path / "data"
    if names is not None:
        folder.mkdir()
        for name in names:
            (folder / name).touch()
    assert message in error_of(available_splits, Folder(path=str(folder)))


def test_parquet_is_read_anew_and_by_its_own_name(tmp_path):
    folder = tmp_path / "my[data]"
    folder.mkdir()
    path = folder / "a*[1].parquet"
    for value in ("old", "new"):
        pandas.DataFrame([{"text": value}]).to_parquet(path)
        os.utime(path, (1, 1))
        assert rows_of(path) == [{"text": value}]
    pandas.DataFrame({"text": []}).to_parquet(path)
    assert rows_of(path) == []


def test_a_cell_may_be_a_whole_document(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "word " * 40_000 + ",x\n")
    assert rows_of(path) == [{"text": "word " * 40_000, "label": "x"}]
