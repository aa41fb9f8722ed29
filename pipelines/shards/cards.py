"""What a dataset says about itself to readers without our code: README.md and croissant.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.shards.schema import COLUMNS
from pipelines.sources.records import BOX_AREA

MEANING = {
    "image": "the picture stored for the person: the view's crop or a cut of the photo; RGB once decoded",
    "image_to_picture": "2 x 3, row by row: photo px to px of the stored picture",
    "image_to_crop": "2 x 3, row by row: photo px to px of the network's input; mirrors where flipped",
    "keypoints": "K x (x, y, v): photo px, v 0 not labelled, 1 hidden, 2 seen; skeleton order, never flipped",
    "heatmaps": "K x H x W float16, C order, of this view (pairs swapped where flipped)",
    "weights": "K loss weights of this view's heatmaps, 0 or 1",
    "image_id": "id of the photo in the annotations",
    "ann_id": "id of the person in the annotations",
    "variant": "0 is the plain view, the others are augmented",
    "bbox_xywh": "the person's box in photo px, sanitised as the reference does",
    "center": "centre of the view in photo px",
    "scale": "width and height of the view in photo px",
    "rotation_deg": "rotation of the view",
    "flipped": "the view is a mirror image",
    "area": f"the annotated area in px^2; {BOX_AREA} x width x height of the box where there is none",
    "width": "of the photo",
    "height": "of the photo",
    "image_sha256": "of the photo's file",
}


def readme(fields: Mapping[str, Any]) -> str:
    """A Hugging Face dataset card of a manifest; the YAML head lets `datasets` find the splits."""
    config, splits = fields["config"], fields["splits"]
    width, height = config["input_size"]
    files = [f"  - split: {name}\n    path: data/{name}-*.parquet" for name in splits]
    sizes = []
    for name, split in splits.items():
        shards = split["shards"]
        megabytes = f"{sum(shard['bytes'] for shard in shards) / 1e6:.1f}"
        sizes.append((name, split["people"], split["photos"], split["variants"], len(shards), megabytes))
    rejected = [
        (name, reason, count["rows"], count["people"])
        for name, split in splits.items()
        for reason, count in split["rejected"].items()
    ]
    notes = [
        f"\n{name}: {split['repaired']['area_from_box']} people have no annotated area; it is "
        f"{BOX_AREA} x width x height of\ntheir box. An AP on them is not comparable to COCO's.\n"
        for name, split in splits.items()
        if "area_from_box" in split.get("repaired", {})
    ]
    meaning = [(name, f"`{kind}`", MEANING[name]) for name, kind in COLUMNS.items()]
    return f"""---
configs:
- config_name: default
  data_files:
{chr(10).join(files)}
task_categories:
- keypoint-detection
---

# Person crops with keypoint heatmaps

Made by `hrnet preprocess` for top-down pose at {height}x{width}: codec {config["codec"]}, sigma
{config["sigma"]:g} cells, skeleton {config["skeleton"]["name"]}. A row is one view of one person.

digest `{fields["digest"]}`

{_table(("split", "people", "photos", "views of each", "shards", "MB"), sizes)}

Left out; rejected.parquet has each one with its reason:

{_table(("split", "reason", "rows", "people"), rejected)}
{"".join(notes)}
{_table(("column", "type", "meaning"), meaning)}

Codec, sizes, skeleton and the plan's hash stand in each file's schema metadata under `hrnet`. In the crop a
keypoint lies at `image_to_crop` of (x, y, 1); in a flipped row the pairs change places as well. All views are
rows of their split: keep `variant` 0 for one row a person. The bytes of `heatmaps` are little-endian, of the
`dtype` and `shape` in that metadata:

```python
import json, numpy as np, pyarrow.parquet as pq
from datasets import load_dataset
row = load_dataset("PATH_OF_THIS_FOLDER")["{next(iter(splits))}"][0]
own = json.loads(pq.read_schema("{next(iter(splits.values()))["shards"][0]["path"]}").metadata[b"hrnet"])
heatmaps = np.frombuffer(row["heatmaps"], own["heatmaps"]["dtype"]).reshape(own["heatmaps"]["shape"])
```
"""


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


WORDS = """arrayShape citeAs column containedIn equivalentProperty extract field fileObject fileProperty
fileSet format includes isArray isLiveDataset jsonPath key md5 parentField path recordSet references regex
repeated replace samplingRate separator source subField transform"""
CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{word: f"cr:{word}" for word in WORDS.split()},
}
"""The standard's: its own WORDS are `cr:`, three are more than a name."""
PARQUET = "application/x-parquet"
TYPES = {"struct": "ImageObject", "float": "Float", "double": "Float", "bool": "Boolean", "int": "Integer"}
"""Types of schema.org by a word in the name of Arrow's; Text for the others."""


def croissant(fields: Mapping[str, Any]) -> str:
    """Croissant 1.1 JSON-LD of a manifest: each shard with its sha256, a record set for each split."""
    # A file set's pattern is read from the folder of croissant.json; each shard stands there with its hash.
    distribution: list[dict[str, Any]] = []
    for name, split in fields["splits"].items():
        distribution += [
            {
                "@type": "cr:FileObject",
                "@id": shard["path"],
                "name": shard["path"],
                "contentUrl": shard["path"],
                "contentSize": f"{shard['bytes']} B",
                "encodingFormat": PARQUET,
                "sha256": shard["sha256"],
            }
            for shard in split["shards"]
        ]
        distribution.append(
            {
                "@type": "cr:FileSet",
                "@id": f"{name}-shards",
                "encodingFormat": PARQUET,
                "includes": f"data/{name}-*.parquet",
            }
        )
    records = [
        {"@type": "cr:RecordSet", "@id": name, "name": name, "field": [_field(name, c) for c in COLUMNS]}
        for name in fields["splits"]
    ]
    dataset = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.1",
        "name": "hrnet-person-crops",
        "description": "Person crops with keypoints and precomputed heatmaps, made by hrnet preprocess.",
        "version": f"{fields['schema_version']}.0.0",
        "identifier": fields["digest"],
        "distribution": distribution,
        "recordSet": records,
    }
    return json.dumps(dataset, indent=1) + "\n"


def _field(split: str, column: str) -> dict[str, Any]:
    kind = str(COLUMNS[column])
    source = {"fileSet": {"@id": f"{split}-shards"}, "extract": {"column": column}}
    if kind.startswith("struct"):
        source["transform"] = {"jsonPath": "bytes"}
    field = {
        "@type": "cr:Field",
        "@id": f"{split}/{column}",
        "name": column,
        "description": MEANING[column],
        "dataType": "sc:" + next((name for word, name in TYPES.items() if word in kind), "Text"),
        "source": source,
    }
    return {**field, "isArray": True, "arrayShape": "-1"} if kind.startswith("list") else field
