"""What questions and statements are about: shapes named by colour, by kind, or by both."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vlmoe.sample_corpus.language import plural, with_article
from megatron_vlmoe.sample_corpus.scene import COLORS, KINDS, SHAPE_NAMES, Scene, Shape


@dataclass(frozen=True)
class Thing:
    """All shapes of a colour, of a kind, or of both; None leaves it open."""

    color: str | None
    kind: str | None

    def found_in(self, scene: Scene) -> list[Shape]:
        """The shapes of a scene that it names."""
        return [
            shape
            for shape in scene.shapes
            if self.color in (None, shape.color) and self.kind in (None, shape.kind)
        ]

    def noun(self, count: int = 1) -> str:
        """As in "red circle", "stars" and "blue shapes"."""
        kind = self.kind or "shape"
        words = (self.color, kind if count == 1 else plural(kind))
        return " ".join(word for word in words if word)

    def indefinite(self) -> str:
        """As in "an orange circle"."""
        return with_article(self.noun())


KIND_THINGS = tuple(Thing(None, kind) for kind in KINDS)
COLOR_THINGS = tuple(Thing(color, None) for color in COLORS)
NAMED_THINGS = tuple(Thing(color, kind) for color, kind in SHAPE_NAMES)
