"""The files of the door's page by the names that its URLs have: no other file can be asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edit_ray.page.document import STYLE
from edit_ray.page.run_server import HLS_JS

_PAGE = Path(__file__).parent / "page"
_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}
_FILES = {
    **{path.name: path for path in sorted(_PAGE.iterdir()) if path.suffix in _KINDS},
    "page.css": STYLE,
    "hls.js": HLS_JS if HLS_JS.is_file() else _PAGE / "without_hls.js",
}

PAGE_FILES: Mapping[str, tuple[Path, str]] = {name: (path, _KINDS[path.suffix]) for name, path in _FILES.items()}
"""Each file with its media type; `index.html` is the page, the others are below /page/."""
