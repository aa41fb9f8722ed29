"""PosePredictor on a network whose right answer is known, and on HRNet against torch's own operations."""

from __future__ import annotations

import copy
import functools
import json
import os
import pickle
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from hrnet_core.architecture import HRNetConfig
from hrnet_core.checkpoint import CheckpointSpec, save_checkpoint
from hrnet_core.errors import CheckpointError, ConfigError, DataError, ImageError
from hrnet_core.heatmaps import HeatmapCodec
from hrnet_core.model import HRNet, fold_batch_norms, normalize
from hrnet_core.modes import compiler, fastest_exact, unusable
from hrnet_core.onnx_file import export_onnx
from hrnet_core.predictor import PosePredictor
from hrnet_core.skeleton import COCO17, Skeleton

COLORS = Skeleton("colors", ("red", "green", "blue"), (), (0.1, 0.1, 0.1))
PLACES = np.array([[150.3, 120.8], [228.1, 200.4], [190.6, 260.2]], np.float32)  # of red, green, blue
MOVED = PLACES + np.array([40, 20], np.float32)
BOX = [100.0, 50.0, 180.0, 240.0]
SMALL = HRNetConfig(width=8, stem_width=16, bottlenecks=1, modules=(1, 1, 1), blocks=1)


class ColorReader(nn.Module):
    """A perfect network for blobs of light: the heatmap of keypoint k is colour k, read at the cells."""

    def __init__(self, codec: HeatmapCodec) -> None:
        super().__init__()
        self.codec = codec
        self.batches: list[int] = []

    def __deepcopy__(self, _memo: Any) -> ColorReader:
        return self  # so that a test sees the batches

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        if self.codec.name == "udp":  # cells are (W - 1) / (W / 4 - 1) px apart
            size = self.codec.heatmap_size[::-1]
            return F.interpolate(images, size, mode="bilinear", align_corners=True)
        return images[:, :, ::4, ::4]


def blobs(places: NDArray[np.float32] = PLACES, sigma: float = 10.0) -> NDArray[np.uint8]:
    """uint8 (480, 640, 3): one soft blob of each colour."""
    y, x = np.mgrid[:480, :640]
    distance = (x[..., None] - places[:, 0]) ** 2 + (y[..., None] - places[:, 1]) ** 2
    return np.rint(255 * np.exp(-distance / (2 * sigma**2))).astype(np.uint8)


def assert_undisturbed(asked: Sequence[tuple[PosePredictor, NDArray[np.uint8]]]) -> None:
    """Each predictor, asked for its crops by a thread of its own beside the others, five times, answers with
    the bits of calls one after the other; and an answer stays what it was when others follow."""
    alone = [predictor.heatmaps(crops, flip_test=False) for predictor, crops in asked]
    kept = [answer.copy() for answer in alone]
    together: list[list[NDArray[Any]]] = [[] for _ in asked]

    def ask(i: int) -> None:
        for _ in range(5):
            together[i].append(asked[i][0].heatmaps(asked[i][1], flip_test=False))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(len(asked)):
        assert len(together[i]) == 5
        for answer in together[i]:
            assert np.array_equal(answer, kept[i])
        assert np.array_equal(alone[i], kept[i])


def color_predictor(codec: str = "dark", **fields: Any) -> PosePredictor:
    heatmaps = HeatmapCodec(codec, (192, 256))  # type: ignore[arg-type]
    spec = CheckpointSpec(
        HRNetConfig(num_keypoints=3), heatmaps, COLORS, mean=(0, 0, 0), std=(1, 1, 1), **fields
    )
    return PosePredictor(ColorReader(heatmaps), spec, device="cpu")  # type: ignore[arg-type]


@functools.cache
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = HRNet(SMALL, initialization="kaiming").train()
    torch.nn.init.normal_(model.final_layer.weight, std=0.5)
    with torch.no_grad():
        for _ in range(30):  # running statistics settle, so that eval mode keeps the signal's size
            model(torch.randn(4, 3, 64, 64))
    return model.state_dict()


def hrnet_predictor(mode: str = "float32", codec: str = "official") -> tuple[HRNet, PosePredictor]:
    model = HRNet(SMALL)
    model.load_state_dict(weights())
    spec = CheckpointSpec(SMALL, HeatmapCodec(codec, (96, 128)))  # type: ignore[arg-type]
    return model, PosePredictor(model, spec, device="cpu", mode=mode)


def noise(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 128, 96, 3), dtype=np.uint8)


# --- Where the answer is known --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "flip_test", "shift"),
    [
        ("dark", False, 0.0),
        ("udp", False, 0.0),
        ("udp", True, 0.0),
        # The mirrored crop is read at 4c + 3 px, shifted by a column at 4c - 1: the mean of 4c and 4c - 1
        # is half a crop px too far right (facts on the flip shift: +0.25 cell of the mirrored half).
        ("dark", True, 0.5),
    ],
)
def test_keypoints_lie_where_the_light_is(codec: str, flip_test: bool, shift: float) -> None:
    (poses,) = color_predictor(codec)(blobs(), boxes_xywh=[BOX], flip_test=flip_test)
    error = poses.keypoints.xy[0] - PLACES
    crop_px = 300 * 0.75 / 192  # image px: 240 px of box height x 1.25 fill 256 rows
    assert np.abs(error - [shift * crop_px, 0]).max() < 0.1
    assert poses.keypoints.conf == pytest.approx(1, abs=0.06)
    assert poses.boxes.xywh.tolist() == [BOX]
    assert (poses.boxes_source, poses.orig_shape, poses.skeleton) == ("given", (480, 640), COLORS)
    assert set(poses.speed) == {"preprocess", "inference", "postprocess"}


def test_the_crop_is_the_checkpoints() -> None:
    """A box of the crop's own aspect, 180 x 240, fills 192 px with 180 px x padding."""
    for padding in (1.25, 1.5):
        matrix = color_predictor("official", padding=padding).image_to_crop([BOX])[0]
        assert matrix[0, 0] == pytest.approx(192 / (180 * padding))
        assert matrix @ [100 + 90, 50 + 120, 1] == pytest.approx([96, 128])
    udp = color_predictor("udp").image_to_crop([BOX])[0]
    assert udp[0, 0] == pytest.approx(191 / (180 * 1.25))


def test_official_answers_within_a_quarter_cell_rule() -> None:
    (poses,) = color_predictor("official")(blobs(), boxes_xywh=[BOX], flip_test=False)
    # Rounding to cells of 4 crop px and a quarter step: at most 1.25 cells off on each axis.
    assert np.abs(poses.keypoints.xy[0] - PLACES).max() < 5 * 300 * 0.75 / 192


def test_several_images_one_poses_each_in_order() -> None:
    predictor = color_predictor("udp")
    moved = blobs(MOVED)
    wide = np.zeros((200, 900, 3), np.uint8)
    boxes = [[BOX, [90.0, 40, 200, 260]], np.zeros((0, 4)), [[140.0, 70, 180, 240]], None]
    scores = [[0.9, 0.4], [], None, None]
    poses = predictor([blobs(), wide, moved, moved], boxes, scores)
    assert [len(p) for p in poses] == [2, 0, 1, 1]
    assert poses[0].keypoints.xy == pytest.approx(np.stack([PLACES, PLACES]), abs=0.15)
    assert poses[2].keypoints.xy[0] == pytest.approx(MOVED, abs=0.15)
    assert poses[0].boxes.conf.tolist() == pytest.approx([0.9, 0.4])
    assert poses[2].boxes.conf.tolist() == [1.0]
    assert [p.boxes_source for p in poses] == ["given", "given", "given", "whole_image"]
    assert poses[3].boxes.xywh.tolist() == [[0, 0, 640, 480]]
    assert poses[3].keypoints.xy[0] == pytest.approx(MOVED, abs=0.7)  # 4 times coarser cells
    assert poses[1].keypoints.data.shape == (0, 3, 3)
    assert predictor([]) == []


def test_a_call_is_its_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls whose people share a batch, as in serving, are answered as alone; no image is kept."""
    predictor = color_predictor("udp")
    calls: list[Any] = [([blobs(), blobs(MOVED)], [[BOX], None]), (blobs(MOVED), [BOX, BOX], [0.5, 0.25])]
    expected = [poses for call in calls for poses in predictor(*call)]
    prepared = [one for call in calls for one in predictor.prepare(*call)]
    keypoints, scores = predictor.predict_crops(np.concatenate([one.crops for one in prepared]))
    finished = predictor.finish(prepared, keypoints, scores)
    for one, poses, whole in zip(prepared, finished, expected, strict=True):
        assert (poses.keypoints.data == whole.keypoints.data).all()
        assert (poses.boxes.xywh == whole.boxes.xywh).all()
        assert poses.scores.tolist() == whole.scores.tolist()
        assert (poses.boxes_source, poses.orig_shape) == (whole.boxes_source, whole.orig_shape)
        assert all(part.size < blobs().size for part in vars(one).values() if isinstance(part, np.ndarray))
    assert predictor.finish([], keypoints[:0], scores[:0]) == []

    passed = []
    for half in ("prepare", "predict_crops", "finish"):
        inner = getattr(predictor, half)
        monkeypatch.setattr(predictor, half, lambda *a, h=half, f=inner: (passed.append(h), f(*a))[1])
    predictor(blobs(), [BOX])
    assert passed == ["prepare", "predict_crops", "finish"]


def test_batches_are_as_long_as_asked_and_never_padded() -> None:
    predictor = color_predictor("udp")
    network: Any = predictor._passes._pass.network
    predictor(blobs(), boxes_xywh=[BOX] * 7, flip_test=False, batch_size=3)
    assert network.batches == [3, 3, 1]
    network.batches.clear()
    predictor([blobs()] * 2, boxes_xywh=[[BOX] * 2] * 2, batch_size=3)  # flip test: as the checkpoint says
    assert network.batches == [3, 3, 1, 1]
    network.batches.clear()
    replaced = color_predictor("udp", flip_test=False)
    replaced(blobs(), boxes_xywh=[BOX])
    assert replaced._passes._pass.network.batches == [1]  # type: ignore[union-attr]


def test_a_box_outside_the_image_is_answered_with_nothing_seen() -> None:
    (poses,) = color_predictor()(blobs(), boxes_xywh=[[5000, 5000, 50, 50], BOX])
    assert len(poses) == 2
    assert np.isfinite(poses.keypoints.data).all()
    assert poses.keypoints.conf[0].max() == 0
    assert poses.keypoints.conf[1].min() > 0.9


@pytest.mark.parametrize(
    ("boxes", "named"),
    [
        ([[10, 10, 0, 20]], "row 0"),
        ([BOX, [10, 10, 20, -1]], "row 1"),
        ([[float("nan"), 10, 20, 20]], "row 0"),
        ([[10, 10, float("inf"), 20]], "row 0"),
        ([[10, 1e7, 20, 20]], "row 0"),
        ([10, 10, 20, 20], r"\(P, 4\)"),
        ([[10, 10, 20]], r"\(P, 4\)"),
        ([[10, 10, 20, 20], [1]], "must be numbers"),
        ("box", "must be numbers"),
    ],
)
def test_boxes_that_are_none_are_refused_by_row(boxes: Any, named: str) -> None:
    with pytest.raises(DataError, match=named):
        color_predictor()(blobs(), boxes_xywh=boxes)


def test_images_and_scores_are_checked() -> None:
    predictor = color_predictor()
    for image in (blobs()[..., 0], blobs() / 255.0, blobs()[..., :2], np.zeros((0, 5, 3), np.uint8), 7):
        with pytest.raises(DataError, match=r"images\[0\] must be a uint8 array"):
            predictor([image])
    with pytest.raises(DataError, match="box_scores must be 1 finite"):
        predictor(blobs(), [BOX], [0.5, 0.5])
    with pytest.raises(DataError, match="box_scores must be 1 finite"):
        predictor(blobs(), [BOX], [float("nan")])
    with pytest.raises(DataError, match=r"boxes_xywh has 1 entries for 2 images"):
        predictor([blobs()] * 2, [[BOX]])
    with pytest.raises(ValueError, match="crops must be uint8"):
        predictor.predict_crops(np.zeros((1, 192, 256, 3), np.uint8))


class _NotRgb(NamedTuple):
    given: Any
    got: str
    way_out: str


def not_rgb() -> list[_NotRgb]:
    from PIL import Image

    image = blobs()
    return [
        _NotRgb(None, "NoneType", "cv2.imread gives None where it cannot read a file"),
        _NotRgb(b"\xff\xd8\xff", "bytes", "decode_image makes one of a file's bytes"),
        _NotRgb(Image.fromarray(image), "Image", r"exif_transpose\(image\).convert\('RGB'\)"),
        _NotRgb(torch.from_numpy(image).permute(2, 0, 1), "Tensor", r"permute\(1, 2, 0\)"),
        _NotRgb(image[..., 0], r"uint8 \(480, 640\)", "COLOR_GRAY2RGB"),
        _NotRgb(image[..., :1], r"uint8 \(480, 640, 1\)", "COLOR_GRAY2RGB"),
        _NotRgb(np.dstack([image, image[..., 0]]), r"uint8 \(480, 640, 4\)", "leaves alpha out"),
        _NotRgb(image.transpose(2, 0, 1), r"uint8 \(3, 480, 640\)", r"transpose\(1, 2, 0\)"),
        _NotRgb(image / 255.0, "float64", r"np.rint\(255 \* image\)"),
        _NotRgb(image.astype(np.uint16) * 257, "uint16", "image >> 8"),
        _NotRgb(image.astype(np.int64), "int64", r"image.astype\(np.uint8\)"),
    ]


def test_what_is_no_array_of_rgb_is_told_how_to_become_one() -> None:
    """Alone as among others: one picture is not taken for a list of its rows."""
    predictor = color_predictor()
    for given, got, way_out in not_rgb():
        with pytest.raises(DataError, match=f"^images must be a uint8 array .* got {got}.*{way_out}"):
            predictor(given)
        with pytest.raises(DataError, match=rf"^images\[1\] must be a uint8 array .* got {got}.*{way_out}"):
            predictor([blobs(), given])
    assert len(predictor(image for image in (blobs(), blobs()))) == 2


def test_boxes_of_another_shape_are_told_the_right_one() -> None:
    predictor = color_predictor()
    with pytest.raises(DataError, match=r"the scores into box_scores; got \(1, 5\)"):
        predictor(blobs(), [[*BOX, 0.9]])
    with pytest.raises(DataError, match=r"boxes_xywh must be numbers: .*requires grad"):
        predictor(blobs(), torch.tensor([BOX], requires_grad=True))
    expected = predictor(blobs(), [BOX])[0].keypoints.data
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (predictor(blobs(), torch.tensor([BOX]))[0].keypoints.data == expected).all()


@pytest.mark.parametrize("size", [0, -1, 2.5, "2"])
def test_a_batch_is_of_one_or_more(size: Any) -> None:
    """-1 was answered with zeros."""
    with pytest.raises(ConfigError, match=f"batch_size must be a whole number from 1 up, got {size!r}"):
        color_predictor()(blobs(), [BOX], batch_size=size)
    with pytest.raises(ConfigError, match="flip_test must be True, False or None, got 'no'"):
        color_predictor()(blobs(), [BOX], flip_test="no")  # type: ignore[arg-type]


FORKED = """
import functools, multiprocessing, sys
import numpy as np, torch
from hrnet_core.predictor import PosePredictor

torch.set_num_threads(2)
load = functools.partial(PosePredictor.load, sys.argv[1], device="cpu", mode=sys.argv[2])
predictor = load()
image = np.zeros((200, 300, 3), np.uint8)
predictor(image)  # so that there are threads to wait for

def child(threads):
    torch.set_num_threads(threads)
    for what in (lambda: predictor(image), lambda: load()(image)):
        try:
            print(len(what()), flush=True)
        except Exception as error:
            print(type(error).__name__, error, flush=True)

for threads in (2, 1):
    process = multiprocessing.get_context("fork").Process(target=child, args=(threads,))
    process.start()
    process.join(60)
    print("ended" if process.exitcode == 0 else "hangs", flush=True)
    process.kill()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_is_refused_where_it_would_wait_for_ever(tmp_path: Path) -> None:
    """torch's threads do not come along; with one thread there are none to wait for."""
    model, predictor = hrnet_predictor()
    save_checkpoint(tmp_path / "checkpoint", model, predictor.spec)
    assert forked(tmp_path / "checkpoint", "float32")[2:] == ["ended", "1", "1", "ended"]


def forked(checkpoint: Path, mode: str) -> list[str]:
    """What a process of two threads and one of one say, forked from one that has computed: asking the
    predictor that came along, and one of their own. Those of two are refused."""
    command = [sys.executable, "-c", FORKED, str(checkpoint), mode]
    told = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=200
    ).stdout.splitlines()
    assert len(told) == 6
    for line in told[:2]:
        assert line.startswith("ConfigError process ")
        assert 'multiprocessing.get_context("spawn")' in line
        assert "torch.set_num_threads(1)" in line
    return told


def test_a_predictor_can_be_pickled() -> None:
    _, predictor = hrnet_predictor()
    image = noise(1)[0]
    there = pickle.loads(pickle.dumps(predictor))
    assert (there(image)[0].keypoints.data == predictor(image)[0].keypoints.data).all()


@pytest.mark.parametrize("mode", ["onnx", "openvino"])
def test_a_predictor_of_another_runtime_is_copied_but_not_pickled(mode: str) -> None:
    """That was "Can't pickle local object 'open_onnx.<locals>.run'"."""
    _, predictor = hrnet_predictor(mode)
    image = noise(1)[0]
    there = copy.deepcopy(predictor)
    assert (there(image)[0].keypoints.data == predictor(image)[0].keypoints.data).all()
    with pytest.raises(ConfigError, match=rf"mode {mode} cannot be pickled, .* mode='{mode}'"):
        pickle.dumps(predictor)


def test_arrays_of_any_layout_are_taken_and_left_alone() -> None:
    predictor = color_predictor("udp")
    image = blobs()
    expected = predictor(image, [BOX])[0].keypoints.data
    flipped_view = image[..., ::-1].copy()[..., ::-1]  # as after reading BGR
    frozen = image.copy()
    frozen.flags.writeable = False  # as out of Ray's object store
    boxes = np.array([BOX])
    for given in (flipped_view, frozen):
        assert (predictor(given, boxes)[0].keypoints.data == expected).all()
    assert (frozen == image).all()
    assert boxes.tolist() == [BOX]
    crops = np.zeros((1, 256, 192, 3), np.uint8)
    crops.flags.writeable = False
    assert predictor.predict_crops(crops)[1].max() == 0
    with pytest.raises(ValueError, match=r"crops must be an array .* got list"):
        predictor.predict_crops(list(crops))  # type: ignore[arg-type]


def test_a_path_is_read_as_it_is_shown(tmp_path: Path) -> None:
    """Stored turned, EXIF turns it back: the answer is the array's, and knows its file."""
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(blobs()).copy()).save(tmp_path / "a.png", exif=exif)
    predictor = color_predictor("udp")
    expected = predictor(blobs(), [BOX])[0]
    for given in (tmp_path / "a.png", str(tmp_path / "a.png")):
        (poses,) = predictor(given, [BOX])
        assert (poses.keypoints.data == expected.keypoints.data).all()
        assert poses.path == str(tmp_path / "a.png")
        assert poses.orig_shape == (480, 640)
    assert expected.path is None
    both = predictor([tmp_path / "a.png", blobs()], [[BOX], [BOX]])
    assert [p.path for p in both] == [str(tmp_path / "a.png"), None]
    (tmp_path / "b.png").write_bytes(b"none")
    with pytest.raises(ImageError, match=r"b\.png: the file begins with"):
        predictor(tmp_path / "b.png")
    with pytest.raises(DataError, match=r"gone\.png: cannot be read \(No such file"):
        predictor([tmp_path / "gone.png"])


def test_border_rule_reaches_the_decoder() -> None:
    predictor = color_predictor("official")
    crops = np.zeros((1, 256, 192, 3), np.uint8)
    crops[0, 4, 80], crops[0, 4, 84] = 255, 100  # row 1 of the heatmap: only mmpose steps along x there
    official, _ = predictor.predict_crops(crops, flip_test=False)
    mmpose, _ = predictor.predict_crops(crops, flip_test=False, border="mmpose")
    assert official[0, 0].tolist() == [80, 4]
    assert mmpose[0, 0].tolist() == [81, 4]


# --- HRNet ----------------------------------------------------------------------------------------


def test_flip_test_is_the_published_average() -> None:
    model, predictor = hrnet_predictor()
    crops = noise(3)
    images = (torch.from_numpy(crops).permute(0, 3, 1, 2).double() / 255).float()
    images = (images - torch.tensor(COCO_MEAN).view(3, 1, 1)) / torch.tensor(COCO_STD).view(3, 1, 1)
    with torch.no_grad():
        plain, mirrored = model.eval()(images), model(images.flip(3))
    back = mirrored.flip(3)[:, COCO17.flip_order.tolist()]
    back[:, :, :, 1:] = back.clone()[:, :, :, :-1]  # the official one-column shift
    expected = (0.5 * (plain + back)).numpy()
    spread = expected.max() - expected.min()
    assert np.abs(predictor.heatmaps(crops) - expected).max() < 1e-5 * spread
    assert np.abs(predictor.heatmaps(crops, flip_test=False) - plain.numpy()).max() < 1e-5 * spread
    keypoints, scores = predictor.predict_crops(crops)
    assert (predictor.spec.codec.decode(predictor.heatmaps(crops))[0] == keypoints).all()
    assert (scores == predictor.heatmaps(crops).max(axis=(2, 3))).all()


COCO_MEAN, COCO_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


EXACT = 1e-5  # of the heatmaps' range: float32 in another order
ROUGH = 0.05  # bfloat16 keeps 8 bits; a wrong layer costs the whole range


@pytest.mark.parametrize(
    ("mode", "tolerance"),
    [
        ("channels_last", EXACT),
        ("bfloat16", ROUGH),
        ("onnx", EXACT),
        ("openvino", EXACT),
        ("openvino_bfloat16", ROUGH),
        ("ncnn", EXACT),
        pytest.param("compiled", EXACT, marks=pytest.mark.slow),
        pytest.param("compiled_bfloat16", ROUGH, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")  # torch's own, when it compiles
def test_modes_agree_as_far_as_they_promise(mode: str, tolerance: float) -> None:
    """Against float32: batches of three, of two (compiled once for all) and of one, and the flip test."""
    model, exact = hrnet_predictor()
    _, other = hrnet_predictor(mode)
    crops = noise(3)
    truth = exact.heatmaps(crops)
    spread = truth.max() - truth.min()
    for count in (3, 2, 1):
        heatmaps = other.heatmaps(crops[:count])
        assert heatmaps.dtype == np.float32
        difference = np.abs(heatmaps - truth[:count]).max() / spread
        assert difference < tolerance
        if tolerance == ROUGH:
            assert difference > EXACT, "bfloat16 that equals float32 is float32"
    # Batch size must not be baked in, nor anything of the first input.
    assert np.abs(other.heatmaps(noise(5, 1)) - exact.heatmaps(noise(5, 1))).max() < tolerance * spread
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert model.bn1.running_mean is not None, "the caller's network was folded"


def test_bfloat16_is_nearer_to_float32_than_autocast() -> None:
    """Folded BatchNorm rounds once less a layer, and the head is float32."""
    model, exact = hrnet_predictor()
    crops = noise(4)
    truth = exact.heatmaps(crops, flip_test=False)
    ours = hrnet_predictor("bfloat16")[1].heatmaps(crops, flip_test=False)
    images = normalize(torch.from_numpy(crops), tuple(COCO_MEAN), tuple(COCO_STD))  # type: ignore[arg-type]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        auto = model.eval()(images).float().numpy()
    assert np.sqrt(((ours - truth) ** 2).mean()) < 0.9 * np.sqrt(((auto - truth) ** 2).mean())


def test_folding_leaves_no_batch_norm_and_the_same_answer() -> None:
    model, _ = hrnet_predictor()
    folded = copy.deepcopy(model).eval()
    fold_batch_norms(folded)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 40
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    images = torch.randn(2, 3, 128, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.eval()(images)
        spread = expected.max() - expected.min()
        assert (folded(images) - expected).abs().max() < EXACT * spread


def figures(difference: float = 0.0, ms: float = 50.0) -> dict[str, float]:
    return {"ap_difference": difference, "ms_per_crop": ms}


@pytest.mark.parametrize(
    ("modes", "device", "chosen"),
    [
        ({}, "cpu", "float32"),
        ({"cpu": {"channels_last": figures(0.0004)}}, "cpu", "channels_last"),
        ({"cpu": {"channels_last": figures(0.001)}}, "cpu", "channels_last"),
        ({"cpu": {"channels_last": figures(-0.002)}}, "cpu", "float32"),
        ({"cpu": {"channels_last": figures(0.002)}}, "cpu", "float32"),
        ({"cpu": {"channels_last": figures()}}, "cuda", "float32"),
        ({"cpu": {"channels_last": {"ms_per_crop": 50}}}, "cpu", "float32"),
        ({"cpu": {"channels_last": {"ap_difference": 0.0}}}, "cpu", "float32"),
        ({"cpu": {"unheard_of": figures(ms=1)}}, "cpu", "float32"),
        (
            {
                "cpu": {
                    "float32": figures(ms=140),
                    "channels_last": figures(ms=119),
                    "bfloat16": figures(0.002, ms=58),
                },
                "cuda": {"bfloat16": figures(ms=1)},
            },
            "cpu",
            "channels_last",
        ),
    ],
)
def test_auto_takes_the_fastest_measured_to_be_exact(
    modes: Any, device: str, chosen: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert fastest_exact(modes, device) == chosen
    if device == "cpu":
        model, exact = hrnet_predictor()
        with caplog.at_level("INFO", logger="hrnet_core.predictor"):
            predictor = PosePredictor(model, replace(exact.spec, modes=modes), device="cpu")
        assert predictor.mode == chosen
        assert f"mode auto on cpu is {chosen}" in caplog.text


def test_auto_passes_by_what_cannot_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured on another machine: no compiler here, no ONNX Runtime, no bfloat16 in the processor."""
    measured = {
        "cpu": {
            "compiled_bfloat16": figures(ms=10), "compiled": figures(ms=20), "onnx": figures(ms=30),
            "bfloat16": figures(ms=40), "channels_last": figures(ms=50),
        }
    }  # fmt: skip
    monkeypatch.setenv("CXX", "true")  # any program that is there
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert fastest_exact(measured, "cpu") == "compiled_bfloat16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
    assert fastest_exact(measured, "cpu") == "compiled"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert fastest_exact(measured, "cpu") == "onnx"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert fastest_exact(measured, "cpu") == "channels_last"


def test_a_mode_that_cannot_run_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, predictor = hrnet_predictor()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert compiler() is None
    for mode in ("compiled", "compiled_bfloat16"):
        with pytest.raises(
            ConfigError, match=rf"mode '{mode}' cannot run here: .*no compiler: install g\+\+"
        ):
            PosePredictor(model, predictor.spec, device="cpu", mode=mode)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
        assert unusable(mode, "cuda") == ""
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "triton" else name)
        assert "Triton, which is not installed (pip install triton)" in unusable(mode, "cuda")
    for mode in ("tf32", "float16", "compiled_tf32", "compiled_float16"):
        with pytest.raises(ConfigError, match=f"mode '{mode}' cannot run here: it is a GPU's; on a CPU take"):
            PosePredictor(model, predictor.spec, device="cpu", mode=mode)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(ConfigError, match=r"onnxruntime is not installed \(pip install 'hrnet-ray"):
        PosePredictor(model, predictor.spec, device="cpu", mode="onnx")
    with pytest.raises(ConfigError, match="an ONNX file cannot be made here: onnxruntime"):
        export_onnx(model, predictor.spec)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
def test_a_compiler_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch._inductor.config

    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    failed = r"mode 'compiled': torch\.compile failed here .*headers of Python"
    # torch's own: monkeypatch would take the setting away for good.
    with torch._inductor.config.patch({"cpp.cxx": (None, "false")}), pytest.raises(ConfigError, match=failed):
        hrnet_predictor("compiled")[1].heatmaps(noise(2))
    torch._dynamo.reset()


def test_onnx_file_of_the_folder_is_used_or_refused(tmp_path: Path) -> None:
    model, predictor = hrnet_predictor()
    spec = save_checkpoint(tmp_path / "c", model, predictor.spec)
    content = export_onnx(model, spec)
    (tmp_path / "c" / "model.onnx").write_bytes(content)
    loaded = PosePredictor.load(tmp_path / "c", device="cpu", mode="onnx")
    crops = noise(2)
    truth = predictor.heatmaps(crops)
    assert np.abs(loaded.heatmaps(crops) - truth).max() < EXACT * (truth.max() - truth.min())
    # Whoever finds the file finds how to use it.
    import onnxruntime

    session = onnxruntime.InferenceSession(content)
    told = json.loads(session.get_modelmeta().custom_metadata_map["hrnet"])
    assert told == {k: v for k, v in json.loads(json.dumps(spec.as_dict())).items() if k != "modes"}
    assert [session.get_inputs()[0].name, session.get_outputs()[0].name] == ["images", "heatmaps"]
    assert session.get_inputs()[0].shape[1:] == [3, 128, 96]
    assert isinstance(session.get_inputs()[0].shape[0], str), "any number of people"

    with torch.no_grad():
        model.final_layer.bias.add_(1)
    save_checkpoint(tmp_path / "other", model, predictor.spec)
    (tmp_path / "other" / "model.onnx").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.onnx: made from weights .*: hrnet export"):
        PosePredictor.load(tmp_path / "other", device="cpu", mode="onnx")
    (tmp_path / "other" / "model.onnx").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"model\.onnx: ONNX Runtime cannot open it"):
        PosePredictor.load(tmp_path / "other", device="cpu", mode="onnx")
    # Saving other weights there takes the stale file away.
    save_checkpoint(tmp_path / "other", model, predictor.spec)
    assert not (tmp_path / "other" / "model.onnx").exists()


def test_unknown_modes_and_devices_are_refused() -> None:
    model, predictor = hrnet_predictor()
    with pytest.raises(ConfigError, match="mode 'fast' is unknown"):
        PosePredictor(model, predictor.spec, mode="fast")
    with pytest.raises(ConfigError, match="device 'gpu' cannot be used"):
        PosePredictor(model, predictor.spec, device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device 'cuda' cannot be used"):
            PosePredictor(model, predictor.spec, device="cuda")


def test_the_network_in_training_and_the_predictor_do_not_meet() -> None:
    model, _ = hrnet_predictor()
    model.train()
    predictor = PosePredictor(model, hrnet_predictor()[1].spec, device="cpu", mode="bfloat16")
    assert model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in model.parameters())
    before = predictor.heatmaps(noise(1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (predictor.heatmaps(noise(1)) == before).all()


@pytest.mark.parametrize("mode", ["float32", "channels_last"])
def test_other_weights_answer_as_a_new_predictor_does(mode: str) -> None:
    """Bit for bit, and in the same memory, as a recording reads it there."""
    model, predictor = hrnet_predictor(mode)
    before = predictor.heatmaps(noise(3))
    memory = {name: tensor.data_ptr() for name, tensor in predictor._network.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    predictor.take_weights(model)
    expected = PosePredictor(model, predictor.spec, "cpu", mode).heatmaps(noise(3))
    np.testing.assert_array_equal(predictor.heatmaps(noise(3)), expected)
    assert np.abs(expected - before).max() > 0.1 * np.ptp(before)
    assert {n: t.data_ptr() for n, t in predictor._network.state_dict().items()} == memory


def test_weights_that_are_kept_elsewhere_are_not_exchanged() -> None:
    model, predictor = hrnet_predictor("bfloat16")
    with pytest.raises(ValueError, match="mode bfloat16 keeps its weights"):
        predictor.take_weights(model)


def test_calls_from_several_threads_equal_calls_one_by_one() -> None:
    _, predictor = hrnet_predictor()
    images = [noise(1, seed)[0] for seed in range(8)]
    boxes = [[[10.0 + seed, 20, 40 + seed, 60]] for seed in range(8)]
    work: list[Callable[[], Any]] = [
        lambda i=i: predictor(images[i], boxes[i], flip_test=bool(i % 2))[0].keypoints.data for i in range(8)
    ]
    alone = [task() for task in work]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda task: task(), work * 2))
    assert all((a == b).all() for a, b in zip(alone * 2, together, strict=True))


def test_load_gives_the_saved_network(tmp_path: Path) -> None:
    model, predictor = hrnet_predictor()
    saved = save_checkpoint(tmp_path / "c", model, replace(predictor.spec, flip_test=False))
    loaded = PosePredictor.load(tmp_path / "c", device="cpu", threads=torch.get_num_threads())
    loaded.warm_up()
    assert loaded.spec.weights_sha256 == saved.weights_sha256
    assert loaded.mode == "float32"
    assert (loaded.heatmaps(noise(2)) == predictor.heatmaps(noise(2), flip_test=False)).all()


def test_speed_is_the_calls_own_time() -> None:
    predictor = color_predictor()
    started = time.perf_counter()
    poses = predictor([blobs()] * 2, [[BOX]] * 2)
    total = (time.perf_counter() - started) * 1000
    assert 0 < sum(sum(p.speed.values()) for p in poses) <= total
