"""What happens on the page when a visitor does something. Everything that arrives is checked: it may come from anybody.

What a visitor chose is one `Visit` in gr.State, which each visitor has for himself on the server; from the browser come
a model's name, numbers, a mask, an upload. Pictures go out as data URLs: the answers name no file of the server.
"""

import functools
import time
from dataclasses import dataclass, replace
from html import escape

import gradio as gr
from PIL import Image

from demo.drawing import (
    IMAGENET,
    Drawing,
    address,
    animation,
    draw,
    fitted_mask,
    opened,
    random_mask,
    row_of,
    thumb,
)
from demo.uploads import Sorry

NOTHING = "nothing"
STATISTICS = {"visible neighbours": "neighbours", "true patch (using the answer)": "answer"}
WAYS = {"ratio": "over mask ratios", "seed": "over seeds"}
RATIOS = (10, 20, 30, 40, 50, 60, 70, 75, 80, 85, 90, 95)
SEEDS = 10  # of an animation


@dataclass(frozen=True)
class Visit:
    """What one visitor looks at. `kind`: of which examples the picture is, "own" for an upload."""

    model: str
    other: str
    image: Image.Image
    kind: str
    removed: tuple[bool, ...]
    statistics: str = "neighbours"


def number(value: object, low: int, high: int, what: str) -> int:
    """A visitor's number, rounded. Raises Sorry unless it lies within [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise Sorry(f"{what} is a number from {low} to {high}.")
    return round(value)


def settings(percent: object, seed: object) -> tuple[int, int]:
    """What the two sliders say. A number typed beside one may be beyond its ends: the box then shows the end."""
    values = []
    for value, low, high, what in ((percent, 1, 99, "The share of hidden patches"), (seed, 0, 100, "The seed")):
        if isinstance(value, int | float):
            value = min(max(value, low), high)
        values.append(number(value, low, high, what))
    return values[0], values[1]


def one_of(value: object, values: object, what: str) -> str:
    """A visitor's choice. Raises Sorry unless it is one of `values`."""
    if not isinstance(value, str) or value not in values:
        raise Sorry(f"{what} is not one that this page offers. Please reload it.")
    return value


def told(event: gr.EventData, name: str) -> object:
    """What an event of our own scripts tells, None where it does not."""
    given = event._data
    return given.get(name) if isinstance(given, dict) else None


def mask_of(text: object, length: int) -> tuple[bool, ...]:
    """A visitor's mask "0110..." -> which patches are removed. Raises Sorry."""
    if not isinstance(text, str) or len(text) != length or not set(text) <= {"0", "1"}:
        raise Sorry("This mask does not fit the model. Please reload the page.")
    return checked_mask(tuple(bit == "1" for bit in text))


def checked_mask(removed: tuple[bool, ...]) -> tuple[bool, ...]:
    """The same mask. Raises Sorry where it leaves nothing to see, or nothing to predict."""
    if all(removed) or not any(removed):
        raise Sorry("Leave at least one patch to see, and hide at least one.")
    return removed


class Handlers:
    """What happens on the page. `choices`: {name: source of a checkpoint}; `examples`: {kind: pictures}."""

    def __init__(self, choices: dict[str, str], examples: dict[str, list[Image.Image]]) -> None:
        self.choices, self.examples = choices, examples
        self.newest: tuple[Visit | None, str] = None, ""

    def models(self, visit: Visit) -> list:
        """The model of a visit, and the one beside it."""
        return [opened(self.choices[name]) for name in (visit.model, visit.other) if name]

    def kind_for(self, kind: str) -> str:
        """Which examples a model of this kind of pictures gets."""
        return kind if kind in self.examples else "photographs"

    def check(self, visit: object) -> Visit:
        """The visit of somebody who has opened the page. Raises Sorry for others."""
        if not isinstance(visit, Visit):
            raise Sorry("Please reload the page first.")
        return visit

    def fetch(self, name: object, other: object) -> None:
        """Have a model, and another beside it, ready. Raises Sorry, and UserError where one fails to load."""
        opened(self.choices[one_of(name, self.choices, "This model")])
        if one_of(other, [NOTHING, *self.choices], "The model to compare with") != NOTHING:
            opened(self.choices[other])

    def choose(self, visit: object, name: object, other: object, percent: object, seed: object) -> Visit:
        """Another model, or another beside it. Raises Sorry, and UserError where one fails to load."""
        self.fetch(name, other)
        opened_ = opened(self.choices[name])
        kind = self.kind_for(opened_.kind)
        old = visit if isinstance(visit, Visit) else None
        image, shown = (old.image, old.kind) if old and old.kind in ("own", kind) else (self.examples[kind][0], kind)
        removed = tuple(self.mask(opened_.model, percent, seed))
        if old and opened(self.choices[old.model]).model.patch_embed.grid_size == opened_.model.patch_embed.grid_size:
            removed = old.removed
        other = "" if other == NOTHING else other
        return Visit(name, other, image, shown, removed, old.statistics if old else "neighbours")

    def mask(self, model: object, percent: object, seed: object) -> list[bool]:
        """A random mask by a visitor's numbers."""
        return random_mask(model, *settings(percent, seed))

    def board(self, visit: Visit) -> str:
        """The pictures, and what is said about them, as HTML. Visitors who open the page see the same, drawn once."""
        newest, html = self.newest
        if visit != newest:
            html = self.drawn(visit)
            self.newest = visit, html
        return html

    def drawn(self, visit: Visit) -> str:
        """The same, drawn anew."""
        rows, lines = [], []
        entries = self.models(visit)
        first, grid = entries[0], entries[0].model.patch_embed.grid_size
        for i, entry in enumerate(entries):
            model, name = entry.model, visit.other if i else visit.model
            removed = fitted_mask(list(visit.removed), grid, model) if i else list(visit.removed)
            start = time.perf_counter()
            drawing = draw(model, visit.image, list(checked_mask(tuple(removed))), visit.statistics)
            seconds = time.perf_counter() - start
            if visit.other:
                rows.append(f"<h3>{escape(name)}</h3>")
            rows.append(row_of(drawing, removed, model.patch_embed.grid_size, first=not i))
            who = f"{escape(name)}: " if visit.other else ""
            line = f"<p>{who}<b>Loss {drawing.loss:.4f}</b> over {sum(removed)} hidden of {len(removed)} patches, "
            lines.append(line + f"in {seconds:.2f} s.{self.remark(drawing)}</p>")
        if first.kind in self.examples and first.kind != "photographs" and visit.kind == "own":
            lines.append(
                f'<p class="hint">This model has seen nothing but {first.kind}. Of other pictures expect colours and '
                "rough shapes, no more; a model of photographs does better.</p>"
            )
        return f'{"".join(rows)}<div id="loss">{"".join(lines)}</div>'

    @staticmethod
    def remark(drawing: Drawing) -> str:
        """Whose mean and contrast a model of normalised pixels shows."""
        if drawing.statistics == "neighbours":
            return " It predicts normalised pixels; mean and contrast come from the visible neighbours."
        if drawing.statistics == "answer":
            return " <b>Uses the answer</b>: mean and contrast of each hidden patch come from the true picture."
        return ""

    def about(self, visit: Visit) -> str:
        """What the model was trained on."""
        entry = self.models(visit)[0]
        if not entry.trained_on:
            return "<p>The file of this model does not tell what it was trained on.</p>"
        words = f"<p><b>{escape(visit.model)}</b> was trained on {entry.trained_on}, without labels."
        if entry.trained_on == IMAGENET or entry.kind in self.examples:
            words += (
                f" The examples are {'photographs' if entry.trained_on == IMAGENET else 'some'} that it has never seen."
            )
        return words + "</p>"

    def thumbs(self, visit: Visit) -> str:
        """The examples for the model, as HTML."""
        return self.thumbs_of(self.kind_for(self.models(visit)[0].kind))

    @functools.cache  # noqa: B019  one instance, which the page has as long as it lives
    def thumbs_of(self, kind: str) -> str:
        """The examples of one kind, as HTML."""
        buttons = "".join(
            f'<button data-index="{i}" aria-label="example {i + 1}"><img src="{address(thumb(image))}" alt=""></button>'
            for i, image in enumerate(self.examples[kind])
        )
        return f'<div class="thumbs{"" if kind == "photographs" else " sharp"}">{buttons}</div>'

    def picked(self, visit: Visit, index: object) -> Visit:
        """An example by its number."""
        kind = self.kind_for(self.models(visit)[0].kind)
        index = number(index, 0, len(self.examples[kind]) - 1, "The number of an example")
        return replace(visit, image=self.examples[kind][index], kind=kind)

    def gif(self, visit: Visit, way: str, percent: object, seed: object) -> str:
        """An animation over mask ratios or seeds, as HTML with a link to save it."""
        model = self.models(visit)[0].model
        percent, seed = settings(percent, seed)
        frames = []
        for percent_, seed_ in [(p, seed) for p in RATIOS] if way == "ratio" else [(percent, s) for s in range(SEEDS)]:
            words = f"{percent_} % hidden" if way == "ratio" else f"seed {seed_}, {percent_} % hidden"
            frames.append((draw(model, visit.image, random_mask(model, percent_, seed_), visit.statistics), words))
        url = animation(frames)
        return (
            f'<img src="{url}" alt="animation {WAYS[way]}">'
            f'<p><a href="{url}" download="masked-autoencoder-{way}.gif">Save this GIF</a></p>'
        )
