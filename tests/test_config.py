"""Settings: the shipped files load, mistakes are named, identities depend on what decides the result."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from hrnet_core.choices import CODECS, MODES, Augmentation
from hrnet_core.errors import ConfigError
from pipelines.settings.config import RunConfig, reference
from pipelines.settings.config_file import load_config
from pipelines.shards.recipe import Recipe

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "pipelines" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_config_loads_by_name_and_says_what_to_expect(path: Path) -> None:
    config = load_config(path.stem)
    assert config == load_config(str(path))
    assert config.config_name == path.stem
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert "AP" in first


def test_published_recipes_are_the_published_numbers() -> None:
    for name, width, size, batch in (
        ("w32_256x192", 32, (192, 256), 128),
        ("w32_384x288", 32, (288, 384), 128),
        ("w48_256x192", 48, (192, 256), 128),
        ("w48_384x288", 48, (288, 384), 96),
    ):
        config = load_config(name)
        assert (config.model.width, config.data.input_size, config.train.batch_size) == (width, size, batch)
        assert config.data.sigma_cells == {256: 2.0, 384: 3.0}[size[1]]
        assert (config.train.epochs, config.train.milestones, config.train.gamma) == (210, (170, 200), 0.1)
        assert (config.train.optimizer, config.train.lr, config.train.weight_decay) == ("adam", 1e-3, 0.0)
        assert config.train.loss == "official"
        assert config.train.precision == "float32"
        assert (config.train.clip_norm, config.train.ema_decay, config.train.accumulate) == (0, 0, 1)
        assert (config.train.recorded, config.train.compile) == (False, False)
        assert (config.train.views, config.data.context) == ("device", 2.0)
        assert not config.train.joint_weights


SIZES = ("w32_256x192", "w32_384x288", "w48_256x192", "w48_384x288")


@pytest.mark.parametrize("size", SIZES)
def test_forms_of_a_published_recipe_differ_in_what_they_say(size: str) -> None:
    official = load_config(size).decides()
    for codec in ("udp", "dark"):
        form = load_config(f"{size}_{codec}").decides()
        assert {key for key in form if form[key] != official[key]} == {"data.codec"}
        assert form["data.codec"] == codec
    modern = load_config(f"{size}_modern")
    assert modern.data == load_config(f"{size}_udp").data, "one dataset for both"
    assert modern.model == load_config(size).model
    # The stated rule: 1e-3 x sqrt(batch / 128).
    assert modern.train.lr == pytest.approx(1e-3 * (modern.train.batch_size / 128) ** 0.5, rel=0.02)
    layer = load_config("modern").train.model_dump()
    published = RunConfig().train.model_dump()
    of_size = {"batch_size", "lr", "views"}
    named = {key for key in layer if layer[key] != published[key]} - of_size
    assert {"photometric", "coarse_dropout", "information_dropping", "ema_warmup", "schedule"} < named
    assert all(getattr(modern.train, key) == layer[key] for key in named)
    assert modern.train.views == "device"


def test_a_config_begins_as_its_base(tmp_path: Path) -> None:
    (tmp_path / "ours.yaml").write_text(
        "base: [w48_384x288, modern]\ntrain: {epochs: 5}\nrun: {storage: here}\n"
    )
    (tmp_path / "mine.yaml").write_text("base: ours.yaml\ntrain: {lr: 0.5}\n")
    config = load_config(str(tmp_path / "mine.yaml"))
    assert (config.config_name, config.run.storage, config.model.width) == ("mine", "here", 48)
    assert (config.train.lr, config.train.epochs, config.train.batch_size) == (0.5, 5, 256)
    assert (config.data.codec, config.data.input_size) == ("udp", (288, 384))


@pytest.mark.parametrize(
    ("text", "wants"),
    [
        ("train: {epoch: 3}", ["c.yaml", "train.epoch", "did you mean 'epochs'"]),
        ("trian: {epochs: 3}", ["c.yaml", "'trian'", "did you mean 'train'"]),
        ("train: {epochs: many}", ["c.yaml", "train.epochs", "'many'"]),
        ("train: {num_workers: 3}", ["num_workers 3 must divide", "lanes 8"]),
        ("train: {batch_size: 12}", ["batch_size 12 must be a multiple"]),
        ("data: {input_size: [190, 256]}", ["data", "multiples of 32"]),
        ("data: {codec: msra}", ["data.codec", "'msra'"]),
        ("- a list", ["c.yaml", "mapping"]),
        ("a: [1", ["c.yaml", "not a readable YAML"]),
        ("base: w32", ["c.yaml: base: no config 'w32'", "w32_256x192"]),
        ("base: 3", ["c.yaml: base:", "got 3"]),
        ("base: [tiny, 3]", ["c.yaml: base:", "list of names"]),
        ("base: c.yaml", ["c.yaml: base: c is a config that begins as this one"]),
        ("base: [tiny, modern]\ntrain: {epoch: 3}", ["c.yaml (its base: tiny, modern)", "train.epoch"]),
        ("base: tiny\ntrain: 3", ["c.yaml (its base: tiny)", "train"]),
    ],
)
def test_a_mistake_is_named_with_file_and_field(tmp_path: Path, text: str, wants: list[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(str(file))
    for want in wants:
        assert want in str(caught.value)
    assert "\n\n" not in str(caught.value), "one paragraph"


def test_an_unknown_config_lists_the_shipped_names() -> None:
    with pytest.raises(ConfigError, match="w32_256x192"):
        load_config("w32")


def test_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        RunConfig().train.epochs = 3  # type: ignore[misc]


def test_identity_follows_what_decides_the_result() -> None:
    base = RunConfig()

    def changed(section: str, **values: object) -> str:
        part = getattr(base, section).model_copy(update=values)
        return base.model_copy(update={section: part}).identity("digest")

    same = [
        changed("train", num_workers=2),
        changed("data", root="/a", shards="/b"),
        changed("run", name="n"),
    ]
    other = [
        changed("train", seed=1),
        changed("data", seed=1),
        changed("model", width=48),
        base.identity("x"),
    ]
    assert {base.identity("digest")} == set(same)
    assert base.identity("digest") not in other


def test_digest_settings_leave_out_places_and_fill_in_defaults() -> None:
    data = RunConfig().data
    moved = data.model_copy(update={"root": "/a", "shards": "/b", "strict": True, "sigma": 2.0})
    semantic = Recipe.of(data).as_dict()
    assert Recipe.of(moved).as_dict() == semantic
    assert Recipe.of(data.model_copy(update={"codec": "udp"})).as_dict() != semantic


def lists(names: tuple[str, ...]) -> Callable[[ast.AST], bool]:
    """Whether a node lists all these names: a tuple, a list, what a Literal holds."""
    return lambda node: (
        isinstance(node, ast.Tuple | ast.List | ast.Set)
        and {*names} <= {one.value for one in node.elts if isinstance(one, ast.Constant)}
    )


def default_of(name: str) -> Callable[[ast.AST], bool]:
    """Whether a node gives a field of that name a number."""
    return lambda node: (
        isinstance(node, ast.AnnAssign)
        and ast.unparse(node.target) == name
        and node.value is not None
        and any(isinstance(one, ast.Constant) and one.value not in (0, 1) for one in ast.walk(node.value))
    )


@pytest.mark.parametrize(
    "states",
    [
        lists(CODECS),
        lists(MODES),
        lambda node: isinstance(node, ast.BinOp) and ast.unparse(node).endswith("/ 256"),
        *map(default_of, Augmentation.__dataclass_fields__),
        lambda node: isinstance(node, ast.Constant) and node.value == 100_000_000,
        lambda node: (
            isinstance(node, ast.Assign | ast.AnnAssign | ast.arguments)
            and re.search(r"padding.* = 1\.25|padding: float=1\.25", ast.unparse(node), re.IGNORECASE)
            is not None
        ),
    ],
    ids=["codecs", "modes", "default sigma", *Augmentation.__dataclass_fields__, "max pixels", "padding"],
)
def test_what_can_be_chosen_of_the_method_is_stated_in_one_module(states: Callable[[ast.AST], bool]) -> None:
    files = [file for room in ("hrnet_core", "pipelines", "serve") for file in (ROOT / room).rglob("*.py")]
    stating = {file.name for file in files if any(map(states, ast.walk(ast.parse(file.read_text()))))}
    assert stating == {"choices.py"}


def test_an_argument_has_the_default_of_the_setting_that_it_stands_for() -> None:
    text = (ROOT / "pipelines" / "settings" / "arguments.py").read_text()
    assert re.findall(r"(?:split|skeleton|codec|input_size): [^=\n]*= [\"(].*", text) == []


def test_settings_are_never_taken_out_of_a_dict() -> None:
    """They stay typed from the command line to the last worker: a misspelt name is an error where it stands,
    not a KeyError in a process elsewhere. The three texts about a dataset print what its manifest.json and
    its card, both JSON, say of it."""
    texts = {"pipelines/inspect_shards.py", "pipelines/shards/cards.py", "pipelines/pages/dataset.py"}
    found = set()
    for file in (file for room in ("pipelines", "serve") for file in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                name = ast.unparse(node.value).rpartition(".")[2]
                if name in ("config", "job", "settings") and isinstance(node.slice.value, str):
                    found.add(str(file.relative_to(ROOT)))
    assert found - texts == set()


def test_the_documentation_lists_every_setting() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == reference() + "\n", (
        "write it anew: python -m pipelines.settings.config > docs/configuration.md"
    )
