"""Rows out of files, the hub and packages; every failure is one line that names the place."""

from __future__ import annotations

import json
import os
import types

import datasets
import huggingface_hub
import pandas
import pytest

from softprompt_jax import tasks
from softprompt_jax.config import UserError, parse
from softprompt_jax.data.sources import Files, Folder, Hub, read_file

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


def test_a_json_list_gives_its_rows_by_number(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS, indent=2), encoding="utf-8")
    assert list(read_file(path)) == [(f"{path} row {number}", row) for number, row in enumerate(ROWS, start=1)]


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
        ("a.json", b'[{"x": 1},\n{"x": }]', "a.json:2: not JSON ("),
        ("a.json", b'{"x": 1}', "a.json: found dict; expected a list of JSON objects, one a row"),
        ("a.json", b'[{"x": 1}, 2]', "a.json row 2: found int; expected a JSON object with its fields"),
        ("a.txt", b"x", "found the suffix '.txt'; expected .jsonl, .json, .csv, .tsv, .parquet"),
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
    assert "no split 'test'; found train, validation" in error_of(source.check_split, "test", "here")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_hub_out_of_reach_says_what_is_cached(tmp_path, monkeypatch):
    import datasets.config

    (tmp_path / "someone___something").mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    message = error_of(Hub(name="nobody/nothing").rows, "train", "task mine")
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
    assert [row for _, row in source.rows("validation", "here")] == [{"text": "cb dev", "label": 1}]
    assert len(list(source.rows("train", "here"))) == len(ROWS)
    sliced = source.model_copy(update={"splits": {"train": "train[:1]", "validation": "train[1:]"}})
    assert [len(list(sliced.rows(split, "here"))) for split in ("train", "validation")] == [1, len(ROWS) - 1]
    with pytest.raises(UserError, match="converted: the conversion has a folder per config; expected `config`"):
        parse(Hub, {"name": "x", "converted": True}, "source")


COMMIT, OTHER = "c0ffee" * 6 + "c0ff", "decade" * 6 + "deca"


class Rows(list):
    """What `datasets` loads: rows, and the addresses of the files that they come from."""

    def __init__(self, commit: str):
        super().__init__([{"x": 1}])
        self.info = types.SimpleNamespace(download_checksums={f"hf://datasets/a/b@{commit}/c/test.parquet": {}})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose data sets are at COMMIT; `asked` and `read` are what it was asked for."""
    found = types.SimpleNamespace(asked=[], read=[], commit=COMMIT, cached=COMMIT)

    def dataset_info(self, name, revision):
        found.asked.append((name, revision))
        if found.commit is None:
            raise OSError("no route\nto host")
        return types.SimpleNamespace(sha=found.commit)

    def load_dataset(*args, **kwargs):
        found.read.append((args, kwargs))
        return Rows(found.cached)

    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return found


def test_a_pinned_source_is_read_at_the_commit_that_the_hub_had(hub):
    converted, plain = Hub(name="a/b", config="c", converted=True), Hub(name="a/b")
    pinned = converted.pinned("task mine")
    assert (pinned.revision, pinned.pinned("task mine")) == (COMMIT, pinned)
    assert hub.asked == [("a/b", "refs/convert/parquet")]
    assert [row for _, row in pinned.rows("test", "here")] == [{"x": 1}]
    assert list(plain.rows("test", "here")) == [("a/b test row 1", {"x": 1})]
    files = {"test": "c/test/*.parquet"}
    assert hub.read == [
        (("a/b", None), {"data_files": files, "split": "test", "revision": COMMIT}),
        (("a/b", None), {"data_files": None, "split": "test", "revision": None}),
    ]
    assert Files(train="a.jsonl").pinned("task mine") == Files(train="a.jsonl")


def test_without_a_hub_the_revision_is_that_of_the_cached_rows(hub):
    hub.commit, plain = None, Hub(name="a/b")
    message = error_of(plain.newest, "task mine")
    assert "the revision of a/b could not be asked for (no route); expected a hub" in message
    assert plain.pinned("task mine").revision == COMMIT
    hub.cached = OTHER
    message = error_of(plain.model_copy(update={"revision": COMMIT}).rows, "train", "task mine")
    assert message.startswith(f"task mine: a/b is cached at {OTHER}, and the hub is out of reach; expected {COMMIT}")
    assert plain.model_copy(update={"revision": "main"}).pinned("here").revision == "main"


def test_a_revision_that_was_recorded_for_all_runs_of_a_machine_belongs_into_the_settings(hub, tmp_path):
    plain = Hub(name="a/b")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "revisions.json").write_text(json.dumps({"a/b": OTHER}))
    for call in (plain.pinned, lambda where: list(plain.rows("test", where))):
        assert f"expected it in the run's settings, as task.source.revision={OTHER}; add it" in error_of(
            call, "task mine"
        )
    plain.model_copy(update={"revision": COMMIT}).rows("test", "task mine")
    Hub(name="a/b", config="c", converted=True).rows("test", "task mine")


# ------------------------------------------------------------------------------------------- folders


def test_folder_has_a_file_or_a_folder_of_files_per_split(tmp_path):
    (tmp_path / "train").mkdir()
    for name, text in (("train/b.csv", "two"), ("train/a.csv", "one"), ("test.csv", "three")):
        (tmp_path / name).write_text(f"text,label\n{text},x\n", encoding="utf-8")
    (tmp_path / "train" / "README.md").write_text("not data")
    source = Folder(path=str(tmp_path))
    assert source.split_names() == ["train", "test"]
    assert [row["text"] for _, row in source.rows("train", "here")] == ["one", "two"]
    assert list(source.rows("test", "here")) == [(f"{tmp_path}/test.csv:2", {"text": "three", "label": "x"})]
    assert "here: no split 'validation'; found train, test" in error_of(source.check_split, "validation", "here")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (None, "no such folder; expected one with train.jsonl"),
        ([], "found nothing; expected train, validation or test with .jsonl, .json, .csv, .tsv, .parquet"),
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
    assert message in error_of(Folder(path=str(folder)).split_names)


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
