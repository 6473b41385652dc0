"""Where a run's network and images came from, kept in its folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from snows.results.storage import write

SOURCE = "source.json"


@dataclass(frozen=True)
class Source:
    """Name a run's network and images, and what was asked of their preparation.

    The command line finds them again by it.

    Attributes:
        model, data: names, as `snows.sources` reads them.
        weights: file of the dense network's weights; None is the library's own.
        random_weights: whether the dense network had random ones.
        classes, labels: files that say what the data's classes are; None where there was none.
        crop, resize: in pixels; None is the network's own.
        mean, std: of three channels; None is the network's own.
    """

    model: str
    data: str
    weights: str | None = None
    random_weights: bool = False
    classes: str | None = None
    labels: str | None = None
    crop: int | None = None
    resize: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def settings(self) -> tuple[int | None, int | None, tuple[float, ...] | None, tuple[float, ...] | None]:
        """Return what replaces the preparation's own settings: crop, resize, mean and std."""
        return self.crop, self.resize, self.mean, self.std

    def save(self, folder: Path) -> None:
        """Write it into a run's folder."""
        write(folder / SOURCE, (json.dumps(asdict(self), indent=1) + "\n").encode())

    @classmethod
    def read(cls, folder: Path) -> Source:
        """Read the one in a run's folder.

        Raises:
            ValueError: it cannot be read, or an entry is missing, unknown or of another type.
        """
        path = folder / SOURCE
        try:
            content = json.loads(path.read_text())
            if not isinstance(content, dict) or set(content) != {entry.name for entry in fields(cls)}:
                raise ValueError(f"expected the entries {', '.join(entry.name for entry in fields(cls))}")
            for name, value in content.items():
                if name in ("model", "data"):
                    sound = isinstance(value, str)
                elif name in ("weights", "classes", "labels"):
                    sound = value is None or isinstance(value, str)
                elif name == "random_weights":
                    sound = isinstance(value, bool)
                elif name in ("crop", "resize"):
                    sound = value is None or (type(value) is int and value > 0)
                else:
                    sound = value is None or (
                        isinstance(value, list) and all(type(x) in (int, float) for x in value)
                    )
                    content[name] = tuple(value) if sound and value is not None else None
                if not sound:
                    raise ValueError(f"{name} is {value!r:.60}")
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({error})") from error
        return cls(**content)
