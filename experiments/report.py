"""A table and a plot of what an experiment has measured, over seeds, beside what the paper publishes."""

import math
import statistics

from PIL import Image, ImageDraw, ImageFont

from experiments.tables import Experiment, Row

BLUE, GREY, PALE = (31, 90, 166), (140, 140, 140), (228, 228, 228)
Measured = dict[str, dict[str, list[float]]]  # row -> metric -> accuracies in %, one a seed


def spread(values: list[float]) -> str:
    """Mean ± standard deviation (of the sample) of some seeds; the number alone for one."""
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def table(name: str, experiment: Experiment, rows: list[Row], measured: Measured, n_seeds: int, command: str) -> str:
    """Markdown: a row each; measured mean ± standard deviation over seeds, and what the paper has for ViT-L."""
    metrics = metrics_of(rows)
    head = [experiment.title, *(part for metric in metrics for part in (metric, f"{metric}, paper"))]
    lines = [f"### {name}: {experiment.title}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [row.name]
        for metric in metrics:
            published = row.published.get(metric)
            cells += [spread(measured.get(row.name, {}).get(metric, [])), "–" if published is None else f"{published}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Top-1 in %, {n_seeds} seeds (mean ± standard deviation): `{command}`", ""])


def metrics_of(rows: list[Row]) -> list[str]:
    """What its rows have published, in the table's order."""
    return list(dict.fromkeys(metric for row in rows for metric in row.published)) or ["fine-tuned"]


def plot(experiment: Experiment, rows: list[Row], measured: Measured) -> Image.Image:
    """A panel a metric: measured in blue, mean and bars of a standard deviation, each seed a dot, by the left axis; the
    paper's in grey by the right one.
    """
    metrics = metrics_of(rows)
    width, height = 560, 340
    canvas = Image.new("RGB", (width * len(metrics), height), "white")
    for i, metric in enumerate(metrics):
        ours = [measured.get(row.name, {}).get(metric, []) for row in rows]
        theirs = [[row.published[metric]] if row.published.get(metric) is not None else [] for row in rows]
        _panel(canvas, i * width, (width, height), f"{experiment.title}: {metric}, top-1 %", rows, ours, theirs)
    return canvas


def _panel(canvas: Image.Image, x0: int, size: tuple[int, int], title: str, rows: list[Row], ours, theirs) -> None:
    draw, font, small = ImageDraw.Draw(canvas), ImageFont.load_default(13), ImageFont.load_default(10)
    left, right, top, bottom = x0 + 48, x0 + size[0] - 48, 40, size[1] - 70
    draw.text((x0 + size[0] / 2, 10), title, fill="black", font=font, anchor="mt")
    draw.rectangle([left, top, right, bottom], outline=PALE)
    places = [row.x for row in rows]
    if None in places:  # no numbers: side by side
        places = list(range(len(rows)))
    margin = (max(places) - min(places) or 1) * 0.08
    low, high = min(places) - margin, max(places) + margin
    across = [left + (place - low) / (high - low) * (right - left) for place in places]
    for i, (x, row) in enumerate(zip(across, rows, strict=True)):
        label = row.name if len(row.name) <= 18 else row.name[:17] + "…"
        draw.line([(x, top), (x, bottom)], fill=PALE)
        draw.text((x, bottom + 6 + 13 * (i % 3)), label, fill="black", font=small, anchor="mt")
    for values, colour, edge, anchor in ((theirs, GREY, right + 5, "lm"), (ours, BLUE, left - 5, "rm")):
        if not any(values):
            continue
        ticks = _ticks([value for some in values for value in some])

        def height_of(value: float, ticks=ticks) -> float:
            return bottom - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (bottom - top)

        for tick in ticks:
            draw.text((edge, height_of(tick)), f"{tick:g}", fill=colour, font=small, anchor=anchor)
        points = [(x, some) for x, some in zip(across, values, strict=True) if some]
        aside = 0 if rows[0].x is not None else 5 if values is ours else -5  # two dots at one place would be one
        means = [(x + aside, height_of(statistics.mean(some))) for x, some in points]
        if rows[0].x is not None and (values is ours or all(theirs)):  # no line over what is not published
            draw.line(means, fill=colour, width=2)
        for (x, y), (_, some) in zip(means, points, strict=True):
            if len(some) > 1:
                _bar(draw, x, *(height_of(statistics.mean(some) + s * statistics.stdev(some)) for s in (-1, 1)), colour)
                for value in some:
                    draw.ellipse([x + 7, height_of(value) - 1, x + 9, height_of(value) + 1], fill=colour)
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=colour)
    draw.text((left, size[1] - 6), "measured (left axis)", fill=BLUE, font=small, anchor="lb")
    draw.text((right, size[1] - 6), "paper, ViT-L on ImageNet-1K (right axis)", fill=GREY, font=small, anchor="rb")


def _bar(draw: ImageDraw.ImageDraw, x: float, low: float, high: float, colour: tuple[int, int, int]) -> None:
    draw.line([(x, low), (x, high)], fill=colour, width=2)
    for y in (low, high):
        draw.line([(x - 5, y), (x + 5, y)], fill=colour, width=2)


def _ticks(values: list[float]) -> list[float]:
    """Round numbers around all values, with room for the bars: at most seven."""
    low, high = min(values), max(values)
    room = (high - low) * 0.3 or 1
    step = next(s for s in (0.2, 0.5, 1, 2, 5, 10, 20) if (high - low + 2 * room) / s <= 5 or s == 20)
    first, last = math.floor((low - room) / step), math.ceil((high + room) / step)
    return [round(i * step, 6) for i in range(first, last + 1)]
