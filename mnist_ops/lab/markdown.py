"""The Markdown that the pages are written in, and HTML made from it."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Mapping, Sequence

__all__ = ["items", "table", "to_html"]


def table(head: Sequence[str], rows: Iterable[Sequence[str]], folded: str = "") -> str:
    """A table in Markdown, behind the words of ``folded`` if there are any; none without rows."""
    rows = [list(row) for row in rows]
    if not rows:
        return ""
    lines = [list(head), ["---"] * len(head), *rows]
    text = "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )
    return f"<details><summary>{folded}</summary>\n\n{text}\n\n</details>" if folded else text


def items(lines: Iterable[str]) -> str:
    """A list in Markdown."""
    return "\n".join(f"- {line}" for line in lines)


def _inline(text: str) -> str:
    text = html.escape(text)
    for pattern, tag in (
        (r"`([^`]+)`", "code"),
        (r"\*\*(.+?)\*\*", "strong"),
        (r"\*(\S[^*]*)\*", "em"),
    ):
        text = re.sub(pattern, rf"<{tag}>\1</{tag}>", text)
    return re.sub(r"\[([^\]]+)\]\((https://[^)\s]+)\)", r'<a href="\2">\1</a>', text)


def to_html(markdown: str, images: Mapping[str, bytes]) -> str:
    """The inside of ``<body>`` for the Markdown that these pages use.

    Args:
        markdown: headings, paragraphs, lists, tables, figures and folded parts, each a block
            between empty lines; bold, emphasis, code and links inside. All else is escaped.
        images: by the paths that the figures name.
    """
    made = []
    for block in markdown.strip().split("\n\n"):
        folded = re.fullmatch(r"<details><summary>(.*)</summary>", block)
        figure = re.fullmatch(r"!\[(.*)\]\((.*)\)", block)
        if folded:
            made.append(f"<details><summary>{_inline(folded[1])}</summary>")
        elif block == "</details>":
            made.append(block)
        elif figure:
            data = base64.b64encode(images[figure[2]]).decode("ascii")
            words = html.escape(figure[1])
            made.append(f'<img src="data:image/png;base64,{data}" alt="{words}">')
        elif heading := re.match(r"(#+) ", block):
            level = len(heading[1])
            made.append(f"<h{level}>{_inline(block[level + 1 :])}</h{level}>")
        elif block.startswith("- "):
            items = "\n".join(f"<li>{_inline(line[2:])}</li>" for line in block.split("\n"))
            made.append(f"<ul>\n{items}\n</ul>")
        elif block.startswith("| "):
            lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.split("\n")]
            rows = [
                "".join(
                    f"<{tag}>{_inline(cell.strip().replace(chr(92) + '|', '|'))}</{tag}>"
                    for cell in line
                )
                for tag, line in zip(["th", "", *["td"] * len(lines)], lines, strict=False)
                if tag
            ]
            inside = "\n".join(f"<tr>{row}</tr>" for row in rows)
            made.append(f'<div class="scroll"><table>\n{inside}\n</table></div>')
        elif block:
            made.append(f"<p>{_inline(block)}</p>")
    return "\n".join(made) + "\n"
