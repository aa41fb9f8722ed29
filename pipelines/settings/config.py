"""Every setting of a run, with its meaning under it. No torch, ray or mlflow here: `--help` is fast.

A YAML file fills a RunConfig (config_file.py); `--section.field` on the command line overrides it (cli.py).
Unknown keys and contradictions are refused by name. What takes part in the dataset's digest is
a Recipe (pipelines/shards/recipe.py); what names a run by default is `RunConfig.identity()`. The section
`train` is in train.py beside it, what the endpoint has of `serve` in serve/settings.py.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal

import tyro
from pydantic import Field, field_validator, model_validator

from hrnet_core.architecture import HRNetConfig
from hrnet_core.choices import MAX_PIXELS, OFFICIAL, PADDING, CodecName, ModeName, default_sigma
from pipelines.settings.section import Section
from pipelines.settings.train import WORKERS, TrainSettings
from serve.settings import BATCH_WAIT_S, MODEL_NAME, REPLICAS, Limits, ReplicaSettings

BoxesCategory = int | Literal["all"]
"""Which entries of a detector's file are people: those of a category_id, or all."""


class RunSettings(Section):
    name: str | None = None
    """The run's identity: the same name goes on where it stopped. Default: config name and 8 digits."""
    fresh: bool = False
    """Start this name anew: its earlier state is moved aside, never deleted."""
    storage: str = "runs"
    """Folder for checkpoints, pictures, reports and, without a tracking server, MLflow's database."""


SOURCES = ("root", "format", "category", "coordinates_checked", "shards", "strict")
"""Settings of DataSettings that say where the data is, not what it becomes."""


class DataSettings(Section):
    root: str = ""
    """Folder or URI (s3://, gs://, az://) of the annotated pictures; what lies there: docs/sources.md."""
    format: Literal["coco", "yolo_pose"] = "coco"
    """coco: annotations/person_keypoints_SPLIT.json beside SPLIT/ with the pictures. yolo_pose: images/ and
    labels/ with a text file a picture; for training, not for AP."""
    category: str | None = None
    """Name of the category that is read; "all" joins those with the skeleton's keypoints. Default: person, or
    the only one that lists keypoints."""
    coordinates_checked: bool = False
    """People do stand in the upper left of all pictures (a fixed camera): annotations that look as if they
    were px of smaller pictures are read as they stand."""
    shards: str = ""
    """Folder or URI of the preprocessed dataset (manifest.json, data/)."""
    train_split: str = "train2017"
    val_split: str = "val2017"
    """May be the training split itself, to see whether a network can learn what it is shown."""
    skeleton: str = "coco17"
    """"coco17", "crowdpose14", "mpii16", or the path of a skeleton JSON file."""
    input_size: tuple[int, int] = (192, 256)
    """(width, height) of a crop in px, multiples of 32."""
    codec: CodecName = "official"
    """How keypoints become heatmaps and back, with the crop geometry that belongs to it."""
    sigma: float | None = Field(default=None, gt=0)
    """Gaussian sigma in heatmap cells. Default: 2 x height / 256."""
    padding: float = Field(default=PADDING, gt=0)
    """Scale of the crop relative to the aspect-fixed box."""
    variants: int = Field(default=1, ge=1)
    """Views stored of each training person: 0 is the plain one, the others are augmented."""
    scale_factor: float = Field(default=OFFICIAL.scale_factor, ge=0, lt=1)
    """Of augmented views: standard deviation of the scale around 1, and where it is clipped."""
    rotation_factor: float = Field(default=OFFICIAL.rotation_factor, ge=0)
    """Of augmented views: standard deviation of the rotation in degrees, clipped at twice that."""
    half_body_probability: float = Field(default=OFFICIAL.half_body_probability, ge=0, le=1)
    flip_probability: float = Field(default=OFFICIAL.flip_probability, ge=0, le=1)
    context: Literal[1.0, 2.0] = 1.0  # type: ignore[valid-type]  # pydantic takes floats
    """1.0 stores the view's own crop. 2.0 stores a cut of the photo around the person, twice as wide as the
    plain view: fresh views can be made of it (train.views device), stored ones are cropped from it."""
    people_per_shard: int = Field(default=2048, ge=1)
    row_group_people: int = Field(default=128, ge=1)
    image_format: Literal["jpeg", "png"] = "jpeg"
    jpeg_quality: int = Field(default=95, ge=1, le=100)
    max_pixels: int = Field(default=MAX_PIXELS, ge=1)
    """A picture whose header promises more is rejected before it is decoded."""
    seed: int = Field(default=0, ge=0)
    """Seed of the stored views."""
    strict: bool = False
    """End with exit code 2 when any picture or person had to be rejected."""

    @model_validator(mode="after")
    def _check(self) -> DataSettings:
        if any(side <= 0 or side % 32 for side in self.input_size):
            raise ValueError(f"input_size must be positive multiples of 32, got {self.input_size}")
        return self

    @property
    def sigma_cells(self) -> float:
        """Sigma in heatmap cells with the default filled in."""
        return self.sigma if self.sigma is not None else default_sigma(self.input_size)


class ModelSettings(Section):
    width: int = 32
    """Channels of the highest-resolution branch: 32 for W32, 48 for W48."""
    stem_width: int = 64
    bottlenecks: int = 4
    modules: tuple[int, int, int] = (1, 4, 3)
    """Exchange modules of stage 2, 3 and 4."""
    blocks: int = 4
    """Basic blocks of each branch of a module."""
    init: str | None = None
    """Weights to start from: a checkpoint folder or a published file (ImageNet, COCO). None: from scratch."""
    initialization: Literal["published", "kaiming"] = "published"
    """Where nothing is loaded. published: convolutions N(0, 0.001), the reference's. kaiming: N(0, 2/fan_out)
    and a small head, which learns faster from scratch."""

    def architecture(self, num_keypoints: int) -> HRNetConfig:
        """The network that these settings describe."""
        return HRNetConfig(num_keypoints=num_keypoints, **self.model_dump(exclude={"init", "initialization"}))


class WorkerSettings(Section):
    """How the network runs over work units, in evaluate and predict alike (pipelines/poses/units.py)."""

    batch_size: int = Field(default=32, ge=1)
    """People of a forward pass; fixed per work unit, because it changes float results."""
    mode: Literal["auto", ModeName] = "auto"
    """How the network runs (docs/modes.md). auto: the fastest that the checkpoint has measured as exact
    enough; the table and the protocol say which."""
    compile_cache: str | None = None
    """Folder that keeps what compiled modes compile. Default: TORCHINDUCTOR_CACHE_DIR, else hrnet/compiled
    in the user's cache folder."""
    max_pixels: int = Field(default=MAX_PIXELS, ge=1)
    """A picture or video whose header promises more is rejected before it is decoded."""
    num_workers: int | None = Field(default=None, ge=1)
    """Ray Data actors, each with the model; results do not depend on it. Default: as many as fill the
    machine; on a cluster, the nodes that are there when the stage starts."""
    cpus_per_worker: int | None = Field(default=None, ge=1)
    """CPUs of an actor: threads of its network, and pictures decoded at a time. Results depend on it by
    rounding only, with use_gpu not at all. Default: 1, or 2 for passes of one thread where units are few;
    with use_gpu the GPU's share of its machine's CPUs, of which Ray is asked for 1."""
    use_gpu: bool = False
    """One GPU for each actor."""

    @property
    def threads(self) -> int:
        """Of a network on the CPU, in an actor: they decide how its sums are rounded."""
        return 1 if self.use_gpu else self.cpus_per_worker or 1

    @property
    def device(self) -> str:
        """Where an actor's network runs: "cuda" or "cpu"."""
        return "cuda" if self.use_gpu else "cpu"


class EvaluateSettings(WorkerSettings):
    flip_test: bool = True
    """Average with the mirror image, shifted as the codec wants."""
    preset: Literal["official", "mmpose"] = "official"
    """Where the two protocols differ: the box rule and the border of the quarter offset."""
    category: str | None = None
    """Name of the category that is scored; "all" joins those of the skeleton, as one. Default: person, or the
    only one that lists keypoints, whatever data.category was."""
    coordinates_checked: bool = False
    """As data.coordinates_checked, of the annotations that are scored against."""
    boxes_category: BoxesCategory | None = None
    """category_id that people have in the detector's file; "all": whatever they have. Default: those of the
    annotations that are scored."""
    score_threshold: float = 0.0
    """Detector boxes below this are left out."""
    keypoint_threshold: float = 0.2
    """Keypoints above this take part in a person's score."""
    oks_nms: float = Field(default=0.9, gt=0, le=1)
    """Of two predictions of one image with a higher OKS, the lower score goes."""
    soft_nms: bool = False


class PredictSettings(WorkerSettings):
    formats: tuple[Literal["coco", "parquet", "openpose", "overlays", "videos"], ...] = ("coco", "parquet")
    """What to write: COCO results, a table, a JSON file a picture, pictures and videos with skeletons."""
    flip_test: bool | None = None
    """Average with the mirror image: twice the work. Default: what the checkpoint says."""
    exif: bool = True
    """Turn pictures as their EXIF says, as viewers do. Off for boxes of stored pixels: COCO's annotations."""
    boxes_category: BoxesCategory = 1
    """category_id that people have where --boxes is a list of detections; "all": whatever they have."""
    category_id: int = 1
    """Of everyone in poses.json: what they have in the annotations that it is scored against."""
    score_threshold: float | None = None
    """Boxes scoring less are left out. Default: what the detector's declaration says; 0 for a boxes file."""
    draw_threshold: float = 0.3
    """Keypoints above this are drawn. Files always hold all of them."""
    video_stride: int = Field(default=1, ge=1)
    """Every how many-th frame of a video, from the first."""


class TrackSettings(Section):
    uri: str | None = None
    """MLflow tracking URI. Default: MLFLOW_TRACKING_URI, else SQLite in the storage folder."""
    experiment: str = "hrnet"
    registered_model: str = MODEL_NAME
    """In the registry: train adds versions, promote moves its champion, predict and deploy take that."""
    onnx: bool = True
    """Versions carry model.onnx beside the weights. At the end of a run it takes 31 s of a core for W32."""


class ServeSettings(Section, Limits, ReplicaSettings):
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every interface. Other than a loopback address it needs `keys`."""
    anyone: bool = False
    """Answer whoever reaches the endpoint, without keys, wherever it listens."""
    port: int = Field(default=8000, ge=1, le=65535)
    detector: str | None = None
    """ONNX person detector (path or URI), its declaration MODEL.json beside it: finds the people of pictures
    that come without boxes. Default: such a picture is taken as one person."""
    grpc_port: int | None = Field(default=None, ge=1, le=65535)
    """Also answer the Open Inference Protocol over gRPC, on this port."""
    replicas: int = Field(default=REPLICAS, ge=1)
    """Copies of the model that share the requests."""
    cpus_per_replica: float | None = Field(default=None, gt=0)
    """CPUs of a replica, and threads of its network. Default: the machine's, shared by the replicas (Ray
    counts half of them, so that their successors fit beside them); on a cluster 1."""
    use_gpu: bool = False
    """One GPU for each replica."""
    batch_wait_ms: float = Field(default=1000 * BATCH_WAIT_S, ge=0)
    """How long an idle model waits for more people. While it is busy, the next batch gathers anyway."""
    haproxy: bool | None = None
    """True: HAProxy takes the requests; False: Serve's Python proxy, which is slower and answers its own
    errors in plain text. Default: HAProxy where it is installed (Linux), on a cluster unless `host` is a
    loopback address."""

    @model_validator(mode="after")
    def _check(self) -> ServeSettings:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is less than replicas {self.replicas}")
        if self.grpc_port == self.port:
            raise ValueError(f"grpc_port {self.grpc_port} is the port of HTTP: give it another one")
        if self.device.startswith("cuda") and not self.use_gpu:
            raise ValueError(f"device {self.device!r} needs use_gpu: Ray hides GPUs that nobody asked for")
        return self


class SweepSettings(Section):
    """What `hrnet sweep` tries; without effect on other verbs."""

    space: Annotated[dict[str, dict[str, Any]], tyro.conf.Suppress] = Field(default={})
    """Settings that vary, in the config file alone: {train.lr: {loguniform: [1.0e-4, 1.0e-2]}}, or uniform,
    randint (both ends too), choice."""
    trials: int = Field(default=10, ge=1)
    """How many points of the space are tried. More of them later: the same command with a higher number."""
    seed: int = Field(default=0, ge=0)
    """Of the points."""
    grace_epochs: int = Field(default=1, ge=1)
    """No trial is stopped before so many epochs."""
    reduction: int = Field(default=3, ge=2)
    """At grace_epochs, grace_epochs x reduction, ... epochs one of so many trials goes on (ASHA)."""
    concurrent: int | None = Field(default=None, ge=1)
    """Trials at a time, each of train.num_workers workers. Default: as many as Ray has room for at first."""


class RaySettings(Section):
    num_cpus: int | None = Field(default=None, ge=1)
    """CPUs of the Ray that this verb starts here; no effect where RAY_ADDRESS names a cluster. Default: all
    that this process may use (those of the machine that it is bound to, within its container's quota)."""
    metrics_port: int | None = Field(default=None, ge=1, le=65535)
    """Port of the loopback address where the Ray that this verb starts here shows Prometheus metrics (other
    interfaces: docs/cluster.md#ports). Default: of deploy 9464, or any free one where that is taken; of other
    verbs any free one."""
    wait_minutes: float = Field(default=30.0, gt=0)
    """How long to wait for a cluster to bring the workers asked for."""
    labels: dict[str, str] = Field(default={})
    """Labels that a cluster's node must have to do the work of this verb, as `ray start --labels` gave them:
    `--ray.labels hrnet-pool gpu`. Default: any node with room. No effect on a Ray that is started here."""

    @field_validator("labels")
    @classmethod
    def _exact(cls, labels: dict[str, str]) -> dict[str, str]:
        for name, value in labels.items():
            if not re.fullmatch(r"[A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?", value):
                raise ValueError(
                    f"{name} {value!r}: give the label's value, of letters, digits, '-', '_' and '.'; Ray's "
                    f"operators such as in(...) and ! are not taken"
                )
        return labels


class RunConfig(Section):
    run: RunSettings = RunSettings()
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    predict: PredictSettings = PredictSettings()
    track: TrackSettings = TrackSettings()
    serve: ServeSettings = ServeSettings()
    sweep: SweepSettings = SweepSettings()
    ray: RaySettings = RaySettings()
    config_name: Annotated[str, tyro.conf.Suppress] = "custom"
    """Stem of the YAML file this came from."""

    def decides(self) -> dict[str, Any]:
        """{"train.lr": 0.001, ...}: what decides a run's result. A run goes on only with the same ones."""
        decides = {
            "data": self.data.model_dump(mode="json", exclude=set(SOURCES)),
            "model": self.model.model_dump(mode="json"),
            "train": self.train.model_dump(mode="json", exclude=set(WORKERS)),
        }
        return {f"{section}.{key}": value for section, keys in decides.items() for key, value in keys.items()}

    def identity(self, dataset_digest: str) -> str:
        """Default run name: config name and 8 digits of what decides the result and of the data."""
        text = json.dumps([self.decides(), dataset_digest], sort_keys=True)
        return f"{self.config_name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def reference() -> str:
    """docs/configuration.md: every section and setting with its default and meaning, from the fields."""
    lines = [
        "# Configuration",
        "",
        "Written from the code: `python -m pipelines.settings.config > docs/configuration.md`.",
        "",
        "A YAML file holds sections of settings; on the command line the same setting is `--section.setting`",
        "with hyphens (`--train.batch-size 64`, `--data.input-size 192 256`, `--train.use-gpu`,",
        "`--train.no-use-gpu`). An unknown key, or settings that contradict each other, end with exit code 2",
        "and the name of the key.",
    ]
    sections = {name: section for name, section in RunConfig() if isinstance(section, Section)}
    for name, section in sections.items():
        lines += ["", f"## {name}", "", "| setting | default | meaning |", "|---|---|---|"]
        for key, field in type(section).model_fields.items():
            default, meaning = json.dumps(field.default), " ".join((field.description or "").split())
            lines.append(f"| `{name}.{key}` | `{default}` | {meaning} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(reference())
