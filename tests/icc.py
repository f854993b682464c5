"""Colour profiles (ICC.1:2001-04) made from their definition, and what their colours are in sRGB, in float64."""

import struct

import numpy as np

BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
D65, D50 = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in ((0.3127, 0.3290), (0.34567, 0.35850)))
PRIMARIES = {  # x and y of red, green and blue; all of white D65
    "sRGB": ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06)),
    "Display P3": ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
    "Adobe RGB": ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06)),
    "ProPhoto-like": ((0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001)),
}
GAMMAS = {"sRGB": None, "Display P3": None, "Adobe RGB": 563 / 256, "ProPhoto-like": 1.8}  # None: sRGB's curve


def linear(values: np.ndarray, gamma: float | None) -> np.ndarray:
    """Light of coded values in [0, 1]."""
    if gamma:
        return values**gamma
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def coded(light: np.ndarray) -> np.ndarray:
    """sRGB's 8-bit levels of light, before rounding."""
    light = light.clip(0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def to_xyz(space: str) -> np.ndarray:
    xyz = np.array([[x / y, 1, (1 - x - y) / y] for x, y in PRIMARIES[space]]).T
    return xyz * np.linalg.solve(xyz, D65)


def in_srgb(pixels: np.ndarray, space: str) -> np.ndarray:
    """Levels in sRGB of 8-bit pixels (..., 3), before rounding."""
    light = linear(pixels / 255, GAMMAS[space]) @ to_xyz(space).T @ np.linalg.inv(to_xyz("sRGB")).T
    return coded(light)


def profile(space: str) -> bytes:
    """A matrix profile, its colours adapted to D50 (Bradford)."""
    scale = np.diag((BRADFORD @ D50) / (BRADFORD @ D65))
    columns = (np.linalg.inv(BRADFORD) @ scale @ BRADFORD @ to_xyz(space)).T
    tags = {f"{name}XYZ".encode(): _xyz(column) for name, column in zip("rgb", columns, strict=True)}
    tags |= {f"{name}TRC".encode(): _curve(GAMMAS[space]) for name in "rgb"}
    return _file(b"RGB ", space, tags)


def grey_profile(gamma: float) -> bytes:
    return _file(b"GRAY", f"Grey gamma {gamma}", {b"kTRC": _curve(gamma)})


def _xyz(values: np.ndarray) -> bytes:
    return b"XYZ " + bytes(4) + b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _curve(gamma: float | None) -> bytes:
    if gamma:
        return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    table = np.round(linear(np.linspace(0, 1, 4096), None) * 65535).astype(">u2")
    return b"curv" + bytes(4) + struct.pack(">I", len(table)) + table.tobytes()


def _file(colours: bytes, name: str, tags: dict[bytes, bytes]) -> bytes:
    described = name.encode() + b"\0"
    tags |= {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", len(described)) + described + bytes(78 + -len(described) % 4),
        b"cprt": b"text" + bytes(4) + b"none" + bytes(4), b"wtpt": _xyz(D50),
    }  # fmt: skip
    directory, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for signature, blob in tags.items():
        directory += signature + struct.pack(">II", start + len(body), len(blob))
        body += blob + bytes(-len(blob) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"lcms", 0x02100000, b"mntr", colours, b"XYZ ")
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + _xyz(D50)[8:]
    return head.ljust(128, b"\0") + directory + body
