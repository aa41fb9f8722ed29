"""`hrnet import`: weights that others published become a checkpoint folder, with a report of what matched."""

from __future__ import annotations

import re
from pathlib import Path

from hrnet_core.choices import CodecName
from hrnet_core.errors import CheckpointError, ConfigError, shown
from hrnet_core.locations import folder_to_write
from hrnet_core.skeleton import load_skeleton
from pipelines.process.code_version import code_version
from pipelines.storage.files import base_name, is_file, join, sha256_of
from pipelines.tracking.checkpoints import put_checkpoint


def import_weights(
    file: str | Path,
    out: str | Path,
    codec: CodecName,
    input_size: tuple[int, int],
    skeleton: str = "coco17",
    sigma: float | None = None,
) -> None:
    """Read FILE (every published layout: published.read_weights), write the folder OUT, print the report.
    Both are paths or URIs.

    Width, modules and keypoints are read from the shapes. codec, input_size (width, height) and sigma are
    the caller's word: no weights file tells what it was trained for, and a wrong codec costs accuracy
    without an error. The file's name may: what it contradicts is refused.

    CheckpointError: unreadable, incomplete, another number of keypoints than the skeleton, no keypoint head,
    a folder that says for itself what it was trained for. ConfigError: a codec or size there is not, or of
    which the file's name says otherwise. Nothing is written then.
    """
    from hrnet_core.checkpoint import DESCRIPTION, CheckpointSpec
    from hrnet_core.heatmaps import HeatmapCodec
    from hrnet_core.published import fit_weights, read_weights

    out = folder_to_write(out, "OUT")
    try:
        heatmaps = HeatmapCodec(codec, input_size, sigma)  # type: ignore[arg-type]  # None: the usual one
        if any(side % 32 for side in heatmaps.input_size):
            raise ValueError(f"input_size must be two multiples of 32, got {input_size}")
    except ValueError as error:
        raise ConfigError(f"--codec, --input-size or --sigma: {error}.") from None
    _refuse_contradiction(base_name(str(file)), codec, heatmaps.input_size)
    if is_file(join(str(file), DESCRIPTION)):
        raise CheckpointError(
            f"{file}: a checkpoint folder already: its {DESCRIPTION} has codec, size and skeleton. Name it "
            f"as it is wherever a CHECKPOINT is asked for."
        )
    body = load_skeleton(skeleton)
    published = read_weights(file)
    architecture = published.architecture
    if architecture.num_keypoints != body.num_keypoints:
        raise CheckpointError(
            f"{file}: final_layer makes {architecture.num_keypoints} heatmaps, but skeleton {body.name!r} "
            f"has {body.num_keypoints} keypoints. Name the skeleton it was trained for: --skeleton FILE."
        )
    state, report = fit_weights(published, architecture)
    provenance = {
        "code_version": code_version(),
        "imported_from": base_name(str(file)),
        "file_sha256": sha256_of(file) if is_file(str(file)) else None,
        "key_names": report.scheme,
    }
    spec = CheckpointSpec(architecture, heatmaps, body, provenance=provenance)
    put_checkpoint(out, state, spec)
    width, height = spec.input_size
    print(shown(str(report), keep="\n"))  # it names the keys of their file
    print(
        f"wrote {out}: width {architecture.width}, {architecture.num_keypoints} keypoints ({body.name}), "
        f"input {height}x{width}, codec {heatmaps.name}, sigma {heatmaps.sigma:g} (size and codec as you "
        f"said: the file does not tell)"
    )


def _refuse_contradiction(name: str, codec: str, input_size: tuple[int, int]) -> None:
    """ConfigError where the name of a published file says another size or codec. Names write the height first
    (256x192), --input-size the width."""
    width, height = input_size
    found = [(int(a), int(b)) for a, b in re.findall(r"(?<!\d)(\d+)x(\d+)(?!\d)", name)]
    sizes = [size for size in found if not any(side % 32 for side in size)]
    way_out = "Rename the file if its name is wrong"
    if sizes and (height, width) not in sizes:
        raise ConfigError(
            f"--input-size {width} {height} (width, height) is not what {name!r} says: --input-size "
            f"{sizes[0][1]} {sizes[0][0]}. {way_out}."
        )
    said = [other for other in ("udp", "dark") if re.search(rf"(?<![a-z]){other}(?![a-z])", name.lower())]
    if said and codec not in said:
        raise ConfigError(f"--codec {codec} is not what {name!r} says: --codec {said[0]}. {way_out}.")
