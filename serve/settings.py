"""Settings of the endpoint. `hrnet deploy` (its config.py) and Serve config files have them from here.

Nothing but pydantic: `hrnet --help` reads this.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from hrnet_core.choices import ModeName

# What the two call by different names.
MODEL_NAME = "hrnet-pose"
REPLICAS = 1
CPUS_PER_REPLICA = 1.0
BATCH_WAIT_S = 0.0


def _host_name(name: str) -> str:
    """As requests are compared with it. ValueError where none would ever match."""
    if not re.fullmatch(r"\*|\[[0-9a-fA-F:.]+\]|[^\s/:*@]+", name):
        raise ValueError("not a host name: write it without scheme, port and path (poses.example.com), or *")
    return name.lower()


def _origin(origin: str) -> str:
    """As browsers send it. ValueError where none would ever match."""
    if not re.fullmatch(r"\*|[a-zA-Z][a-zA-Z0-9+.-]*://[^\s/*@?#]+", origin):
        raise ValueError("not an origin: write scheme and host and no / behind (https://example.com), or *")
    return origin.lower()


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Limits(Settings):
    """What one request may ask for. More is refused by name, never cut."""

    max_body_bytes: int = Field(default=32 * 2**20, ge=1)
    """A longer body is not read to its end (413)."""
    body_idle_s: float = Field(default=5.0, gt=0)
    """A body of which nothing comes for this long is given up (408)."""
    body_s: float = Field(default=30.0, gt=0)
    """A body must be whole within this time (408). The deadline of the work begins when it is."""
    max_pixels: int = Field(default=50_000_000, ge=1)
    """A picture whose header promises more is refused before it is decoded."""
    max_people: int = Field(default=128, ge=1)
    """Boxes in one request, over all its pictures."""
    max_images: int = Field(default=16, ge=1)
    """Pictures in one request."""
    first_frame: bool = False
    """Take the first picture of an animation or of a file with several pages; else it is refused (415)."""


class ReplicaSettings(Settings):
    """How one replica works."""

    device: str = "auto"
    """Torch device of the model; auto: the replica's GPU if it has one, else the CPU."""
    mode: Literal["auto", ModeName] = "auto"
    """How the network runs (docs/modes.md). auto: the fastest that the checkpoint has measured as exact
    enough."""
    compile_cache: str | None = None
    """Folder that keeps what compiled modes compile. Default: TORCHINDUCTOR_CACHE_DIR, else hrnet/compiled
    in the user's cache folder."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of a forward pass; default: the replica's CPUs."""
    flip_test: bool | None = None
    """Average with the mirror image: twice the work. Default: what the checkpoint says."""
    max_batch_people: int = Field(default=32, ge=1)
    """People of one forward pass, gathered over requests."""
    score_threshold: float | None = Field(default=None, ge=0, le=1)
    """People that the detector scores less are left out. Default: what its declaration says. A request may
    say another one."""
    max_found: int = Field(default=64, ge=1)
    """Most people that the detector may find in one picture: of more the best are answered, with a warning. A
    request may say fewer."""
    max_batch_pictures: int = Field(default=8, ge=1)
    """Pictures in one run of the detector, gathered over requests, where it takes several."""
    max_requests: int = Field(default=64, ge=1)
    """Requests in progress in one replica, their bodies whole; the next one gets 429."""
    max_bodies: int = Field(default=256, ge=1)
    """Bodies that one replica reads at a time; the next one gets 429."""
    max_bytes_held: int = Field(default=256 * 2**20, ge=1)
    """Bytes of bodies in one replica, while they are read and worked on; the next one gets 429. At least
    what one body may have is taken."""
    max_pixels_held: int = Field(default=64_000_000, ge=1)
    """Pixels in one replica's memory at a time, of pictures being decoded and of people cut out: 3 bytes
    each, up to 12 while a progressive JPEG is decoded. Requests beyond wait their turn, in order, up to
    half the deadline (then 429). One request is always let in."""
    deadline_s: float = Field(default=30.0, gt=0)
    """Work on a whole body that takes longer gets 504."""
    max_replicas: int | None = Field(default=None, ge=1)
    """With this, Ray Serve scales the replicas with the load, up to this many."""
    keys: str | None = None
    """File of the keys that requests must bring, a line each: NAME KEY [rate=5] [share=0.25]. Read again when
    it changes. The environment variable HRNET_SERVE_KEYS of the replicas holds more of them."""
    key_rate: float | None = Field(default=None, gt=0)
    """Requests a second that one key may make in one replica (429); default: as many as there is room for."""
    key_share: float = Field(default=1.0, gt=0, le=1)
    """Share of `max_requests` that one key may have in progress in one replica (429)."""
    hosts: tuple[Annotated[str, AfterValidator(_host_name)], ...] = ()
    """Host names that requests may be addressed to (421), * for any. Default: where `host` is a loopback
    address its names, else any."""
    cors_origins: tuple[Annotated[str, AfterValidator(_origin)], ...] = ()
    """Origins whose pages may ask from a browser, such as https://example.com; * for all."""
    log_format: Literal["text", "json"] = "text"
    """Of the replicas' log: a line for each request, with its id, status, problem, key's name, version and
    times; never pictures or boxes."""
    traces: str | None = None
    """Where OpenTelemetry traces of requests go, by OTLP over HTTP, such as http://127.0.0.1:4318. Default:
    where OTEL_EXPORTER_OTLP_ENDPOINT of the replicas' environment says, else none are made."""
    samples: str | None = None
    """Pictures for the page: a folder with a boxes.json; `hrnet deploy` takes the picture folder of a COCO
    split too."""


class DetectorChoice(Settings):
    """An ONNX detector that finds the people of pictures that come without boxes."""

    model: str
    """MODEL.onnx, a path or URI, with its declaration MODEL.json beside it (docs/predict.md)."""
    source: str = ""
    """What was asked for; shown by /v1/models, and answers carry the last part of it."""
    sha256: str = ""
    """Of the two files, one behind the other (cat MODEL.onnx MODEL.json | sha256sum). A replica refuses a
    detector with another; empty: whatever lies there."""

    @property
    def name(self) -> str:
        return (self.source or self.model).partition("?")[0].rpartition("/")[2]


class ModelChoice(Settings):
    """A checkpoint, and the name and version that its answers carry."""

    checkpoint: str
    """Checkpoint folder, or its URI (s3://, gs://, az://, file://) that pyarrow can read."""
    version: str = ""
    """Version of the registered model, or anything that tells this checkpoint from the next."""
    source: str = ""
    """What was asked for, such as models:/hrnet-pose@champion; shown by /v1/models."""
    name: str = MODEL_NAME
    sha256: str = ""
    """Of the weights. A replica refuses a checkpoint with others; empty: whatever lies there."""
    expected_scores: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Counts of keypoint scores in its evaluation (`keypoint_scores` of evaluation.json), which the gauge
    ray_hrnet_keypoint_score_drift compares with; none: no such gauge."""
    person_detector: DetectorChoice | None = None
    """None: a picture without boxes is taken as one person."""


class LiveSettings(ModelChoice):
    """Serve's user_config: a change of it switches the model inside the running replicas."""

    previous: ModelChoice | None = None
    """What was live before: a replica that cannot load the one above at its start serves this one, and
    `hrnet deploy --rollback` brings it back."""
    last_failure: str = ""
    """Why the deploy before this one was taken back; shown by /v1/models."""
    draining: bool = False
    """Requests are answered with 503 and Retry-After: the endpoint is about to end."""

    def choice(self) -> ModelChoice:
        return ModelChoice(**self.model_dump(include=set(ModelChoice.model_fields)))


class ServeArgs(LiveSettings, ReplicaSettings):
    """Arguments of `serve.app:build`; `args:` of a Serve config file."""

    checkpoint: str = ""
    """Not needed in `args:` of a Serve config file whose user_config names it."""
    limits: Limits = Limits()
    need_keys: bool = False
    """A replica that finds no keys does not start."""
    here_only: bool = False
    """Calls over gRPC are answered to this machine alone: Serve's gRPC servers listen on every interface."""
    batch_wait_s: float = Field(default=BATCH_WAIT_S, ge=0)
    """How long an idle model waits for more people; while it is busy, the next batch gathers anyway."""
    num_replicas: int = Field(default=REPLICAS, ge=1)
    num_cpus: float = Field(default=CPUS_PER_REPLICA, gt=0)
    num_gpus: float = Field(default=0.0, ge=0)
    code: str = ""
    """Version of hrnet that deployed it: another one needs new replicas."""
    labels: dict[str, str] = {}
    """Of the nodes that replicas may run on, as Ray's label_selector; none: any with room."""
