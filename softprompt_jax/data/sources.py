"""Where rows come from: files, the hub, memory, or a package of a package registry, checked by its hash."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from softprompt_jax.config import UserError, cache_folder, first_line, shipped
from softprompt_jax.data.examples import Source
from softprompt_jax.data.packages import Package
from softprompt_jax.data.preprocessors import Row
from softprompt_jax.data.readers import SPLITS
from softprompt_jax.data.rows import Rows
from softprompt_jax.data.seqio_source import Seqio
from softprompt_jax.distributed import cloud_files


class Files(Source):
    """One file per split: jsonl, json (a list), csv, tsv or parquet by suffix; relative to the working directory.

    `quotes` follows csv's quoting rules; false takes a quote mark for a letter, as GLUE's tsv files do.
    """

    kind: Literal["files"] = "files"
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    quotes: bool = True

    def split_names(self) -> list[str]:
        return [split for split in SPLITS if getattr(self, split) is not None]

    def rows(self, split: str, where: str) -> Iterator[tuple[str, Row]]:
        return read_file(getattr(self, split), self.quotes)


class Folder(Source):
    """A folder with a file per split (`train.jsonl`, `validation.csv`), or a folder of files (`train/part1.jsonl`)."""

    kind: Literal["folder"] = "folder"
    path: str
    quotes: bool = True  # whether csv's quoting rules hold, as in files

    def split_names(self) -> list[str]:
        return list(split_files(self))

    def rows(self, split: str, where: str) -> Iterator[tuple[str, Row]]:
        return itertools.chain.from_iterable(read_file(path, self.quotes) for path in split_files(self)[split])


class Inputs(Source):
    """A file of rows of which some are kept for validation: every `every`th, unless a file is stated for it."""

    kind: Literal["inputs"] = "inputs"
    path: str  # jsonl, json, csv, tsv or parquet
    validation: str | None = None  # file for validation; null: rows of `path`
    test: str | None = None  # file for the test
    every: int = pydantic.Field(default=5, ge=2)  # distance between rows that are kept for validation

    def split_names(self) -> list[str]:
        return ["train", "validation"] if self.test is None else list(SPLITS)

    def rows(self, split: str, where: str) -> Iterator[tuple[str, Row]]:
        stated = self.path if split == "train" else getattr(self, split)
        if self.validation is not None or split == "test":
            return read_file(stated)
        numbered = enumerate(read_file(self.path), start=1)
        return (row for number, row in numbered if (number % self.every == 0) == (split == "validation"))


class Hub(Source):
    """A data set of the hub, through `datasets`; `splits` maps our names to the hub's, or to slices (`train[:1000]`).

    `converted` reads the hub's own conversion to parquet, for repositories whose rows come out of a script,
    which today's `datasets` does not run. `revision` is a branch, a tag or a commit (of the conversion, if
    converted). Without one a run reads the newest, and writes its commit into the run's `config.yaml`.
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

    def split_names(self) -> list[str]:
        return sorted(self.splits, key=lambda split: SPLITS.index(split) if split in SPLITS else len(SPLITS))

    def rows(self, split: str, where: str) -> Iterator[tuple[str, Row]]:
        for number, row in enumerate(self._load(split, where), start=1):
            yield f"{self.name} {split} row {number}", row

    def newest(self, where: str) -> Hub:
        """Return the source at the commit that the hub has now of the stated revision; a UserError if out of reach."""
        from huggingface_hub import HfApi

        try:
            commit = HfApi().dataset_info(self.name, revision=self.revision or self._branch).sha
        except Exception as error:  # the hub's client has an exception for each way not to reach it
            raise UserError(
                f"{where}: the revision of {self.name} could not be asked for ({first_line(error)}); "
                "expected a hub within reach; pin the task where there is one"
            ) from None
        return self.model_copy(update={"revision": commit})

    def pinned(self, where: str) -> Hub:
        """Return the source at the commit that is read now: the hub's newest, without a hub that of the cached rows."""
        if self.revision is not None:
            return self
        _refuse_recorded_revision(self, where)
        try:
            return self.newest(where)
        except UserError:
            return self.model_copy(update={"revision": _commit(self._load(self.split_names()[0], where))})

    @property
    def _branch(self) -> str | None:
        return CONVERSION if self.converted else None

    def _load(self, split: str, where: str) -> Any:
        import datasets

        if self.revision is None:
            _refuse_recorded_revision(self, where)
        found, revision = self.splits[split], self.revision or self._branch
        name, files = self.config, None
        if self.converted:
            whole = found.partition("[")[0]  # without a slice, such as that of train[:1000]
            name, files = None, {whole: f"{self.config}/{whole}/*.parquet"}
        try:
            rows = datasets.load_dataset(self.name, name, data_files=files, split=found, revision=revision)
        except Exception as error:  # unreachable, unknown, gated, without that split: one line for each
            raise UserError(
                f"{where}: {self.name} could not be loaded from the hub ({first_line(error)}); expected a hub "
                f"within reach or a cached data set; cached are: {', '.join(_cached_hub_names()) or 'none'}"
            ) from None
        commit = _commit(rows)
        if commit is not None and commit != revision and re.fullmatch("[0-9a-f]{40}", revision or ""):
            raise UserError(
                f"{where}: {self.name} is cached at {commit}, and the hub is out of reach; expected {revision}; "
                "fetch it where the hub is within reach"
            )
        return rows


CONVERSION = "refs/convert/parquet"  # the hub's branch for it, with the files CONFIG/SPLIT/0000.parquet, ...


SHORT_FORMS: dict[str, type[Source]] = {"seqio": Seqio}  # sources whose settings may stand in `task:` itself
AnySource = Annotated[Files | Folder | Inputs | Hub | Package | Seqio | Rows, pydantic.Field(discriminator="kind")]


SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


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
    """Yield (place, row) for every row of a jsonl, json, csv, tsv or parquet file.

    Text formats are read here, not by `datasets`: an error must name the line, and a text "NA" must stay a text.
    """
    path = shipped(cloud_files.local(path))
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a data file ({', '.join(SUFFIXES)})")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: found the suffix {suffix!r}; expected {', '.join(SUFFIXES)}; convert the file")
    if suffix == ".parquet":
        return _parquet_rows(path)
    if suffix in (".jsonl", ".json"):
        return _decoded(path, _jsonl_rows(path) if suffix == ".jsonl" else _json_rows(path))
    return _decoded(path, _csv_rows(path, "," if suffix == ".csv" else "\t", quotes))


def _decoded(path: Path, rows: Iterator[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
    try:
        for place, row in rows:
            if not isinstance(row, dict):
                raise UserError(f"{place}: found {type(row).__name__}; expected a JSON object with its fields")
            yield place, row
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason}); expected UTF-8 text; convert the file") from None


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # also numbers of more than 4300 digits, and too deep ones
                raise UserError(
                    f"{path}:{number}: not JSON ({getattr(error, 'msg', error)}); expected one JSON object a line; "
                    "correct the line"
                ) from None
            yield f"{path}:{number}", row


def _json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        place = f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else path
        raise UserError(
            f"{place}: not JSON ({getattr(error, 'msg', error)}); expected a list of JSON objects"
        ) from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: found {type(rows).__name__}; expected a list of JSON objects, one a row")
    for number, row in enumerate(rows, start=1):
        yield f"{path} row {number}", row


def _csv_rows(path: Path, delimiter: str, quotes: bool) -> Iterator[tuple[str, Row]]:
    hint = "correct the row, or set `quotes: false` where a quote mark is a letter"
    with path.open(encoding="utf-8-sig", newline="") as lines:
        quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
        table = csv.reader(lines, delimiter=delimiter, strict=True, quoting=quoting)
        csv.field_size_limit(1 << 30)  # a cell may be a whole document
        header: list[str] = []
        start = 1
        try:
            for cells in table:
                where, start = f"{path}:{start}", table.line_num + 1
                if not header:
                    header = cells
                    if len(set(cells)) < len(cells):
                        twice = next(name for name in cells if cells.count(name) > 1)
                        raise UserError(f"{where}: two columns {twice!r}; expected each once; rename one")
                    if len(cells) == 1 and (other := next((mark for mark in ";\t," if mark in cells[0]), None)):
                        raise UserError(
                            f"{where}: found columns separated by {other!r}; expected {delimiter!r}; "
                            "save it so, or name a file with tabs .tsv"
                        )
                elif cells and len(cells) != len(header):
                    expected = f"{len(header)} ({', '.join(header)})"
                    raise UserError(f"{where}: found {len(cells)} columns; expected {expected}; {hint}")
                elif cells:
                    yield where, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise UserError(f"{path}:{start}: not a csv row ({error}); expected quoted cells; {hint}") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = itertools.chain.from_iterable(part.to_pylist() for part in file.iter_batches())
            for number, row in enumerate(rows, start=1):
                yield f"{path} row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); expected a parquet file") from None


# ------------------------------------------------------------------------------------------------ hub


def _commit(rows: Any) -> str | None:
    """Return the commit that the rows of a data set were read at, out of the addresses of its files."""
    addresses = getattr(getattr(rows, "info", None), "download_checksums", None) or {}
    found = (re.match(r"hf://datasets/[^@]+@([0-9a-f]{40})/", address) for address in addresses)
    return next((match[1] for match in found if match), None)


def _refuse_recorded_revision(source: Hub, where: str) -> None:
    """Refuse to read another revision than version 0.1 recorded for all runs of a machine, in a file of the cache."""
    path = cache_folder() / "revisions.json"
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    revision = recorded.get(f"{source.name}@{CONVERSION}" if source.converted else source.name)
    if revision is not None:
        raise UserError(
            f"{where}: {path} records the revision {revision} of {source.name}; expected it in the run's settings, "
            f"as task.source.revision={revision}; add it there, or delete the file to read the newest"
        )


def _cached_hub_names() -> list[str]:
    from datasets.config import HF_DATASETS_CACHE

    folder = Path(HF_DATASETS_CACHE)
    found = {path.name.replace("___", "/") for path in folder.glob("*") if path.is_dir()}
    return sorted(found - {"downloads", "parquet", "csv", "json", "text"})
