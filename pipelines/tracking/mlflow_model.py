"""The registered model as MLflow loads it: this file is stored beside the checkpoint folder and run.

Models-from-code: MLflow keeps the source, not a pickle, so it loads where unpickling is forbidden.
Input: a table with columns `image` (bytes of a photograph) and, if wanted, `boxes` (per photograph a
list of [x, y, w, h], photo px; none: the whole photograph is one person). Output: per photograph a dict
{"boxes": P x 4, "keypoints": P x K x 3 (x, y in photo px, score)}.
"""

from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc.model import PythonModel, PythonModelContext


class PoseModel(PythonModel):
    def load_context(self, context: PythonModelContext) -> None:
        from hrnet_core.predictor import PosePredictor

        self.predictor = PosePredictor.load(context.artifacts["checkpoint"])

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, list[Any]]]:
        import numpy as np

        from hrnet_core.images import decode_image

        images = [decode_image(bytes(data), apply_exif=True) for data in model_input["image"]]
        boxes = None
        if "boxes" in model_input:
            boxes = [np.asarray(b, np.float32).reshape(-1, 4) for b in model_input["boxes"]]
        return [
            {"boxes": p.boxes.xywh.tolist(), "keypoints": p.keypoints.data.tolist()}
            for p in self.predictor(images, boxes_xywh=boxes)
        ]


mlflow.models.set_model(PoseModel())
