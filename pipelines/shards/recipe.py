"""What decides the bytes of a shard: the settings without places, and the skeleton itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hrnet_core.choices import Augmentation
from hrnet_core.heatmaps import HeatmapCodec
from hrnet_core.skeleton import Skeleton, load_skeleton, skeleton_from_dict
from pipelines.settings.config import SOURCES, DataSettings


@dataclass(frozen=True)
class Recipe:
    """Settings of a dataset as they are stored with it, and what follows from them."""

    settings: DataSettings
    """Where the data lies (SOURCES) has no part in it, nor has the name of the skeleton."""
    skeleton: Skeleton

    @classmethod
    def of(cls, settings: DataSettings) -> Recipe:
        """DataError for a skeleton that cannot be read."""
        return cls(settings, load_skeleton(settings.skeleton))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], where: str) -> Recipe:
        """From `as_dict`, as a manifest holds it. ValueError (pydantic's), DataError for a bad skeleton."""
        settings = {name: value for name, value in fields.items() if name != "skeleton"}
        return cls(DataSettings(**settings), skeleton_from_dict(fields["skeleton"], where))

    def as_dict(self) -> dict[str, Any]:
        """JSON types, every default filled in: what takes part in the dataset's digest."""
        fields = self.settings.model_dump(mode="json", exclude={*SOURCES, "skeleton", "sigma"})
        return {**fields, "sigma": self.settings.sigma_cells, "skeleton": self.skeleton.as_dict()}

    @cached_property
    def codec(self) -> HeatmapCodec:
        return HeatmapCodec(
            self.settings.codec, input_size=self.settings.input_size, sigma=self.settings.sigma_cells
        )

    @cached_property
    def augmentation(self) -> Augmentation:
        """How far the views may differ from the plain one."""
        return Augmentation(**self.settings.model_dump(include=set(Augmentation.__dataclass_fields__)))
