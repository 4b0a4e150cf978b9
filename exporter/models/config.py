"""What the configs of all transformers share: how config.json is read, and grids of patches."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from svdit.plans.errors import complain, rooted
from svdit.plans.fields import shown

if TYPE_CHECKING:
    from typing_extensions import Self


class TransformerConfig:
    """Base of frozen dataclasses whose fields are the constructor arguments of a diffusers transformer."""

    class_name: ClassVar[str]
    """The diffusers class."""
    supported: ClassVar[str] = ""
    """What to say beside a class that is another one."""

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns of one token."""
        raise NotImplementedError

    @classmethod
    def from_json(cls, obj: dict, path: Path) -> Self:
        """Read a config.json. Raises SvditError for another class, an unknown key or an impossible size."""
        with rooted(f"{path}: "):
            if obj.get("_class_name") != cls.class_name:
                raise complain("$._class_name", shown(obj.get("_class_name")), shown(cls.class_name), cls.supported)
            names = [f.name for f in fields(cls)]
            values = {key: value for key, value in obj.items() if not key.startswith("_")}
            for key in values:
                if key not in names:
                    raise complain(f"$.{key}", "an unknown key", "one of " + ", ".join(names))
            with rooted("$."):
                return cls(**values)

    def grid(self, latent: tuple[int, int, int]) -> tuple[int, int, int]:
        """Token grid of latents of (f, h, w). Raises SvditError when patches do not divide them."""
        for name, size, patch in zip(("frames", "height", "width"), latent, self.patch, strict=True):
            if size < 1 or size % patch:
                raise complain(f"latent {name}", size, f"a positive multiple of the patch size {patch}")
        t, h, w = (size // patch for size, patch in zip(latent, self.patch, strict=True))
        return t, h, w

    def latent(self, grid: tuple[int, int, int]) -> tuple[int, int, int]:
        """Latent (f, h, w) of a token grid."""
        f, h, w = (n * patch for n, patch in zip(grid, self.patch, strict=True))
        return f, h, w
