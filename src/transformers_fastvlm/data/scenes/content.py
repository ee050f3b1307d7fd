# SPDX-License-Identifier: Apache-2.0
"""The content of scenes: images, captions, questions and answers."""

import itertools
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from PIL import Image

from .drawing import COLORS, DIGIT_FACES, FACES, SHAPES, Canvas, Color

KINDS = ("attribute", "relation", "count", "number", "word", "character", "chart")
ASPECTS = ("any", "square", "oblong")

_WORDS = """
ANT APE ARM BAG BAT BED BEE BIRD BOAT BOOK BOX BREAD BUS CAKE CAR CAT CHAIR CITY CLOCK CLOUD COAT COW CUP DESK DOG
DOOR DUCK EAR EGG EXIT EYE FARM FIRE FISH FLAG FOOD FOOT FORK FOX FROG GAME GATE GIFT GOAT GOLD HAND HAT HILL HOME
HORSE HOTEL HOUSE ICE INK IRON JAM JAR KEY KING KITE LAKE LAMP LEAF LION MAP MILK MOON MOUSE NEST NIGHT NOSE OPEN
OWL PAPER PARK PEN PIANO PIG PLANE PLANT QUEEN QUIZ RADIO RAIN RING RIVER ROAD ROSE SALT SEA SHIP SHOE SHOP SNOW
SOUP STAR STOP SUGAR SUN TABLE TAXI TEA TIGER TRAIN TREE VAN VOICE WATER WAVE WIND WOLF YARD ZEBRA ZOO
"""
WORDS = tuple(_WORDS.split())

_ROWS = ("top", "middle", "bottom")
_COLUMNS = ("left", "center", "right")


@dataclass(frozen=True)
class Question:
    """A question about a scene, its kind (one of KINDS) and its one right answer."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Mark:
    """An item of a scene, and the position of its centre, as fractions of the image's width and height.

    An object has labels such as "red", "star" and for its position "top", "left"; a letter or digit is its own label; a
    bar, marked at its end, has "blue" and "bar 4".
    """

    labels: tuple[str, ...]
    x: float
    y: float


@dataclass
class Scene:
    """An image, its marks, a complete caption, and questions, at least one of them of the scene's kind."""

    image: Image.Image
    marks: list[Mark]
    caption: str
    kind: str
    questions: list[Question]


@dataclass
class _Object:
    color: str
    shape: str
    row: int
    column: int
    place: str = field(default="")

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass
class _Page:
    """A canvas with the random source and the palette of one scene."""

    rng: random.Random
    canvas: Canvas
    ink: Color
    marks: list[Mark] = field(default_factory=list)

    def mark(self, labels: Sequence[str], x: float, y: float) -> None:
        """Record a mark at (x, y)."""
        self.marks.append(Mark(tuple(labels), x / self.canvas.width, y / self.canvas.height))

    def color(self, name: str) -> Color:
        """Return the named colour, slightly varied."""
        red, green, blue = (max(0, min(255, value + self.rng.randint(-14, 14))) for value in COLORS[name])
        return red, green, blue


def make_scene(seed: int, index: int, kinds: tuple[str, ...] = KINDS, aspect: str = "any") -> Scene:
    """Return scene `index` of the series `seed`.

    Args:
        seed: selects the series; different seeds share no scene.
        index: number of the scene, from 0.
        kinds: kinds of questions to ask, some of KINDS; each scene has at least one such question.
        aspect: "any" for two squares in five and the rest between 1:2 and 2:1, "square", or "oblong" (at least 4:3).

    Raises:
        ValueError: if a kind or the aspect is unknown.
    """
    check_options(kinds, aspect)
    rng = random.Random(f"scenes/{seed}/{index}")
    kind = rng.choice(kinds)
    while True:
        page = _new_page(rng, aspect)
        caption, questions = _PAINTERS[kind](page)
        # Some scenes allow no question of their kind: three shapes in a row have no "above".
        if any(question.kind == kind for question in questions):
            break
    return Scene(
        _finish(page), page.marks, caption, kind, [question for question in questions if question.kind in kinds]
    )


def make_collage(seed: int, index: int, aspect: str = "any") -> Scene:
    """Return collage `index` of the series `seed`: objects, letters and digits all over the image, no questions.

    Collages are for training an encoder: they show as much as several scenes, and no words that could be guessed.

    Raises:
        ValueError: if the aspect is unknown.
    """
    check_options(KINDS, aspect)
    rng = random.Random(f"collages/{seed}/{index}")
    page = _new_page(rng, aspect)
    canvas = page.canvas
    y = rng.uniform(2, 20)
    while (height := min(rng.uniform(36, 100), canvas.height - y)) >= 30:
        x = rng.uniform(2, 30)
        while (room := canvas.width - x) >= 30:
            length = rng.choice((0, 0, 1, 1, 2, 3, 4))
            width = min(room, length * rng.uniform(27, 62) if length else height)
            if length and width / length >= 25:
                digits = rng.random() < 0.4
                text = "".join(rng.choice("0123456789" if digits else string.ascii_uppercase) for _ in range(length))
                _write(page, text, x + width / 2, y + height / 2, width, height * 0.9)
            elif not length:
                name = rng.choice(list(COLORS)), rng.choice(SHAPES)
                middle = x + width / 2, y + height / 2
                canvas.shape(
                    name[1], *middle, width * rng.uniform(0.32, 0.4), page.color(name[0]), rng.uniform(-0.2, 0.2)
                )
                page.mark(name, *middle)
            x += width + rng.uniform(0, 30)
        y += height
    return Scene(_finish(page), page.marks, "", "collage", [])


def _finish(page: _Page) -> Image.Image:
    """Return the image with its noise and blur."""
    rng = page.rng
    return page.canvas.finish(rng, noise=rng.choice((0.0, rng.uniform(0, 14))), blur=rng.choice((0.0, 0.0, 0.6)))


def check_options(kinds: tuple[str, ...], aspect: str) -> None:
    """Raise ValueError for an unknown kind of question or aspect."""
    if not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds is {tuple(kinds)!r}; expected one or more of {KINDS}.")
    if aspect not in ASPECTS:
        raise ValueError(f"aspect is {aspect!r}; expected 'any', 'square' or 'oblong'.")


def _new_page(rng: random.Random, aspect: str) -> _Page:
    """Return an empty page on a light or a dark ground."""
    width, height = _size(rng, aspect)
    dark = rng.random() < 0.3
    level = rng.randint(0, 45) if dark else rng.randint(215, 255)
    red, green, blue = (max(0, min(255, level + rng.randint(-10, 10))) for _ in range(3))
    return _Page(rng, Canvas(width, height, rng.randint(176, 400), (red, green, blue)), _ink(rng, dark))


def _size(rng: random.Random, aspect: str) -> tuple[int, int]:
    """Return width and height, the larger one 256."""
    if aspect == "square" or (aspect == "any" and rng.random() < 0.4):
        return 256, 256
    short = round(256 / rng.uniform(4 / 3 if aspect == "oblong" else 1.0, 2.0))
    return (256, short) if rng.random() < 0.5 else (short, 256)


def _ink(rng: random.Random, dark: bool) -> Color:
    """Return a text colour that stands out."""
    low, high = (190, 255) if dark else (0, 90)
    return rng.randint(low, high), rng.randint(low, high), rng.randint(low, high)


def _cells(side: int) -> int:
    """Return how many cells, of 64 pixels at least, fit along a side."""
    return max(2, side // 64)


def _place(page: _Page, objects: list[tuple[str, str]]) -> list[_Object]:
    """Draw (colour, shape) pairs into different cells of a grid and return them in reading order."""
    canvas, rng = page.canvas, page.rng
    grids = itertools.product(range(1, _cells(canvas.height) + 1), range(1, _cells(canvas.width) + 1))
    rows, columns = rng.choice([grid for grid in grids if grid[0] * grid[1] >= len(objects)])
    cells = rng.sample([(row, column) for row in range(rows) for column in range(columns)], len(objects))
    wide, high = canvas.width / columns, canvas.height / rows
    placed = []
    for (color, shape), (row, column) in zip(objects, sorted(cells), strict=True):
        radius = rng.uniform(0.24, 0.36) * min(wide, high)
        room_x, room_y = max(0.0, wide / 2 - radius * 1.25), max(0.0, high / 2 - radius * 1.25)
        x = (column + 0.5) * wide + rng.uniform(-room_x, room_x)
        y = (row + 0.5) * high + rng.uniform(-room_y, room_y)
        canvas.shape(shape, x, y, radius, page.color(color), rng.uniform(-0.2, 0.2))
        place = _ROWS[min(2, int(3 * y / canvas.height))], _COLUMNS[min(2, int(3 * x / canvas.width))]
        placed.append(_Object(color, shape, row, column, " ".join(place)))
        page.mark((color, shape, *place), x, y)
    return placed


def _paint_objects(page: _Page) -> tuple[str, list[Question]]:
    """Draw a few different objects and ask about them and their positions."""
    rng = page.rng
    number = rng.choice((2, 2, 3, 3, 4))
    names = rng.sample([(color, shape) for color in COLORS for shape in SHAPES], number)
    objects = _place(page, names)
    return _listed(objects), _attributes(objects, rng) + _relations(objects, rng)


def _listed(objects: list[_Object]) -> str:
    """Return a caption: each object after its position, in reading order, and their number."""
    return "Shapes: " + ", ".join(f"{one.place} {one.name}" for one in objects) + f". {len(objects)} in all."


def _attributes(objects: list[_Object], rng: random.Random) -> list[Question]:
    questions = []
    for one in objects:
        if sum(other.shape == one.shape for other in objects) == 1:
            text = rng.choice((f"What color is the {one.shape}?", f"Which color does the {one.shape} have?"))
            questions.append(Question("attribute", text, one.color))
        if sum(other.color == one.color for other in objects) == 1:
            text = rng.choice((f"What shape is {one.color}?", f"Which shape is the {one.color} one?"))
            questions.append(Question("attribute", text, one.shape))
        if sum(other.place == one.place for other in objects) == 1:
            text = rng.choice((f"What is at the {one.place}?", f"Which shape is at the {one.place}?"))
            questions.append(Question("attribute", text, one.name))
    return questions


def _relations(objects: list[_Object], rng: random.Random) -> list[Question]:
    """Return questions about directions, each only if no other object is level with its reference object."""
    questions = []
    for one in objects:
        others = [other for other in objects if other is not one]
        for axis, before, after in (("column", "left of", "right of"), ("row", "above", "below")):
            here = getattr(one, axis)
            places = [getattr(other, axis) for other in others]
            if here in places:
                continue
            for relation, found in (
                (before, [other for other, place in zip(others, places, strict=True) if place < here]),
                (after, [other for other, place in zip(others, places, strict=True) if place > here]),
            ):
                if len(found) == 1:
                    text = rng.choice(
                        (f"What is {relation} the {one.name}?", f"Which shape is {relation} the {one.name}?")
                    )
                    questions.append(Question("relation", text, found[0].name))
            other = rng.choice(others)
            first, second = before.removesuffix(" of"), after.removesuffix(" of")
            text = f"Is the {other.name} {first} or {second}{' of' if axis == 'column' else ''} the {one.name}?"
            questions.append(Question("relation", text, first if getattr(other, axis) < here else second))
    return questions


def _paint_count(page: _Page) -> tuple[str, list[Question]]:
    """Several objects of few sorts, to be counted."""
    rng, canvas = page.rng, page.canvas
    room = _cells(canvas.width) * _cells(canvas.height)
    colors, shapes = rng.sample(list(COLORS), rng.choice((1, 2, 2))), rng.sample(SHAPES, rng.choice((1, 2, 2)))
    number = rng.randint(1, min(5, room))
    objects = _place(page, [(rng.choice(colors), rng.choice(shapes)) for _ in range(number)])
    questions = [Question("count", rng.choice(("How many shapes are there?", "Count the shapes.")), str(number))]
    other_shape = rng.choice([shape for shape in SHAPES if shape not in shapes])
    for shape in [*shapes, *([other_shape] if rng.random() < 0.3 else [])]:
        count = sum(one.shape == shape for one in objects)
        text = rng.choice((f"How many {shape}s are there?", f"Count the {shape}s."))
        questions.append(Question("count", text, str(count)))
    for color in colors:
        count = sum(one.color == color for one in objects)
        text = rng.choice((f"How many {color} shapes are there?", f"Count the {color} shapes."))
        questions.append(Question("count", text, str(count)))
    return _listed(objects), questions


def _paint_text(page: _Page) -> tuple[str, list[Question]]:
    """A number, a word, or both, one above the other."""
    rng, canvas = page.rng, page.canvas
    digits = rng.randint(2, 3)
    number = str(rng.randint(10 ** (digits - 1), 10**digits - 1))
    room = canvas.width * 0.92
    longest = min(5, int(room / 28))
    word = rng.choice([word for word in WORDS if len(word) <= longest])
    lines = rng.choice(([("number", number)], [("word", word)], [("number", number), ("word", word)]))
    lines = rng.sample(lines, len(lines))
    questions, told = [], []
    band = canvas.height / len(lines)
    for position, (kind, text) in enumerate(lines):
        height = rng.uniform(min(40, band * 0.8), min(100, band * 0.8))
        width = rng.uniform(min(room, len(text) * 40), min(room, len(text) * 64))
        x = canvas.width / 2 + rng.uniform(-1, 1) * max(0.0, (canvas.width - width) / 2 - 4)
        y = (position + 0.5) * band + rng.uniform(-1, 1) * max(0.0, (band - height) / 2 - 3)
        _write(page, text, x, y, width, height)
        asked = rng.choice((f"What {kind} is written?", f"Read the {kind}.", f"Which {kind} do you see?"))
        questions += [Question(kind, asked, text), *_characters(kind, text)]
        told.append(f"the {kind} {text}")
    return "Text: " + ", ".join(told) + ".", questions


def _characters(kind: str, text: str) -> list[Question]:
    """Questions about single digits or letters of a text, and how many it has."""
    name = "digit" if kind == "number" else "letter"
    ordinals = ("first", "second", "third")[: max(1, len(text) - 1)]
    places = [*zip(ordinals, text, strict=False), ("last", text[-1])]
    questions = [Question("character", f"What is the {place} {name}?", character) for place, character in places]
    return [*questions, Question("character", f"How many {name}s does the {kind} have?", str(len(text)))]


def _write(page: _Page, text: str, x: float, y: float, width: float, height: float) -> None:
    """Write a text in some face within a box around (x, y), now and then on a coloured plate."""
    rng, ink = page.rng, page.ink
    if rng.random() < 0.25:
        plate = page.color(rng.choice(list(COLORS)))
        edges = (x - width / 2 - 5, y - height / 2 - 4, x + width / 2 + 5, y + height / 2 + 4)
        page.canvas.rectangle(*edges, plate)
        ink = (255, 255, 255) if sum(plate) < 420 else (0, 0, 0)
    face = rng.choice(DIGIT_FACES if text.isdigit() else FACES)
    for letter, middle in zip(text, page.canvas.text(text, x, y, width, height, face, ink), strict=True):
        page.mark(letter, middle, y)


def _paint_chart(page: _Page) -> tuple[str, list[Question]]:
    """A bar chart with a line at every unit."""
    rng, canvas = page.rng, page.canvas
    number = rng.randint(2, 4)
    colors = rng.sample(list(COLORS), number)
    values = [rng.randint(1, 6) for _ in colors]
    left, right, bottom, top = 14, canvas.width - 8, canvas.height - 10, 10
    unit, slot = (bottom - top) / 6, (right - left) / number
    grid = tuple((value + 128) // 2 for value in page.ink)
    for line in range(1, 7):
        canvas.line((left, bottom - line * unit), (right, bottom - line * unit), grid)  # type: ignore[arg-type]
    share = rng.uniform(0.5, 0.8)
    for position, (color, value) in enumerate(zip(colors, values, strict=True)):
        center = left + (position + 0.5) * slot
        half = min(share * slot / 2, 24)
        canvas.rectangle(center - half, bottom - value * unit, center + half, bottom, page.color(color))
        page.mark((color, f"bar {value}"), center, bottom - value * unit)
    canvas.line((left, bottom), (right, bottom), page.ink, 2.5)
    canvas.line((left, top - 4), (left, bottom), page.ink, 2.5)
    questions = []
    for color, value in zip(colors, values, strict=True):
        text = rng.choice((f"How high is the {color} bar?", f"What is the value of the {color} bar?"))
        questions.append(Question("chart", text, str(value)))
    for word, extreme in (("highest", max(values)), ("lowest", min(values))):
        if values.count(extreme) == 1:
            questions.append(Question("chart", f"Which bar is the {word}?", colors[values.index(extreme)]))
    questions.append(Question("chart", "How many bars are there?", str(number)))
    told = ", ".join(f"{color} {value}" for color, value in zip(colors, values, strict=True))
    return f"Chart: {told}.", questions


_PAINTERS: dict[str, Callable[[_Page], tuple[str, list[Question]]]] = {
    "attribute": _paint_objects,
    "relation": _paint_objects,
    "count": _paint_count,
    "number": _paint_text,
    "word": _paint_text,
    "character": _paint_text,
    "chart": _paint_chart,
}
