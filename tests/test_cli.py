"""The command line: every verb explains itself, and a mistake costs a paragraph and exit code 2."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import create_autospec

import pytest
from small_coco import annotation_file, write_coco

from pipelines.cli import VERBS, main, parse


def failed(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command line that must end with 2; returns its one-paragraph error."""
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_without_arguments_the_verbs_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    for verb in VERBS:
        assert f"  {verb} " in out


def test_an_unknown_verb_is_refused_with_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert "preprocess" in failed(["prepare"], capsys)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    assert f"hrnet {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stage", "command"),
    [
        ("draw", "draw OUT"),
        ("validate", "validate COCO"),
        ("preprocess", "preprocess tiny --data.root COCO --data.shards SHARDS"),
        ("inspect_shards", "inspect SHARDS"),
        ("train", "train tiny --data.shards SHARDS"),
        ("evaluate", "evaluate CHECKPOINT COCO"),
        ("measure_modes", "evaluate CHECKPOINT COCO --measure-modes"),
        ("predict", "predict a.jpg b.jpg"),
        ("promote", "promote 3"),
        ("deploy", "deploy"),
        ("load", "load http://127.0.0.1:8000 a.jpg b.jpg --rates 5 10"),
        ("import_weights", "import FILE OUT"),
        ("export", "export CHECKPOINT --coco COCO"),
        ("benchmark", "benchmark CHECKPOINT --modes float32 --batch-sizes 1 2"),
        ("estimate_sigmas", "estimate-sigmas a.json b.json"),
        ("reproduce", "reproduce COCO --weights-dir W --boxes B"),
    ],
)
def test_a_verb_gives_its_stage_what_the_stage_takes(
    stage: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(f"pipelines.{stage}")
    called = create_autospec(getattr(module, stage))  # a TypeError where an argument is not the stage's
    monkeypatch.setattr(module, stage, called)
    main(command.split())
    called.assert_called_once()
    given = str(called.call_args)
    for word in command.split()[1:]:
        assert word.startswith("--") or word in given


@pytest.mark.parametrize("verb", ["preprocess", "train"])
def test_a_config_is_asked_for(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "name a config" in failed([verb, "--data.shards", "x"], capsys)


def test_a_missing_folder_setting_names_its_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--data.root" in failed(["preprocess", "tiny"], capsys)
    assert "--data.shards" in failed(["train", "tiny"], capsys)


def test_an_unknown_flag_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "tiny", "--train.epoch", "3"])
    assert ended.value.code == 2
    assert "epoch" in capsys.readouterr().err


def test_settings_that_contradict_each_other_end_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["train", "tiny", "--data.shards", "x", "--train.num-workers", "3"])
    except SystemExit as ended:
        code = int(ended.code or 0)
    assert code == 2
    assert "lanes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ["train", "tiny", "--train.epochs", "0"],
            "--train.epochs: Input should be greater than or equal to 1 (got 0)",
        ),
        (
            ["deploy", "--serve.max-bodies", "-3"],
            "--serve.max-bodies: Input should be greater than or equal to 1 (got -3)",
        ),
        (
            ["draw", "OUT", "--val-images", "0"],
            "--val-images: Input should be greater than or equal to 1 (got 0)",
        ),
        (["load", "URL", "a.jpg", "--rates", "1", "0"], "--rates: Input should be greater than 0 (got 0.0)"),
        (
            ["deploy", "--serve.max-replicas", "1", "--serve.replicas", "3"],
            "max_replicas 1 is less than replicas 3",
        ),
    ],
)
def test_a_value_out_of_range_is_a_sentence_as_in_a_file(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = failed(argv, capsys)
    assert error == f"hrnet {argv[0]}: command line: {said}. All settings: docs/configuration.md.\n"


def test_what_is_no_value_at_all_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["deploy", "--serve.port", "abc"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("invalid literal") == 1


def test_an_override_wins_over_the_file_and_the_rest_stays(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train: {epochs: 7, lr: 0.5}\ndata: {codec: udp}\n")
    config = parse("train", [str(file), "--train.lr", "0.25", "--data.input-size", "96", "128"])
    assert (config.train.epochs, config.train.lr, config.data.codec) == (7, 0.25, "udp")
    assert config.data.input_size == (96, 128)
    assert config.config_name == "mine"


@pytest.mark.parametrize(
    "argv",
    [
        ["draw", "file/out", "--images", "4"],
        ["estimate-sigmas", "none-a.json", "none-b.json", "--out", "file/out"],
        ["import", "none.pth", "file/out"],
        ["reproduce", "none", "--weights-dir", "none", "--boxes", "none.json", "--out", "file/out"],
    ],
)
def test_what_cannot_be_written_is_told_before_anything_is_read(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert "file/out: " in (error := failed(argv, capsys))
    assert f"{tmp_path / 'file'} is a file, not a folder. Name another" in error


def test_a_missing_coco_folder_ends_with_2_in_a_fresh_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipelines.cli", "preprocess", "tiny"]
    command += ["--data.root", str(tmp_path / "nowhere"), "--data.shards", str(tmp_path / "shards")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "shards").exists()


def test_a_locale_of_other_names_is_refused(tmp_path: Path) -> None:
    """Pictures named in UTF-8 would be told as missing there."""
    command = [sys.executable, "-m", "pipelines.cli", "validate", str(tmp_path)]
    env = {**os.environ, "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "hrnet: names of files are taken for ascii here (LC_ALL, LC_CTYPE or LANG), so that those in UTF-8 "
        "would not be found. Set PYTHONUTF8=1."
    ]


def test_foreign_results_are_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = annotation_file(write_coco(tmp_path / "coco", {"val2017": [1]}), "val2017")
    (tmp_path / "r.json").write_text("{")
    argv = ["evaluate", "--results", str(tmp_path / "r.json"), "--ground-truth", str(truth)]
    assert "r.json" in failed(argv, capsys)
    assert "--ground-truth" in failed(argv[:3], capsys)
