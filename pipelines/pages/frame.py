"""What every page is made of: the HTML around it, pictures inside it, tables of fields."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def embedded(path: Path, alt: str) -> str:
    """A picture file inside the page itself."""
    data = base64.b64encode(path.read_bytes()).decode()
    kind = {".png": "png", ".jpg": "jpeg"}[path.suffix]
    return f'<img alt="{html.escape(alt)}" src="data:image/{kind};base64,{data}">'


def definitions(fields: Mapping[str, Any]) -> str:
    """A table of names and values; None is left out."""
    rows = "".join(
        f"<tr><th>{html.escape(str(key))}</th><td>{html.escape(str(value))}</td></tr>"
        for key, value in fields.items()
        if value is not None
    )
    return f'<table class="fields">{rows}</table>'


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
.stats {{ display: grid; gap: 12px; padding: 12px;
  grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)) }}
.stat {{ padding: 8px 12px; border-left: 3px solid var(--fill) }}
.stat b {{ font-size: 26px; margin-right: 8px }} .stat small {{ display: block; color: var(--quiet) }}
img, svg {{ max-width: 100%; height: auto; display: block }} img {{ border-radius: 6px }}
svg {{ max-width: 640px }} rect {{ fill: var(--fill) }}
text {{ font-size: 12px; text-anchor: middle; fill: var(--quiet) }}
table {{ border-collapse: collapse; width: 100% }}
td, th {{ text-align: left; padding: 4px 10px 4px 0; border-bottom: 1px solid var(--line);
  font-weight: normal; vertical-align: top }} th {{ color: var(--quiet) }}
.fields td {{ overflow-wrap: anywhere }} .bar {{ width: 45% }}
.bar i {{ display: block; height: 10px; border-radius: 5px; background: var(--fill) }}
</style></head><body>
{body}
</body></html>
"""
