"""Detectors in ONNX: small real models whose answer follows from the picture, in every declared form."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from hrnet_core.detector import Declaration, PersonDetector, read_declaration, suppress
from hrnet_core.errors import ConfigError

WIDTH, HEIGHT = 320, 256  # of the detectors' input
RECTANGLE = np.array([100, 40, 300, 200], np.float32)  # x, y, w, h of the red patch in the picture


def picture() -> NDArray[np.uint8]:
    """uint8 (320, 640, 3): grey, and one red patch."""
    image = np.full((320, 640, 3), 60, np.uint8)
    x, y, w, h = RECTANGLE.astype(int)
    image[y : y + h, x : x + w] = (255, 0, 0)
    return image


def constant(name: str, values: Any, kind: type = np.float32) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(values, kind), name)


def save(
    file: Path,
    nodes: list[onnx.NodeProto],
    constants: list[onnx.TensorProto],
    outputs: dict[str, Any],
    **more: Any,
) -> Path:
    shape = more.pop("input_shape", [1, 3, HEIGHT, WIDTH])
    graph = helper.make_graph(
        nodes,
        "detector",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(n, kind, None) for n, kind in outputs.items()],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, file)
    file.with_suffix(".json").write_text(json.dumps(more.pop("declaration")))
    return file


def red_nodes(channel: int = 0, image: str = "image") -> list[onnx.NodeProto]:
    """`image` (1, 3, h, w) -> `corners` float (1, 4): the outer edges of what is above 0.5 in one channel."""
    return [
        helper.make_node("Gather", [image, f"channel{channel}"], ["red"], axis=1),  # (1, h, w)
        helper.make_node("Greater", ["red", "half"], ["is_red"]),
        helper.make_node("Cast", ["is_red"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["mask"], ["columns"], axes=[1], keepdims=0),
        helper.make_node("ReduceMax", ["mask"], ["rows"], axes=[2], keepdims=0),
        *[
            helper.make_node("ArgMax", [of], [name], axis=1, keepdims=1, select_last_index=last)
            for of, name, last in (
                ("columns", "left", 0), ("rows", "top", 0), ("columns", "right", 1), ("rows", "bottom", 1)
            )
        ],
        helper.make_node("Concat", ["left", "top", "right", "bottom"], ["pixels"], axis=1),
        helper.make_node("Cast", ["pixels"], ["inner"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["inner", "outer"], ["corners"]),
    ]  # fmt: skip


def red_constants(channel: int = 0) -> list[onnx.TensorProto]:
    return [
        constant(f"channel{channel}", channel, np.int64),
        constant("half", 0.5),
        constant("outer", [[0, 0, 1, 1]]),
    ]


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def rtdetr_like(folder: Path) -> Path:
    """pred_boxes (1, 3, 4) normalised (cx, cy, w, h), logits (1, 3, 2): the patch, the patch as class 1,
    and something that scores .1."""
    nodes = [
        *red_nodes(),
        helper.make_node("MatMul", ["corners", "to_center"], ["centered"]),
        helper.make_node("Mul", ["centered", "size"], ["fractions"]),
        helper.make_node("Unsqueeze", ["fractions", "one"], ["row"]),
        helper.make_node("Concat", ["row", "row", "other"], ["pred_boxes"], axis=1),
        helper.make_node("Identity", ["given"], ["logits"]),
    ]
    to_center = [[0.5, 0, -1, 0], [0, 0.5, 0, -1], [0.5, 0, 1, 0], [0, 0.5, 0, 1]]
    constants = [
        *red_constants(),
        constant("to_center", to_center),
        constant("size", [[1 / WIDTH, 1 / HEIGHT, 1 / WIDTH, 1 / HEIGHT]]),
        constant("one", [1], np.int64),
        constant("other", [[[0.5, 0.5, 0.2, 0.2]]]),
        constant("given", [[[logit(0.9), -9], [-9, logit(0.8)], [logit(0.1), -9]]]),
    ]
    declared = {"layout": "boxes", "boxes": "pred_boxes", "scores": "logits", "logits": True}
    declared |= {"box_format": "cxcywh", "normalized": True, "resize": "stretch"}
    declared |= {"input_size": [WIDTH, HEIGHT]}
    outputs = {"pred_boxes": TensorProto.FLOAT, "logits": TensorProto.FLOAT}
    return save(folder / "rtdetr.onnx", nodes, constants, outputs, declaration=declared)


def torchvision_like(folder: Path, people: int = 2) -> Path:
    """One image without a batch; boxes (N, 4) px, labels (N,) with 1 = person, scores (N,)."""
    nodes = [
        helper.make_node("Unsqueeze", ["image", "zero"], ["batch"]),
        *red_nodes(image="batch"),
        helper.make_node("Concat", ["corners"] * people, ["boxes"], axis=0),
        helper.make_node("Identity", ["given_labels"], ["labels"]),
        helper.make_node("Identity", ["given_scores"], ["scores"]),
    ]
    constants = [
        *red_constants(),
        constant("zero", [0], np.int64),
        constant("given_labels", [1, 18][:people], np.int64),
        constant("given_scores", [0.7, 0.95][:people]),
    ]
    declared = {"layout": "boxes", "boxes": "boxes", "scores": "scores", "labels": "labels"}
    declared |= {"person_class": 1, "input_size": [WIDTH, HEIGHT]}
    outputs = {"boxes": TensorProto.FLOAT, "labels": TensorProto.INT64, "scores": TensorProto.FLOAT}
    shape = [3, HEIGHT, WIDTH]
    return save(
        folder / "torchvision.onnx", nodes, constants, outputs, input_shape=shape, declaration=declared
    )


def mmdeploy_like(folder: Path) -> Path:
    """dets (1, 2, 5) px with the score behind, labels (1, 2); BGR pixels 0..255, letterbox in the middle."""
    nodes = [
        *red_nodes(channel=2),
        helper.make_node("Concat", ["corners", "score"], ["one_det"], axis=1),
        helper.make_node("Concat", ["one_det", "other"], ["both"], axis=0),
        helper.make_node("Unsqueeze", ["both", "zero"], ["dets"]),
        helper.make_node("Identity", ["given"], ["labels"]),
    ]
    constants = [
        constant("channel2", 2, np.int64),
        constant("half", 200),
        constant("outer", [[0, 0, 1, 1]]),
        constant("score", [[0.6]]),
        constant("other", [[0, 0, 9, 9, 0.99]]),
        constant("zero", [0], np.int64),
        constant("given", [[0, 5]], np.int64),
    ]
    declared = {"layout": "boxes", "boxes": "dets", "labels": "labels", "channels": "BGR"}
    declared |= {"divide_by": 1, "resize": "letterbox_center", "input_size": [WIDTH, HEIGHT]}
    outputs = {"dets": TensorProto.FLOAT, "labels": TensorProto.INT64}
    return save(folder / "mmdeploy.onnx", nodes, constants, outputs, declaration=declared)


CELLS = (WIDTH // 8) * (HEIGHT // 8) + (WIDTH // 16) * (HEIGHT // 16) + (WIDTH // 32) * (HEIGHT // 32)


def yolox_like(folder: Path, decoded: bool = False) -> Path:
    """(1, cells, 7), two classes: the same person from two cells, and one of the other class."""
    found = np.zeros((1, CELLS, 7), np.float32)
    first16 = (WIDTH // 8) * (HEIGHT // 8)
    # Row 5, column 6 of the stride 16 map: centre (6.5, 5.25) x 16 = (104, 84), size e^ln(4) x 16 = 64 x 96.
    raw = [0.5, 0.25, math.log(4), math.log(6)]
    found[0, first16 + 5 * (WIDTH // 16) + 6] = [*raw, 0.9, 0.8, 0.1]
    # Row 10, column 12 of stride 8: centre (13.125, 10.5) x 8 = (105, 84), the same size: nearly the same.
    found[0, 10 * (WIDTH // 8) + 12] = [1.125, 0.5, math.log(8), math.log(12), 0.9, 0.7, 0]
    found[0, -1] = [0, 0, 0, 0, 0.9, 0.1, 0.9]
    if decoded:
        found[0, first16 + 5 * (WIDTH // 16) + 6, :4] = [104, 84, 64, 96]
        found[0, 10 * (WIDTH // 8) + 12, :4] = [105, 84, 64, 96]
        found[0, -1, :4] = [300, 200, 20, 20]
    nodes = [
        helper.make_node("ReduceMax", ["image"], ["most"], axes=[0, 1, 2, 3], keepdims=0),
        helper.make_node("Mul", ["most", "zero"], ["nothing"]),
        helper.make_node("Add", ["found", "nothing"], ["output"]),
    ]
    declared = {"layout": "yolox", "input_size": [WIDTH, HEIGHT], "channels": "BGR", "divide_by": 1}
    declared |= {"nms_iou": 0.45, "decoded": decoded}
    constants = [constant("found", found), constant("zero", 0)]
    return save(folder / "yolox.onnx", nodes, constants, {"output": TensorProto.FLOAT}, declaration=declared)


@pytest.mark.parametrize(
    ("build", "score"), [(rtdetr_like, 0.9), (torchvision_like, 0.7), (mmdeploy_like, 0.6)]
)
def test_the_patch_is_found_where_it_is(tmp_path: Path, build: Any, score: float) -> None:
    """640x320 px in an input of 320x256: stretched by (0.5, 0.8), or by 0.5 with a rest on one side or two.

    One px of the input is 2 px of the picture, and so exact is the answer.
    """
    boxes, scores = PersonDetector.load(build(tmp_path))(picture())
    assert boxes.shape == (1, 4)
    assert boxes.dtype == scores.dtype == np.float32
    assert scores == pytest.approx([score], abs=1e-6)
    assert np.abs(boxes[0] - RECTANGLE).max() <= 2


def test_a_single_box_without_a_batch_axis_stays_one(tmp_path: Path) -> None:
    boxes, _ = PersonDetector.load(torchvision_like(tmp_path, people=1))(picture())
    assert np.abs(boxes - RECTANGLE).max() <= 2


@pytest.mark.parametrize("decoded", [False, True])
def test_yolox_cells_are_decoded_and_suppressed(tmp_path: Path, decoded: bool) -> None:
    detector = PersonDetector.load(yolox_like(tmp_path, decoded))
    boxes, scores = detector(np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    assert boxes == pytest.approx(np.array([[72, 36, 64, 96]]), abs=1e-3)
    assert scores == pytest.approx([0.72])
    twice, _ = detector(np.zeros((2 * HEIGHT, 2 * WIDTH, 3), np.uint8))
    assert twice == pytest.approx(2 * boxes, abs=1e-3)
    _, many = detector(np.zeros((HEIGHT, WIDTH, 3), np.uint8), score_threshold=0.05)
    assert many == pytest.approx([0.72, 0.09])  # the other class scores .09 as a person


def test_suppression_by_hand() -> None:
    """Boxes 10 wide, shifted by 2: IoU 8 / 12; by 5: 5 / 15."""
    boxes = np.array([[0, 0, 10, 10], [2, 0, 12, 10], [5, 0, 15, 10]], np.float32)
    assert suppress(boxes, 0.7).tolist() == [0, 1, 2]
    assert suppress(boxes, 0.6).tolist() == [0, 2]  # 1 and 2 overlap by 7 / 13, but 1 is gone already
    assert suppress(boxes, 0.3).tolist() == [0]
    assert suppress(boxes[:0], 0.5).tolist() == []


def test_it_travels_to_other_processes(tmp_path: Path) -> None:
    detector = PersonDetector.load(rtdetr_like(tmp_path))
    again = pickle.loads(pickle.dumps(detector))
    assert "_session" not in vars(again)
    assert (again(picture())[0] == detector(picture())[0]).all()
    assert again(picture(), score_threshold=0.05)[1] == pytest.approx([0.9, 0.1], abs=1e-6)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layuot": "boxes"}, "unknown fields ['layuot']"),
        ({"layout": "ssd"}, "layout is 'ssd', choose one of boxes, yolox"),
        ({"layout": None}, "layout is None"),
        ({"boxes": ""}, "needs the field boxes"),
        ({"boxes": "dets"}, "declared as output 'dets', but its outputs are logits, pred_boxes"),
        ({"scores": ""}, "(N, 4) with an output of scores"),
        ({"person_class": 7}, "scores of shape (3, 2) for person_class 7"),
        ({"input_size": [320]}, "input_size must be [width, height]"),
        ({"input_size": [64, 64]}, "does not take float32 (1, 3, 64, 64)"),
        ({"input_size": "big"}, "input_size"),
        ({"input_size": [200_000, 200_000]}, "input_size goes to 8192 px a side"),
        ({"std": [1, 0, 1]}, "std"),
        ({"nms_iou": 3}, "nms_iou must lie above 0"),
        ({"layout": "yolox", "boxes": "", "scores": ""}, "layout yolox reads one of"),
    ],
)
def test_a_wrong_declaration_is_one_paragraph(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    file = rtdetr_like(tmp_path)
    declaration = file.with_suffix(".json")
    declaration.write_text(json.dumps({**json.loads(declaration.read_text()), **change}))
    with pytest.raises(ConfigError) as caught:
        PersonDetector.load(file)
    assert named in str(caught.value)
    assert "rtdetr" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_files_are_one_paragraph(tmp_path: Path) -> None:
    def refused(file: Path, match: str) -> None:
        with pytest.raises(ConfigError, match=match) as caught:
            PersonDetector.load(file)
        assert "\n" not in str(caught.value)

    file = rtdetr_like(tmp_path)
    refused(tmp_path / "none.onnx", r"none\.onnx: cannot be read \(No such file or directory\)")
    (tmp_path / "none.onnx").write_bytes(b"no model")
    refused(tmp_path / "none.onnx", r"none\.json: no readable JSON .* declared in MODEL\.json beside it")
    file.with_suffix(".json").rename(tmp_path / "none.json")
    refused(tmp_path / "none.onnx", "not a model that ONNX Runtime opens")
    (tmp_path / "none.json").write_text("[1]")
    refused(
        tmp_path / "none.onnx", r"none\.json: holds a list of \d+, not one JSON object\..* docs/predict\.md"
    )
    (tmp_path / "none.json").write_text("{}")
    refused(tmp_path / "none.onnx", r"missing fields \['input_size', 'layout'\]")


def test_defaults_are_declared(tmp_path: Path) -> None:
    file = tmp_path / "m.json"
    file.write_text('{"layout": "yolox", "input_size": [416, 416]}')
    declaration = read_declaration(file)
    assert declaration == Declaration("yolox", (416, 416))
    assert (declaration.score_threshold, declaration.nms_iou, declaration.pad_value) == (0.3, None, 114)
