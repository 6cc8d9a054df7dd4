"""What a network of another library says of its classes, where fastdiff's own says it in its configuration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Labelled:
    """A network's `config`: rows of its class embedding, a row for "no class" counted; None where it takes no labels."""

    num_classes: int | None
