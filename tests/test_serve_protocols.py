"""What other programs send and read: the Open Inference Protocol, COCO, OpenPose, gzip, OpenAPI."""

from __future__ import annotations

import asyncio
import base64
import gzip
import importlib
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from test_serve import BOXES, call, form, photo, save_tiny, service_of

from hrnet_core.images import encode_png
from hrnet_core.predictor import PosePredictor
from serve.routes import make_app
from serve.schemas import PROBLEMS
from serve.service import PoseService

PNG = encode_png(photo())
SECRET = "0123456789abcdef-triton"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("serve") / "tiny", 0)


@pytest.fixture(scope="module")
def service(checkpoint: Path) -> PoseService:
    return service_of(checkpoint)


@pytest.fixture(scope="module")
def predictor(checkpoint: Path) -> PosePredictor:
    return PosePredictor.load(checkpoint, device="cpu")


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """HOST:PORT of an application over real HTTP."""
    # Its logging would close the handlers there are: absl's, which nncf brings, closes pytest's stderr then.
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def address(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """With keys."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"triton {SECRET}\n")
    with running(make_app(service_of(checkpoint, keys=str(keys)))) as address:
        yield address


# --- the Open Inference Protocol ----------------------------------------------------------------


def triton(address: str) -> Any:
    http = pytest.importorskip("tritonclient.http", reason="tritonclient[http] of the dev extra")
    return http, http.InferenceServerClient(address)


def test_tritonclient_gets_what_the_predictor_finds(address: str, predictor: PosePredictor) -> None:
    http, client = triton(address)
    key = {"Authorization": f"Bearer {SECRET}"}
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("hrnet-pose")
    assert client.is_model_ready("hrnet-pose", "7")
    described = client.get_model_metadata("hrnet-pose")
    assert described["versions"] == ["7"]
    assert described["outputs"][0] == {"name": "keypoints", "datatype": "FP32", "shape": [-1, 17, 3]}
    image = http.InferInput("image", [2], "BYTES")
    image.set_data_from_numpy(np.array([PNG, encode_png(photo(2))], object))
    boxes = http.InferInput("boxes", [3, 4], "FP32")
    boxes.set_data_from_numpy(np.array(BOXES, np.float32))
    counts = http.InferInput("counts", [2], "INT32")
    counts.set_data_from_numpy(np.array([2, 1], np.int32))
    expected = predictor([photo(), photo(2)], [BOXES[:2], BOXES[2:]])
    for outputs in (
        None,
        [http.InferRequestedOutput(o["name"], binary_data=False) for o in described["outputs"]],
    ):
        found = client.infer(
            "hrnet-pose", [image, boxes, counts], outputs=outputs, request_id="mine", headers=key
        )
        assert found.get_response()["id"] == "mine"
        assert found.get_response()["model_version"] == "7"
        for name, asked in (("counts", [2, 1]), ("boxes", BOXES)):
            np.testing.assert_array_equal(found.as_numpy(name), asked)
        keypoints = np.concatenate([poses.keypoints.data for poses in expected])
        assert found.as_numpy("keypoints").shape == (3, 17, 3)
        np.testing.assert_allclose(found.as_numpy("keypoints"), keypoints, rtol=1e-5, atol=1e-3)
        scores = np.concatenate([poses.scores for poses in expected])
        np.testing.assert_allclose(found.as_numpy("scores"), scores, atol=1e-4)


def test_tritonclient_is_told_what_is_wrong(address: str) -> None:
    http, client = triton(address)
    image = http.InferInput("image", [1], "BYTES")
    image.set_data_from_numpy(np.array([b"no picture"], object))
    with pytest.raises(Exception, match=r"Authorization: Bearer KEY"):
        client.infer("hrnet-pose", [image])
    with pytest.raises(Exception, match=r"image\[0\]: the file begins with"):
        client.infer("hrnet-pose", [image], headers={"Authorization": f"Bearer {SECRET}"})
    with pytest.raises(Exception, match="here is hrnet-pose 7"):
        client.get_model_metadata("hrnet-pose", "8")


def infer_v2(service: PoseService, inputs: list[Any], **more: Any) -> httpx.Response:
    return call(service, "POST", "/v2/models/hrnet-pose/infer", json={"inputs": inputs, **more})


IMAGE = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(PNG).decode()]}


def test_plain_json_will_do(service: PoseService, predictor: PosePredictor) -> None:
    flat = {"name": "boxes", "datatype": "FP32", "shape": [3, 4], "data": [v for box in BOXES for v in box]}
    nested = {**flat, "data": BOXES}
    for boxes in (flat, nested):
        answer = infer_v2(service, [IMAGE, boxes], outputs=[{"name": "keypoints"}]).json()
        (output,) = answer["outputs"]
        assert (output["name"], output["datatype"], output["shape"]) == ("keypoints", "FP32", [3, 17, 3])
        expected = predictor(photo(), BOXES)[0].keypoints.data
        np.testing.assert_allclose(np.reshape(output["data"], (3, 17, 3)), expected, rtol=1e-5, atol=1e-3)
    assert infer_v2(service, [IMAGE]).json()["outputs"][2]["data"] == [0, 0, 320, 240]
    nobody = {"name": "boxes", "datatype": "FP32", "shape": [0, 4], "data": []}
    assert [o["shape"] for o in infer_v2(service, [IMAGE, nobody]).json()["outputs"]] == [
        [0, 17, 3],
        [0],
        [0, 4],
        [1],
        [0],
    ]


@pytest.mark.parametrize(
    ("inputs", "more", "named"),
    [
        ([], {}, "image: missing"),
        (None, {}, "inputs must be a list"),
        ([{"datatype": "BYTES"}], {}, "inputs must be a list"),
        ([IMAGE, IMAGE], {}, "image: unknown or twice"),
        ([{**IMAGE, "name": "picture"}], {}, "picture: unknown"),
        ([{**IMAGE, "data": ["?"]}], {}, "base64"),
        ([{**IMAGE, "data": [5]}], {}, "base64"),
        ([{**IMAGE, "data": None}], {}, "data must be a list"),
        ([{**IMAGE, "parameters": {"binary_data_size": 9}}], {}, "binary_data_size is more"),
        ([IMAGE, {"name": "boxes", "data": [1, 2, 3]}], {}, "no rows of x, y, w, h"),
        ([IMAGE, {"name": "boxes", "data": [[1, 2, 3]]}], {}, "boxes[0][0]: expected four"),
        ([IMAGE, {"name": "counts", "data": [1]}], {}, "counts are of boxes"),
        ([IMAGE, {"name": "boxes", "data": BOXES}, {"name": "counts", "data": [2]}], {}, "how many of the 3"),
        ([IMAGE, {"name": "boxes", "data": BOXES}, {"name": "counts", "data": ["3"]}], {}, "whole numbers"),
        ([IMAGE, {"name": "boxes", "data": BOXES * 50}], {}, "150 people"),
        ([{**IMAGE, "data": IMAGE["data"] * 17}], {}, "at most 16"),
        ([IMAGE], {"outputs": [{"name": "heatmaps"}]}, "heatmaps: no such output"),
        ([IMAGE], {"outputs": "keypoints"}, "outputs a list"),
    ],
)
def test_a_bad_inference_request_says_what_is_wrong(
    service: PoseService, inputs: Any, more: dict[str, Any], named: str
) -> None:
    response = infer_v2(service, inputs, **more)
    assert response.status_code in (400, 422), response.text
    assert named in response.json()["error"]


@pytest.mark.parametrize(("name", "datatype"), [("image", "BYTES"), ("boxes", "FP32"), ("counts", "INT32")])
def test_many_times_more_values_than_a_request_has_are_not_looked_at(
    service: PoseService, name: str, datatype: str
) -> None:
    """32 MB of binary zeros are eight million empty pictures: seconds in which nobody else is answered."""
    tail = bytes(80_000)
    tensor = {"name": name, "datatype": datatype, "parameters": {"binary_data_size": len(tail)}}
    head = json.dumps({"inputs": [tensor]}).encode()
    url, headers = "/v2/models/hrnet-pose/infer", {"Inference-Header-Content-Length": str(len(head))}
    response = call(service, "POST", url, content=head + tail, headers=headers)
    assert response.status_code == 422, response.text
    assert "more than 11,152 values" in response.json()["error"]


@pytest.mark.parametrize("length", ["99999", "-1", "x", "3"])
def test_a_wrong_header_length_is_refused(service: PoseService, length: str) -> None:
    url, headers = "/v2/models/hrnet-pose/infer", {"Inference-Header-Content-Length": length}
    response = call(service, "POST", url, content=b'{"inputs": []}', headers=headers)
    assert response.status_code == 400


# --- formats ------------------------------------------------------------------------------------


def test_coco_results_are_the_predictors(service: PoseService, predictor: PosePredictor) -> None:
    files = [("image", PNG), ("image", encode_png(photo(2)))]
    data = {"boxes": json.dumps([BOXES[:2], None])}
    response = call(
        service, "POST", "/v1/poses?format=coco&image_id=40&category_id=5", files=files, data=data
    )
    assert response.headers["x-model-version"] == "7"
    expected = [
        *predictor(photo(), BOXES[:2])[0].to_coco(40, 5),
        *predictor(photo(2))[0].to_coco(41, 5),
    ]
    assert len(response.json()) == 3
    for found, asked in zip(response.json(), expected, strict=True):
        assert {k: found[k] for k in ("image_id", "category_id", "bbox")} == {
            k: asked[k] for k in ("image_id", "category_id", "bbox")
        }
        np.testing.assert_allclose(found["keypoints"], asked["keypoints"], rtol=1e-5, atol=1e-3)


def test_openpose_is_of_one_picture(service: PoseService, predictor: PosePredictor) -> None:
    answer = call(service, "POST", "/v1/poses?format=openpose", **form(PNG, BOXES)).json()
    expected = predictor(photo(), BOXES)[0].to_openpose()
    assert answer["version"] == 1.3
    for found, asked in zip(answer["people"], expected["people"], strict=True):
        np.testing.assert_allclose(
            found["pose_keypoints_2d"], asked["pose_keypoints_2d"], rtol=1e-5, atol=1e-3
        )
    two = call(service, "POST", "/v1/poses?format=openpose", files=[("image", PNG)] * 2)
    assert (two.status_code, two.json()["type"]) == (422, "urn:hrnet:problem:too-many-images")
    unknown = call(service, "POST", "/v1/poses?format=xml", **form())
    assert unknown.status_code == 422
    assert "'native', 'coco' or 'openpose'" in unknown.json()["detail"]


def test_answers_are_compressed_for_who_reads_that_and_pictures_are_not(service: PoseService) -> None:
    async def raw(url: str, encoding: str) -> tuple[httpx.Headers, bytes]:
        transport = httpx.ASGITransport(make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            options = {**form(PNG, BOXES), "headers": {"Accept-Encoding": encoding}}
            async with http.stream("POST", url, **options) as response:
                return response.headers, b"".join([chunk async for chunk in response.aiter_raw()])

    headers, body = asyncio.run(raw("/v1/poses", "gzip"))
    assert headers["content-encoding"] == "gzip"
    plain_headers, plain = asyncio.run(raw("/v1/poses", "identity"))
    assert "content-encoding" not in plain_headers
    assert json.loads(gzip.decompress(body))["results"] == json.loads(plain)["results"]
    assert len(body) < 0.6 * len(plain)
    assert "content-encoding" not in asyncio.run(raw("/v1/overlay", "gzip"))[0]


# --- OpenAPI ------------------------------------------------------------------------------------


def test_the_examples_of_openapi_are_what_its_schemas_say(service: PoseService) -> None:
    document = call(service, "GET", "/openapi.json").json()
    checked = 0
    for methods in document["paths"].values():
        for operation in methods.values():
            bodies = [operation.get("requestBody", {}), *operation["responses"].values()]
            for content in (content for body in bodies for content in body.get("content", {}).values()):
                examples = [example["value"] for example in content.get("examples", {}).values()]
                for example in [*examples, *([content["example"]] if "example" in content else [])]:
                    schema = {**content["schema"], "components": document["components"]}
                    jsonschema.validate(example, schema)
                    checked += 1
    assert checked > 20


def test_openapi_says_every_problem_limit_and_key(
    checkpoint: Path, service: PoseService, tmp_path: Path
) -> None:
    document = call(service, "GET", "/openapi.json").json()
    responses = document["paths"]["/v1/poses"]["post"]["responses"]
    told = {slug for r in responses.values() for c in r["content"].values() for slug in c["examples"]}
    assert told - {"native", "coco", "found"} == set(PROBLEMS) - {"not-found", "method-not-allowed"}
    assert document["info"]["x-limits"]["max_people"] == service.args.limits.max_people
    assert "security" not in document["paths"]["/v1/poses"]["post"]
    (tmp_path / "keys").write_text(f"a {SECRET}\n")
    keyed = call(service_of(checkpoint, keys=str(tmp_path / "keys")), "GET", "/openapi.json").json()
    assert keyed["paths"]["/v1/poses"]["post"]["security"] == [{"key": []}]
    assert keyed["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}


def test_the_example_of_a_json_body_is_answered(service: PoseService) -> None:
    body = call(service, "GET", "/openapi.json").json()["paths"]["/v1/poses"]["post"]["requestBody"]
    response = call(service, "POST", "/v1/poses", json=body["content"]["application/json"]["example"])
    assert response.status_code == 200, response.text


@pytest.mark.slow
def test_a_client_made_of_openapi_json_works(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, predictor: PosePredictor
) -> None:
    """By openapi-python-client, in a process of its own; then used as its README says."""
    pytest.importorskip("openapi_python_client", reason="of the dev extra")
    (tmp_path / "openapi.json").write_text(httpx.get(f"http://{address}/openapi.json").text)
    tool = [
        sys.executable,
        "-m",
        "openapi_python_client",
        "generate",
        "--path",
        "openapi.json",
        "--meta",
        "none",
    ]
    subprocess.run([*tool, "--output-path", "made_client"], cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.syspath_prepend(tmp_path)
    made, api = (importlib.import_module(f"made_client{name}") for name in ("", ".api.default.poses"))
    models, types = (importlib.import_module(f"made_client.{name}") for name in ("models", "types"))
    form_body = models.PosesFilesBody(image=[types.File(BytesIO(PNG), "photo.png")], boxes=json.dumps(BOXES))
    json_body = models.PosesJsonBody(image=base64.b64encode(PNG).decode(), boxes=BOXES)
    with made.AuthenticatedClient(f"http://{address}", token=SECRET) as client:
        for body in (form_body, json_body):
            answer = api.sync(client=client, body=body)
            keypoints = [person.keypoints for person in answer.results[0].persons]
            np.testing.assert_allclose(keypoints, predictor(photo(), BOXES)[0].keypoints.data, atol=1e-3)
        bad = api.sync(client=client, body=models.PosesFilesBody(image=[types.File(BytesIO(b"none"), "x")]))
        assert (bad.status, bad.type_) == (422, "urn:hrnet:problem:not-a-picture")


@pytest.mark.slow
def test_no_request_that_the_schema_allows_or_forbids_breaks_the_server(service: PoseService) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="of the dev extra")
    from hypothesis import HealthCheck, given, settings

    # Of what a schema allows, hardly anything is a picture.
    accepted = importlib.import_module("schemathesis.specs.openapi.checks").positive_data_acceptance
    schema = schemathesis.openapi.from_asgi("/openapi.json", make_app(service))
    asked: Counter[int] = Counter()
    for result in schema.get_all_operations():
        operation = result.ok()
        modes = list(schemathesis.GenerationMode) if operation.method == "post" else []
        for mode in modes or [schemathesis.GenerationMode.POSITIVE]:  # a GET has nothing to be wrong

            @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=mode))
            def one(case: Any) -> None:
                response = case.call()
                asked[response.status_code] += 1
                assert response.status_code < 500, response.text
                if response.status_code >= 400:
                    assert response.headers["content-type"] == ["application/problem+json"]
                case.validate_response(response, excluded_checks=[accepted])

            one()
    assert asked[200] > 10
    assert asked[422] > 10
