"""The model of a replica: a checkpoint, loaded, and what is said of it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ray.serve.metrics import Gauge

from hrnet_core.errors import CheckpointError
from hrnet_core.score_drift import SCORE_BOUNDS
from serve.detector import load_detector, threshold_of
from serve.schemas import DetectorInfo, LoadedDetector, LoadedModel, ModelInfo, NamedModel
from serve.settings import DetectorChoice, LiveSettings, ModelChoice, ServeArgs

if TYPE_CHECKING:
    from hrnet_core.detector import PersonDetector
    from hrnet_core.predictor import PosePredictor


@dataclass(frozen=True)
class ServedModel:
    """A loaded checkpoint. Requests hold on to the one they started with."""

    predictor: PosePredictor
    choice: ModelChoice
    flip_test: bool
    detector: PersonDetector | None = None

    def info(self) -> ModelInfo:
        return ModelInfo(
            name=self.choice.name,
            version=self.choice.version,
            sha256=self.predictor.spec.weights_sha256 or "",
            mode=self.predictor.mode,
            flip_test=self.flip_test,
            detector=self._detector_info(),
        )

    def _detector_info(self) -> DetectorInfo | None:
        if not self.detector or not self.choice.person_detector:
            return None
        return DetectorInfo(name=self.choice.person_detector.name, sha256=self.detector.sha256)

    def described(self, args: ServeArgs) -> LoadedModel:
        spec = self.predictor.spec
        return LoadedModel(
            **self.info().model_dump(exclude={"detector"}),
            detector=self._described_detector(args),
            source=self.choice.source or self.choice.checkpoint,
            checkpoint=self.choice.checkpoint,
            input_size=spec.input_size,
            codec=spec.codec.as_dict(),
            skeleton={**spec.skeleton.as_dict(), "palette": [list(c) for c in spec.skeleton.palette]},
            provenance=spec.provenance,
            expected_scores=list(self.choice.expected_scores) or None,
        )

    def _described_detector(self, args: ServeArgs) -> LoadedDetector | None:
        detector, choice = self.detector, self.choice.person_detector
        if not detector or not choice:
            return None
        return LoadedDetector(
            name=choice.name,
            sha256=detector.sha256,
            source=choice.source or choice.model,
            input_size=detector.declaration.input_size,
            score_threshold=threshold_of(detector, args),
            max_found=args.max_found,
            batches=detector.batches,
        )


def named(choice: ModelChoice) -> NamedModel:
    """What /v1/models says of a model that need not be loaded."""
    source = choice.source or choice.checkpoint
    detector = choice.person_detector
    found_by = DetectorInfo(name=detector.name, sha256=detector.sha256) if detector else None
    return NamedModel(
        name=choice.name, version=choice.version, sha256=choice.sha256, source=source, detector=found_by
    )


def load_model(choice: ModelChoice, args: ServeArgs, before: ServedModel | None = None) -> ServedModel:
    """Fetch, check, load and warm up a checkpoint, and its detector. CheckpointError says what is wrong with
    it, also where its weights are not those of `choice.sha256`: an answer names the version that made it, or
    there is none. ConfigError: of the detector.

    before: what is loaded; of that the part is kept that is the same.
    """
    detector = _detector(choice.person_detector, args, before)
    if before and _without_detector(before.choice) == _without_detector(choice):
        return replace(before, choice=choice, detector=detector)
    predictor = _load_predictor(choice, args)
    flip_test = predictor.spec.flip_test if args.flip_test is None else args.flip_test
    predictor.warm_up(args.max_batch_people, flip_test)
    return ServedModel(predictor, choice, flip_test, detector)


def _without_detector(choice: ModelChoice) -> ModelChoice:
    return choice.model_copy(update={"person_detector": None})


def _threads(args: ServeArgs) -> int:
    return args.threads or max(1, int(args.num_cpus))


def _detector(
    choice: DetectorChoice | None, args: ServeArgs, before: ServedModel | None
) -> PersonDetector | None:
    if choice is None:
        return None
    if before and before.choice.person_detector == choice:
        return before.detector
    return load_detector(choice, _threads(args), args.num_gpus > 0)


def _load_predictor(choice: ModelChoice, args: ServeArgs) -> PosePredictor:
    from hrnet_core.checkpoint import fetch_checkpoint, verify_checkpoint
    from hrnet_core.predictor import PosePredictor

    if len(choice.expected_scores) not in (0, len(SCORE_BOUNDS) + 1):
        raise CheckpointError(
            f"expected_scores: {len(choice.expected_scores)} counts, but keypoint scores are counted in "
            f"{len(SCORE_BOUNDS) + 1} buckets. Deploy again with this version of hrnet, or leave them out."
        )
    with tempfile.TemporaryDirectory(prefix="hrnet-checkpoint-") as temporary:
        folder = fetch_checkpoint(choice.checkpoint, Path(temporary))
        verify_checkpoint(folder)
        predictor = PosePredictor.load(folder, args.device, args.mode, _threads(args), args.compile_cache)
    loaded = predictor.spec.weights_sha256 or ""
    # Of what was loaded: the folder may change after any check.
    if choice.sha256 not in ("", loaded):
        raise CheckpointError(
            f"{choice.checkpoint}: holds weights with sha256 {loaded[:12]}..., but {choice.name} "
            f"{choice.version} was deployed with {choice.sha256[:12]}...: the folder has changed since. "
            f"Deploy it again, or put the old weights back."
        )
    return predictor


class ModelGauges:
    """Prometheus: which model is to answer, which does, and whether the last deploy failed."""

    def __init__(self) -> None:
        what = "1 for the version that has the role: intended is to answer, serving does."
        labels = "role", "name", "version", "sha256"
        self.models = Gauge("hrnet_model", what, labels)  # type: ignore[arg-type]  # Ray has tuple[str]
        self.failed = Gauge("hrnet_deploy_failed", "1 where the model asked for last does not answer.")
        self._shown: set[tuple[str, str, str, str]] = set()

    def show(self, live: LiveSettings, model: ServedModel | None, failed: bool) -> None:
        """What is so now; what was shown before and is no longer so becomes 0."""
        choices = {"intended": live.choice(), **({"serving": model.choice} if model else {})}
        now = {(role, c.name, c.version, c.sha256) for role, c in choices.items()}
        for labels in self._shown | now:
            tags = dict(zip(("role", "name", "version", "sha256"), labels, strict=True))
            self.models.set(int(labels in now), tags=tags)
        self._shown |= now
        self.failed.set(int(failed))
