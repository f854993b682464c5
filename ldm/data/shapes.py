"""What `data.shapes` can name: the shapes (height, width) of the images that models see."""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import Field

from ldm.base.errors import InputError
from ldm.base.options import Choice, Positive

Shape = tuple[int, int]  # height and width in pixels


class Shapes(Choice):
    def shapes(self, image_size: int) -> tuple[Shape, ...]:
        """The shapes of about `image_size` ** 2 pixels, in order; a `ValueError` if there are none for this size."""
        raise NotImplementedError


class Square(Shapes):
    kind: Literal["square"] = "square"

    def shapes(self, image_size: int) -> tuple[Shape, ...]:
        return ((image_size, image_size),)


class Buckets(Shapes):
    """Shapes of nearly equal area, as of SDXL (Podell et al. 2023, section 2.2 and appendix I)."""

    kind: Literal["buckets"] = "buckets"
    step: Positive = 64  # pixels of which every side is a multiple
    max_aspect: Annotated[float, Field(ge=1)] = 2.0  # long side over short side, at most

    def shapes(self, image_size: int) -> tuple[Shape, ...]:
        """The square, and for each longer side the longest short side with which the area is at most the square's."""
        if image_size % self.step:
            advice = "set data.shapes.step to a divisor of data.image_size"
            raise ValueError(f"data.shapes.step {self.step} does not divide data.image_size {image_size}; {advice}")
        found, long = set[Shape](), image_size
        while (short := image_size**2 // long // self.step * self.step) and long <= self.max_aspect * short:
            found |= {(short, long), (long, short)}
            long += self.step
        if len(found) == 1:
            few = f"leaves the square alone at data.image_size {image_size} and data.shapes.max_aspect {self.max_aspect}"
            raise ValueError(
                f"data.shapes.step {self.step} {few}; set a smaller divisor of data.image_size, or data.shapes: square"
            )
        return tuple(sorted(found))


def nearest(shapes: Sequence[Shape], width: int, height: int) -> Shape:
    """The first of the shapes whose aspect ratio is nearest, by |log|, to that of an image: in exact arithmetic."""
    return min(shapes, key=lambda shape: _distance(shape, width, height))


def cropped(shape: Shape, width: int, height: int) -> float:
    """The share of an image's pixels that lie outside when its centre fills `shape` without distortion."""
    return float(1 - 1 / _distance(shape, width, height))


def _distance(shape: Shape, width: int, height: int) -> Fraction:
    """The larger aspect ratio over the smaller one: at least 1."""
    ratio = Fraction(width * shape[0], height * shape[1])
    return max(ratio, 1 / ratio)


def as_text(shape: Shape) -> str:
    """WIDTHxHEIGHT, as pictures' sizes are written."""
    return f"{shape[1]}x{shape[0]}"


def from_text(text: str) -> Shape:
    """The inverse of `as_text`; `InputError` for what is no size."""
    if not (found := re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)):
        raise InputError(f"size {text!r}: write WIDTHxHEIGHT in pixels, such as 320x192")
    return int(found[2]), int(found[1])
