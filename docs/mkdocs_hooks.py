"""Let the site hold what its pages link to outside docs/: README, CONTRIBUTING, tpu/, benchmarks/, configs.

A page links to files as they lie in the repository. On the site a file outside docs/ is at repository/PATH; links are
rewritten to that, and a folder's link leads to its README.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
_LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)]*)?(\))")


def on_config(config: Any) -> Any:
    """Write out each folder of the navigation as its pages, README first."""
    for section in config.nav:
        for title, pages in section.items() if isinstance(section, dict) else ():
            if isinstance(pages, str) and pages.endswith("/"):
                names = sorted((path.name for path in (DOCS / pages).glob("*.md")), key=lambda n: (n != "README.md", n))
                section[title] = [f"{pages}{name}" for name in names]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add every file outside docs/ that some page links to, and those that these link to."""
    waiting = [DOCS / file.src_uri for file in files.documentation_pages()]
    added: set[Path] = set()
    while waiting:
        page = waiting.pop()
        for _, target, _, _ in _LINK.findall(page.read_text(encoding="utf-8")):
            path = _path(page, target)
            if path is not None and not path.is_relative_to(DOCS) and path not in added:
                added.add(path)
                files.append(File.generated(config, _address(path), abs_src_path=str(path)))
                waiting += [path] if path.suffix == ".md" else []
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite links from where a file lies in the repository to where it lies on the site."""
    source = Path(page.file.abs_src_path)

    def rewrite(found: re.Match[str]) -> str:
        before, target, anchor, after = found.groups()
        path = _path(source, target)
        if path is None:
            return found[0]
        address = os.path.relpath(_address(path), Path(page.file.src_uri).parent)
        return f"{before}{address}{anchor or ''}{after}"

    return _LINK.sub(rewrite, markdown)


def _path(page: Path, target: str) -> Path | None:
    """Return the file of the repository that a page's link leads to, or None for an address and a broken link."""
    if re.match(r"\w+:", target):
        return None
    path = (page.parent / target).resolve()
    path = path / "README.md" if path.is_dir() else path
    return path if path.is_file() and path.is_relative_to(ROOT) else None


def _address(path: Path) -> str:
    """Return where a file of the repository lies on the site."""
    return (path.relative_to(DOCS) if path.is_relative_to(DOCS) else "repository" / path.relative_to(ROOT)).as_posix()
