"""Picture in, poses out: the operator's detector inside a replica, as `hrnet predict` runs it."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from test_detector import constant, picture, red_constants, red_nodes, rtdetr_like, save, torchvision_like
from test_evaluate import rows_here
from test_images import HEIC
from test_serve import Direct, assert_same, call

from hrnet_core.detector import PersonDetector
from hrnet_core.errors import ConfigError
from hrnet_core.images import decode_image, encode_png
from hrnet_core.predictor import PosePredictor
from pipelines.predict import predict
from pipelines.settings.config import PredictSettings
from serve.detector import Finder
from serve.model import load_model
from serve.routes import make_app
from serve.service import PoseService
from serve.settings import DetectorChoice, Limits, ModelChoice, ServeArgs

SCORES = (0.9, 0.8, 0.6, 0.2)
WIDTH, HEIGHT = 320, 256  # of the detector's input
PNG = encode_png(picture())
BOX = [[40.0, 20.0, 90.0, 200.0]]


def crowd(folder: Path, batch: int | str = "pictures") -> Path:
    """boxes (B, 4, 4) px and scores (B, 4, 1): the red patch, and three more, each 8 px further."""
    from onnx import TensorProto, helper

    moved = [[8 * i, 2 * i, 8 * i, 2 * i] for i in range(len(SCORES))]
    nodes = [
        *red_nodes(),
        helper.make_node("Unsqueeze", ["corners", "one"], ["row"]),
        helper.make_node("Add", ["row", "moved"], ["boxes"]),
        helper.make_node("ReduceMax", ["row"], ["farthest"], axes=[2], keepdims=1),
        helper.make_node("Mul", ["farthest", "zero"], ["none"]),
        helper.make_node("Add", ["none", "given"], ["scores"]),
    ]
    constants = [
        *red_constants(),
        constant("one", [1], np.int64),
        constant("moved", [moved]),
        constant("zero", 0),
        constant("given", [[[score] for score in SCORES]]),
    ]
    declared = {"layout": "boxes", "boxes": "boxes", "scores": "scores", "input_size": [WIDTH, HEIGHT]}
    outputs = {"boxes": TensorProto.FLOAT, "scores": TensorProto.FLOAT}
    shape = [batch, 3, HEIGHT, WIDTH]
    return save(folder / "crowd.onnx", nodes, constants, outputs, input_shape=shape, declaration=declared)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return crowd(tmp_path_factory.mktemp("detector"))


def service_of(checkpoint: Path, model: Path | None, **settings: Any) -> PoseService:
    detector = DetectorChoice(model=str(model)) if model else None
    args = ServeArgs(checkpoint=str(checkpoint), version="7", person_detector=detector, **settings)
    service = Direct(args, make_app)
    service.model = load_model(args.choice(), args)
    return service


@pytest.fixture(scope="module")
def service(checkpoint: Path, model: Path) -> PoseService:
    return service_of(checkpoint, model)


def ask(service: PoseService, query: str = "", boxes: Any = ..., images: int = 1) -> httpx.Response:
    data = {} if boxes is ... else {"boxes": json.dumps(boxes)}
    files = [("image", PNG)] * images
    return call(service, "POST", f"/v1/poses{query}", files=files, data=data)


def results(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    return response.json()["results"]


# --- answers ------------------------------------------------------------------------------------


def test_people_are_those_that_predict_finds_and_their_poses_the_predictors(
    service: PoseService,
    model: Path,
    checkpoint: Path,
    predictor: PosePredictor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "red.png").write_bytes(PNG)
    monkeypatch.setattr("pipelines.poses.units.rows_on_ray", rows_here)
    predict(
        [str(tmp_path / "red.png")],
        checkpoint,
        out=tmp_path / "out",
        detector=model,
        settings=PredictSettings(),
    )
    predicted = json.loads((tmp_path / "out" / "poses.json").read_text())
    response = ask(service)
    (result,) = results(response)
    persons = result["persons"]
    assert result["boxes_source"] == "detector"
    assert [person["box_score"] for person in persons] == [0.9, 0.8, 0.6], "0.2 is below the declared 0.3"
    found = np.array([person["bbox"] for person in persons])
    np.testing.assert_allclose(found, [one["bbox"] for one in predicted], rtol=0, atol=1e-3)
    scores = [person["score"] for person in persons]
    np.testing.assert_allclose(scores, [one["score"] for one in predicted], rtol=0, atol=1e-3)
    expected = predictor(picture(), found, SCORES[:3])[0]
    assert_same(persons, expected.keypoints.xy, expected.keypoints.conf)
    assert response.json()["model"]["detector"] == {
        "name": "crowd.onnx",
        "sha256": PersonDetector.load(model).sha256,
    }
    assert list(response.json()["timings_ms"]) == ["read", "decode", "detect", "queue", "infer", "total"]
    assert service.room.pixels.held == 0


def test_boxes_sent_and_whole_pictures_are_still_to_be_had(
    service: PoseService, predictor: PosePredictor
) -> None:
    for query in ("", "?boxes_from=detector"):
        (result,) = results(ask(service, query, boxes=BOX))
        assert (result["boxes_source"], result["persons"][0]["box_score"]) == ("request", None)
    (result,) = results(ask(service, "?boxes_from=whole_image"))
    assert result["boxes_source"] == "whole_image"
    expected = predictor(picture())[0]
    assert_same(result["persons"], expected.keypoints.xy, expected.keypoints.conf)
    several = results(ask(service, boxes=[BOX, None, []], images=3))
    assert [one["boxes_source"] for one in several] == ["request", "detector", "request"]
    assert [len(one["persons"]) for one in several] == [1, 3, 0]


def test_a_request_says_how_sure_and_how_many(service: PoseService) -> None:
    (result,) = results(ask(service, "?score_threshold=0.1"))
    assert [person["box_score"] for person in result["persons"]] == list(SCORES)
    (result,) = results(ask(service, "?score_threshold=0.1&max_found=2"))
    assert [person["box_score"] for person in result["persons"]] == [0.9, 0.8]
    (warning,) = result["warnings"]
    assert warning.startswith("4 people were found, the 2 that score highest are answered")
    (result,) = results(ask(service, "?score_threshold=0.95"))
    assert (result["persons"], result["warnings"], result["boxes_source"]) == ([], [], "detector")
    assert ask(service, "?score_threshold=0.95&format=coco").json() == []
    drawn = call(service, "POST", "/v1/overlay?max_found=1", files={"image": PNG})
    assert drawn.headers["x-warning"].startswith("3 people were found, the 1")
    painted = (decode_image(drawn.content, apply_exif=True) != picture()).any(axis=2)
    assert painted[40:45, 100:400].any(), "its box"


@pytest.mark.parametrize(
    ("query", "field", "detail"),
    [
        ("?max_found=65", "max_found", "at most 64 people"),
        ("?max_found=0", "max_found", "greater than or equal to 1"),
        ("?score_threshold=1.5", "score_threshold", "less than or equal to 1"),
        ("?boxes_from=somewhere", "boxes_from", "'auto', 'detector' or 'whole_image'"),
    ],
)
def test_what_cannot_be_asked_is_named(service: PoseService, query: str, field: str, detail: str) -> None:
    problem = ask(service, query)
    assert (problem.status_code, problem.json()["type"]) == (422, "urn:hrnet:problem:invalid-field")
    assert problem.json()["detail"].startswith(f"{field}: ")
    assert detail in problem.json()["detail"]


def test_without_a_detector_a_picture_is_one_person_and_asking_for_one_is_refused(checkpoint: Path) -> None:
    service = service_of(checkpoint, None)
    response = ask(service)
    assert results(response)[0]["boxes_source"] == "whole_image"
    assert response.json()["model"]["detector"] is None
    problem = ask(service, "?boxes_from=detector")
    assert (problem.status_code, problem.json()["field"]) == (422, "boxes_from")
    assert "no detector runs here" in problem.json()["detail"]


def test_a_request_has_no_more_people_than_it_may_over_all_its_pictures(
    checkpoint: Path, model: Path
) -> None:
    """Five people: two boxes that were sent, two of the first picture, and of the next what is left of them;
    settings of the replica hold where a request says nothing."""
    limits = Limits(max_people=5)
    service = service_of(checkpoint, model, limits=limits, max_found=3, score_threshold=0.1)
    answered = results(ask(service, boxes=[None, BOX + BOX, None], images=3))
    assert [len(one["persons"]) for one in answered] == [2, 2, 1]
    assert ["people were found" in " ".join(one["warnings"]) for one in answered] == [True, False, True]
    assert [len(one["persons"]) for one in results(ask(service))] == [3]
    described = call(service, "GET", "/v1/models").json()["models"][0]["detector"]
    assert (described["max_found"], described["score_threshold"]) == (3, 0.1)
    small = service_of(checkpoint, model, limits=limits, max_pixels_held=1)
    alone = results(ask(small, "?score_threshold=0.1&max_found=3", boxes=[None, BOX + BOX, None], images=3))
    assert [len(one["persons"]) for one in alone] == [2, 2, 1], "pictures one after the other"
    assert small.room.pixels.held == 0


def test_the_open_inference_protocol_finds_people_too(service: PoseService) -> None:
    import base64

    def infer(**parameters: Any) -> httpx.Response:
        image = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(PNG).decode()]}
        body = {"inputs": [image], "parameters": parameters}
        return call(service, "POST", "/v2/models/hrnet-pose/infer", json=body)

    answer = infer(score_threshold=0.7, max_found=3).json()
    outputs = {output["name"]: output for output in answer["outputs"]}
    assert outputs["counts"]["data"] == [2]
    assert outputs["box_scores"]["data"] == pytest.approx([0.9, 0.8])
    native = results(ask(service, "?score_threshold=0.7"))[0]["persons"]
    found = np.reshape(outputs["boxes"]["data"], (2, 4))
    np.testing.assert_allclose(found, [person["bbox"] for person in native], rtol=0, atol=1e-3)
    assert answer["parameters"]["boxes_source"] == ["detector"]
    whole = infer(boxes_from="whole_image").json()
    assert whole["parameters"]["boxes_source"] == ["whole_image"]
    for wrong in ({"max_found": "3"}, {"max_found": 99}, {"boxes_from": 3}, {"score_threshold": "high"}):
        problem = infer(**wrong)
        assert (problem.status_code, problem.json()["field"]) == (422, *wrong)


# --- runs ---------------------------------------------------------------------------------------


class Watched:
    """A Finder whose runs are noted; the first one waits to be let go."""

    def __init__(self, detector: PersonDetector, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs: list[int] = []
        self.begun, self.go = threading.Event(), threading.Event()
        self.detector = detector
        self.finder = Finder(most, lambda _, pictures, __: self.runs.append(pictures))
        find = PersonDetector.find

        def held(self_: PersonDetector, views: Any, thresholds: Any) -> Any:
            self.begun.set()
            assert self.go.wait(30)
            if any(threshold == -1 for threshold in thresholds):
                raise RuntimeError("this picture ends a run")
            return find(self_, views, thresholds)

        monkeypatch.setattr(PersonDetector, "find", held)

    def ask(self, images: list[NDArray[np.uint8]], thresholds: list[float], give_up: int = -1) -> list[Any]:
        """The first picture alone, the others while the detector is busy with it."""

        async def asked() -> list[Any]:
            def one(i: int) -> asyncio.Task[Any]:
                view = self.detector.view(images[i])
                return asyncio.create_task(self.finder.find(self.detector, [view], thresholds[i]))

            tasks = [one(0)]
            await asyncio.to_thread(self.begun.wait, 30)
            tasks += [one(i) for i in range(1, len(images))]
            await asyncio.sleep(0)  # they stand in the queue
            if give_up >= 0:
                tasks[give_up].cancel()
                await asyncio.sleep(0)
            self.go.set()
            return await asyncio.gather(*tasks, return_exceptions=True)

        return asyncio.run(asked())


def shifted(i: int) -> NDArray[np.uint8]:
    return np.roll(picture(), 10 * i, axis=1)


def test_pictures_of_several_requests_share_a_run_and_keep_their_answers(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = PersonDetector.load(model)
    alone = [detector(shifted(i), 0.7) for i in range(6)]
    watched = Watched(detector, 3, monkeypatch)
    answers = watched.ask([shifted(i) for i in range(6)], [0.7] * 6)
    assert watched.runs == [1, 3, 2]
    for (answer,), expected in zip(answers, alone, strict=True):
        np.testing.assert_allclose(answer[0], expected[0], rtol=0, atol=1e-3)
        np.testing.assert_allclose(answer[1], expected[1], rtol=0, atol=1e-6)


def test_a_detector_of_one_picture_runs_picture_by_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(PersonDetector.load(crowd(tmp_path, batch=1)), 8, monkeypatch)
    answers = watched.ask([shifted(i) for i in range(3)], [0.7] * 3)
    assert watched.runs == [1, 1, 1]
    assert [len(answer[0][0]) for answer in answers] == [2, 2, 2]


def test_a_picture_that_fails_or_is_given_up_concerns_no_other(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(PersonDetector.load(model), 8, monkeypatch)
    answers = watched.ask([shifted(i) for i in range(4)], [0.7, -1, 0.7, 0.7], give_up=2)
    assert watched.runs == [1, 2], "who gave up is not looked at"
    assert [type(answer) for answer in answers] == [list, RuntimeError, asyncio.CancelledError, list]
    assert len(answers[3][0][0]) == 2


def test_poses_go_on_while_the_detector_is_busy(
    checkpoint: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = service_of(checkpoint, model)
    begun, go, find = threading.Event(), threading.Event(), PersonDetector.find

    def held(*arguments: Any) -> Any:
        begun.set()
        assert go.wait(30)
        return find(*arguments)

    monkeypatch.setattr(PersonDetector, "find", held)

    async def both() -> tuple[httpx.Response, httpx.Response]:
        transport = httpx.ASGITransport(make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            slow = asyncio.create_task(http.post("/v1/poses", files={"image": PNG}))
            await asyncio.to_thread(begun.wait, 30)
            data = {"boxes": json.dumps(BOX)}
            answered = await http.post("/v1/poses", files={"image": PNG}, data=data)
            assert not slow.done()
            go.set()
            return answered, await slow

    for response, people in zip(asyncio.run(both()), (1, 3), strict=True):
        assert len(results(response)[0]["persons"]) == people


def test_the_threads_of_its_session_are_the_replicas(checkpoint: Path, model: Path) -> None:
    for settings, threads in (({"num_cpus": 3}, 3), ({"num_cpus": 3, "threads": 2}, 2)):
        served = service_of(checkpoint, model, **settings).model
        assert served
        assert served.detector
        assert served.detector._session.get_session_options().intra_op_num_threads == threads


def test_runs_and_pictures_are_counted(
    checkpoint: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = service_of(checkpoint, model)
    assert service.model
    assert service.model.detector
    sha256 = service.model.detector.sha256[:12]
    counted: list[Any] = []
    monkeypatch.setattr(service.metrics.looked, "add", lambda *told: counted.append(told))
    results(ask(service, images=2))
    assert counted == [(2, sha256)]
    assert sum(service.metrics.runs._series[(sha256,)].counts) == 1
    assert service.metrics.runs._series[(sha256,)].total > 0


def test_a_heic_is_answered_as_its_pixels_are_and_without_its_reader_is_415(
    service: PoseService, predictor: PosePredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    heic = HEIC["turned-6"]
    (result,) = results(call(service, "POST", "/v1/poses?boxes_from=whole_image", files={"image": heic}))
    assert result["image"] == {"width": 64, "height": 96, "exif_rotated": False}
    expected = predictor(decode_image(heic, apply_exif=True))[0]
    assert_same(result["persons"], expected.keypoints.xy, expected.keypoints.conf)
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    problem = call(service, "POST", "/v1/poses", files={"image": heic})
    assert (problem.status_code, problem.json()["type"]) == (415, "urn:hrnet:problem:media-type")
    assert "pip install 'hrnet-ray[heif]'" in problem.json()["detail"]


# --- which one ----------------------------------------------------------------------------------


def test_a_replica_refuses_another_detector_than_was_deployed(checkpoint: Path, tmp_path: Path) -> None:
    model = crowd(tmp_path)
    sha256 = PersonDetector.load(model).sha256
    choice = ModelChoice(
        checkpoint=str(checkpoint), person_detector=DetectorChoice(model=str(model), sha256=sha256)
    )
    args = ServeArgs(checkpoint=str(checkpoint))
    assert load_model(choice, args).detector
    declaration = model.with_suffix(".json")
    declaration.write_text(declaration.read_text() + " ")
    with pytest.raises(ConfigError, match=rf"was deployed with {sha256[:12]}.*they have changed since"):
        load_model(choice, args)


def test_another_detector_leaves_the_network_where_it_is_and_the_other_way_round(
    checkpoint: Path, model: Path, tmp_path: Path
) -> None:
    args = ServeArgs(checkpoint=str(checkpoint), person_detector=DetectorChoice(model=str(model)))
    first = load_model(args.choice(), args)
    other = args.choice().model_copy(
        update={"person_detector": DetectorChoice(model=str(rtdetr_like(tmp_path)))}
    )
    second = load_model(other, args, first)
    assert second.predictor is first.predictor
    assert second.detector is not first.detector
    assert second.info().detector != first.info().detector
    third = load_model(other.model_copy(update={"version": "8"}), args, second)
    assert third.detector is second.detector
    assert third.predictor is not second.predictor
    assert (
        load_model(other.model_copy(update={"person_detector": None}), args, second).info().detector is None
    )


def test_whoever_has_no_key_is_not_told_where_the_detector_lies(
    checkpoint: Path, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("camera 0123456789abcdef-key\n")
    service = service_of(checkpoint, model, keys=str(tmp_path / "keys"))
    told = call(service, "GET", "/v1/models")
    assert str(model.parent) not in told.text
    assert told.json()["models"][0]["detector"]["name"] == "crowd.onnx"
    bearer = {"Authorization": "Bearer 0123456789abcdef-key"}
    assert str(model) in call(service, "GET", "/v1/models", headers=bearer).text


@pytest.mark.parametrize(
    ("build", "batches"), [(crowd, True), (rtdetr_like, False), (torchvision_like, False)]
)
def test_a_detector_is_asked_whether_it_takes_several_pictures(
    tmp_path: Path, build: Any, batches: bool
) -> None:
    assert PersonDetector.load(build(tmp_path)).batches is batches


def test_an_axis_that_is_free_in_name_only_is_found_out(tmp_path: Path) -> None:
    """Of the export of a model for one picture the first axis may be free, and its answer of one."""
    from onnx import TensorProto, helper

    nodes = [
        *red_nodes(),
        helper.make_node("ReduceMax", ["corners"], ["one_row"], axes=[0], keepdims=1),
        helper.make_node("Concat", ["one_row", "score"], ["one_det"], axis=1),
        helper.make_node("Unsqueeze", ["one_det", "zero"], ["dets"]),
    ]
    constants = [*red_constants(), constant("score", [[0.9]]), constant("zero", [0], np.int64)]
    declared = {"layout": "boxes", "boxes": "dets", "input_size": [WIDTH, HEIGHT]}
    outputs, shape = {"dets": TensorProto.FLOAT}, ["pictures", 3, HEIGHT, WIDTH]
    file = save(tmp_path / "d.onnx", nodes, constants, outputs, input_shape=shape, declaration=declared)
    detector = PersonDetector.load(file)
    assert not detector.batches
    views = [detector.view(shifted(i)) for i in range(2)]
    (first, _), (second, _) = detector.find(views, [None, None])
    assert second[0][0] - first[0][0] == pytest.approx(10, abs=2)


def test_boxes_that_no_predictor_takes_are_left_out(tmp_path: Path) -> None:
    """Undecoded YOLOX gives sizes as logarithms: a wrong declaration makes them endless."""
    detector = PersonDetector.load(crowd(tmp_path))
    outputs = {"boxes": np.array([[0, 0, 9, 9], [0, 0, 1e30, 9]], np.float32)}
    outputs["scores"] = np.array([[0.9], [0.9]], np.float32)
    boxes, scores = detector._people(outputs, detector.view(picture()), None)
    assert boxes.tolist() == [[0, 0, 18, 18]]
    assert len(scores) == 1
