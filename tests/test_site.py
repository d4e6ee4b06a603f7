"""The documentation site: what is generated is complete, every link leads somewhere, and all is local."""

import ast
import functools
import json
import re
import threading
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import matplotlib.image
import numpy as np
import pytest
import yaml
from conftest import ROOT
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from docs.site import layouts, reference, reference_plots
from fcmae.__main__ import COMMANDS
from fcmae.config import _keys, command_of, reference_logs, shipped_configs
from fcmae.masking import sample_visible_ids
from fcmae.recipe import Images, Machine, choose

DOCS = ROOT / "docs"


# What is generated


@pytest.mark.parametrize("name", reference.KINDS)
def test_a_page_of_keys_names_every_key_and_what_it_is(name: str) -> None:
    page = reference.configuration_page(name)
    terms = dict(re.findall(r"^`\S+?`\{ #(\S+) \} .+\n:   (.*)$", page, re.MULTILINE))
    sections = {prefix for prefix, _ in reference.sections_of(reference.KINDS[name].model)}
    assert {*_keys(reference.KINDS[name].model)} - sections <= terms.keys()
    assert [key for key, text in terms.items() if not text] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_of_commands_names_every_option_and_what_it_is(command: str) -> None:
    section = reference.commands_page().partition(f"## fcmae {command}\n")[2].partition("\n## ")[0]
    terms = re.findall(r"^(`.+)\n:   (.*)$", section, re.MULTILINE)
    for action in import_module(f"fcmae.commands.{command}").make_parser()._actions:
        for option in action.option_strings if action.dest != "help" else ():
            assert any(f"`{option}`" in term and text for term, text in terms), option


def test_the_page_of_recipes_links_to_every_shipped_configuration() -> None:
    links = {*re.findall(r"\]\(\.\./configs/(.+?)\.yaml\)", reference.recipes_page())}
    assert links == {*shipped_configs()}


@pytest.mark.parametrize("command", ["pretrain", "finetune", "ablate"])
def test_a_schema_is_that_of_the_models(command: str) -> None:
    written = json.loads((reference.SCHEMAS / f"{command}.json").read_text())
    assert written == reference.schema_of(command), "python docs/site/reference.py writes it anew"


def known_to(schema: Mapping[str, Any], part: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys of `values` that a part of a schema does not have."""
    branches = [part, *part.get("anyOf", ())]
    refs = [branch["$ref"].rpartition("/")[2] for branch in branches if "$ref" in branch]
    for ref in refs:
        part = schema["$defs"][ref]
    for key, value in values.items():
        if key not in part["properties"]:
            yield key
        elif isinstance(value, dict) and "additionalProperties" not in part["properties"][key]:
            yield from known_to(schema, part["properties"][key], value)


@pytest.mark.parametrize("name", shipped_configs())
def test_the_schemas_know_every_key_of_the_shipped_configurations(name: str) -> None:
    values = yaml.safe_load(shipped_configs()[name].read_text())
    schema = reference.schema_of(command_of(name))
    top = schema
    if "if" in schema:
        top = schema["then" if values.get("task") == "segmentation" else "else"]
    assert [*known_to(schema, top, values)] == []


def assert_committed(figure: Figure, picture: Path, script: str) -> None:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = np.asarray(canvas.buffer_rgba())[..., :3] / 255
    anew = f"python docs/site/{script} draws it anew"
    assert picture.is_file(), anew
    committed = matplotlib.image.imread(picture)[..., :3]
    assert drawn.shape == committed.shape, anew
    assert np.abs(drawn - committed).mean() < 0.01, anew


def test_the_figure_of_the_layouts_is_what_the_code_draws() -> None:
    assert_committed(layouts.draw_layouts(), layouts.PICTURE, "layouts.py")


@pytest.mark.parametrize("name", reference_logs())
def test_each_reference_log_has_its_plot_on_the_page_of_results(name: str) -> None:
    plot = reference_plots.plot_of(name)
    assert f"]({plot.relative_to(DOCS)})" in (DOCS / "results.md").read_text()
    assert_committed(reference_plots.draw_log(reference_logs()[name]), plot, "reference_plots.py")


def said_by_the_code() -> str:
    """All text in the code, what is filled in left out."""
    said = []
    for path in (ROOT / "fcmae").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
    return "\n".join(said)


def test_every_message_of_the_troubleshooting_page_is_one_that_the_code_says() -> None:
    rows = re.findall(r"^\| (`.+?`) \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    parts = [part for row in rows for part in re.split(r"\.\.\.", row.strip("`"))]
    said = said_by_the_code()
    assert len(rows) > 40
    assert [part for part in parts if part not in said] == []


def test_the_page_of_small_images_says_what_is_chosen_for_them() -> None:
    page = (DOCS / "small-images.md").read_text()
    rows = [[int(n) for n in re.findall(r"\d+", row)] for row in re.findall(r"^\| \d+ px .*", page, re.MULTILINE)]
    gpu = Machine("a GPU", gpu=True, memory=24_000_000_000, bf16=True, cores=8)
    assert len(rows) == 6
    for side, stride, patch, size, high, wide, visible, patches in rows:
        images = Images(10_000, side, 3, (0.5,) * 3, (0.2,) * 3)
        chosen = {choice.key: choice.value for choice in choose(images, gpu)}
        assert (chosen["model.stem_stride"], chosen["data.image_size"]) == (stride, size)
        assert (patch, high, wide, patches) == (8 * stride, size // patch, size // patch, high * wide)
        assert sample_visible_ids(1, patches, 0.6).shape[1] == visible


# The built site


class Page(HTMLParser):
    """What a page has: anchors, links, and what a browser loads with it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.loads: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.add(found["href"])
        elif tag == "link" and found.get("rel") not in ("canonical", "next", "prev"):
            self.loads.add(found["href"])
        elif "src" in found:
            self.loads.add(found["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built; a warning is an error."""
    pytest.importorskip("material", reason="needs mkdocs-material: pip install '.[docs]'")
    pytest.importorskip("mkdocstrings", reason="needs mkdocstrings: pip install '.[docs]'")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder))
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    """Its pages by their names."""
    found = sorted(site.rglob("*.html"))
    return {path.relative_to(site).as_posix(): Page(path.read_text(encoding="utf-8")) for path in found}


def test_every_page_of_docs_is_a_page_of_the_site(pages: dict[str, Page]) -> None:
    written = {path.relative_to(DOCS).with_suffix(".html").as_posix() for path in DOCS.rglob("*.md")}
    assert written | {"index.html", "api.html", "commands.html"} <= pages.keys()


def test_every_link_of_the_site_leads_to_a_page_and_its_anchor(site: Path, pages: dict[str, Page]) -> None:
    followed = 0
    for name, page in pages.items():
        base = f"http://site/{name}"
        for link in {*page.links, *page.loads}:
            if link.startswith("data:"):
                continue
            target, anchor = urldefrag(urljoin(base, link))
            if urlsplit(target).netloc != "site":
                assert link in page.links, f"{name} loads {link} from elsewhere"
                continue
            place = unquote(urlsplit(target).path).lstrip("/") or "index.html"
            assert (site / place).is_file(), f"{name}: {link}"
            if anchor and not anchor.startswith("__"):
                assert unquote(anchor) in pages[place].anchors, f"{name}: {link}"
            followed += 1
    assert followed > 1000


def test_the_python_page_has_every_public_name_and_its_docstring(site: Path, pages: dict[str, Page]) -> None:
    import fcmae

    anchors = pages["api.html"].anchors
    for name in fcmae.__all__:
        assert f"fcmae.{fcmae.HOMES[name]}.{name}" in anchors
    assert "Fully convolutional masked autoencoder" in (site / "api.html").read_text()


@pytest.fixture(scope="module")
def served(site: Path) -> Iterator[str]:
    """The address of the site, served on this machine."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


LINKS = "[...document.querySelectorAll('a[href]')].map(a => a.href)"
MISSING = "[...document.images].filter(i => i.loading != 'lazy' && !i.naturalWidth).map(i => i.src)"
WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
IDS = "[...document.querySelectorAll('[id], [name]')].flatMap(e => [e.id, e.getAttribute('name')])"


@pytest.mark.browser
def test_a_browser_on_a_phone_follows_every_link_and_shows_every_page(
    served: str, pages: dict[str, Page], browser: Any
) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844})
    wrong: list[str] = []
    own = (served, "data:")
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: None if request.url.startswith(own) else wrong.append(request.url))

    anchors: dict[str, set[str]] = {}
    links: set[str] = {served}
    while waiting := {urldefrag(link)[0] for link in links} - anchors.keys():
        for address in sorted(waiting):
            anchors[address] = set()
            if not address.endswith((".html", "/")) or address.startswith(f"{served}source/"):
                assert page.request.get(address).ok, address  # files, many and alike
                continue
            response = page.goto(address)
            assert response is not None
            assert response.ok, address
            assert page.evaluate(MISSING) == [], address
            assert page.evaluate(WIDER) <= 0, f"{address} is wider than a phone"
            anchors[address] |= {*page.evaluate(IDS)}
            links |= {link for link in page.evaluate(LINKS) if link.startswith(served)}
    assert wrong == []
    shown = {address.removeprefix(served) or "index.html" for address, ids in anchors.items() if ids}
    assert shown == {name for name in pages if not name.startswith("source/")} - {"404.html"}
    for link in links:
        target, anchor = urldefrag(link)
        assert not anchor or unquote(anchor) in anchors[target] or anchor.startswith("__"), link


@pytest.mark.browser
def test_the_search_of_the_site_finds_a_key(served: str, browser: Any) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(served)
    query = page.locator("input[name=query]")
    query.click()
    page.get_by_text("Type to start searching").wait_for()  # its index has been read
    query.press_sequentially("mask_group")
    page.locator(".md-search-result__link[href*='keys-pretrain']").first.wait_for()
