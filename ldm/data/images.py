"""Image files, the preprocessing that gives them a shape that models see, and arrays of their pixels."""

import contextlib
import functools
import io
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms, ImageColor, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from ldm.data.shapes import Shape, as_text, cropped, nearest

SUFFIXES = {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".mpo", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif"}
UNREAD = {  # images that we cannot read
    ".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".j2k", ".svg", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf",
    ".orf", ".rw2", ".exr", ".hdr", ".tga", ".ppm", ".pgm", ".pbm", ".pnm", ".dcm",
}  # fmt: skip
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # by content: a suffix proves nothing, and Pillow's EPS runs a program
FILTERS = {name: Image.Resampling[name.upper()] for name in ("lanczos", "bicubic", "bilinear", "box")}
MODES = {1: "L", 3: "RGB"}  # Pillow's name for 1 and 3 channels
MAX_PIXELS = 89_478_485  # Pillow warns beyond this
ORIENTATION = 0x0112  # EXIF tag
TURNED = range(5, 9)  # its values that exchange width and height
ORIENTING = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # what of a PNG may hold it, before its pixels or after
JPEG = b"\xff\xd8"  # first bytes of a file
PROFILE = "profile"  # in the `info` of an image that was converted to sRGB: the name of its colour profile
CROPPED = "cropped"  # in the `info` of an image that `Preprocessing.read` made: the share of the file's pixels that it lost
SAME = 1  # level of 256 by which colours of a profile may differ from sRGB's and still count as these

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # our own limit raises an error instead
Image.core.set_blocks_max(8)  # PILLOW_BLOCKS_MAX: reuses the memory of one image for the next, which saves a quarter of decoding


class UnreadableImage(Exception):
    """A file that cannot be decoded as an image; the message is the reason."""


@dataclass(frozen=True)
class Preprocessing:
    """How an image file becomes a stored image; part of the identity of shards, latents and models."""

    image_size: int  # pixels, the side of the square that models see, or of one with the area of the other shapes
    channels: int  # 1 greyscale, 3 RGB
    resize_filter: str = "lanczos"  # a key of FILTERS
    fit: str = "cover"  # cover: crop at the centre; contain: pad with the background; stretch
    background: str = "#ffffff"  # behind transparency and padding
    margin: int = 0  # pixels stored beyond the shape, for random crops
    shapes: tuple[Shape, ...] = ()  # that models see, (height, width), if not the square alone; from JSON, lists

    def __post_init__(self) -> None:
        shapes = tuple((height, width) for height, width in self.shapes)
        object.__setattr__(self, "shapes", () if shapes == ((self.image_size, self.image_size),) else shapes)

    @property
    def all_shapes(self) -> tuple[Shape, ...]:
        """The shapes that models see, (height, width)."""
        return self.shapes or ((self.image_size, self.image_size),)

    def shape_of(self, width: int, height: int) -> Shape:
        """The shape that an upright image of this size gets: of the nearest aspect ratio."""
        return nearest(self.all_shapes, width, height)

    def shape_in(self, blob: bytes, *, min_side: int = 1, max_pixels: int = MAX_PIXELS) -> Shape:
        """The shape that an image file gets. It is opened only if there are several; raises `UnreadableImage`."""
        return self.shape_of(*upright_size(blob, min_side, max_pixels)) if self.shapes else self.all_shapes[0]

    def stored(self, shape: Shape) -> Shape:
        """Height and width of stored images of a shape, in pixels."""
        return shape[0] + self.margin, shape[1] + self.margin

    @property
    def described(self) -> str:
        """Size and filter in a few words, such as `32x32x1, lanczos`; results are comparable only if these are equal."""
        size = f"{self.image_size}x{self.image_size}x{self.channels}"
        if self.shapes:
            size += f" in {len(self.shapes)} buckets {as_text(self.shapes[0])} to {as_text(self.shapes[-1])}"
        words = [size, self.resize_filter] + [self.fit] * (self.fit != "cover")
        if self.margin:
            side = self.image_size + self.margin
            words.append(f"margin {self.margin}" if self.shapes else f"of {side}x{side}")
        return ", ".join(words + [f"on {self.background}"] * (self.background != "#ffffff"))

    def read(self, blob: bytes, *, min_side: int = 1, max_pixels: int = MAX_PIXELS) -> Image.Image:
        """Decode an image file and make it a stored image; raises `UnreadableImage`. Its `info` has `PROFILE` and `CROPPED`."""
        image = decode(blob, channels=self.channels, background=self.background, min_side=min_side, max_pixels=max_pixels)
        height, width = self.stored(self.shape_of(*image.size))
        stored = fit_to(image, (width, height), self.resize_filter, self.fit, self.background)
        lost = cropped((height, width), *image.size) if self.fit == "cover" else 0.0
        stored.info = image.info | {CROPPED: lost}
        return stored

    def as_seen(self, blob: bytes) -> np.ndarray:
        """An image file as a model sees it, uint8 (C, H, W): the centre of the stored image; raises `UnreadableImage`."""
        stored, start = to_array(self.read(blob)), self.margin // 2
        _, height, width = stored.shape
        return stored[:, start : start + height - self.margin, start : start + width - self.margin]

    def is_stored(self, blob: bytes) -> bool:
        """Whether a file is a JPEG whose picture needs no change: that is stored as it is, without loss."""
        if not blob.startswith(JPEG):
            return False
        with Image.open(io.BytesIO(blob), formats=("JPEG",)) as image:
            fits = image.mode == MODES[self.channels] and image.size[::-1] == self.stored(self.shape_of(*image.size))
            upright = image.getexif().get(ORIENTATION, 1) == 1
            return fits and upright and not _conversion(image.info.get("icc_profile"), image.mode)


def decode(
    blob: bytes, *, channels: int, background: str = "#ffffff", min_side: int = 1, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Decode an image file to greyscale (`channels` 1) or RGB (3) as a viewer shows it; raises `UnreadableImage`.

    Upright, its first frame, in sRGB, on `background`. Its `info` has the name of a profile that was converted (`PROFILE`).
    """
    with _opened(blob, min_side, max_pixels) as image:
        upright = _with_8_bits(ImageOps.exif_transpose(image))
        alpha = upright.convert("RGBA").getchannel("A") if upright.has_transparency_data else None
        colours, profile = _in_srgb(upright, image.info.get("icc_profile"))
        if alpha:
            layers = colours.convert("RGBA")
            layers.putalpha(alpha)
            colours = Image.alpha_composite(Image.new("RGBA", layers.size, background), layers)
        decoded = colours.convert(MODES[channels])
        decoded.info = {PROFILE: profile} if profile else {}  # without EXIF and the like, which a PNG would carry on
        return decoded


def upright_size(blob: bytes, min_side: int = 1, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of what `decode` would return, by the file's header; raises `UnreadableImage`."""
    with _opened(blob, min_side, max_pixels) as image:
        width, height = image.size  # of a TIFF, Pillow has turned them already
        if image.format == "PNG" and not any(name in blob for name in ORIENTING):  # Pillow would decode the pixels to find none
            return width, height
        turned = image.format != "TIFF" and image.getexif().get(ORIENTATION) in TURNED
        return (height, width) if turned else (width, height)


@contextlib.contextmanager
def _opened(blob: bytes, min_side: int, max_pixels: int) -> Iterator[Image.Image]:
    """An image of a size within bounds, its pixels not decoded yet; what goes wrong within is an `UnreadableImage`."""
    if not blob:
        raise UnreadableImage("the file is empty")
    with _reasons(), Image.open(io.BytesIO(blob), formats=FORMATS) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise UnreadableImage(f"{width} x {height} pixels, more than data.max_pixels {max_pixels}")
        if min(width, height) < min_side:
            raise UnreadableImage(f"{width} x {height} pixels, smaller than data.min_side {min_side}")
        yield image


def _with_8_bits(image: Image.Image) -> Image.Image:
    """An image of 16-bit grey values with 8, its transparent value as transparency. Pillow reads 16-bit colours with 8 itself."""
    if image.mode == "F":
        raise UnreadableImage("floating-point pixels; 8 or 16 bits are read")
    transparent = image.info.get("transparency")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        if image.mode == "RGB" and isinstance(transparent, tuple) and max(transparent) > 255:  # of 16 bits still
            image.info["transparency"] = tuple(value >> 8 for value in transparent)
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise UnreadableImage(f"{image.mode} pixels from {values.min()} to {values.max()}; 8 or 16 bits are read")
    grey = Image.fromarray((values // 257).astype(np.uint8))
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _in_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str | None]:
    """The colours of an image in sRGB, without transparency; and the name of the profile that they were converted from."""
    mode = {"1": "L", "LA": "L", "L": "L", "CMYK": "CMYK", "LAB": "LAB"}.get(image.mode, "RGB")
    colours = image if image.mode == mode else image.convert(mode)
    if conversion := _conversion(profile, mode):
        convert, name = conversion
        return convert(colours), name
    return colours, None


@functools.lru_cache(maxsize=32)
def _conversion(profile: bytes | None, mode: str) -> tuple[Callable[[Image.Image], Image.Image], str] | None:
    """From a colour profile to sRGB, and the profile's name; None if it is sRGB, damaged, or of other pixels, as for viewers."""
    if mode != "LAB" and profile is None:
        return None
    try:
        source = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB") if mode == "LAB" else io.BytesIO(profile or b""))
        flags = (
            ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
        )  # a coarse table of greys is far off in the dark
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", flags=flags)
        name = " ".join(ImageCms.getProfileDescription(source).split()) or "a profile without a name"
    except (OSError, ImageCms.PyCMSError):
        return None
    if mode not in ("L", "RGB"):
        return transform.apply, name
    levels = np.arange(256, dtype=np.uint8)
    some = levels[::15]
    sample = levels[None] if mode == "L" else np.stack(np.meshgrid(some, some, some), axis=-1).reshape(1, -1, 3)
    shown = np.asarray(transform.apply(Image.fromarray(sample)).convert(mode))
    if np.abs(shown.astype(int) - sample).max() <= SAME:
        return None
    table = shown.ravel().tolist()
    return (lambda grey: grey.point(table)) if mode == "L" else transform.apply, name


def decode_stored(blob: bytes, preprocessing: Preprocessing, shape: Shape) -> np.ndarray:
    """Pixels of a stored image of a shape, uint8 (H, W, C); raises `UnreadableImage` if it is none of `preprocessing`."""
    with _reasons():
        (height, width), mode = preprocessing.stored(shape), MODES[preprocessing.channels]
        image = (JpegImageFile if blob.startswith(JPEG) else PngImageFile)(io.BytesIO(blob))  # no other format is stored
        if image.mode != mode or image.size != (width, height):
            raise ValueError(f"{image.mode} of {image.width} x {image.height} pixels, expected {mode} of {width} x {height}")
        return np.frombuffer(image.tobytes(), dtype=np.uint8).reshape(height, width, preprocessing.channels)


@contextlib.contextmanager
def _reasons() -> Iterator[None]:
    """Turn any error into `UnreadableImage`, without memory addresses, which differ between runs."""
    try:
        yield
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage("not an image of a known format") from None
    except Exception as error:  # decoders of foreign bytes raise anything: struct.error, KeyError, ZeroDivisionError, …
        reason = re.sub(r" at 0x[0-9a-f]+", "", " ".join(str(error).split()))
        raise UnreadableImage(f"{type(error).__name__}: {reason}") from None


def fit_to(
    image: Image.Image, size: tuple[int, int], resize_filter: str, fit: str = "cover", background: str = "#ffffff"
) -> Image.Image:
    """Give `image` a size (width, height): `cover` crops at the centre, `contain` pads, `stretch` distorts."""
    if fit == "cover":
        return ImageOps.fit(image, size, method=FILTERS[resize_filter])
    if fit == "contain":
        return ImageOps.pad(image, size, FILTERS[resize_filter], ImageColor.getcolor(background, image.mode))
    return image.resize(size, FILTERS[resize_filter])


def to_array(image: Image.Image) -> np.ndarray:
    """An image as uint8 (C, H, W)."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def from_array(pixels: np.ndarray) -> Image.Image:
    """The inverse of `to_array`: uint8 (C, H, W) with 1 or 3 channels."""
    return Image.fromarray(pixels[0] if pixels.shape[0] == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def to_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=4)  # photographs take as little space as at 6, in half the time
    return buffer.getvalue()
