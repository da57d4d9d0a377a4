"""Writes the demo's result as one self-contained HTML file."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from devtools.demo import Row

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { border-bottom: 1px solid #8886; padding: .3rem .9rem; text-align: right }
th:first-child, td:first-child { text-align: left }
.images { display: flex; flex-wrap: wrap; gap: 1rem }
figure { margin: 0; max-width: 32rem } img { max-width: 100%; display: block }
pre { background: #8882; padding: .8rem; overflow-x: auto }
:root { color-scheme: light dark }
"""


def write_report(
    file: Path, table: Sequence[Sequence[str]], rows: Sequence["Row"], facts: Mapping[str, str]
) -> Path:
    """Write the report to `file` and return it."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Blade demo</title>",
        f"<style>{_STYLE}</style><h1>Blade demo</h1>",
        _facts(facts),
        _table(table),
    ]
    for blade in rows:
        stock = blade.stock
        if stock is None:
            continue
        parts.append(f"<h2>{escape(stock.name)} against {escape(blade.name)}</h2>")
        for pair in zip(stock.images, blade.images, strict=True):
            names = (stock.name, blade.name)
            figures = [_figure(image, name) for image, name in zip(pair, names, strict=True)]
            parts.append(f"<div class=images>{''.join(figures)}</div>")
        if blade.report:
            parts.append(f"<h3>Report of the last run</h3><pre>{escape(blade.report)}</pre>")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return file


def _facts(facts: Mapping[str, str]) -> str:
    rows = [f"<tr><td>{escape(k)}<td>{escape(v)}" for k, v in facts.items()]
    return f"<table>{''.join(rows)}</table>"


def _table(lines: Sequence[Sequence[str]]) -> str:
    head, *body = lines
    html = "<tr>" + "".join(f"<th>{escape(cell)}" for cell in head)
    for line in body:
        html += "<tr>" + "".join(f"<td>{escape(cell)}" for cell in line)
    return f"<table>{html}</table>"


def _figure(image: Path, name: str) -> str:
    data = base64.b64encode(image.read_bytes()).decode()
    caption = f"<figcaption>{escape(name)}: {escape(image.name)}</figcaption>"
    return f'<figure><img src="data:image/png;base64,{data}" alt="">{caption}</figure>'
