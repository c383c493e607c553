"""The project's Markdown as tests read it: code, tables, links, anchors."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Document:
    path: Path

    @cached_property
    def source(self) -> str:
        return self.path.read_text(encoding="utf-8")

    def blocks(self, *languages: str) -> list[str]:
        """The fenced blocks of some languages, in order."""
        fenced = re.findall(r"^```(\w*)\n(.*?)^```$", self.source, re.MULTILINE | re.DOTALL)
        return [text for language, text in fenced if language in languages]

    @cached_property
    def prose(self) -> str:
        """The text without fenced blocks."""
        return re.sub(r"^```.*?^```$", "", self.source, flags=re.MULTILINE | re.DOTALL)

    @cached_property
    def code(self) -> list[str]:
        """The pieces of code within the prose."""
        return re.findall(r"`([^`\n]+)`", self.prose)

    @cached_property
    def links(self) -> list[str]:
        """The targets of links and images that stay within the repository."""
        targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]+`", "", self.prose))
        return [target for target in targets if not target.startswith("https://")]

    @cached_property
    def anchors(self) -> set[str]:
        """What its headings are called in a link, by GitHub's rule."""
        headings = re.findall(r"^#+ (.+)$", self.prose, re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    def rows(self, heading: str) -> Iterator[list[str]]:
        """Yield the cells of each row of the first table below a heading, without the table's own."""
        below = self.source.split(f"# {heading}\n", 1)[1]
        table = re.search(r"(?:^\|.*\n)+", below, re.MULTILINE)
        for line in table.group().splitlines()[2:]:
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))]


DOCUMENTS = [
    Document(path)
    for folder, pattern in ((REPOSITORY, "*.md"), (REPOSITORY / "docs", "*.md"), (REPOSITORY / "prompts", "*.md"))
    for path in sorted(folder.glob(pattern))
]
#: Those that speak of the project as it is, and not of what it was.
CURRENT = [doc for doc in DOCUMENTS if doc.path.name != "CHANGELOG.md"]


def document(name: str) -> Document:
    return Document(REPOSITORY / name)
