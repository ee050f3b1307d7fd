# SPDX-License-Identifier: Apache-2.0
"""Render examples/images/street.jpg, the picture of the demo: a house by a country road, and a sign that says 42.

    python examples/make_picture.py [OUT]

Drawn from a seed with NumPy and Pillow alone, so that it is nobody's photograph: sky, clouds and hills from fractal
noise, the rest from polygons, then lens blur, grain and vignette.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

OUT = Path(__file__).parent / "images" / "street.jpg"
WIDTH, HEIGHT = 1280, 960
HORIZON = 0.56  # of the height
QUALITY = 82
SUN = (0.16, 0.13)  # of width and height

Points = list[tuple[float, float]]


def fractal_noise(
    rng: np.random.Generator, height: int, width: int, cells: tuple[int, int], octaves: int = 5
) -> np.ndarray:
    """Return (height, width) values in 0...1: random grids of doubling fineness, each half as strong, added up."""
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        shape = (cells[0] * 2**octave + 1, cells[1] * 2**octave + 1)
        grid = Image.fromarray(rng.random(shape, np.float32))
        total += np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC)) / 2**octave
    total -= total.min()
    return total / total.max()


def mix(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Blend two colours, or pictures, by `share` of the second: (height, width) or (height, 1)."""
    return first + (second - first) * share[..., None]


def colour(red: int, green: int, blue: int) -> np.ndarray:
    return np.array([red, green, blue], np.float32)


class Scene:
    """A picture in progress; coordinates are shares of its width and height, (0, 0) is the upper left corner."""

    def __init__(self, width: int, height: int, seed: int = 42) -> None:
        self.width, self.height = width, height
        self.rng = np.random.default_rng(seed)
        self.pixels = np.zeros((height, width, 3), np.float32)
        rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
        self.x, self.y = columns / width, rows / height

    def mask(self, points: Points, blur: float = 0.0) -> np.ndarray:
        """Return how far each pixel lies inside a polygon, 0...1; `blur` is a share of the width."""
        large = Image.new("L", (self.width * 2, self.height * 2))
        scaled = [(x * self.width * 2, y * self.height * 2) for x, y in points]
        ImageDraw.Draw(large).polygon(scaled, fill=255)
        return self._smooth(large, blur)

    def disc(self, x: float, y: float, radius: float, blur: float = 0.0) -> np.ndarray:
        """Return the mask of a disc; `radius` and `blur` are shares of the width."""
        large = Image.new("L", (self.width * 2, self.height * 2))
        r, x, y = radius * self.width * 2, x * self.width * 2, y * self.height * 2
        ImageDraw.Draw(large).ellipse((x - r, y - r, x + r, y + r), fill=255)
        return self._smooth(large, blur)

    def _smooth(self, large: Image.Image, blur: float) -> np.ndarray:
        image = large.resize((self.width, self.height), Image.Resampling.BOX)
        if blur:
            image = image.filter(ImageFilter.GaussianBlur(blur * self.width))
        return np.asarray(image, np.float32) / 255

    def lettering(self, text: str, x: float, y: float, size: float) -> np.ndarray:
        """Return the mask of a text centred at (x, y); `size` is the font's, as a share of the width."""
        large = Image.new("L", (self.width * 2, self.height * 2))
        pixels = size * self.width * 2
        ImageDraw.Draw(large).text(
            (x * self.width * 2, y * self.height * 2),
            text,
            fill=255,
            font=ImageFont.load_default(size=pixels),
            anchor="mm",
            stroke_width=pixels * 0.025,
        )
        return self._smooth(large, 0)

    def noise(self, *cells: int, octaves: int = 5) -> np.ndarray:
        return fractal_noise(self.rng, self.height, self.width, (cells[0], cells[1]), octaves)

    def paint(self, mask: np.ndarray, tint: np.ndarray) -> None:
        self.pixels = mix(self.pixels, tint, mask)

    def shade(self, mask: np.ndarray, factor: float) -> None:
        """Darken, as a shadow does."""
        self.pixels *= 1 - (1 - factor) * mask[..., None]


def sky(scene: Scene) -> None:
    down = np.clip(scene.y / HORIZON, 0, 1)
    scene.pixels[:] = mix(colour(66, 122, 190), colour(205, 222, 232), down**0.8)
    distance = np.hypot(scene.x - SUN[0], (scene.y - SUN[1]) * scene.height / scene.width)
    scene.paint(np.exp(-distance * 5) * 0.6, colour(255, 240, 205))
    clouds = np.clip((scene.noise(5, 4, octaves=6) - 0.52) * 4, 0, 1) * (1 - down**4)
    above = max(scene.height // 68, 1)
    thinner_above = clouds - np.pad(clouds, ((above, 0), (0, 0)), mode="edge")[:-above]
    lit = np.clip(0.75 + 0.5 * thinner_above, 0, 1)
    scene.paint(clouds * 0.85, mix(colour(168, 178, 192), colour(255, 252, 246), lit))


def hills(scene: Scene) -> None:
    layers = (
        (0.17, 3, colour(136, 160, 182)),
        (0.115, 5, colour(108, 138, 140)),
        (0.06, 8, colour(82, 116, 84)),
    )
    for tallness, cells, tint in layers:
        ridge = fractal_noise(scene.rng, 1, scene.width, (1, cells), 6)[0]
        top = HORIZON - tallness * (0.35 + 0.65 * ridge)
        mask = np.clip((scene.y - top) * scene.height, 0, 1)
        scene.paint(mask, tint * (0.86 + 0.28 * scene.noise(24, 32)[..., None]))


def meadow(scene: Scene) -> None:
    mask = np.clip((scene.y - HORIZON) * scene.height, 0, 1)
    depth = np.clip((scene.y - HORIZON) / (1 - HORIZON), 0, 1)
    grass = mix(colour(128, 152, 84), colour(74, 116, 42), depth**0.7)
    # Blades look larger near the camera: two textures, blended by depth.
    texture = 0.6 * scene.noise(90, 60, octaves=4) * depth + 0.5 * scene.noise(220, 100, octaves=3) * (1 - depth)
    patches = scene.noise(10, 5)
    scene.paint(mask, grass * (0.62 + 0.55 * texture + 0.3 * patches)[..., None])
    flowers = (scene.rng.random(scene.x.shape) > 0.9988) & (depth > 0.12)
    dots = Image.fromarray((flowers * 255).astype(np.uint8)).filter(ImageFilter.MaxFilter(3))
    scene.paint(np.asarray(dots, np.float32) / 255 * mask * 0.8, colour(240, 226, 150))


def road(scene: Scene) -> None:
    far, near = (0.545, 0.565), (0.20, 0.78)
    depth = np.clip((scene.y - HORIZON) / (1 - HORIZON), 0, 1)
    gravel = scene.mask(
        [(far[0] - 0.006, HORIZON), (far[1] + 0.006, HORIZON), (near[1] + 0.06, 1), (near[0] - 0.06, 1)]
    )
    scene.paint(gravel, colour(150, 140, 116) * (0.7 + 0.5 * scene.noise(200, 200, octaves=3))[..., None])
    asphalt = scene.mask([(far[0], HORIZON), (far[1], HORIZON), (near[1], 1), (near[0], 1)])
    tone = 0.84 + 0.24 * scene.noise(240, 260, octaves=3) + 0.1 * scene.noise(8, 3)
    scene.paint(asphalt, mix(colour(132, 134, 138), colour(86, 88, 93), depth) * tone[..., None])
    for side in (0.06, 0.94):
        line = [
            (far[0] + (far[1] - far[0]) * (side + w), HORIZON)
            if end == 0
            else (near[0] + (near[1] - near[0]) * (side + w), 1.0)
            for end, w in ((0, -0.008), (0, 0.008), (1, 0.008), (1, -0.008))
        ]
        scene.paint(scene.mask(line) * 0.7, colour(226, 226, 220))
    # Dashes of equal length on the ground shrink with the distance.
    for number in range(2, 24):
        start, end = (1 / (0.52 * k) for k in (number + 0.45, number))
        if start > 1.05:
            continue
        corners: Points = []
        for place, sign in ((start, -1), (start, 1), (end, 1), (end, -1)):
            share = min(place, 1.05)
            left, right = far[0] + (near[0] - far[0]) * share, far[1] + (near[1] - far[1]) * share
            middle, half = (left + right) / 2, (right - left) * 0.011
            corners.append((middle + sign * half, HORIZON + (1 - HORIZON) * share))
        scene.paint(scene.mask(corners) * 0.85, colour(232, 230, 218))


def house(scene: Scene) -> None:
    ground, eaves, ridge = 0.665, 0.50, 0.385
    left, corner, right = 0.10, 0.30, 0.395
    shadow: Points = [
        (left + 0.02, ground),
        (right, ground - 0.035),
        (right + 0.13, ground + 0.005),
        (corner + 0.10, ground + 0.05),
    ]
    scene.shade(scene.mask(shadow, 0.004), 0.55)
    plaster = 0.9 + 0.14 * scene.noise(60, 60)
    front: Points = [(left, ground), (left, eaves), (corner, eaves), (corner, ground)]
    gable: Points = [
        (corner, ground),
        (corner, eaves),
        ((corner + right) / 2, ridge + 0.012),
        (right, eaves - 0.012),
        (right, ground - 0.035),
    ]
    scene.paint(scene.mask(front), colour(236, 224, 198) * plaster[..., None])
    scene.paint(scene.mask(gable), colour(170, 160, 148) * plaster[..., None])
    scene.shade(scene.mask([(left, eaves), (corner, eaves), (corner, eaves + 0.02), (left, eaves + 0.02)], 0.001), 0.7)

    chimney: Points = [(0.17, 0.42), (0.17, 0.345), (0.20, 0.345), (0.20, 0.42)]
    scene.paint(scene.mask(chimney), colour(142, 84, 66) * plaster[..., None])
    scene.paint(scene.mask([(0.19, 0.42), (0.19, 0.345), (0.20, 0.345), (0.20, 0.42)]), colour(104, 62, 50))
    roof: Points = [
        (left - 0.012, eaves + 0.008),
        (left + 0.042, ridge),
        ((corner + right) / 2 + 0.004, ridge),
        (corner + 0.004, eaves + 0.008),
    ]
    rows = 0.86 + 0.14 * (np.sin((scene.y - ridge) * 2 * np.pi / 0.0125) > -0.4)
    tiles = rows * (0.85 + 0.3 * scene.noise(50, 160, octaves=3))
    scene.paint(scene.mask(roof), colour(172, 82, 58) * tiles[..., None])
    edge: Points = [
        ((corner + right) / 2, ridge - 0.004),
        ((corner + right) / 2 + 0.006, ridge - 0.004),
        (right + 0.012, eaves),
        (right + 0.006, eaves + 0.008),
    ]
    scene.paint(scene.mask(edge), colour(104, 52, 40))

    for x in (0.118, 0.252):
        window(scene, x, 0.548, 0.036, 0.058)
    window(scene, 0.333, 0.535, 0.022, 0.052)
    door: Points = [(0.186, ground), (0.186, 0.552), (0.222, 0.552), (0.222, ground)]
    scene.paint(scene.mask([(0.182, ground), (0.182, 0.547), (0.226, 0.547), (0.226, ground)]), colour(246, 242, 232))
    scene.paint(scene.mask(door), colour(46, 92, 96) * (0.85 + 0.3 * scene.noise(6, 90))[..., None])
    scene.paint(scene.disc(0.2165, 0.612, 0.0022), colour(226, 190, 96))


def window(scene: Scene, x: float, y: float, width: float, height: float) -> None:
    def box(grow: float) -> Points:
        a, b = grow, grow * 1.3
        return [(x - a, y - b), (x + width + a, y - b), (x + width + a, y + height + b), (x - a, y + height + b)]

    scene.paint(scene.mask(box(0.004)), colour(246, 242, 232))
    glass = np.clip((scene.y - y) / height, 0, 1)
    scene.paint(scene.mask(box(0)), mix(colour(132, 164, 194), colour(46, 60, 74), glass))
    middle = x + width / 2
    scene.paint(
        scene.mask(
            [(middle - 0.0012, y), (middle + 0.0012, y), (middle + 0.0012, y + height), (middle - 0.0012, y + height)]
        ),
        colour(246, 242, 232),
    )
    centre = y + height * 0.42
    scene.paint(
        scene.mask(
            [(x, centre - 0.0015), (x + width, centre - 0.0015), (x + width, centre + 0.0015), (x, centre + 0.0015)]
        ),
        colour(246, 242, 232),
    )


def tree(scene: Scene, x: float, ground: float, size: float, tint: np.ndarray) -> None:
    scene.shade(
        scene.mask(
            [
                (x, ground - 0.004),
                (x + size * 1.5, ground + size * 0.12),
                (x + size * 1.9, ground + size * 0.3),
                (x, ground + 0.008),
            ],
            0.006,
        ),
        0.6,
    )
    trunk: Points = [
        (x - size * 0.06, ground),
        (x - size * 0.035, ground - size),
        (x + size * 0.035, ground - size),
        (x + size * 0.06, ground),
    ]
    scene.paint(scene.mask(trunk), colour(88, 68, 50) * (0.8 + 0.4 * scene.noise(10, 200, octaves=3))[..., None])
    leaves = 0.45 + 0.9 * scene.noise(70, 90, octaves=4)
    crown_y = ground - size * 1.75
    for angle in np.linspace(0, 2 * np.pi, 34, endpoint=False):
        reach = size * scene.rng.uniform(0.1, 0.62)
        px, py = x + np.cos(angle) * reach, crown_y + np.sin(angle) * reach * 1.35
        light = 1.0 - 0.42 * np.clip((px - x) / size + (py - crown_y) / size, -0.6, 1)
        ragged = np.clip(
            scene.disc(px, py, size * scene.rng.uniform(0.16, 0.27), 0.0015) * (0.4 + 1.5 * leaves) - 0.35, 0, 1
        )
        scene.paint(ragged, tint * (light * leaves)[..., None])


def sign(scene: Scene, text: str = "42") -> None:
    x, y, radius, ground = 0.825, 0.45, 0.083, 0.885
    tall = scene.width / scene.height
    scene.shade(
        scene.mask(
            [(x, ground - 0.004), (x + 0.14, ground + 0.06), (x + 0.15, ground + 0.06), (x + 0.006, ground + 0.004)],
            0.002,
        ),
        0.6,
    )
    pole = scene.mask([(x - 0.008, ground), (x - 0.008, y), (x + 0.008, y), (x + 0.008, ground)])
    round_ = np.clip(1 - np.abs((scene.x - x + 0.003) / 0.011), 0, 1)
    scene.paint(pole, mix(colour(84, 88, 94), colour(206, 210, 214), round_))
    tuft = scene.disc(x, ground + 0.006, 0.022, 0.004) * np.clip(scene.noise(60, 240, octaves=3) * 2 - 0.7, 0, 1)
    scene.paint(tuft, colour(66, 104, 38))
    light = 1.04 - 0.16 * np.clip((scene.x - x) / radius * 0.5 + (scene.y - y) / (radius * tall) * 0.5 + 0.5, 0, 1)
    scene.shade(scene.disc(x + 0.004, y + 0.006, radius, 0.004), 0.75)
    scene.paint(scene.disc(x, y, radius), colour(214, 216, 214) * light[..., None])
    scene.paint(scene.disc(x, y, radius * 0.97), colour(196, 30, 36) * light[..., None])
    scene.paint(scene.disc(x, y, radius * 0.77), colour(248, 247, 242) * light[..., None])
    scene.paint(scene.lettering(text, x, y, radius * 1.02), colour(24, 24, 26))


def camera(scene: Scene) -> Image.Image:
    """Return the picture as a lens and a sensor see it: a little blur, vignette and grain."""
    exact = Image.fromarray(np.clip(scene.pixels, 0, 255).astype(np.uint8))
    pixels = np.asarray(exact.filter(ImageFilter.GaussianBlur(scene.width * 0.0005)), np.float32)
    corner = np.hypot(scene.x - 0.5, scene.y - 0.5)
    pixels = pixels * (1 - 0.55 * np.clip(corner - 0.25, 0, 1) ** 1.5)[..., None]
    pixels = 255 * np.clip(pixels / 255, 0, 1) ** 0.96 + scene.rng.normal(0, 2.2, (*scene.x.shape, 1))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def make_picture(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Return the scene at a size; the parts are painted from far to near."""
    scene = Scene(width, height)
    for part in (sky, hills, meadow, road):
        part(scene)
    for x, ground, size, tint in ((0.055, 0.625, 0.085, colour(74, 118, 52)), (0.475, 0.60, 0.05, colour(86, 124, 60))):
        tree(scene, x, ground, size, tint)
    house(scene)
    for x, ground, size, tint in ((0.422, 0.672, 0.088, colour(92, 138, 52)), (0.945, 0.67, 0.10, colour(78, 124, 48))):
        tree(scene, x, ground, size, tint)
    sign(scene)
    return camera(scene)


def main() -> None:
    """Parse the arguments and write the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", nargs="?", type=Path, default=OUT)
    out = parser.parse_args().out
    out.parent.mkdir(parents=True, exist_ok=True)
    make_picture().save(out, quality=QUALITY)
    print(f"{out}: {WIDTH} x {HEIGHT} pixels, {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
