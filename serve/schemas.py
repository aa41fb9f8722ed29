"""What the server answers: poses, models, and problems (RFC 9457 problem+json). No torch, no Ray here."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Answer(BaseModel):
    """The texts under the fields are in openapi.json and on /docs."""

    # A number that JSON has not would be answered as null: better a defect that is seen.
    model_config = ConfigDict(use_attribute_docstrings=True, allow_inf_nan=False)


class DetectorInfo(Answer):
    """The detector that finds people in pictures without boxes."""

    name: str
    sha256: str
    """Of MODEL.onnx and MODEL.json, one behind the other."""


class ModelInfo(Answer):
    """The model that computed an answer."""

    name: str
    version: str
    sha256: str
    """Of the weights."""
    mode: str
    flip_test: bool
    detector: DetectorInfo | None = None
    """null: none runs here."""


class ImageInfo(Answer):
    """The picture as displayed, that is after its EXIF orientation."""

    width: int
    height: int
    exif_rotated: bool
    """True where EXIF asked to turn or mirror the stored pixels."""


class Person(Answer):
    bbox: tuple[float, float, float, float]
    """x, y, w, h as asked for or found, px of the displayed picture."""
    box_score: float | None = None
    """The detector's; null where it did not find the box."""
    score: float
    """Mean of the keypoint scores above 0.2, times the score of a box that was found, as in the COCO
    protocol."""
    keypoints: list[tuple[float, float, float]]
    """x, y, score of each keypoint in the order of /v1/models; low scores are never left out."""


class Result(Answer):
    """One picture."""

    image: ImageInfo
    boxes_source: str
    """request: the boxes sent. detector: none were sent, people were found. whole_image: none were sent, the
    picture is taken as one person."""
    persons: list[Person]
    """One for each box, in the order of the boxes; those found: the best first."""
    warnings: list[str] = []
    """What may make the answer wrong although there is one, such as damaged JPEG data."""


class PosesAnswer(Answer):
    request_id: str
    model: ModelInfo
    results: list[Result]
    """One for each picture, in the order sent."""
    timings_ms: dict[str, float]
    """read: the body. decode: pictures and crops. detect: the detector and the wait for it, where it looked.
    queue: for a batch. infer: forward passes. total."""


class CocoResult(Answer):
    """A person with ?format=coco: a COCO keypoint result."""

    image_id: int
    category_id: int
    keypoints: list[float]
    """x, y, score of each keypoint, one after the other."""
    score: float
    bbox: tuple[float, float, float, float]


class OpenPosePerson(Answer):
    person_id: list[int]
    pose_keypoints_2d: list[float]
    """x, y, score of OpenPose's 18 keypoints, one after the other."""
    face_keypoints_2d: list[float]
    hand_left_keypoints_2d: list[float]
    hand_right_keypoints_2d: list[float]


class OpenPoseAnswer(Answer):
    """With ?format=openpose: OpenPose's JSON of a picture."""

    version: float
    converted: dict[str, Any]
    """What was not OpenPose's: the neck is the middle of the shoulders."""
    people: list[OpenPosePerson]


class LoadedDetector(DetectorInfo):
    """What /v1/models says of a detector."""

    source: str
    input_size: tuple[int, int]
    """(width, height), px."""
    score_threshold: float
    """Of people, where a request says none."""
    max_found: int
    """Most people of a picture."""
    batches: bool
    """Whether it takes several pictures in one run."""


class LoadedModel(ModelInfo):
    """What /v1/models says of a model."""

    detector: LoadedDetector | None = None
    source: str
    checkpoint: str
    input_size: tuple[int, int]
    """(width, height) of a crop, px."""
    codec: dict[str, Any]
    skeleton: dict[str, Any]
    """Names, mirror pairs, limbs of the keypoints, and `palette`: an RGB colour for each."""
    provenance: dict[str, Any]
    expected_scores: list[int] | None = None
    """Counts of keypoint scores in its evaluation, which ray_hrnet_keypoint_score_drift compares with; null:
    they are not known, and there is no such gauge."""


class NamedModel(Answer):
    """A model as it was deployed, loaded here or not."""

    name: str
    version: str
    sha256: str
    source: str
    detector: DetectorInfo | None = None


UNTOLD = "The model asked for last does not answer; whoever has a key is told why."


class ModelsAnswer(Answer):
    models: list[LoadedModel]
    """What answers here."""
    intended: NamedModel | None
    """What is to answer: of the last deploy that was not taken back."""
    previous: NamedModel | None
    """What answered before, and what `hrnet deploy --rollback` brings back."""
    last_load_error: str | None
    """Why the model asked for last is not the one above, or why its deploy was taken back; null where neither
    is so."""

    def without_paths(self) -> ModelsAnswer:
        """For whoever has no key: what answers, not where it lies and what it was made of."""
        untold = {"source": "", "checkpoint": "", "provenance": {}}
        named = {
            role: model and model.model_copy(update={"source": ""})
            for role, model in (("intended", self.intended), ("previous", self.previous))
        }
        models = [model.model_copy(update=untold | {"detector": _untold(model)}) for model in self.models]
        return self.model_copy(
            update={"models": models, **named, "last_load_error": self.last_load_error and UNTOLD}
        )


def _untold(model: LoadedModel) -> LoadedDetector | None:
    return model.detector and model.detector.model_copy(update={"source": ""})


class ProblemAnswer(Answer):
    """RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    request_id: str


# --- problems ----------------------------------------------------------------------------------

PROBLEMS: dict[str, tuple[int, str]] = {
    "malformed-body": (400, "The body cannot be read"),
    "unauthorized": (401, "A key is needed"),
    "not-found": (404, "There is nothing at this address"),
    "method-not-allowed": (405, "This address does not take that method"),
    "slow-body": (408, "The body came too slowly"),
    "body-too-large": (413, "The body is too large"),
    "misdirected": (421, "This host is not served here"),
    "media-type": (415, "This media type is not read"),
    "several-frames": (415, "A file of several pictures is not read"),
    "invalid-field": (422, "A field is missing, unknown or wrong"),
    "invalid-boxes": (422, "The boxes cannot be used"),
    "too-many-images": (422, "Too many pictures in one request"),
    "too-many-people": (422, "Too many people in one request"),
    "too-many-pixels": (422, "The picture has too many pixels"),
    "not-a-picture": (422, "The bytes are not a picture that is read here"),
    "truncated-picture": (422, "The picture is cut off"),
    "overloaded": (429, "All places are taken"),
    "internal-error": (500, "The server failed"),
    "not-ready": (503, "No model is ready"),
    "draining": (503, "The endpoint takes no more requests"),
    "deadline": (504, "The answer took too long"),
}
"""Slug of a problem's type (urn:hrnet:problem:SLUG): status and title. docs/serving.md lists them."""


def _short(text: str, most: int = 2000) -> str:
    """What a client sent may stand in it: 20 MB of a field's name are not sent back, nor logged."""
    return text if len(text) <= most else f"{text[:most]}..."


class Problem(Exception):
    """An answer that is an error. `detail` says what is wrong with this request and the way out."""

    def __init__(
        self, slug: str, detail: str, *, headers: dict[str, str] | None = None, **members: Any
    ) -> None:
        detail = _short(detail)
        super().__init__(detail)
        self.slug, self.detail, self.members = slug, detail, members
        self.status, self.title = PROBLEMS[slug]
        self.headers = headers or {}

    @classmethod
    def of_field(cls, field: str, slug: str, what: str, **members: Any) -> Problem:
        """One that names the field to blame, in its detail and as a member."""
        field = _short(field, 200)
        return cls(slug, f"{field}: {what}", field=field, **members)

    def body(self, instance: str, request_id: str) -> dict[str, Any]:
        """The members of the problem+json object."""
        return {
            "type": f"urn:hrnet:problem:{self.slug}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "instance": instance,
            "request_id": request_id,
            **self.members,
        }
