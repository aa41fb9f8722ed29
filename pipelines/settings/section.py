"""What every section of settings is: frozen, strict about names, told by its docstrings."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Frozen, and strict about names: a misspelt key must not become a default in silence."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
