"""Links between the site's pages and documents that lie elsewhere in the repository.

Pages of docs/ link to documents outside it as they are found in a checkout. Where a page of the site includes such a
document, links to the document become links to the page.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

PAGES = {
    "../README.md": "index.md",
    "../results/NOTES.md": "evidence/notes.md",
    "../benchmarks/README.md": "evidence/benchmarks.md",
    "../CONTRIBUTING.md": "project/contributing.md",
    "../CHANGELOG.md": "project/changelog.md",
    "../examples/plain_trainer.py": "trainer-examples.md",
    "../examples/trainer.py": "trainer-examples.md",
    "../examples/session.py": "session.md",
    "../examples/plain_sft.py": "trainer-examples.md",
    "../examples/sft.py": "trainer-examples.md",
}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page's text with links to included documents turned into links to the pages that include them."""
    folder = posixpath.dirname(page.file.src_uri)

    def target(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[1]))
        found = PAGES.get(path)
        return f"]({posixpath.relpath(found, folder or '.')}{match[2] or ''})" if found else match[0]

    return re.sub(r"\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)", target, markdown)
