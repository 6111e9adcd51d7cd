"""Lets pages of the site link to files of the repository that lie outside docs/ (a hook of mkdocs).

Links in docs/ are relative, so that they work in an editor and on a code host. On the site, the
Markdown files in PAGES become pages, any other linked file is served with the site, and a link to
a directory becomes plain text. A link that leads nowhere stops a strict build.
"""

import logging
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Name on the site -> file of the repository.
PAGES = {"index.md": "README.md", "records.md": "results/README.md", "changes.md": "CHANGELOG.md"}
LINK = re.compile(r"(!?)\[((?:\[[^\]]*\]\([^)]*\)|[^\]])*)\]\(([^)#\s:]+)(#[^)\s]*)?\)")

# Warnings of this logger count in a strict build.
logger = logging.getLogger("mkdocs.hooks.links")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie elsewhere in the repository."""
    for name, path in PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point each relative link to where the site has its target."""
    source = ROOT / PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    pages = {path: name for name, path in PAGES.items()}

    def rewritten(match: re.Match[str]) -> str:
        image, text, target, anchor = match.groups(default="")
        path = (source.parent / target).resolve()
        if not path.exists() or not path.is_relative_to(ROOT):
            logger.warning("%s links to %s, which does not exist", source.relative_to(ROOT), target)
            return text
        if path.is_dir():
            return text
        name = path.relative_to(ROOT).as_posix()
        if name in pages:
            name = pages[name]
        elif name.startswith("docs/"):
            name = name.removeprefix("docs/")
        else:
            name = f"repository/{name}"
            if name not in files.src_uris:
                files.append(File.generated(config, name, abs_src_path=str(path)))
        relative = posixpath.relpath(name, posixpath.dirname(page.file.src_uri) or ".")
        return f"{image}[{text}]({relative}{anchor})"

    return LINK.sub(rewritten, markdown)
