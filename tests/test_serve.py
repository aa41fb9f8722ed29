"""The endpoint: its requests, answers and problems without Serve, then the same over HTTP on Ray Serve."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import re
import socket
import threading
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
import torch
import yaml
from free_ports import free_port
from PIL import Image

from hrnet_core.architecture import HRNetConfig
from hrnet_core.checkpoint import CheckpointSpec, fetch_checkpoint, save_checkpoint
from hrnet_core.errors import CheckpointError, ConfigError
from hrnet_core.heatmaps import HeatmapCodec
from hrnet_core.images import decode_image, encode_jpeg, encode_png
from hrnet_core.model import HRNet
from hrnet_core.predictor import PosePredictor
from serve import app as serving
from serve import client
from serve.haproxy import FULL_HEADER
from serve.model import ServedModel, load_model
from serve.routes import make_app
from serve.samples import load_samples
from serve.schemas import PROBLEMS
from serve.service import PoseService
from serve.settings import Limits, LiveSettings, ModelChoice, ServeArgs
from serve.work import Inferred, Portion, infer

BOXES = [[40.0, 20.0, 90.0, 200.0], [150.5, 60.0, 80.0, 120.0], [-20.0, -10.0, 100.0, 90.0]]


def photo(seed: int = 0, width: int = 320, height: int = 240) -> np.ndarray:
    """uint8 (H, W, 3): coloured patches, different for each seed."""
    rng = np.random.default_rng(seed)
    return cv2.resize(
        rng.integers(0, 256, (9, 12, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC
    )


def save_tiny(folder: Path, seed: int) -> Path:
    """A checkpoint of a very narrow network with random weights whose heatmaps have clear peaks."""
    torch.manual_seed(seed)
    config = HRNetConfig(width=4, stem_width=8, bottlenecks=1, modules=(1, 1, 1), blocks=1)
    model = HRNet(config)
    for parameter in model.parameters():
        if parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter)
    save_checkpoint(folder, model, CheckpointSpec(config, HeatmapCodec("official", (64, 96), sigma=1.0)))
    return folder


class Direct(PoseService):
    """The service without Serve: a portion is a batch of its own."""

    async def _infer_portion(self, portion: Portion) -> Inferred:
        (found,) = await self._infer([portion])
        if isinstance(found, Exception):
            raise found
        return found


def service_of(checkpoint: Path, **settings: Any) -> PoseService:
    args = ServeArgs(checkpoint=str(checkpoint), version="7", **settings)
    service = Direct(args, make_app)
    service.model = load_model(ModelChoice(checkpoint=args.checkpoint, version="7"), args)
    return service


@pytest.fixture(scope="module")
def service(checkpoint: Path) -> PoseService:
    return service_of(
        checkpoint, max_batch_people=2, limits=Limits(max_body_bytes=900_000, max_people=6, max_images=3)
    )


def call(service: PoseService, method: str, url: str, **options: Any) -> httpx.Response:
    """One request to the application of `service`."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.request(method, url, **options)

    return asyncio.run(send())


def assert_same(persons: list[dict[str, Any]], keypoints: np.ndarray, scores: np.ndarray) -> None:
    answered = np.array([p["keypoints"] for p in persons])
    np.testing.assert_allclose(answered[..., :2], keypoints, rtol=0, atol=1e-3)
    np.testing.assert_allclose(answered[..., 2], scores, rtol=1e-4, atol=1e-3)


# --- answers ------------------------------------------------------------------------------------


def test_portions_of_a_request_come_back_in_the_order_of_its_boxes(
    service: PoseService, predictor: PosePredictor
) -> None:
    data = encode_png(photo())
    response = call(
        service, "POST", "/v1/poses", files={"image": data}, data={"boxes": json.dumps(BOXES)}
    )  # a batch takes 2 people: 3 boxes are two portions
    answer = response.json()
    assert response.status_code == 200, answer
    expected = predictor(photo(), BOXES)[0]
    assert_same(answer["results"][0]["persons"], expected.keypoints.xy, expected.keypoints.conf)
    assert [p["bbox"] for p in answer["results"][0]["persons"]] == BOXES
    np.testing.assert_allclose(
        [p["score"] for p in answer["results"][0]["persons"]], expected.scores, atol=1e-3
    )
    assert answer["model"] == {
        "name": "hrnet-pose",
        "version": "7",
        "sha256": predictor.spec.weights_sha256,
        "mode": "float32",
        "flip_test": True,
        "detector": None,
    }
    assert set(answer["timings_ms"]) == {"read", "decode", "queue", "infer", "total"}
    assert all(ms >= 0 for ms in answer["timings_ms"].values())


def test_answers_are_made_by_the_predictors_halves(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture is cut by the predictor's `prepare` and answered by its `finish`, whatever those do."""
    service = service_of(checkpoint)
    assert service.model
    predictor, asked = service.model.predictor, []
    moved = [[x + 5, y, w, h] for x, y, w, h in BOXES]
    prepare, finish = predictor.prepare, predictor.finish

    def elsewhere(image: np.ndarray, boxes_xywh: Any) -> Any:
        asked.append(np.asarray(boxes_xywh).tolist())
        return prepare(image, moved)

    monkeypatch.setattr(predictor, "prepare", elsewhere)
    monkeypatch.setattr(predictor, "finish", lambda people, xy, scores: finish(people, xy + 1, scores / 2))
    files, data = {"image": encode_png(photo())}, {"boxes": json.dumps(BOXES)}
    (result,) = call(service, "POST", "/v1/poses", files=files, data=data).json()["results"]
    monkeypatch.undo()
    people = predictor.prepare(photo(), moved)
    keypoints, scores = predictor.predict_crops(people[0].crops)
    (expected,) = predictor.finish(people, keypoints + 1, scores / 2)
    assert asked == [BOXES]
    assert [p["bbox"] for p in result["persons"]] == moved
    assert_same(result["persons"], expected.keypoints.xy, expected.keypoints.conf)


def test_without_boxes_the_whole_picture_is_one_person(
    service: PoseService, predictor: PosePredictor
) -> None:
    answer = call(service, "POST", "/v1/poses", files={"image": encode_png(photo())}).json()
    (result,) = answer["results"]
    assert result["boxes_source"] == "whole_image"
    assert result["image"] == {"width": 320, "height": 240, "exif_rotated": False}
    assert [p["bbox"] for p in result["persons"]] == [[0, 0, 320, 240]]
    expected = predictor(photo())[0]
    assert_same(result["persons"], expected.keypoints.xy, expected.keypoints.conf)


def test_the_first_frame_of_an_animation_where_that_is_asked_for(checkpoint: Path) -> None:
    service = service_of(checkpoint, limits=Limits(first_frame=True))
    answer = call(service, "POST", "/v1/poses", files={"image": ANIMATION}).json()
    still = io.BytesIO()
    Image.open(io.BytesIO(ANIMATION)).save(still, "GIF")  # its first frame alone
    expected = call(service, "POST", "/v1/poses", files={"image": still.getvalue()}).json()
    assert answer["results"] == expected["results"]


def test_an_empty_list_of_boxes_is_an_answer_without_people(service: PoseService) -> None:
    answer = call(
        service, "POST", "/v1/poses", files={"image": encode_png(photo())}, data={"boxes": "[]"}
    ).json()
    assert answer["results"][0]["persons"] == []
    assert answer["results"][0]["boxes_source"] == "request"


def test_several_pictures_and_json_give_what_single_forms_give(service: PoseService) -> None:
    pictures = [encode_png(photo(1)), encode_png(photo(2, 200, 300)), encode_png(photo(3))]
    boxes = [BOXES[:1], None, BOXES[1:]]
    files = [("image", data) for data in pictures]
    as_form = call(service, "POST", "/v1/poses", files=files, data={"boxes": json.dumps(boxes)}).json()
    text = {"image": [base64.b64encode(data).decode() for data in pictures], "boxes": boxes}
    as_json = call(service, "POST", "/v1/poses", json=text).json()
    assert as_form["results"] == as_json["results"]
    for data, one, result in zip(pictures, boxes, as_form["results"], strict=True):
        alone = call(
            service,
            "POST",
            "/v1/poses",
            json={"image": base64.b64encode(data).decode(), "boxes": one},
        ).json()["results"][0]
        assert result["image"] == alone["image"]
        points = np.array([p["keypoints"] for p in alone["persons"]])
        assert_same(result["persons"], points[..., :2], points[..., 2])


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_boxes_are_in_px_of_the_picture_as_displayed(
    service: PoseService, predictor: PosePredictor, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(photo()).save(file, "JPEG", exif=exif, quality=95)
    turns = {1: 0, 3: 2, 6: 3, 8: 1}[orientation]  # EXIF's definition, in quarter turns to the left
    displayed = np.rot90(decode_image(file.getvalue(), apply_exif=False), turns)
    response = call(
        service, "POST", "/v1/poses", files={"image": file.getvalue()}, data={"boxes": json.dumps(BOXES)}
    )
    (result,) = response.json()["results"]
    assert result["image"] == {
        "width": displayed.shape[1],
        "height": displayed.shape[0],
        "exif_rotated": orientation != 1,
    }
    expected = predictor(displayed, BOXES)[0]
    assert_same(result["persons"], expected.keypoints.xy, expected.keypoints.conf)


def test_overlay_is_the_displayed_picture_with_something_drawn_on_it(service: PoseService) -> None:
    response = call(
        service,
        "POST",
        "/v1/overlay?threshold=0",
        files={"image": encode_png(photo())},
        data={"boxes": json.dumps(BOXES[:1])},
    )
    assert response.headers["content-type"] == "image/png"
    assert response.headers["x-model-version"] == "7"
    drawn = decode_image(response.content, apply_exif=False)
    assert drawn.shape == photo().shape
    changed = (drawn != photo()).any(axis=-1)
    assert 0 < changed.mean() < 0.5
    x, y, w, _ = (int(v) for v in BOXES[0])
    assert changed[y, x : x + w].mean() > 0.8, "the upper edge of the box"


def test_models_says_what_is_loaded(service: PoseService, predictor: PosePredictor) -> None:
    answer = call(service, "GET", "/v1/models").json()
    (model,) = answer["models"]
    assert answer["last_load_error"] is None
    assert model["version"] == "7"
    assert model["input_size"] == [64, 96]
    assert model["codec"] == predictor.spec.codec.as_dict()
    assert model["skeleton"]["keypoints"][0] == "nose"
    assert len(model["skeleton"]["palette"]) == 17


# --- problems -----------------------------------------------------------------------------------


def animation() -> bytes:
    """A GIF of two frames."""
    frames = [Image.fromarray(photo(seed, 64, 48)) for seed in (0, 1)]
    content = io.BytesIO()
    frames[0].save(content, "GIF", save_all=True, append_images=frames[1:])
    return content.getvalue()


PNG = encode_png(photo(0, 64, 48))
HEADER = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + PNG[24:29]  # promises 3.6 gigapixels
ANIMATION = animation()
HUGE = PNG[:12] + HEADER + zlib.crc32(HEADER).to_bytes(4, "big") + PNG[33:]


def form(image: bytes = PNG, boxes: Any = None, **fields: str) -> dict[str, Any]:
    data = {
        **({} if boxes is None else {"boxes": boxes if isinstance(boxes, str) else json.dumps(boxes)}),
        **fields,
    }
    return {"files": {"image": image}, "data": data}


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    # what is sent, type of the problem, what its detail names
    "no content type": ({"content": b"x"}, "media-type", "nothing"),
    "a bare picture": ({"content": PNG, "headers": {"content-type": "image/png"}}, "media-type", "image/png"),
    "compressed": ({**form(), "headers": {"content-encoding": "gzip"}}, "media-type", "gzip"),
    "no boundary": (
        {"content": b"x", "headers": {"content-type": "multipart/form-data"}},
        "malformed-body",
        "boundary",
    ),
    "not a form": (
        {"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=b"}},
        "malformed-body",
        "multipart",
    ),
    "no picture": ({"files": {"boxes": (None, "[]")}}, "invalid-field", "image: missing"),
    "a picture as text": ({"files": {"image": (None, "abc")}}, "invalid-field", "image: not a file"),
    "unknown field": (form(bboxes="[]"), "invalid-field", "bboxes"),
    "boxes twice": (
        {"files": [("image", PNG), ("boxes", (None, "[]")), ("boxes", (None, "[]"))]},
        "invalid-field",
        "boxes: sent twice",
    ),
    "large body": (form(b"x" * 1_000_000), "body-too-large", "900,000"),
    "too many pictures": ({"files": [("image", PNG)] * 4}, "too-many-images", "at most 3"),
    "far too many pictures": ({"files": [("image", PNG)] * 40}, "too-many-images", "at most 3"),
    "too many people": (form(boxes=[[0, 0, 9, 9]] * 7), "too-many-people", "7 people"),
    "not JSON": (form(boxes="[[1, 2"), "invalid-boxes", "boxes: not JSON"),
    "deep JSON": (form(boxes="[" * 100_000), "invalid-boxes", "boxes"),
    "not text": ({"files": {"image": PNG, "boxes": b"\xff\xfe"}}, "invalid-boxes", "boxes: not JSON"),
    "an object": (form(boxes={"x": 1}), "invalid-boxes", "an object"),
    "one flat box": (form(boxes=[1, 2, 3, 4]), "invalid-boxes", "boxes[0]"),
    "three numbers": (form(boxes=[[0, 0, 9, 9], [1, 2, 3]]), "invalid-boxes", "boxes[1]"),
    "text": (form(boxes=[[0, 0, 9, "9"]]), "invalid-boxes", "boxes[0]: h is text"),
    "true": (form(boxes=[[0, 0, 9, True]]), "invalid-boxes", "boxes[0]: h"),
    "not a number": (form(boxes="[[NaN, 0, 9, 9]]"), "invalid-boxes", "boxes[0]: x"),
    "infinite": (form(boxes="[[0, 0, 1e999, 9]]"), "invalid-boxes", "boxes[0]: w"),
    "astronomic": (form(boxes="[[0, 1" + "0" * 400 + ", 9, 9]]"), "invalid-boxes", "boxes[0]: y"),
    "negative width": (form(boxes=[[0, 0, -9, 9]]), "invalid-boxes", "boxes[0]: w and h"),
    "no height": (form(boxes=[[0, 0, 9, 0]]), "invalid-boxes", "boxes[0]: w and h"),
    "nothing in float32": (form(boxes=[[5, 5, 1e-50, 1e-50]]), "invalid-boxes", "boxes[0]: w and h"),
    "outside": (form(boxes=[[0, 0, 9, 9], [64, 0, 9, 9]]), "invalid-boxes", "boxes[1]: lies outside"),
    "lists for two pictures": (
        {"files": [("image", PNG), ("image", PNG), ("boxes", (None, "[[[0, 0, 9, 9]]]"))]},
        "invalid-boxes",
        "2 pictures",
    ),
    "second picture's box": (
        {"files": [("image", PNG), ("image", PNG), ("boxes", (None, "[null, [[0, 0, 9]]]"))]},
        "invalid-boxes",
        "boxes[1][0]",
    ),
    "empty picture": (form(b""), "not-a-picture", "image"),
    "a text file": (form(b"not a picture at all"), "not-a-picture", "image"),
    "a cut JPEG": (form(encode_jpeg(photo())[:-900]), "truncated-picture", "image"),
    "the second one broken": ({"files": [("image", PNG), ("image", b"GIF?")]}, "not-a-picture", "image[1]"),
    "an animation": (form(ANIMATION), "several-frames", "GIF file holds several frames"),
    "a bomb": (form(HUGE), "too-many-pixels", "image"),
    "JSON that is none": (
        {"content": b"{", "headers": {"content-type": "application/json"}},
        "malformed-body",
        "not JSON",
    ),
    "a JSON list": ({"json": []}, "malformed-body", "a list"),
    "JSON without a picture": ({"json": {}}, "invalid-field", "image: missing"),
    "JSON with a stranger": (
        {"json": {"image": "", "url": "http://169.254.169.254"}},
        "invalid-field",
        "url",
    ),
    "a number for a picture": ({"json": {"image": 5}}, "invalid-field", "image: expected base64"),
    "not base64": ({"json": {"image": "?" * 8}}, "invalid-field", "image: not base64"),
    "a data URL": (
        {"json": {"image": "data:image/png;base64,AAAA"}},
        "invalid-field",
        "Leave the data: prefix out",
    ),
    "base64 with line breaks": (
        {"json": {"image": base64.encodebytes(PNG).decode()}},
        "invalid-field",
        "Leave line breaks and spaces out",
    ),
    "base64 for URLs": (
        {"json": {"image": base64.urlsafe_b64encode(b"\xff" * 9).decode()}},
        "invalid-field",
        "alphabet for URLs",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_is_a_problem_that_names_the_field(service: PoseService, case: str) -> None:
    options, slug, named = BAD[case]
    response = call(service, "POST", "/v1/poses", **options)
    problem = response.json()
    assert (response.status_code, problem["type"]) == (PROBLEMS[slug][0], f"urn:hrnet:problem:{slug}"), (
        problem
    )
    assert response.headers["content-type"] == "application/problem+json"
    assert named in problem["detail"]
    assert problem["status"] == response.status_code
    assert problem["instance"] == "/v1/poses"
    assert problem["title"]
    assert problem["request_id"]


@pytest.mark.parametrize(
    ("method", "url", "status", "slug"),
    [
        ("GET", "/nothing", 404, "not-found"),
        ("GET", "/samples/..%2f..%2fetc%2fpasswd", 404, "not-found"),
        ("GET", "/v1/poses", 405, "method-not-allowed"),
        ("DELETE", "/livez", 405, "method-not-allowed"),
        ("POST", "/v1/overlay?threshold=nan", 422, "invalid-field"),
        ("POST", "/v1/overlay?threshold=2", 422, "invalid-field"),
    ],
)
def test_other_errors_are_problems_too(
    service: PoseService, method: str, url: str, status: int, slug: str
) -> None:
    response = call(service, method, url, headers={"x-request-id": "mine"})
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["type"] == f"urn:hrnet:problem:{slug}"
    assert response.json()["request_id"] == "mine"
    if status == 405:
        assert response.headers["allow"]


@pytest.mark.parametrize(
    ("path", "allowed"),
    [("/livez", "GET, HEAD, OPTIONS"), ("/", "GET, HEAD, OPTIONS"), ("/v1/poses", "OPTIONS, POST")],
)
def test_every_address_answers_head_and_options(service: PoseService, path: str, allowed: str) -> None:
    options = call(service, "OPTIONS", path)
    assert (options.status_code, options.headers["allow"], options.content) == (204, allowed, b"")
    head = call(service, "HEAD", path)
    if "GET" in allowed:
        got = call(service, "GET", path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == got.headers["content-length"] != "0"
        assert head.headers["content-type"] == got.headers["content-type"]
    else:
        assert head.status_code == 405
    for method in ("HEAD", "OPTIONS"):
        assert call(service, method, "/nothing").status_code == 404


def test_a_body_without_a_length_is_read_no_further_than_the_limit(service: PoseService) -> None:
    sent = 0

    async def endless() -> Any:
        nonlocal sent
        yield b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
        while sent < 10_000_000:
            sent += 50_000
            yield bytes(50_000)

    response = call(
        service,
        "POST",
        "/v1/poses",
        content=endless(),
        headers={"content-type": "multipart/form-data; boundary=b"},
    )
    assert response.status_code == 413
    assert sent < 2_000_000


def test_a_defect_is_a_500_that_tells_nothing_but_its_request_id(
    service: PoseService, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("secret of the house")

    monkeypatch.setattr("serve.service.result_of", broken)
    response = call(service, "POST", "/v1/poses", **form())
    assert response.status_code == 500
    assert response.json()["type"] == "urn:hrnet:problem:internal-error"
    assert "secret" not in response.text


def test_a_service_without_a_model_is_alive_and_not_ready(checkpoint: Path) -> None:
    service = Direct(ServeArgs(checkpoint=str(checkpoint)), make_app)
    assert call(service, "GET", "/livez").json() == {"live": True}
    for method, url in (("GET", "/readyz"), ("POST", "/v1/poses")):
        response = call(service, method, url)
        assert response.status_code == 503
        assert response.json()["type"] == "urn:hrnet:problem:not-ready"
    assert call(service, "GET", "/v1/models").json() == {
        "models": [],
        "intended": None,
        "previous": None,
        "last_load_error": None,
    }


def test_when_all_places_are_taken_the_next_one_is_told_to_come_again(checkpoint: Path) -> None:
    service = service_of(checkpoint, max_requests=2)
    ended: list[tuple[str, int, str]] = []
    service.metrics.ended = lambda one: ended.append((one.path, one.status, one.reason))  # type: ignore[method-assign]
    inside, free = threading.Semaphore(0), threading.Event()
    unhindered = service.pictures.threads

    class Held(ThreadPoolExecutor):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            def hold() -> Any:
                inside.release()
                assert free.wait(30)
                return fn(*args, **kwargs)

            return unhindered.submit(hold)

    service.pictures.threads = Held(1)

    async def together() -> tuple[httpx.Response, list[httpx.Response], httpx.Response]:
        transport = httpx.ASGITransport(make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            held = [asyncio.create_task(http.post("/v1/poses", **form())) for _ in range(2)]
            for _ in held:
                assert await asyncio.to_thread(inside.acquire, timeout=30)
            # At the door, before the parameters are read: with a place it would be 422.
            refused = await http.post("/v1/poses?unknown=1", **form())
            free.set()
            return refused, await asyncio.gather(*held), await http.post("/v1/poses", **form())

    refused, held, later = asyncio.run(together())
    assert refused.status_code == 429
    assert refused.json()["type"] == "urn:hrnet:problem:overloaded"
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.headers[FULL_HEADER] == refused.json()["reason"] == "places", "what HAProxy goes by"
    assert ended[0] == ("/v1/poses", 429, "places")
    assert [response.status_code for response in held] == [200, 200]
    assert later.status_code == 200, "the places are free again"


def test_a_request_that_takes_too_long_gets_504(checkpoint: Path) -> None:
    service = service_of(checkpoint, deadline_s=0.05)

    async def never(_: Portion) -> Inferred:
        await asyncio.Event().wait()
        raise AssertionError

    service._infer_portion = never  # type: ignore[method-assign]
    response = call(service, "POST", "/v1/poses", **form())
    assert response.status_code == 504
    assert response.json()["type"] == "urn:hrnet:problem:deadline"
    assert service.room.in_progress == 0


# --- the model ----------------------------------------------------------------------------------


def choice(folder: Path, version: str) -> dict[str, Any]:
    return ModelChoice(checkpoint=str(folder), version=version).model_dump()


async def told(service: PoseService, user_config: dict[str, Any]) -> None:
    """As Serve tells a replica of a new user_config, until it has done what it can about it."""
    await service.reconfigure(user_config)
    if service._switching:
        await service._switching


def test_a_new_user_config_swaps_the_model_and_a_bad_one_keeps_it(checkpoint: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", 1)
    service = Direct(ServeArgs(checkpoint=str(checkpoint)), make_app)
    asyncio.run(told(service, choice(checkpoint, "1")))
    first = call(service, "POST", "/v1/poses", **form()).json()
    asyncio.run(told(service, choice(other, "2")))
    second = call(service, "POST", "/v1/poses", **form()).json()
    assert (first["model"]["version"], second["model"]["version"]) == ("1", "2")
    assert first["model"]["sha256"] != second["model"]["sha256"]
    assert first["results"] != second["results"]

    (other / "model.safetensors").write_bytes(b"broken")
    asyncio.run(told(service, choice(other, "3")))
    assert call(service, "POST", "/v1/poses", **form()).json()["results"] == second["results"]
    ready = call(service, "GET", "/readyz")
    assert ready.status_code == 200
    assert ready.json()["model"]["version"] == "2"
    assert "model.safetensors" in ready.json()["last_load_error"]
    assert "model.safetensors" in call(service, "GET", "/v1/models").json()["last_load_error"]


def test_a_replica_does_not_start_with_a_bad_checkpoint(tmp_path: Path) -> None:
    service = Direct(ServeArgs(checkpoint=str(tmp_path)), make_app)
    with pytest.raises(CheckpointError, match=r"checkpoint\.json"):
        asyncio.run(service.reconfigure(choice(tmp_path, "1")))
    response = call(service, "GET", "/readyz")
    assert response.status_code == 503
    assert "checkpoint.json" in response.json()["detail"]


def test_a_replica_that_cannot_load_its_model_at_the_start_serves_the_one_before(
    checkpoint: Path, tmp_path: Path
) -> None:
    service = Direct(ServeArgs(checkpoint=str(tmp_path)), make_app)
    asyncio.run(service.reconfigure({**choice(tmp_path, "2"), "previous": choice(checkpoint, "1")}))
    answer = call(service, "POST", "/v1/poses", **form()).json()
    assert answer["model"]["version"] == "1"
    models = call(service, "GET", "/v1/models").json()
    assert (models["intended"]["version"], models["models"][0]["version"]) == ("2", "1")
    assert "checkpoint.json" in models["last_load_error"]


def test_a_replica_refuses_weights_other_than_those_that_were_deployed(
    checkpoint: Path, predictor: PosePredictor, tmp_path: Path
) -> None:
    """The folder of a training run, say: whole and right, but of the next epoch."""
    sha256 = predictor.spec.weights_sha256
    service = Direct(ServeArgs(checkpoint=str(checkpoint)), make_app)
    asyncio.run(service.reconfigure({**choice(checkpoint, "1"), "sha256": sha256}))
    assert call(service, "POST", "/v1/poses", **form()).json()["model"]["sha256"] == sha256
    other = save_tiny(tmp_path / "other", 1)
    restarted = Direct(ServeArgs(checkpoint=str(other)), make_app)
    with pytest.raises(CheckpointError, match=rf"{sha256[:12]}.*the folder has changed since"):
        asyncio.run(restarted.reconfigure({**choice(other, "1"), "sha256": sha256}))


def test_a_service_that_drains_says_when_to_come_again(checkpoint: Path) -> None:
    service = Direct(ServeArgs(checkpoint=str(checkpoint)), make_app)
    asyncio.run(service.reconfigure(choice(checkpoint, "1")))
    asyncio.run(told(service, {**choice(checkpoint, "1"), "draining": True}))
    for method, url in (("GET", "/readyz"), ("POST", "/v1/poses")):
        response = call(service, method, url, **(form() if method == "POST" else {}))
        assert (response.status_code, response.headers["retry-after"]) == (503, "5")
        assert response.json()["type"] == "urn:hrnet:problem:draining"
    assert call(service, "GET", "/livez").status_code == 200
    asyncio.run(service.check_health())  # Serve must not take it for ill


def test_weights_that_were_exchanged_fail_their_self_test(checkpoint: Path, tmp_path: Path) -> None:
    swapped = save_tiny(tmp_path / "swapped", 3)
    (swapped / "selftest.safetensors").write_bytes((checkpoint / "selftest.safetensors").read_bytes())
    args = ServeArgs(checkpoint=str(swapped))
    with pytest.raises(CheckpointError, match="self-test"):
        load_model(ModelChoice(checkpoint=str(swapped)), args)


def test_health_is_a_crop_through_the_network(checkpoint: Path) -> None:
    service = service_of(checkpoint)
    asyncio.run(service.check_health())
    assert service.model is not None
    service.model = replace(service.model, predictor=Fake(fails_on=0))
    asyncio.run(service.check_health())  # the last answer is fresh: nothing is run
    service._last_success = -1e9
    with pytest.raises(RuntimeError, match="fake"):
        asyncio.run(service.check_health())


def test_a_checkpoint_is_fetched_by_uri(checkpoint: Path, tmp_path: Path) -> None:
    folder = fetch_checkpoint(checkpoint.as_uri(), tmp_path)
    assert {f.name for f in folder.iterdir()} == {f.name for f in checkpoint.iterdir()}
    assert (folder / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    for uri in ((tmp_path / "absent").as_uri(), "nonsense://x"):
        with pytest.raises(CheckpointError, match=re.escape(uri)):
            fetch_checkpoint(uri, tmp_path)


# --- batches ------------------------------------------------------------------------------------


class Fake:
    """A predictor whose answer is its crops' first pixel; fails where one has the value `fails_on`."""

    def __init__(self, fails_on: int | None = None, nan_on: int | None = None, add: float = 0.0) -> None:
        self.fails_on, self.nan_on, self.add = fails_on, nan_on, add
        self.batches: list[int] = []
        self.spec = CheckpointSpec(HRNetConfig(), HeatmapCodec("official", (64, 96), sigma=1.0))
        self.mode = "float32"
        self.hold: Callable[[], Any] = lambda: None

    def predict_crops(self, crops: np.ndarray, *_: Any) -> tuple[np.ndarray, np.ndarray]:
        self.hold()
        first = crops[:, 0, 0, 0].astype(np.float32)
        self.batches.append(len(crops))
        if self.fails_on is not None and (first == self.fails_on).any():
            raise RuntimeError("fake")
        first = np.where(first == (self.nan_on or -1), np.nan, first + self.add)
        return np.tile(first[:, None, None], (1, 17, 2)), np.tile(first[:, None], (1, 17))


def crops_of(model: ServedModel, *values: int) -> Portion:
    return Portion(model, np.stack([np.full((96, 64, 3), v, np.uint8) for v in values]))


@pytest.mark.parametrize("fault", ["fails_on", "nan_on"])
def test_one_bad_item_never_fails_the_others_of_its_batch(fault: str) -> None:
    model = ServedModel(Fake(**{fault: 9}), ModelChoice(checkpoint="x"), True)  # type: ignore[arg-type]
    found = infer([crops_of(model, 1, 2), crops_of(model, 9), crops_of(model, 3)], 32)
    assert isinstance(found[1], RuntimeError)
    for one, expected in ((found[0], [1, 2]), (found[2], [3])):
        assert isinstance(one, Inferred)
        assert one.scores[:, 0].tolist() == expected
        assert one.keypoints[:, 0, 0].tolist() == expected


def test_items_of_two_models_are_answered_by_their_own() -> None:
    old, new = (ServedModel(Fake(add=a), ModelChoice(checkpoint="x"), True) for a in (0.0, 100.0))  # type: ignore[arg-type]
    found = infer([crops_of(old, 1), crops_of(new, 2, 3), crops_of(old, 4)], 32)
    assert [f.scores[:, 0].tolist() for f in found if isinstance(f, Inferred)] == [[1], [102, 103], [4]]
    assert (old.predictor.batches, new.predictor.batches) == ([2], [2])  # type: ignore[attr-defined]


def test_people_gather_while_the_model_is_busy_and_go_when_it_is_idle(checkpoint: Path) -> None:
    service = PoseService(ServeArgs(checkpoint=str(checkpoint)), make_app)
    model = ServedModel(Fake(), ModelChoice(checkpoint="x"), True)  # type: ignore[arg-type]
    handed_in: list[Portion] = []

    async def batched(portion: Portion) -> Inferred:
        handed_in.append(portion)
        return Inferred(np.zeros(0), np.zeros(0), 0, 0)

    async def busy_then_idle() -> None:
        inside, free = threading.Event(), threading.Event()
        model.predictor.hold = lambda: (inside.set(), free.wait(30))  # type: ignore[attr-defined]
        service._infer_batched = batched  # type: ignore[method-assign]
        running = asyncio.create_task(service._infer_portion(crops_of(model, 1)))
        assert await asyncio.to_thread(inside.wait, 30)
        waiting = [asyncio.create_task(service._infer_portion(crops_of(model, v))) for v in (2, 3)]
        for _ in range(5):
            await asyncio.sleep(0)
        assert handed_in == [], "a batch closed now would hold one person"
        free.set()
        assert (await running).scores[:, 0].tolist() == [1], "who comes alone is no batch of Serve's"
        await asyncio.gather(*waiting)
        assert len(handed_in) == 2

    asyncio.run(busy_then_idle())


# --- page and samples ---------------------------------------------------------------------------


def test_the_page_needs_nothing_from_elsewhere(service: PoseService) -> None:
    script = "text/javascript"
    for url, media_type in {
        "/": "text/html",
        "/page.css": "text/css",
        "/page.js": script,
        "/docs": "text/html",
        "/docs.js": script,
    }.items():
        response = call(service, "GET", url)
        assert response.headers["content-type"].startswith(media_type)
        assert "default-src 'self'" in response.headers["content-security-policy"]
        links = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+", response.text)) - {"http://www.w3.org"}
        assert not links, url
    assert call(service, "GET", "/samples").json() == []


def test_documentation_lists_every_contracted_address(service: PoseService) -> None:
    paths = call(service, "GET", "/openapi.json").json()["paths"]
    assert set(paths) == {"/v1/poses", "/v1/overlay", "/v1/models", "/livez", "/readyz"}
    content = paths["/v1/poses"]["post"]["requestBody"]["content"]
    assert set(content) == {"multipart/form-data", "application/json"}


def test_a_serve_config_file_gives_its_args_as_a_dict() -> None:
    with pytest.raises(ValueError, match="checkpoint_folder"):
        serving.build({"checkpoint_folder": "x"})
    application = serving.build({"checkpoint": "x", "limits": {"max_people": 3}, "max_replicas": 2})
    assert type(application).__name__ == "Application"


def test_the_serve_config_file_is_one_by_rays_schema_and_by_ours() -> None:
    from ray.serve.schema import ServeDeploySchema

    file = Path(__file__).parents[1] / "infra" / "serve.yaml"
    config = ServeDeploySchema.model_validate(yaml.safe_load(file.read_text()))
    assert config.http_options.host == "0.0.0.0"
    (application,) = config.applications
    assert (application.import_path, application.route_prefix) == ("serve.app:build", "/")
    args = ServeArgs.model_validate(application.args)
    assert config.http_options.request_timeout_s > args.deadline_s
    (deployment,) = application.deployments
    assert deployment.name == serving.deployment(args).name
    live = LiveSettings.model_validate(deployment.user_config)
    assert live.previous
    assert len(live.sha256) == len(live.previous.sha256) == 64


def test_a_setting_has_one_default_for_hrnet_deploy_and_for_a_serve_config_file() -> None:
    """What both know stands in one class; what they name differently has one default too."""
    from pipelines.settings.config import ServeSettings, TrackSettings

    deploying, file = set(ServeSettings.model_fields), {**ServeArgs.model_fields, **Limits.model_fields}
    shared = deploying & set(file)
    assert len(shared) > 10
    for name in shared:
        classes = {*ServeSettings.__mro__, *ServeArgs.__mro__, *Limits.__mro__}
        stated = [c.__name__ for c in classes if name in vars(c).get("__annotations__", {})]
        assert len(stated) == 1, f"{name} stands in {stated}"
    args, settings = ServeArgs(checkpoint="x"), ServeSettings()
    assert (args.num_replicas, settings.cpus_per_replica) == (settings.replicas, None)  # what is there
    assert args.name == TrackSettings().registered_model
    assert (args.num_gpus > 0, args.batch_wait_s) == (settings.use_gpu, settings.batch_wait_ms / 1000)


def test_samples_are_what_boxes_json_names(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(PNG)
    (tmp_path / "hidden.png").write_bytes(PNG)
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps({"b.png": [[1, 2, 30, 40]]}))
    service = service_of(checkpoint, samples=str(tmp_path))
    assert call(service, "GET", "/samples").json() == [{"name": "b.png", "boxes": [[1, 2, 30, 40]]}]
    sample = call(service, "GET", "/samples/b.png")
    assert (sample.content, sample.headers["content-type"]) == (PNG, "image/png")
    for hidden in ("hidden.png", "boxes.json"):
        assert call(service, "GET", f"/samples/{hidden}").status_code == 404
    for content in ('{"../b.png": []}', '{"c.png": []}', '{"b.png": [[1, 2, 3]]}', "[", "[]", '{"b.png": 5}'):
        boxes.write_text(content)
        with pytest.raises(ConfigError, match=r"boxes\.json"):
            load_samples(str(tmp_path))


# --- the client ---------------------------------------------------------------------------------


def scripted(answers: list[tuple[int, dict[str, str]] | None]) -> Iterator[tuple[str, list[str]]]:
    """A server that gives these answers in turn (None: closes the connection); the ids it was asked with."""
    ids: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            ids.append(self.headers["X-Request-ID"])
            self.rfile.read(int(self.headers["Content-Length"]))
            answer = answers.pop(0)
            if answer is None:
                self.close_connection = True
                return
            status, headers = answer
            body = json.dumps({"title": "t", "detail": "d"} if status >= 400 else {"results": []}).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", ids
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr(client, "time", SimpleNamespace(sleep=waited.append))  # not that of other threads
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return waited


def test_the_client_tries_again_where_that_helps(waits: list[float]) -> None:
    for url, ids in scripted([(429, {"Retry-After": "3"}), None, (503, {}), (200, {})]):
        assert client.poses(url, PNG, [[0, 0, 9, 9]]) == {"results": []}
        assert len(set(ids)) == 1, "one request, one id"
        assert len(ids) == 4
    assert waits[0] == 3
    assert 0 < waits[1] < waits[2] * 3


def test_the_client_gives_up_on_what_will_not_change(waits: list[float]) -> None:
    for url, ids in scripted([(422, {})]):
        with pytest.raises(client.ServerError, match="422 t: d") as caught:
            client.poses(url, PNG)
        assert caught.value.problem["detail"] == "d"
        assert len(ids) == 1
    for url, ids in scripted([(503, {})] * 3):
        with pytest.raises(client.ServerError, match="503"):
            client.poses(url, PNG, attempts=3)
        assert len(ids) == 3
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(OSError, match="refused"):
            client.poses(f"http://127.0.0.1:{unused.getsockname()[1]}", PNG, attempts=2)


# --- on Ray Serve -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def endpoint(ray_local: None, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real deployment on the shared Ray, brought up as `hrnet deploy` does."""
    from ray import serve

    from pipelines.deploy import deploy
    from pipelines.settings.config import RunSettings, ServeSettings

    port = free_port()
    run = RunSettings(storage=str(tmp_path_factory.mktemp("runs")))
    samples = tmp_path_factory.mktemp("samples")
    (samples / "a.png").write_bytes(PNG)
    (samples / "boxes.json").write_text('{"a.png": [[0, 0, 40, 40]]}')
    settings = ServeSettings(
        port=port,
        cpus_per_replica=0.5,
        max_batch_people=6,
        batch_wait_ms=50,
        max_body_bytes=2_000_000,
        body_idle_s=2.0,
        samples=str(samples),
        flip_test=True,
        log_format="json",
    )
    try:
        yield deploy(str(checkpoint), settings, run=run, block=False)
    finally:
        serve.shutdown()


@pytest.fixture
def server(endpoint: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=endpoint, timeout=60, trust_env=False) as session:
        yield session


@pytest.mark.ray
def test_the_http_answer_is_the_predictors(server: httpx.Client, predictor: PosePredictor) -> None:
    data = encode_jpeg(photo(5))
    image = decode_image(data, apply_exif=True)
    for boxes in (BOXES, None):
        fields = {} if boxes is None else {"boxes": json.dumps(boxes)}
        response = server.post("/v1/poses", files={"image": data}, data=fields)
        assert response.status_code == 200, response.text
        expected = predictor(image, boxes)[0]
        assert_same(response.json()["results"][0]["persons"], expected.keypoints.xy, expected.keypoints.conf)


@pytest.mark.ray
def test_an_answer_does_not_depend_on_what_shared_its_batch(
    server: httpx.Client, predictor: PosePredictor
) -> None:
    def ask(seed: int) -> httpx.Response:
        if seed % 5 == 4:
            return server.post("/v1/poses", files={"image": b"no picture"})
        boxes = BOXES[: seed % 3 + 1]
        return server.post(
            "/v1/poses", files={"image": encode_png(photo(seed))}, data={"boxes": json.dumps(boxes)}
        )

    with ThreadPoolExecutor(20) as pool:
        responses = list(pool.map(ask, range(20)))
    for seed, response in enumerate(responses):
        if seed % 5 == 4:
            assert response.json()["type"] == "urn:hrnet:problem:not-a-picture"
            continue
        expected = predictor(photo(seed), BOXES[: seed % 3 + 1])[0]
        assert_same(response.json()["results"][0]["persons"], expected.keypoints.xy, expected.keypoints.conf)
    # Requests of one batch have its time in common, to 0.01 ms: chance does not give three such pairs.
    times = [r.json()["timings_ms"]["infer"] for r in responses if r.status_code == 200]
    assert len(times) - len(set(times)) >= 3


@pytest.mark.ray
def test_the_endpoint_says_who_it_is(server: httpx.Client, predictor: PosePredictor) -> None:
    assert server.get("/livez").json() == {"live": True}
    ready = server.get("/readyz").json()
    assert ready["ready"] is True
    assert ready["model"]["sha256"] == predictor.spec.weights_sha256
    assert server.get("/v1/models").json()["models"][0]["version"] == predictor.spec.weights_sha256[:12]
    assert "Drop a photo" in server.get("/").text
    assert server.get("/samples").json() == [{"name": "a.png", "boxes": [[0, 0, 40, 40]]}]


@pytest.mark.ray
def test_the_request_id_comes_back_once(server: httpx.Client) -> None:
    given = server.get("/nothing", headers={"X-Request-ID": "abc-1"})
    assert given.headers.get_list("x-request-id") == ["abc-1"]
    assert given.json()["request_id"] == "abc-1"
    answer = server.post("/v1/poses", files={"image": PNG})
    assert answer.headers.get_list("x-request-id") == [answer.json()["request_id"]]


@pytest.mark.ray
def test_a_request_id_that_serve_cannot_read_is_replaced(endpoint: str) -> None:
    host, port = endpoint.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    connection.request("GET", "/nothing", headers={"X-Request-ID": b"caf\xe9", "X-Other": b"\xe9"})
    response = connection.getresponse()
    assert response.status == 404
    assert json.loads(response.read())["request_id"] == response.headers["x-request-id"] != "café"
    connection.close()


@pytest.mark.ray
def test_many_slow_bodies_keep_nobody_out(endpoint: str, server: httpx.Client) -> None:
    host, port = endpoint.removeprefix("http://").split(":")
    head = b"POST /v1/poses HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    slow = [socket.create_connection((host, int(port)), timeout=30) for _ in range(80)]
    for connection in slow:
        connection.sendall(head + b"Content-Length: 1000\r\n\r\n-")
    time.sleep(0.3)
    assert server.post("/v1/poses", files={"image": PNG}).status_code == 200
    assert b" 408 " in slow[0].recv(100)
    for connection in slow:
        connection.close()


@pytest.mark.ray
def test_a_stream_without_a_length_is_refused_through_the_proxy(endpoint: str) -> None:
    host, port = endpoint.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    connection.putrequest("POST", "/v1/poses")
    connection.putheader("Content-Type", "multipart/form-data; boundary=b")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
    connection.send(b"%x\r\n%s\r\n" % (len(head), head))
    for _ in range(24):  # 2.4 MB, and never an end
        connection.send(b"%x\r\n%s\r\n" % (100_000, bytes(100_000)))
    response = connection.getresponse()
    assert response.status == 413
    assert json.loads(response.read())["type"] == "urn:hrnet:problem:body-too-large"
    connection.close()


@pytest.mark.ray
def test_the_client_and_the_overlay_over_http(endpoint: str, waits: list[float], tmp_path: Path) -> None:
    file = tmp_path / "photo.png"
    file.write_bytes(encode_png(photo()))
    answer = client.poses(endpoint, file, BOXES)
    assert len(answer["results"][0]["persons"]) == 3
    assert decode_image(client.overlay(endpoint, file, BOXES), apply_exif=False).shape == photo().shape
    with pytest.raises(client.ServerError, match="422"):
        client.poses(endpoint, b"nothing")


@pytest.mark.ray
def test_metrics_are_on_the_nodes_metrics_port(server: httpx.Client) -> None:
    import ray

    assert server.post("/v1/poses", files={"image": PNG}).status_code == 200
    assert server.post("/v1/poses", files={"image": b"none"}).status_code == 422
    assert server.get("/metrics").status_code == 404, "for the node's own network, not for clients"
    (node,) = [n for n in ray.nodes() if n["Alive"]]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = {
        "ray_hrnet_requests_total": 'slug="not-a-picture"',
        "ray_hrnet_people_total": 'mode="float32"',
        "ray_hrnet_decoded_pixels_total": 'mode="float32"',
        "ray_hrnet_request_seconds_bucket": 'le="+Inf"',
        "ray_hrnet_stage_seconds_sum": 'stage="infer"',
        "ray_hrnet_batch_people_count": "poses",
        "ray_hrnet_keypoint_score_count": 'mode="float32"',
        "ray_hrnet_in_progress": "poses",
        "ray_hrnet_pixels_held": "poses",
    }
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + 40  # Ray exports every ten seconds
    while True:
        lines = opener.open(url, timeout=10).read().decode().splitlines()
        missing = {n for n, tag in wanted.items() if not any(s.startswith(n) and tag in s for s in lines)}
        if not missing or time.monotonic() > deadline:
            break
        threading.Event().wait(0.5)
    assert not missing


@pytest.mark.ray
def test_a_replica_writes_a_line_of_json_for_a_request(server: httpx.Client) -> None:
    from ray._private.worker import _global_node  # the folder of this session's logs has no public name

    sent = server.post("/v1/poses", files={"image": PNG}, headers={"X-Request-ID": "logged-1"}).json()
    deadline = time.monotonic() + 40  # written with Serve's health checks, every ten seconds
    lines: list[str] = []
    while not lines and time.monotonic() < deadline:
        files = Path(_global_node.get_logs_dir_path()).glob("serve/replica_*.log")
        lines = [line for file in files for line in file.read_text().splitlines() if "logged-1" in line]
        threading.Event().wait(0.5)
    (line,) = lines
    told = json.loads(line)
    assert told["request_id"] == sent["request_id"] == "logged-1"
    assert (told["status"], told["path"], told["people"]) == (200, "/v1/poses", 1)
    assert told["version"] == sent["model"]["version"]
