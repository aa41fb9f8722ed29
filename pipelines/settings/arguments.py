"""The arguments of each verb as a model: what is acted on without a flag, settings as `--section.field`.

The field of a verb is its flag, the text under it its help. Configs (preprocess, train) are a RunConfig.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import tyro
from pydantic import Field

from hrnet_core.choices import CodecName, FormatName, ModeName
from pipelines.process.environment import usable_cpus
from pipelines.settings.config import (
    DataSettings,
    EvaluateSettings,
    PredictSettings,
    RaySettings,
    RunSettings,
    ServeSettings,
    TrackSettings,
)
from pipelines.settings.section import Section

DATA = DataSettings()
"""What is not said otherwise of people, pictures and crops is as in preprocessing."""


def positional(name: str) -> tuple[Any, Any]:
    """Marks of an argument that has no flag, under the name that the usage line shows."""
    return tyro.conf.Positional, tyro.conf.arg(metavar=name)


class Draw(Section):
    out: Annotated[str, *positional("OUT")]
    """Folder or URI to write the COCO root into."""
    images: int = Field(default=200, ge=1)
    """Training pictures."""
    val_images: int | None = Field(default=None, ge=1)
    """Validation pictures; default: a fifth of `images`, at least 4."""
    seed: int = Field(default=0, ge=0)
    workers: int = Field(default_factory=usable_cpus, ge=1)
    """Processes; the pictures do not depend on it."""


class Validate(Section):
    coco: Annotated[str, *positional("COCO")]
    """COCO root, a folder or URI."""
    decode: bool = True
    """Decode every picture, as preprocess will. Without: header and end only, several times faster; damage
    in between is not seen."""
    read: int = Field(default=2000, ge=0)
    """Pictures of a split that are read to their end, spread evenly; of the others the header is judged.
    0: all. A checksum list needs all."""
    checksums: str | None = None
    """File as sha256sum writes it, with paths relative to COCO: names pictures with other bytes."""
    examples: int = Field(default=3, ge=0)
    """Rows shown of each kind."""
    out: str | None = None
    """Also write every finding into this CSV file."""
    page: str | None = None
    """Also write an HTML page of the findings, with an example of each drawn into its picture."""
    workers: int = Field(default_factory=usable_cpus, ge=1)
    """Threads that open pictures."""
    data: DataSettings = DataSettings()


class Inspect(Section):
    shards: Annotated[str, *positional("SHARDS")]
    """Folder or URI of a dataset that hrnet preprocess wrote."""
    out: str | None = None
    """Folder or URI for the page, the pictures and card.json; default: SHARDS_inspection beside the
    dataset."""
    coco: str | None = None
    """The COCO root it was made from: shows the pictures of what was left out."""
    log: bool = False
    """Also record card and pictures in MLflow, as the run of this dataset's digest."""
    run: RunSettings = RunSettings()
    track: TrackSettings = TrackSettings()


class Evaluate(Section):
    checkpoint: Annotated[str | None, *positional("CHECKPOINT")] = None
    """Checkpoint folder, URI, or models:/hrnet-pose@champion."""
    coco: Annotated[str | None, *positional("COCO")] = None
    """COCO root, a folder or URI."""
    boxes: str | None = None
    """Person detections as COCO results JSON; default: the ground truth's boxes."""
    split: str = DATA.val_split
    results: str | None = None
    """Score this COCO results file instead of running a model; needs ground_truth."""
    ground_truth: str | None = None
    """Annotations that `results` is scored against."""
    skeleton: str = DATA.skeleton
    """For `results`: whose OKS constants to use."""
    use_area: bool = True
    """For `results`: OKS by the annotations' area; without it by the box, for sets that have none."""
    measure_modes: bool = False
    """Evaluate in every execution mode and write the differences into checkpoint.json, for mode auto."""
    report: str | None = None
    """Also write one HTML file with figures and pictures here."""
    out: str | None = None
    """Folder or URI for results and pictures; default: beside the checkpoint. For `results`: for
    figures.json with all digits."""
    evaluate: EvaluateSettings = EvaluateSettings()
    run: RunSettings = RunSettings()
    track: TrackSettings = TrackSettings()
    ray: RaySettings = RaySettings()


class Benchmark(Section):
    checkpoint: Annotated[str, *positional("CHECKPOINT")]
    """Checkpoint folder, URI or registered version; or a config such as w32_256x192, for random weights."""
    modes: tuple[ModeName, ...] = ()
    """Which to measure; default: all that run here."""
    batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Crops of a call; default: 1, 2, 4 and so on to 256, as far as a pass does not take too long."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; default: as many as torch takes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    json_file: Annotated[str | None, tyro.conf.arg(name="json")] = None
    """Also write every figure into this JSON file."""
    run: RunSettings = RunSettings()
    track: TrackSettings = TrackSettings()


class Predict(Section):
    sources: Annotated[tuple[str, ...], *positional("SOURCE...")] = ()
    """Pictures, videos, folders, globs, URIs of buckets."""
    checkpoint: str | None = None
    """Checkpoint folder, URI or registered version; default: the champion of --track.registered-model."""
    boxes: str | None = None
    """JSON with people's boxes: COCO annotations or detections, or {"picture.jpg": [[x, y, w, h], ...]}."""
    detector: str | None = None
    """ONNX person detector, its declaration MODEL.json beside it. Neither: each picture is one person."""
    out: str | None = None
    """Folder or URI for the results; default: STORAGE/predictions/NAME-DIGEST."""
    predict: PredictSettings = PredictSettings()
    run: RunSettings = RunSettings()
    track: TrackSettings = TrackSettings()
    ray: RaySettings = RaySettings()


class Promote(Section):
    candidate: Annotated[str | None, *positional("CANDIDATE")] = None
    """Version of the registered model; default: the newest."""
    run: RunSettings = RunSettings()
    track: TrackSettings = TrackSettings()


class Deploy(Section):
    checkpoint: Annotated[str | None, *positional("CHECKPOINT")] = None
    """Checkpoint folder, URI or registered version; default: the champion of --track.registered-model."""
    rollback: bool = False
    """Bring back the version that was live before the one that is."""
    serve: ServeSettings = ServeSettings()
    run: RunSettings = RunSettings()
    track: TrackSettings = TrackSettings()
    ray: RaySettings = RaySettings()


class LoadTest(Section):
    url: Annotated[str, *positional("URL")]
    """Such as http://127.0.0.1:8000."""
    sources: Annotated[tuple[str, ...], *positional("SOURCE...")] = ()
    """Pictures, folders, globs, URIs of buckets; asked for in turn."""
    rates: tuple[Annotated[float, Field(gt=0)], ...] = (5.0,)
    """Requests a second, one after the other; each is a row of the table."""
    seconds: float = Field(default=30.0, gt=0)
    """How long requests come at each rate."""
    boxes: str | None = None
    """JSON with people's boxes, as hrnet predict takes it; pictures without are left out. Default: each
    picture is one person."""
    even: bool = False
    """Arrivals at equal distances; default: at random (Poisson), as of clients that know nothing of each
    other."""
    seed: int = Field(default=0, ge=0)
    at_once: int = Field(default=512, ge=1)
    """Requests on the way at most; beyond, they are sent late, and that is said."""
    timeout_s: float = Field(default=60.0, gt=0)
    key_file: str | None = None
    """Its first key is sent; default: HRNET_KEY of the environment."""
    json_file: Annotated[str | None, tyro.conf.arg(name="json")] = None
    """Also write every figure into this JSON file."""


class Import(Section):
    file: Annotated[str, *positional("FILE")]
    """Published weights: official, MMPose 0.x or 1.x, or any file with the published names."""
    out: Annotated[str, *positional("OUT")]
    """Checkpoint folder to write, or the URI of one."""
    codec: CodecName = DATA.codec
    """What the weights were trained for."""
    input_size: tuple[int, int] = DATA.input_size
    """(width, height) of the crops the weights were trained for."""
    sigma: float | None = None
    skeleton: str = DATA.skeleton


class Export(Section):
    checkpoint: Annotated[str, *positional("CHECKPOINT")]
    """Checkpoint folder, URI, or models:/hrnet-pose@champion."""
    out: Annotated[str | None, *positional("OUT")] = None
    """File to write (.onnx; .xml with a .bin beside it; .ncnn.param with two); default: model.onnx,
    openvino_int8.xml or model.ncnn.param in the checkpoint folder, where modes find them; the other formats
    have none."""
    format: FormatName = "onnx"
    """onnx: images -> heatmaps. onnx_decoded: crops -> keypoints. onnx_float16: for GPUs. openvino,
    openvino_int8: OpenVINO's own files. ncnn: ncnn's."""
    shards: str | None = None
    """Preprocessed shards: int8 is calibrated on some of their crops."""
    shards_split: str = DATA.train_split
    coco: str | None = None
    """COCO root: compare keypoints and AP on some of its people too."""
    split: str = DATA.val_split
    boxes: str | None = None
    """Person detections as COCO results JSON; default: the ground truth's boxes."""
    people: int = Field(default=200, ge=1)
    """How many people to compare on, in whole photographs from the first."""
    evaluate: EvaluateSettings = EvaluateSettings()
    run: RunSettings = RunSettings()
    track: TrackSettings = TrackSettings()


class EstimateSigmas(Section):
    files: Annotated[tuple[str, ...], *positional("ANNOTATIONS.json")] = ()
    """Two or more COCO keypoint files of the same people, one an annotator."""
    out: str = "skeleton.json"
    """Skeleton file to write."""
    skeleton: str | None = None
    """Skeleton whose other fields are kept; default: names and limbs of the annotations."""
    use_area: bool = True
    """Distances by the annotations' area; without it by the box, for sets that have none."""
    category: str | None = None
    """Name of the category that is compared; "all" joins those with the keypoints of the first. Default:
    person, or the only one that lists keypoints."""


class Reproduce(Section):
    coco: Annotated[str, *positional("COCO")]
    """COCO root with val2017."""
    weights_dir: str
    """Folder of the published pose_hrnet_*.pth files."""
    boxes: str
    """COCO_val2017_detections_AP_H_56_person.json, the published detector's boxes."""
    models: tuple[str, ...] = ()
    """Which of w32_256x192 w32_384x288 w48_256x192 w48_384x288; default: all."""
    out: str = "runs/reproduce"
    evaluate: EvaluateSettings = EvaluateSettings()
    ray: RaySettings = RaySettings()
