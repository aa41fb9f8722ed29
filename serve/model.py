"""The model of a replica: a checkpoint, loaded, and what is said of it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from serve.schemas import LoadedModel, ModelInfo
from serve.settings import ModelChoice, ServeArgs

if TYPE_CHECKING:
    from hrnet_core.predictor import PosePredictor


@dataclass(frozen=True)
class ServedModel:
    """A loaded checkpoint. Requests hold on to the one they started with."""

    predictor: PosePredictor
    choice: ModelChoice
    flip_test: bool

    def info(self) -> ModelInfo:
        return ModelInfo(
            name=self.choice.name,
            version=self.choice.version,
            sha256=self.predictor.spec.weights_sha256 or "",
            mode=self.predictor.mode,
            flip_test=self.flip_test,
        )

    def described(self) -> LoadedModel:
        spec = self.predictor.spec
        return LoadedModel(
            **self.info().model_dump(),
            source=self.choice.source or self.choice.checkpoint,
            checkpoint=self.choice.checkpoint,
            input_size=spec.input_size,
            codec=spec.codec.as_dict(),
            skeleton={**spec.skeleton.as_dict(), "palette": [list(c) for c in spec.skeleton.palette]},
            provenance=spec.provenance,
        )


def load_model(choice: ModelChoice, args: ServeArgs) -> ServedModel:
    """Fetch, check, load and warm up a checkpoint. CheckpointError says what is wrong with it."""
    from hrnet_core.checkpoint import fetch_checkpoint, verify_checkpoint
    from hrnet_core.predictor import PosePredictor

    with tempfile.TemporaryDirectory(prefix="hrnet-checkpoint-") as temporary:
        folder = fetch_checkpoint(choice.checkpoint, Path(temporary))
        verify_checkpoint(folder)
        threads = args.threads or max(1, int(args.num_cpus))
        predictor = PosePredictor.load(folder, args.device, args.mode, threads, args.compile_cache)
    flip_test = predictor.spec.flip_test if args.flip_test is None else args.flip_test
    predictor.warm_up(args.max_batch_people, flip_test)
    return ServedModel(predictor, choice, flip_test)
