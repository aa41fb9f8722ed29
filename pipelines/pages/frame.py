"""What every page is made of: the HTML around it, sections, tables, figures, pictures inside it."""

from __future__ import annotations

import base64
import contextlib
import html
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hrnet_core.errors import DataError
from hrnet_core.locations import one_line
from pipelines.storage.files import base_name, read_file, write_whole, writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def write_page(file: str | Path, title: str, line: str, quiet: str, *parts: str) -> None:
    """One page without any other file or address. Text: its title, what it is about, a line in small. parts:
    HTML. DataError where it cannot be written."""
    title, line, quiet = map(html.escape, (title, line, quiet))
    try:
        write_whole(file, PAGE.format(title=title, line=line, quiet=quiet, body="\n".join(parts)))
    except OSError as error:
        raise DataError(
            f"{file}: the page cannot be written ({error.strerror or one_line(error)}). Name another file."
        ) from None


def section(heading: str, about: str, *parts: str) -> str:
    """Text that says what is seen, then HTML."""
    quiet = f'<p class="quiet">{html.escape(about)}</p>' if about else ""
    return f"<section><h2>{html.escape(heading)}</h2>{quiet}{''.join(parts)}</section>"


def tiles(figures: Iterable[tuple[str, str, str]]) -> str:
    """A section of large figures: (figure, its name, what it means), each as text."""
    stats = [
        f'<div class="stat"><b>{html.escape(figure)}</b><span>{html.escape(name)}</span>'
        f"<small>{html.escape(meaning)}</small></div>"
        for figure, name, meaning in figures
    ]
    return f'<section class="stats">{"".join(stats)}</section>'


def embedded(file: str, alt: str, wide: bool = False) -> str:
    """A picture file (path or URI) inside the page itself. wide: of many small ones, which a phone scrolls
    instead of making them smaller than can be seen."""
    kind = {".png": "png", ".jpg": "jpeg"}[os.path.splitext(base_name(file))[1]]
    shown = picture(read_file(file), kind, alt)
    return f'<div class="wide">{shown}</div>' if wide else shown


def picture(content: bytes, kind: str, alt: str) -> str:
    """An encoded picture inside the page itself."""
    data = base64.b64encode(content).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/{kind};base64,{data}">'


def table(rows: Iterable[Sequence[Any]], head: Sequence[str] = ()) -> str:
    """Cells as text, None as nothing. Without a head, the first of each row is its name."""
    lines = ["".join(f"<th>{html.escape(name)}</th>" for name in head)] if head else []
    for row in rows:
        cells = [html.escape("" if cell is None else str(cell)) for cell in row]
        first = "" if head else f"<th>{cells.pop(0)}</th>"
        lines.append(first + "".join(f"<td>{cell}</td>" for cell in cells))
    content = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table class="fields">{content}</table></div>'


def definitions(fields: Mapping[str, Any]) -> str:
    """A table of names and values; None is left out."""
    return table([(name, value) for name, value in fields.items() if value is not None])


@contextlib.contextmanager
def figure(file: str | Path, rows: int, columns: int, size: tuple[float, float]) -> Iterator[list[Axes]]:
    """Axes in rows, of a figure of (width, height) x 100 px; `file` is its PNG once the block has ended well.
    No pyplot, whose state is the process's."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=size, dpi=100, layout="constrained")
    axes = drawn.subplots(rows, columns, squeeze=False).ravel().tolist()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9)
    yield axes
    with writing(file) as part, warnings.catch_warnings():
        # A name in a script that matplotlib's own font does not have is drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        drawn.savefig(part, format="png")


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ --ink: #1d2430; --quiet: #5d6878; --line: #e1e5eb; --fill: #2f6fde; --paper: #fff;
  --ground: #f5f6f8; }}
@media (prefers-color-scheme: dark) {{ :root {{
  --ink: #e6e9ef; --quiet: #9aa5b5; --line: #333b47; --fill: #6c9df2; --paper: #1b2028;
  --ground: #12161c; }} }}
* {{ box-sizing: border-box }}
body {{ margin: 0 auto; max-width: 1120px; padding: 32px 20px 64px;
  background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }}
h1 {{ font-size: 34px; margin: 0 }} h2 {{ font-size: 20px; margin: 0 0 4px }} h3 {{ margin: 20px 0 6px }}
p {{ margin: 4px 0 }} .quiet {{ color: var(--quiet) }}
section {{ background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 20px; margin-top: 20px }}
header p, section > p, h3 {{ overflow-wrap: anywhere }}
.wide {{ overflow-x: auto }} .wide img {{ min-width: 900px }} .wide svg {{ min-width: 480px }}
.photos {{ display: grid; gap: 0 20px; align-items: end;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)) }}
.stats {{ display: grid; gap: 12px; padding: 12px;
  grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)) }}
.stat {{ padding: 8px 12px; border-left: 3px solid var(--fill) }}
.stat b {{ font-size: 26px; margin-right: 8px }} .stat small {{ display: block; color: var(--quiet) }}
img, svg {{ max-width: 100%; height: auto; display: block }} img {{ border-radius: 6px }}
svg {{ max-width: 640px }} rect {{ fill: var(--fill) }} .missed {{ fill: none; stroke: var(--fill) }}
text {{ font-size: 12px; text-anchor: middle; fill: var(--quiet) }}
table {{ border-collapse: collapse; width: 100% }}
td, th {{ text-align: left; padding: 4px 10px 4px 0; border-bottom: 1px solid var(--line);
  font-weight: normal; vertical-align: top }} th {{ color: var(--quiet) }}
.scroll {{ overflow-x: auto }} .fields td:last-child {{ overflow-wrap: anywhere; min-width: 12em }}
.bar {{ width: 45%; vertical-align: middle }}
.bar i {{ display: block; height: 10px; border-radius: 5px; background: var(--fill) }}
@media print {{
  body {{ max-width: none; padding: 0 }} .wide img {{ min-width: 0 }} h2, h3 {{ break-after: avoid }}
  tr, img, svg, .stat {{ break-inside: avoid }} .bar i {{ print-color-adjust: exact }}
}}
</style></head><body>
<header><h1>{title}</h1><p>{line}</p><p class="quiet">{quiet}</p></header>
{body}
</body></html>
"""
