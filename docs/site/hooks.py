"""Hooks of mkdocs: pages that are generated, and links that lead out of docs/ to pages of those files.

On GitHub the pages of docs/ link to files of the repository (../configs/pretrain/tiny.yaml). Here such a file
becomes a page, source/configs/pretrain/tiny.yaml, so that a link is right in both and the site needs nothing else.
"""

import os
import re
from pathlib import Path, PurePosixPath

import reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")
INSTEAD = {
    ROOT / "README.md": "index.md",
    ROOT / "configs": "recipes.md",
    ROOT / "fcmae" / "commands": "commands.md",
}
"""Pages for what is linked on GitHub in their place."""
LANGUAGES = {".py": "python", ".yaml": "yaml", ".cff": "yaml", ".toml": "toml"}
"""Of files that become pages, by their ends; others are text."""


def place_of(uri: str) -> Path:
    """Return the folder of the repository from which the links of a page go."""
    if uri == "index.md":
        return ROOT
    if uri.startswith("source/"):
        return (ROOT / uri.removeprefix("source/")).parent
    return (DOCS / uri).parent


def target_of(place: Path, link: str) -> str | None:
    """Return the page or file of the site that a link means; None if the repository has no such file."""
    path = Path(os.path.normpath(place / link))
    if path in INSTEAD:
        return INSTEAD[path]
    if path.is_relative_to(DOCS) and path.is_file() and path.suffix != ".py":
        return path.relative_to(DOCS).as_posix()
    if not path.is_relative_to(ROOT) or not path.exists():
        return None
    uri = f"source/{path.relative_to(ROOT).as_posix()}"
    return uri if path.suffix in (".md", ".json", ".jsonl", ".png") else f"{uri}.md"


def relative_links(markdown: str, uri: str) -> str:
    """Return a page's text, in which links of the repository have become links of the site."""
    place = place_of(uri)

    def rewrite(found: re.Match[str]) -> str:
        link, anchor = found[1], found[2] or ""
        if (target := target_of(place, link)) is None:
            return found[0]
        return os.path.relpath(target, PurePosixPath(uri).parent) + anchor

    return LINK.sub(rewrite, markdown)


def source_page(path: Path) -> str:
    """Return the page of a file or folder outside of docs/."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.is_file() and f.suffix != ".pyc")
        return "\n".join([f"# {name}", "", *(f"- [{file.name}]({path.name}/{file.name})" for file in files), ""])
    text = path.read_text(encoding="utf-8")
    return f"# {path.name}\n\n`{name}`\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{text}\n````\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the first page, the generated ones and, as long as links lead to more, files from outside of docs/."""

    def add(uri: str, content: str | bytes) -> None:
        files.append(File.generated(config, uri, content=content))
        if uri.endswith(".md"):
            waiting.append((uri, str(content)))

    waiting = [(file.src_uri, file.content_string) for file in files.documentation_pages()]
    add("index.md", (ROOT / "README.md").read_text(encoding="utf-8"))
    for uri, make in reference.PAGES.items():
        add(uri, make())
    while waiting:
        uri, content = waiting.pop()
        for link, _ in LINK.findall(content):
            target = target_of(place_of(uri), link)
            if target is None or target in files.src_uris or not target.startswith("source/"):
                continue
            path = Path(os.path.normpath(place_of(uri) / link))
            if target.endswith(".md"):
                add(target, path.read_text(encoding="utf-8") if path.suffix == ".md" else source_page(path))
            else:
                add(target, path.read_bytes())
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links right for the site, and let its search find what is written for readers."""
    if page.file.src_uri.startswith("source/"):
        page.meta["search"] = {"exclude": True}
    return relative_links(markdown, page.file.src_uri)
