"""Charts of an evaluation, drawn with Pillow: error over strength of each corruption, and a confusion matrix."""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from util.data.robustness import ALEXNET, EXTRA, STRENGTHS

BLUE, GREY, PALE = (31, 90, 166), (120, 120, 120), (225, 225, 225)


def corruption_chart(row: dict) -> Image.Image:
    """The entry imagenet-c of results.json -> small multiples: error in % over strength, a panel a corruption.

    The grey line is AlexNet's mean error over the strengths, which CE divides by.
    """
    alexnet, panels = {**ALEXNET, **EXTRA}, row["corruptions"]
    width, height, left, top, across = 190, 150, 34, 34, 5
    rows = math.ceil(len(panels) / across)
    canvas = Image.new("RGB", (min(len(panels), across) * width + 20, rows * height + 40), "white")
    draw, font, small = ImageDraw.Draw(canvas), ImageFont.load_default(12), ImageFont.load_default(10)
    for i, (name, cells) in enumerate(panels.items()):
        x0, y0 = i % across * width + left, i // across * height + top
        w, h = width - 46, height - 56

        def place(strength: float, error: float, x0=x0, y0=y0, w=w, h=h) -> tuple[float, float]:
            return x0 + (strength - 0.5) / len(STRENGTHS) * w, y0 + h - error / 100 * h

        ce = "" if cells["ce"] is None else f"  CE {cells['ce']:.1f}"
        draw.text((x0, y0 - 18), name + ce, fill="black", font=font)
        for error in (0, 50, 100):
            draw.line([(x0, place(1, error)[1]), (x0 + w, place(1, error)[1])], fill=PALE)
            draw.text((x0 - 4, place(1, error)[1]), str(error), fill=GREY, font=small, anchor="rm")
        for strength in STRENGTHS:
            draw.text((place(strength, 0)[0], y0 + h + 3), str(strength), fill=GREY, font=small, anchor="mt")
        level = place(1, 100 * alexnet[name])[1]
        draw.line([(x0, level), (x0 + w, level)], fill=GREY, width=1)
        points = [place(s, e) if e is not None else None for s, e in zip(STRENGTHS, cells["error"], strict=True)]
        for a, b in zip(points, points[1:], strict=False):
            if a and b:  # a strength that is missing leaves a gap
                draw.line([a, b], fill=BLUE, width=2)
        for x, y in filter(None, points):
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=BLUE)
    note = "error in % over strength; grey: AlexNet's mean error"
    draw.text((left, canvas.height - 18), note, fill=GREY, font=small)
    return canvas


def confusion_chart(matrix: np.ndarray, names: list[str]) -> Image.Image:
    """[C, C] counts, rows true and columns predicted -> a picture: the darker, the larger the share of the row."""
    n = len(names)
    cell, font = max(14, min(40, 640 // n)), ImageFont.load_default(11)
    labels = [name if len(name) <= 24 else name[:23] + "…" for name in names]
    margin = 30 + int(max(map(font.getlength, labels)))
    canvas = Image.new("RGB", (margin + n * cell + 20, margin + n * cell + 20), "white")
    draw = ImageDraw.Draw(canvas)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    for row in range(n):
        middle = margin + row * cell + cell // 2
        draw.text((margin - 6, middle), labels[row], fill="black", font=font, anchor="rm")
        across = Image.new("RGB", (margin, cell), "white")  # the same text, turned for the columns
        ImageDraw.Draw(across).text((6, cell // 2), labels[row], fill="black", font=font, anchor="lm")
        canvas.paste(across.rotate(90, expand=True), (margin + row * cell, 0))
        for column in range(n):
            shade = share[row, column]
            colour = tuple(round(255 - (255 - part) * shade) for part in BLUE)
            x, y = margin + column * cell, margin + row * cell
            draw.rectangle([x, y, x + cell, y + cell], fill=colour, outline=PALE)
            if n <= 20 and matrix[row, column]:
                ink = "white" if shade > 0.5 else "black"
                draw.text((x + cell / 2, y + cell / 2), str(matrix[row, column]), fill=ink, font=font, anchor="mm")
    draw.text((6, 6), "true \\ predicted", fill=GREY, font=font)
    return canvas
