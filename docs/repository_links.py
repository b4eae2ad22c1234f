"""MkDocs hook: pages link to files of the repository as on a code host, and the site has those files too.

README.md is the site's first page; a page of docs/ stays what it is; any other file that a page links to lies below
`repository/`. A link to nothing is an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

_LINK = re.compile(r"(\]\()([^)\s]+)(\))|(<img [^>]*src=\")([^\"]+)(\")")
_FENCE = re.compile(r"^\s*```")
HOME = PurePosixPath("README.md")


def place_of(source: PurePosixPath) -> PurePosixPath:
    """Where a file of the repository lies in the site."""
    if source == HOME:
        return PurePosixPath("index.md")
    return source.relative_to("docs") if source.is_relative_to("docs") else "repository" / source


def linked(text: str, source: PurePosixPath, root: Path) -> tuple[str, set[PurePosixPath]]:
    """The text of a page with its links as the site has them, and the files that they lead to.

    Raises ValueError for a link to what is not there.
    """
    found: set[PurePosixPath] = set()

    def replaced(match: re.Match[str]) -> str:
        before, target, after = (part for part in match.groups() if part is not None)
        path, _, heading = target.partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return match[0]
        file = PurePosixPath(os.path.normpath(source.parent / path))
        if not (root / file).is_file():
            raise ValueError(f"{source} links to {target}, and there is no file {file}")
        found.add(file)
        there = os.path.relpath(place_of(file), place_of(source).parent)
        return f"{before}{there}{'#' if heading else ''}{heading}{after}"

    return _outside_of_code(text, lambda line: _LINK.sub(replaced, line)), found


def _outside_of_code(text: str, change: Callable[[str], str]) -> str:
    lines, code = [], False
    for line in text.split("\n"):
        code ^= bool(_FENCE.match(line))
        lines.append(line if code else change(line))
    return "\n".join(lines)


def on_files(files: Any, config: Any) -> Any:
    """Adds what pages link to, and what those link to."""
    from mkdocs.structure.files import File

    root = Path(config.config_file_path).parent
    waiting = {HOME, *(PurePosixPath("docs", file.src_uri) for file in files.documentation_pages())}
    seen: set[PurePosixPath] = set()
    while waiting:
        source = waiting.pop()
        seen.add(source)
        place = str(place_of(source))
        if source.suffix != ".md":
            if files.get_file_from_path(place) is None:
                files.append(File.generated(config, place, abs_src_path=str(root / source)))
            continue
        text, found = linked((root / source).read_text(), source, root)
        waiting |= found - seen
        if not source.is_relative_to("docs"):
            files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The links of the pages in docs/; those of the others are as they should be."""
    if page.file.generated_by is not None:
        return markdown
    root = Path(config.config_file_path).parent
    return linked(markdown, PurePosixPath("docs", page.file.src_uri), root)[0]
