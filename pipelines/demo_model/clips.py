"""Captioned clips for the demo model: one coloured shape that moves over a textured background.

Everything is drawn here, from a seed, at constant pixel scale: an object has the same radius (px)
and speed (px per frame) on a 32 x 32 canvas as on a 96 x 96 one, so small clips teach what large
ones need.
Units: positions and radii in pixels, speed in pixels per frame, colours RGB in 0..1 until the final
uint8.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from vidsparse.generate.prompts import shipped

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.92, 0.10, 0.10),
    "yellow": (0.95, 0.88, 0.10),
    "green": (0.10, 0.80, 0.15),
    "cyan": (0.10, 0.85, 0.90),
    "blue": (0.12, 0.18, 0.95),
    "magenta": (0.92, 0.12, 0.88),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
SIZES: dict[str, tuple[float, float]] = {"small": (6.5, 7.5), "large": (9.5, 11.0)}
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}
TEXTURES = ("striped", "checked", "dotted", "cloudy")
TINTS: dict[str, tuple[float, float, float]] = {
    "grey": (0.44, 0.44, 0.44),
    "brown": (0.47, 0.41, 0.36),
    "slate": (0.35, 0.40, 0.45),
}
SPEED_RANGE = (2.4, 3.2)
TRAIL_LENGTH, TRAIL_OPACITY = 26.0, 0.7
TEXTURE_CONTRAST = 0.09
PHRASES: dict[str, tuple[str, ...]] = {
    "left": ("left", "to the left", "leftwards"),
    "right": ("right", "to the right", "rightwards"),
    "up": ("up", "to the top", "upwards"),
    "down": ("down", "to the bottom", "downwards"),
    "small": ("small", "little"),
    "large": ("large", "big"),
}
TEMPLATES = (
    "a {size} {colour} {shape} moves {direction} over a {texture} {tint} background",
    "a {size} {colour} {shape} glides {direction} on a {texture} {tint} background",
    "over a {texture} {tint} background, a {size} {colour} {shape} is moving {direction}",
    "a {colour} {shape} moving {direction}",
    "a {colour} {shape} drifts {direction}, {texture} background",
    "the {shape} is {colour} and {size}, it moves {direction}",
)
DEFAULT_FRAMES, DEFAULT_HEIGHT, DEFAULT_WIDTH = 21, 96, 96


@dataclass(frozen=True)
class Scene:
    """What a clip shows, in the words of its caption."""

    colour: str
    shape: str
    size: str
    direction: str
    texture: str
    tint: str

    @property
    def held_out(self) -> bool:
        """True for the (colour, shape, direction) combinations that training never draws."""
        return is_held_out(self.colour, self.shape, self.direction)


def is_held_out(colour: str, shape: str, direction: str) -> bool:
    """One colour in six is kept from training for each (shape, direction): 24 of the 144
    combinations.
    """
    i_colour, i_shape = list(COLOURS).index(colour), SHAPES.index(shape)
    return (i_colour + i_shape + 2 * list(DIRECTIONS).index(direction)) % len(COLOURS) == 0


def sample_scene(
    rng: np.random.Generator,
    held_out: bool = False,
    directions: tuple[str, ...] = tuple(DIRECTIONS),
) -> Scene:
    """A random scene, of the training combinations or, if asked, of the held-out ones."""
    while True:
        scene = Scene(
            colour=str(rng.choice(list(COLOURS))),
            shape=str(rng.choice(SHAPES)),
            size=str(rng.choice(list(SIZES))),
            direction=str(rng.choice(directions)),
            texture=str(rng.choice(TEXTURES)),
            tint=str(rng.choice(list(TINTS))),
        )
        if scene.held_out == held_out:
            return scene


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of several captions of the scene: template and synonyms drawn at random, the first ones
    most often.
    """

    def draw(choices: tuple[str, ...]) -> str:
        return choices[0] if rng.random() < 0.8 else str(rng.choice(choices))

    return draw(TEMPLATES).format(
        colour=scene.colour,
        shape=scene.shape,
        size=draw(PHRASES[scene.size]),
        direction=draw(PHRASES[scene.direction]),
        texture=scene.texture,
        tint=scene.tint,
    )


def vocabulary() -> list[str]:
    """Every word and punctuation mark that a caption can hold, sorted."""
    text = " ".join(TEMPLATES).replace(",", " , ")
    words = {word for word in text.split() if not word.startswith("{")}
    words.update(COLOURS, SHAPES, TEXTURES, TINTS)
    for phrases in PHRASES.values():
        words.update(word for phrase in phrases for word in phrase.split())
    return sorted(words)


def fixed_prompts() -> list[tuple[str, Scene, int]]:
    """The prompts of the check as (prompt, scene, seed): 20 trained combinations, 20 held-out
    ones.
    """
    return [(line.prompt, scene_of(line.prompt), n) for n, line in enumerate(shipped("demo"))]


def scene_of(prompt: str) -> Scene:
    """What a caption by the first template, without synonyms, says."""
    pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>\\w+)", TEMPLATES[0])
    found = re.fullmatch(pattern, prompt)
    if found is None:
        raise ValueError(f"{prompt!r} is no caption of the form {TEMPLATES[0]!r}")
    return Scene(**found.groupdict())


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance (px, negative inside) from points (x, y) to the outline of the shape at the
    origin.
    """
    ax, ay = np.abs(x), np.abs(y)
    if shape == "circle":
        return np.hypot(x, y) - 0.95 * radius
    if shape == "square":
        return np.maximum(ax, ay) - 0.86 * radius
    if shape == "triangle":
        return np.maximum(0.894 * ax - 0.447 * (y + radius), y - 0.8 * radius)
    if shape == "cross":
        arm = 0.34 * radius
        return np.minimum(np.maximum(ax - radius, ay - arm), np.maximum(ay - radius, ax - arm))
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.72 * radius) - 0.27 * radius
    if shape == "diamond":
        return (ax + ay - 1.1 * radius) * 0.7071
    raise ValueError(f"unknown shape {shape!r}, expected one of {SHAPES}")


def draw_background(scene: Scene, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A still texture of low contrast, float [height, width, 3] in 0..1."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
    wave_x, wave_y = np.sin(2 * np.pi * x / 8), np.sin(2 * np.pi * y / 8)
    if scene.texture == "striped":
        pattern = np.tanh(2.0 * wave_x)
    elif scene.texture == "checked":
        pattern = np.tanh(3.0 * np.sin(np.pi * x / 8) * np.sin(np.pi * y / 8))
    elif scene.texture == "dotted":
        pattern = np.tanh(2.0 * (wave_x + wave_y - 0.7))
    elif scene.texture == "cloudy":
        coarse = rng.normal(size=(height // 8 + 3, width // 8 + 3)).astype(np.float32)
        pattern = np.tanh(1.2 * _upsample(coarse, 8)[4 : 4 + height, 4 : 4 + width])
    else:
        raise ValueError(f"unknown texture {scene.texture!r}, expected one of {TEXTURES}")
    tint = np.asarray(TINTS[scene.tint], np.float32)
    return tint + (TEXTURE_CONTRAST * pattern)[..., None] * (tint / tint.mean())


def _upsample(coarse: np.ndarray, factor: int) -> np.ndarray:
    """Smooth (raised-cosine) interpolation of a grid of values, [(rows-1)*factor,
    (columns-1)*factor].
    """

    def along_first(grid: np.ndarray) -> np.ndarray:
        weight = 0.5 - 0.5 * np.cos(np.pi * np.arange(factor, dtype=np.float32) / factor)
        weight = weight.reshape(1, factor, *([1] * (grid.ndim - 1)))
        fine = grid[:-1, None] * (1 - weight) + grid[1:, None] * weight
        return fine.reshape(-1, *grid.shape[1:])

    return along_first(along_first(coarse).T).T


def trajectory(
    scene: Scene, radius: float, frames: int, height: int, width: int, rng: np.random.Generator
) -> np.ndarray:
    """Centre (x, y) per frame, [frames, 2] px: constant velocity, the object inside the picture
    throughout.
    """
    direction = np.asarray(DIRECTIONS[scene.direction], np.float32)
    margin = radius + 1.0
    room = np.array([width, height], np.float32) - 2 * margin
    if (room < 0).any():
        raise ValueError(f"a radius of {radius:.1f} px needs a larger canvas than {height}x{width}")
    axis = int(np.argmax(np.abs(direction)))
    speed = rng.uniform(*SPEED_RANGE)
    if frames > 1:
        speed = min(speed, float(room[axis]) / (frames - 1))
    travel = direction * speed * (frames - 1)
    low, high = np.minimum(travel, 0), np.maximum(travel, 0)
    start = margin - low + rng.uniform(0, 1, 2) * np.maximum(room - (high - low), 0)
    return start + direction * speed * np.arange(frames)[:, None]


def trail_opacity(direction: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Opacity of the fading trail behind an object at the origin: a wedge TRAIL_LENGTH px long."""
    dx, dy = DIRECTIONS[direction]
    behind, aside = -(x * dx + y * dy), np.abs(x * dy - y * dx)
    share = np.clip(1 - behind / TRAIL_LENGTH, 0, 1)
    edge = np.clip(0.5 + radius * (0.25 + 0.5 * share) - aside, 0, 1)
    return TRAIL_OPACITY * share * edge * (behind > 0)


def draw_clip(
    scene: Scene, frames: int, height: int, width: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw the scene, uint8 [frames, height, width, 3]; edges are anti-aliased over one pixel.

    The object leaves a short trail of its colour: motion that a single frame shows is learned far
    sooner.
    """
    background = draw_background(scene, height, width, rng)
    radius = float(rng.uniform(*SIZES[scene.size]))
    centres = trajectory(scene, radius, frames, height, width, rng).astype(np.float32)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
    x, y = x - centres[:, 0, None, None], y - centres[:, 1, None, None]
    alpha = np.clip(0.5 - signed_distance(scene.shape, x, y, radius), 0, 1)
    alpha = np.maximum(alpha, trail_opacity(scene.direction, x, y, radius))[..., None]
    video = background * (1 - alpha) + np.asarray(COLOURS[scene.colour], np.float32) * alpha
    return (np.clip(video, 0, 1) * 255 + 0.5).astype(np.uint8)


def contact_sheet(videos: list[np.ndarray], columns: int = 6, gap: int = 2) -> np.ndarray:
    """One row per video with `columns` evenly spaced frames, uint8 [H, W, 3]."""
    rows = []
    for video in videos:
        picks = np.linspace(0, len(video) - 1, columns).round().astype(int)
        rows.append(
            np.concatenate([np.pad(video[i], ((gap, 0), (gap, 0), (0, 0))) for i in picks], axis=1)
        )
    return np.concatenate(rows, axis=0)
