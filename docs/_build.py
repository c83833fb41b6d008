"""A hook of mkdocs.

Links to files outside `docs` become links to copies in the site. Links that name a file, as in
`[threads.md](threads.md)`, get the title of its page.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGE = re.compile(r"\[([\w/.-]+\.md|networks)\]\(([^)#]+\.md)(#[^)]*)?\)")
LINK = re.compile(r"\]\((\.\./[^)#]+)\)")


def _outside(link: str, page: str) -> str | None:
    """The path of a link's target from the root of the repository, if it is outside `docs`."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return None if path.startswith("docs/") else path


def on_files(files: Files, config: Any) -> Files:
    """Adds the source files that pages link to, and the folders of figures as plain lists."""
    for file in list(files.documentation_pages()):
        for link in LINK.findall(file.content_string):
            path = _outside(link, file.src_uri)
            name = f"source/{path}.txt"
            if path is None or files.get_file_from_path(name) is not None:
                continue
            target = ROOT / path
            if target.is_dir():
                text = "\n".join(each.name for each in sorted(target.iterdir()))
            else:
                text = target.read_text()
            files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, files: Files, **_: Any) -> str:
    """Points those links to the copies, and names the pages."""

    def named(match: re.Match[str]) -> str:
        folder = posixpath.dirname(page.file.src_uri)
        file = files.get_file_from_path(posixpath.normpath(posixpath.join(folder, match[2])))
        if file is None or file.page is None:
            return match[0]
        title = file.page.title or re.findall(r"^# (.*)", file.content_string, re.M)[0]
        return f"[{title}]({match[2]}{match[3] or ''})"

    def replaced(match: re.Match[str]) -> str:
        path = _outside(match[1], page.file.src_uri)
        if path is None:
            return match[0]
        folder = posixpath.dirname(page.file.src_uri) or "."
        return f"]({posixpath.relpath(f'source/{path}.txt', folder)})"

    return LINK.sub(replaced, PAGE.sub(named, markdown))
