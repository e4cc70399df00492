"""Parts of an HTML page that loads nothing: tables, pictures and the frame around them.

Built with html.escape alone: it is a few tables, and every text in it passes through one function.
"""

import base64
import tempfile
from collections.abc import Callable
from html import escape
from pathlib import Path

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --page: #fff; --line: #c9ced6; --soft: #f3f5f7 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --page: #15181c; --line: #444b55; --soft: #20252b } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0 auto;
  max-width: 80rem; padding: 0 1rem 3rem; overflow-wrap: anywhere }
h1 { font-size: 1.6rem } h2 { font-size: 1.3rem; margin-top: 2.5rem } h3 { font-size: 1rem }
a { color: inherit } nav a { margin-right: 1rem } pre { white-space: pre-wrap; background: var(--soft); padding: .5rem }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 4px }
.wide:focus-visible, a:focus-visible { outline: 2px solid currentColor }
table { border-collapse: collapse; font-size: .85rem; width: 100%; overflow-wrap: normal }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem; border-bottom: 1px solid var(--line) }
th { background: var(--soft) } td.text { min-width: 10rem } tr:last-child td { border-bottom: 0 }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
figure { margin: 1.5rem 0 } figure img { display: block; min-width: 46rem; max-width: 100%; height: auto;
  background: #fff; padding: .5rem; box-sizing: border-box; margin: 0 auto }
figcaption { font-size: .9rem }
@media (max-width: 44rem) {
  .wide.cards { overflow-x: visible; border: 0 }
  .cards thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%) }
  .cards table, .cards tbody, .cards tr { display: block }
  .cards tr { border: 1px solid var(--line); border-radius: 4px; margin: .6rem 0; padding: .3rem 0 }
  .cards td, .cards td.number { display: flex; gap: .8rem; border: 0; padding: .1rem .6rem; text-align: left;
    white-space: normal; min-width: 0 }
  .cards td::before { content: attr(data-head); flex: 0 0 7rem; opacity: .75 }
}
"""


def table(name: str, heads: list[str], rows: list[list[str]], numbers: tuple[str, ...] = ()) -> str:
    """A table of texts, each escaped; on a narrow screen every row is a card. `numbers`: heads of figures.

    Roles are said aloud, since a browser forgets a table's once its rows are laid out as blocks.
    """
    head = "".join(f'<th scope="col" role="columnheader">{escape(text)}</th>' for text in heads)
    lines = []
    for row in rows:
        cells = []
        for text, title in zip(row, heads, strict=True):
            kind = "number" if title in numbers else "text" if len(text) > 40 else "short"
            cells.append(f'<td role="cell" class="{kind}" data-head="{escape(title)}">{escape(text)}</td>')
        lines.append(f'<tr role="row">{"".join(cells)}</tr>')
    # A region that scrolls must be reachable from the keyboard.
    return (
        f'<div class="wide cards" role="region" tabindex="0" aria-label="{escape(name)}"><table role="table"><thead>'
        f'<tr role="row">{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def picture(draw: Callable[[Path], Path], text: str) -> str:
    """What `draw` writes to the .svg file that it is given, inside the page; `text` stands for it and below it."""
    with tempfile.TemporaryDirectory() as folder:
        data = draw(Path(folder) / "plot.svg").read_bytes()
    source = "data:image/svg+xml;base64," + base64.b64encode(data).decode()
    image = f'<img src="{source}" alt="{escape(text)}">'
    return (
        f'<figure><div class="wide" role="region" tabindex="0" aria-label="{escape(text)}">{image}</div>'
        f"<figcaption>{escape(text)}</figcaption></figure>"
    )


def page(title: str, sections: list[tuple[str, str, str]], last: str) -> str:
    """The whole page. sections: (id, heading, HTML), those without HTML left out. last: a sentence at the end."""
    kept = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{name}">{escape(heading)}</a>' for name, heading, _ in kept)
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{escape(heading)}</h2>{html}'
        "</section>"
        for name, heading, html in kept
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><header><h1>{escape(title)}</h1>"
        f'<nav aria-label="sections">{links}</nav></header><main>{body}</main><footer><p>{escape(last)}</p></footer>'
        "</body></html>\n"
    )
