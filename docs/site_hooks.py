"""What the site takes from the repository's documents, so that every text is written once.

Whole documents become pages (`PAGES`), as do the bundled artifacts' cards and the notebooks. In a
page

- ``<!-- include: FILE#HEADING -->`` stands for that section of a document, and without a heading
  for a file of code;
- ``<!-- table: NAME -->`` for a table of RESULTS.md;
- ``<!-- method: NAME -->`` for a method's row in the README's table;
- ``<!-- cards -->`` for links to the cards.

Links between documents lead to their pages; a link to a file that is not on the site becomes its
path.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
#: Document -> page.
PAGES = {
    "README.md": "index.md",
    "RESULTS.md": "results.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "examples/COVERAGE.md": "coverage.md",
    "examples/hosts/README.md": "hosts.md",
}
CARDS = sorted(path.parent.name for path in ROOT.glob("hub_cards/*/README.md"))
PAGES |= {f"hub_cards/{name}/README.md": f"cards/{name}.md" for name in CARDS}
NOTEBOOKS = sorted(path.stem for path in ROOT.glob("docs/notebooks/*.ipynb"))


def on_files(files, config):
    """Add the pages that are documents of the repository, and the notebooks."""
    for document, page in PAGES.items():
        text = (ROOT / document).read_text()
        files.append(File.generated(config, page, content=linked(text, document, page)))
    for name in NOTEBOOKS:
        files.append(
            File.generated(config, f"notebooks/{name}.md", content=notebook_as_markdown(name))
        )
    return files


def on_page_markdown(markdown, page, config, files):  # noqa: ARG001
    """Fill in what a page includes; a page that lies in docs/ links as it does on the disk."""
    name = page.file.src_uri
    if (ROOT / "docs" / name).is_file():
        markdown = linked(markdown, f"docs/{name}", name)
    return filled(markdown, name)


def linked(text: str, document: str, page: str) -> str:
    """A document's text as a page: without front matter, its links leading to pages."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)

    def replace(match: re.Match) -> str:
        mark, label, target = match.groups()
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or not path:
            return match[0]
        place = posixpath.normpath(posixpath.join(posixpath.dirname(document), path))
        to = PAGES.get(place) or (place.removeprefix("docs/") if place.startswith("docs/") else "")
        if not to:
            return label if label.startswith("`") else f"`{place}`"
        there = posixpath.relpath(to, posixpath.dirname(page) or ".")
        return f"{mark}[{label}]({there}{'#' + anchor if anchor else ''})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", replace, text)


def filled(text: str, page: str) -> str:
    """A page's text with its includes, tables and rows in place."""
    text = re.sub(r"<!-- include: (\S+?)(?:#(.+?))? -->", lambda m: included(m, page), text)
    text = re.sub(r"<!-- table: (\S+) -->", lambda m: table(m[1]), text)
    cards = "\n".join(f"- [{name}](cards/{name}.md)" for name in CARDS)
    text = text.replace("<!-- cards -->", cards)
    return re.sub(r"<!-- method: (\S+) -->", lambda m: method_row(m[1]), text)


def included(match: re.Match, page: str) -> str:
    """A section of a document, without its heading, or a file of code as a block."""
    document, heading = match.groups()
    text = (ROOT / document).read_text()
    if heading is None:
        return f"```{'toml' if document.endswith('toml') else 'python'}\n{text.rstrip()}\n```"
    found = re.search(
        rf"^(#+) {re.escape(heading)}\n(.*?)(?=^\1 |\Z)", text, flags=re.DOTALL | re.MULTILINE
    )
    if not found:
        raise ValueError(f"{page}: {document} has no heading {heading!r}")
    return linked(found[2].strip(), document, page)


def table(name: str) -> str:
    """One of the tables of RESULTS.md, which `examples/report.py` writes."""
    found = re.search(
        rf"<!-- report: {name} -->\n(.+?)\n<!-- end -->",
        (ROOT / "RESULTS.md").read_text(),
        flags=re.DOTALL,
    )
    if not found:
        raise ValueError(f"RESULTS.md has no table {name!r}")
    return found[1]


def method_row(name: str) -> str:
    """When to take a method and what it costs, from the README's table."""
    rows = re.findall(r"^\|(.+)\|$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    cells = [[cell.strip() for cell in row.split("|")] for row in rows]
    head = next(row for row in cells if row[0] == "method")
    row = next((row for row in cells if row[0] == f"`{name}`"), None)
    if row is None:
        raise ValueError(f"the README's table has no method {name!r}")
    pairs = zip(head[1:], row[1:], strict=True)
    return "\n".join(
        ["| | |", "|---|---|", *(f"| **{title}** | {cell} |" for title, cell in pairs)]
    )


def notebook_as_markdown(name: str) -> str:
    """A notebook's cells as a page; its code is run by the tests."""
    parts = []
    for cell in json.loads((ROOT / f"docs/notebooks/{name}.ipynb").read_text())["cells"]:
        text = "".join(cell["source"]).rstrip()
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join(parts) + "\n"
