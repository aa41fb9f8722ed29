"""COCO17 against COCO's own lists, and skeletons that users write."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pycocotools.cocoeval import Params
from small_coco import annotation_file, edited, write_coco
from test_preprocess import config, without_ray

from hrnet_core import skeleton as skeleton_module
from hrnet_core.errors import DataError
from hrnet_core.model import HRNet
from hrnet_core.skeleton import (
    COCO17,
    HEAD,
    LEFT,
    RIGHT,
    Skeleton,
    load_skeleton,
    sides_by_name,
    skeleton_from_dict,
)
from pipelines.preprocess import preprocess
from pipelines.settings.train import TrainSettings
from pipelines.sources.coco import read_coco
from pipelines.training.feed import Feed
from pipelines.training.state import make_optimizer
from pipelines.training.step import Part, train_step

HAND = {
    "name": "hand3",
    "keypoints": ["wrist", "left_tip", "right_tip"],
    "flip_pairs": [[1, 2]],
    "oks_sigmas": [0.05, 0.03, 0.03],
}

# The order of COCO's annotation files (cocodataset.org, person_keypoints, categories[0].keypoints).
COCO_ORDER = [
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder",
    "left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee",
    "right_knee", "left_ankle", "right_ankle",
]  # fmt: skip


def test_coco17_is_cocos() -> None:
    assert list(COCO17.keypoints) == COCO_ORDER
    np.testing.assert_allclose(COCO17.oks_sigmas, Params("keypoints").kpt_oks_sigmas, rtol=1e-15)
    assert COCO17.num_keypoints == 17
    # Official lib/dataset/coco.py:83-103.
    assert COCO17.upper_body == tuple(range(11))
    assert COCO17.joint_weights == (1,) * 7 + (1.2, 1.2, 1.5, 1.5, 1, 1, 1.2, 1.2, 1.5, 1.5)
    assert len(COCO17.limbs) == 19


def test_real_annotations_name_the_same_keypoints_and_limbs(real_data: Path) -> None:
    category = json.loads((real_data / "coco/annotations/person_keypoints_val2017.json").read_text())[
        "categories"
    ][0]
    assert list(COCO17.keypoints) == category["keypoints"]
    assert [[a + 1, b + 1] for a, b in COCO17.limbs] == category["skeleton"]


def test_mirroring_exchanges_left_and_right_and_nothing_else() -> None:
    mirrored = [COCO17.keypoints[i] for i in COCO17.flip_order]
    swap = {"left": "right", "right": "left"}
    for name, other in zip(COCO17.keypoints, mirrored, strict=True):
        side, _, part = name.partition("_")
        assert other == (f"{swap[side]}_{part}" if side in swap else name)
    np.testing.assert_array_equal(COCO17.flip_order[COCO17.flip_order], np.arange(17))


def test_flip_order_is_the_published_reordering(reference: dict[str, Any]) -> None:
    case = reference["official_fliplr_joints"]
    visible = np.array(case["vis_in"])[:, 0]
    np.testing.assert_array_equal(visible[COCO17.flip_order], np.array(case["vis_out"])[:, 0])
    joints = np.array(case["joints_in"])[COCO17.flip_order]
    joints[:, 0] = case["width"] - 1 - joints[:, 0]
    # The published code also zeroes what is not visible (trap 9).
    np.testing.assert_array_equal(joints * np.array(case["vis_out"]), case["joints_out"])


def test_json_round_trip(tmp_path: Path) -> None:
    assert skeleton_from_dict(json.loads(json.dumps(COCO17.as_dict()))) == COCO17
    file = tmp_path / "hand.json"
    file.write_text(json.dumps(HAND))
    hand = load_skeleton(file)
    assert hand.num_keypoints == 3
    assert hash(hand) == hash(skeleton_from_dict(HAND))
    np.testing.assert_array_equal(hand.flip_order, [0, 2, 1])
    assert hand.palette[1:] == (LEFT, RIGHT)
    assert load_skeleton("coco17") is COCO17


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"keypoints": []}, ["keypoints", "at least one"]),
        ({"keypoints": ["a", "b", "a"]}, ["unique"]),
        ({"oks_sigmas": [0.1]}, ["oks_sigmas", "3"]),
        ({"oks_sigmas": [0.1, 0, 0.1]}, ["oks_sigmas", "positive"]),
        ({"flip_pairs": [[1, 3]]}, ["flip_pairs", "0 to 2"]),
        ({"flip_pairs": [[1, 2], [2, 0]]}, ["flip_pairs", "at most once"]),
        ({"limbs": [[-1, 0]]}, ["limbs", "0 to 2"]),
        ({"joint_weights": [1]}, ["joint_weights", "3"]),
        ({"sigmas": [1, 1, 1]}, ["unknown fields ['sigmas']", "docs/skeletons.md"]),
        ({"flip_pairs": None}, ["missing fields ['flip_pairs']"]),
        ({"flip_pairs": []}, ["left_tip and right_tip", "[[1, 2]]"]),
        ({"flip_pairs": [[0, 1]]}, ["left_tip and right_tip", "[[1, 2]]"]),
        ({"keypoints": ["wrist", "Tip_R", "tip_l"], "flip_pairs": []}, ["Tip_R and tip_l"]),
        ({"keypoints": [0, 1, 2]}, ["keypoints must be a list of names"]),
        ({"keypoints": "abc"}, ["keypoints must be a list of names"]),
        ({"keypoints": ["a", "b", " "]}, ["keypoints must be a list of names"]),
        ({"keypoints": ["a", "b", "c\n"]}, ["keypoints must be a list of names"]),
        ({"flip_pairs": [["left_tip", "right_tip"]]}, ["flip_pairs", "[[1, 2], ...]"]),
        ({"flip_pairs": [[1]]}, ["flip_pairs", "[[1, 2], ...]"]),
        ({"limbs": [[0, 1, 2]]}, ["limbs", "[[1, 2], ...]"]),
        ({"limbs": {"0": [0, 1]}, "name": 5}, ["name must be text; limbs"]),
        ({"upper_body": ["wrist"]}, ["upper_body must be a list of indices"]),
        ({"oks_sigmas": 0.1}, ["oks_sigmas must be a list of finite numbers"]),
        ({"oks_sigmas": ["0.1", 0.1, 0.1]}, ["oks_sigmas must be a list of finite numbers"]),
        ({"oks_sigmas": [float("inf"), 0.1, 0.1]}, ["oks_sigmas must be a list of finite numbers"]),
        ({"joint_weights": [1, 1, -1]}, ["joint_weights", "none negative"]),
        ({"colors": [[0, 0, 256]] * 3}, ["colors", "0 to 255"]),
        ({"colors": ["red"] * 3}, ["colors", "0 to 255"]),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, change: dict[str, Any], names: list[str]) -> None:
    fields = {key: value for key, value in (HAND | change).items() if value is not None}
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(fields))
    with pytest.raises(DataError) as caught:
        load_skeleton(file)
    for name in ["mine.json", *names, "docs/skeletons.md"]:
        assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (["nose", "left_eye", "right_eye"], [(1, 2)]),
        (["hip r", "EyeLeft", "hip l", "eyeRIGHT"], [(0, 2), (1, 3)]),
        (["l_hip", "r_knee", "pelvis", "brightness", "tail", "rear"], []),
    ],
)
def test_sides_are_known_by_name(names: list[str], pairs: list[tuple[int, int]]) -> None:
    assert sides_by_name(names) == pairs


def test_sides_have_their_colours() -> None:
    names = ("L_Eye", "hip R", "EyeLeft", "RIGHT", "brow", "tail")
    body = Skeleton("animal", names, (), (0.1,) * 6)
    assert body.palette == (LEFT, RIGHT, LEFT, RIGHT, HEAD, HEAD)


@pytest.mark.parametrize("content", [None, "{", "[1, 2]"])
def test_a_file_that_is_no_skeleton_is_named(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "mine.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(DataError, match=r"mine\.json"):
        load_skeleton(file)


def scripts() -> list[str]:
    text = (Path(__file__).parents[1] / "docs/skeletons.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_the_script_of_the_docs_reads_mmposes_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "tiny.py", tmp_path / "tiny.json"
    source.write_text(
        """dataset_info = dict(
            dataset_name='tiny',
            keypoint_info={
                0: dict(name='Nose', id=0, color=[51, 153, 255], type='upper', swap=''),
                2: dict(name='R_Paw', id=2, color=[255, 128, 0], type='', swap='L_Paw'),
                1: dict(name='L_Paw', id=1, color=[0, 255, 0], type='lower', swap='R_Paw')},
            skeleton_info={0: dict(link=('R_Paw', 'Nose'), id=0, color=[0, 0, 255])},
            joint_weights=[1., 1.2, 1.2],
            sigmas=[0.026, 0.062, 0.062])"""
    )
    monkeypatch.setattr("sys.argv", ["script", str(source), str(target)])
    exec(scripts()[0], {})
    assert load_skeleton(target) == Skeleton(
        "tiny", ("Nose", "L_Paw", "R_Paw"), ((1, 2),), (0.026, 0.062, 0.062), ((2, 0),), (0,),
        (1.0, 1.2, 1.2), ((51, 153, 255), (0, 255, 0), (255, 128, 0)),
    )  # fmt: skip


def test_the_script_of_the_docs_puts_a_whole_body_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body, parts = [1, 2, 2] * 17, {"foot": 6, "face": 68, "lefthand": 21, "righthand": 21}
    person = {"id": 1, "keypoints": body, **{f"{part}_kpts": [n, n, 1] * n for part, n in parts.items()}}
    content = {"images": [], "annotations": [person], "categories": [{"id": 1, "keypoints": ["nose"] * 17}]}
    files = [tmp_path / name for name in ("source.json", "skeleton.json", "target.json")]
    files[0].write_text(json.dumps(content))
    files[1].write_text(json.dumps({"keypoints": [f"k{i}" for i in range(133)]}))
    monkeypatch.setattr("sys.argv", ["script", *map(str, files)])
    exec(scripts()[1], {})
    found = json.loads(files[2].read_text())
    together = [*body, *(value for n in parts.values() for value in [n, n, 1] * n)]
    assert found["annotations"][0]["keypoints"] == together
    assert len(found["categories"][0]["keypoints"]) == 133


# ---------------------------------------------------------------------------------- the shipped ones

SHIPPED = sorted(file.stem for file in (Path(skeleton_module.__file__).parent / "skeletons").glob("*.json"))
# pycocotools' constants by joint; head and neck are CrowdPose's (crowdposetools' cocoeval.py).
BY_JOINT = {
    "shoulder": 0.079, "elbow": 0.072, "wrist": 0.062, "hip": 0.107, "knee": 0.087, "ankle": 0.089,
    "head": 0.079, "neck": 0.079, "head_top": 0.079, "upper_neck": 0.079, "thorax": 0.079, "pelvis": 0.107,
}  # fmt: skip


def test_there_are_shipped_skeletons_and_a_wrong_name_lists_them(tmp_path: Path) -> None:
    assert SHIPPED == ["crowdpose14", "mpii16"]
    with pytest.raises(DataError, match="coco17, crowdpose14, mpii16"):
        load_skeleton("crowdpose")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_skeleton_is_a_body(name: str) -> None:
    """Constants by joint, every left with its right, one connected figure, lower and upper half by name."""
    body = load_skeleton(name)
    assert body.name == name
    assert skeleton_from_dict(json.loads(json.dumps(body.as_dict()))) == body
    parts = [n.removeprefix("left_").removeprefix("right_") for n in body.keypoints]
    assert list(body.oks_sigmas) == [BY_JOINT[part] for part in parts]
    swap = {"left": "right", "right": "left"}
    for one, other in zip(body.keypoints, np.array(body.keypoints)[body.flip_order].tolist(), strict=True):
        side, _, part = one.partition("_")
        assert other == (f"{swap[side]}_{part}" if side in swap else one)
    lower = {i for i, part in enumerate(parts) if part in ("hip", "knee", "ankle", "pelvis")}
    assert set(body.upper_body) == set(range(body.num_keypoints)) - lower
    joined = {0}
    for _ in body.limbs:
        joined |= {i for limb in body.limbs for i in limb if joined & set(limb)}
    assert joined == set(range(body.num_keypoints))
    if body.joint_weights:
        weight = {"elbow": 1.2, "knee": 1.2, "wrist": 1.5, "ankle": 1.5}
        assert list(body.joint_weights) == [weight.get(part, 1) for part in parts]


def test_crowdpose14_is_that_of_its_annotations(real_data: Path) -> None:
    file = real_data / "evaluator" / "crowdpose_example" / "gt.json"
    category = json.loads(file.read_text())["categories"][0]
    assert list(load_skeleton("crowdpose14").keypoints) == category["keypoints"]


def test_crowdpose_annotations_are_read(real_data: Path, tmp_path: Path) -> None:
    """They have no area: it is that of the box by the rule that they are scored by."""
    data = json.loads((real_data / "evaluator" / "crowdpose_example" / "gt.json").read_text())
    root = root_of(tmp_path, data)
    split = read_coco(root, "train2017", load_skeleton("crowdpose14"))
    labelled = [a for a in data["annotations"] if a["num_keypoints"]]
    assert (len(split.photos), len(split.people)) == (4, len(labelled)) == (4, 9)
    assert [r.reason for r in split.rejected] == ["no_keypoints"]
    assert split.repaired["area_from_box"] == 9
    boxes = {a["id"]: a["bbox"] for a in data["annotations"]}
    for ann_id, area in zip(split.people.ann_id.tolist(), split.people.area, strict=True):
        assert area == pytest.approx(0.53 * boxes[ann_id][2] * boxes[ann_id][3])
    # One that has an area: the others' are from their boxes all the same.
    labelled[0]["area"] = 100.0
    split = read_coco(root_of(tmp_path / "b", data), "train2017", load_skeleton("crowdpose14"))
    assert (len(split.people), split.repaired["area_from_box"]) == (9, 8)
    assert [r.reason for r in split.rejected] == ["no_keypoints"]


def root_of(root: Path, data: dict[str, Any]) -> Path:
    """A COCO root of annotations; the pictures are empty, nothing here opens them."""
    (root / "annotations").mkdir(parents=True)
    (root / "train2017").mkdir()
    annotation_file(root, "train2017").write_text(json.dumps(data))
    for image in data["images"]:
        (root / "train2017" / image["file_name"]).touch()
    return root


@pytest.mark.parametrize("name", ["coco17", *SHIPPED])
def test_another_order_is_refused_name_by_name(tmp_path: Path, name: str) -> None:
    """CVAT exports the names in an order of its own (cvat issues 5048, 8484)."""
    body = load_skeleton(name)
    theirs = sorted(body.keypoints)
    data: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    data["categories"] = [{"id": 1, "name": "person", "keypoints": theirs}]
    with pytest.raises(DataError) as caught:
        read_coco(root_of(tmp_path, data), "train2017", body)
    message = str(caught.value)
    assert f"skeleton {name!r}: the same names in another order" in message
    differing = [(i, a, b) for i, (a, b) in enumerate(zip(theirs, body.keypoints, strict=True)) if a != b]
    assert len(differing) > 10
    for place, a, b in differing:
        assert f"position {place} has {a!r} instead of {b!r}" in message
    assert "--data.skeleton" in message


def test_another_skeleton_is_refused_by_its_names(tmp_path: Path) -> None:
    data: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    names = list(load_skeleton("crowdpose14").keypoints)
    data["categories"] = [{"id": 1, "name": "person", "keypoints": names}]
    with pytest.raises(DataError, match=r"14 keypoints instead of 17 \(missing .*'nose'.*unknown .*'neck'"):
        read_coco(root_of(tmp_path, data), "train2017", COCO17)


def test_a_training_step_with_14_keypoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the settings alone: annotations of CrowdPose's layout -> shards -> feed -> loss that falls."""
    body = load_skeleton("crowdpose14")
    places = [*range(5, 17), 0, 1]
    root = write_coco(tmp_path / "coco", {"train2017": [2, 2], "val2017": [1]})
    for split in ("train2017", "val2017"):
        with edited(root, split) as data:
            data["categories"][0]["keypoints"] = list(body.keypoints)
            for annotation in data["annotations"]:
                triples = np.array(annotation["keypoints"]).reshape(17, 3)[places]
                annotation |= {"keypoints": triples.ravel().tolist(), "num_keypoints": 14}
                del annotation["area"]
    without_ray(monkeypatch)
    run = config(root, tmp_path / "s", skeleton="crowdpose14")
    small = run.model.model_copy(
        update={"width": 8, "stem_width": 8, "bottlenecks": 1, "modules": (1, 1, 1), "blocks": 1}
    )
    manifest = preprocess(run)
    assert manifest.recipe.skeleton == body
    settings = TrainSettings(batch_size=4, lanes=4)
    (batch,) = Feed(manifest, "train2017", settings).batches(0)
    assert batch.heatmaps.shape == (4, 14, 24, 16)
    torch.manual_seed(0)
    model = HRNet(small.architecture(manifest.recipe.skeleton.num_keypoints), "kaiming").train()
    optimizer = make_optimizer(model, settings)
    part = Part(
        torch.from_numpy(batch.images).permute(0, 3, 1, 2) / 255,
        torch.from_numpy(batch.heatmaps).float(),
        torch.from_numpy(batch.weights.copy()),
        1.0,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    losses = [float(train_step(model, optimizer, [part], settings)) for _ in range(6)]
    torch.set_num_threads(threads)
    assert losses[-1] < 0.9 * losses[0]


# Machado, Oliveira, Fernandes 2009, severity 1: linear RGB as someone without green or red cones sees it.
DEUTERANOPIA = [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]
PROTANOPIA = [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]
RGB_TO_XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]


def lab(rgb: tuple[int, int, int], seen: Any) -> NDArray[np.float64]:
    """CIE L*a*b* of an sRGB colour that `seen` changes."""
    share = np.array(rgb) / 255
    linear = np.clip(seen @ np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4), 0, 1)
    xyz = RGB_TO_XYZ @ linear / [0.9505, 1, 1.089]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("seen", [np.eye(3), np.array(DEUTERANOPIA), np.array(PROTANOPIA)])
def test_sides_can_be_told_apart_by_the_colour_blind(seen: Any) -> None:
    """A distance of 2 is just seen beside each other; thin lines on a photograph need far more. MMPose's own
    green (0, 255, 0) is 14 from its orange for a man in a hundred."""
    for a, b in ((LEFT, RIGHT), (LEFT, HEAD), (RIGHT, HEAD)):
        assert np.linalg.norm(lab(a, seen) - lab(b, seen)) > 30
