"""The page itself: its parts, and which of them do what. What is done is in handlers.py."""

import os
from dataclasses import replace
from html import escape
from pathlib import Path

import gradio as gr
from PIL import Image

from demo.handlers import NOTHING, STATISTICS, WAYS, Handlers, Visit, checked_mask, mask_of, one_of, settings, told
from demo.uploads import Sorry, read_upload
from util.errors import UserError
from util.log import log

HERE = Path(__file__).resolve().parent
PAPER = "https://arxiv.org/abs/2111.06377"
THEME = gr.themes.Default(
    primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
)
PICK = """element.addEventListener("click", event => {
  const button = event.target.closest("button");
  if (button) trigger("pick", { index: Number(button.dataset.index) });
});"""


class Page(gr.Blocks):
    """Blocks that have words for whatever a program other than this page sends."""

    async def preprocess_data(self, *args, **kwargs):
        """Components refuse values of other kinds each in its own way."""
        try:
            return await super().preprocess_data(*args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:
            raise Sorry("The page cannot do that. Please reload it.") from error

    async def process_api(self, *args, **kwargs):
        """Gradio refuses some more; what is left is a fault of ours: the log has it, the visitor is told no more."""
        try:
            return await super().process_api(*args, **kwargs)
        except Sorry:
            raise
        except gr.Error as error:
            raise Sorry("The page cannot do that. Please reload it.") from error
        except Exception as error:
            log.exception("the page failed")
            raise Sorry("Something went wrong here, not with you. Please reload the page.") from error


def intro() -> str:
    """Title, what to do, links. MAE_CODE_URL names the code's address, where there is one."""
    code = os.environ.get("MAE_CODE_URL", "")
    links = [f'<a href="{PAPER}" target="_blank">paper</a>']
    if code.startswith("https://"):
        links.append(f'<a href="{escape(code, quote=True)}" target="_blank">code</a>')
    return (
        "<h1>What a masked autoencoder sees</h1><p>Most of the picture is hidden, and the model fills it in from the "
        "rest. <b>Paint on the second picture</b>, by clicking or dragging, to hide patches or show them again. "
        f"{' · '.join(links)}</p>"
    )


def share(now: Visit) -> int:
    """Hidden patches in %, as the slider shows them."""
    return min(max(round(100 * sum(now.removed) / len(now.removed)), 1), 99)


def build(choices: dict[str, str], examples: dict[str, list[Image.Image]]) -> gr.Blocks:
    """The page. `choices`: {name of a model: source of its checkpoint}; `examples`: {kind: pictures}."""
    do = Handlers(choices, examples)
    names = list(choices)
    with Page(title="Masked autoencoder", analytics_enabled=False, delete_cache=(300, 600)) as page:
        gr.HTML(intro(), elem_id="intro")
        about = gr.HTML(elem_id="about")
        board = gr.HTML(elem_id="board", js_on_load=(HERE / "page.js").read_text(), apply_default_css=False)
        with gr.Row():
            with gr.Column(min_width=300):
                gr.Markdown("Mask", elem_classes="caption")
                percent = gr.Slider(1, 99, 75, step=1, label="Hidden patches (%)", elem_id="ratio", buttons=[])
                seed = gr.Slider(0, 100, 0, step=1, label="Seed: which of them", elem_id="seed", buttons=[])
                again = gr.Button("Another random mask", variant="primary", elem_id="again")
            with gr.Column(min_width=300):
                gr.Markdown("Model", elem_classes="caption")
                model = gr.Dropdown(names, value=names[0], label="Model", elem_id="model")
                other = gr.Dropdown([NOTHING, *names], value=NOTHING, label="Side by side with", elem_id="other")
                statistics = gr.Radio(
                    list(STATISTICS.items()), value="neighbours", visible=False, elem_id="statistics",
                    label="Mean and contrast of a hidden patch come from",
                )  # fmt: skip
                with gr.Row():
                    animate = {
                        way: gr.Button(f"Animate {words}", size="sm", min_width=120, elem_id=f"by_{way}")
                        for way, words in WAYS.items()
                    }
                gif = gr.HTML(elem_id="animation", apply_default_css=False)
            with gr.Column(min_width=300):
                gr.Markdown("Picture", elem_classes="caption")
                thumbs = gr.HTML(elem_id="examples", js_on_load=PICK, apply_default_css=False)
                upload = gr.Image(
                    show_label=False, sources=["upload", "clipboard"], height=150, elem_id="upload", buttons=[],
                    placeholder="Drop a picture of yours here, or click",
                )  # fmt: skip
                # gradio's own reading has no words for broken files, and opens any file that an event names
                upload.preprocess = lambda given: read_upload(given and given.path)
        visit = gr.State()

        def shown(now):
            """What changes with every drawing."""
            return {board: do.board(now), percent: share(now), visit: now}

        def fetch(now, *names_):
            try:
                do.fetch(*names_)
            except UserError as error:  # such as a failed download
                raise Sorry(escape(error.message)) from error
            return do.about(now) if isinstance(now, Visit) else ""

        def back(now):  # what was there stays, the choice too
            before = isinstance(now, Visit)
            return (now.model, now.other or NOTHING, do.about(now)) if before else (names[0], NOTHING, "")

        def start(now, name, other_, percent_, seed_):
            if isinstance(now, Visit) and (name, other_) == (now.model, now.other or NOTHING):
                return {visit: now}  # looked at the list, and left it
            try:
                now = do.choose(now, name, other_, percent_, seed_)
            except UserError as error:
                raise Sorry(escape(error.message)) from error
            drawn = shown(now)
            normalised = any(entry.model.norm_pix_loss for entry in do.models(now))
            return {**drawn, about: do.about(now), thumbs: do.thumbs(now), statistics: gr.Radio(visible=normalised)}

        def mask_again(now, percent_, seed_):
            now = do.check(now)
            if percent_ is None or seed_ is None:  # wiped, to type another
                return {visit: now}
            removed = tuple(do.mask(do.models(now)[0].model, percent_, seed_))
            drawn = shown(replace(now, removed=removed))
            return {part: value for part, value in drawn.items() if part is not percent}

        def settle(now, percent_, seed_):  # the slider is let go, or the box left: it shows what is hidden
            now = do.check(now)
            if percent_ is None or settings(percent_, seed_)[0] == share(now):
                return {percent: share(now), visit: now}
            drawn = mask_again(now, percent_, seed_)
            return {**drawn, percent: share(drawn[visit])}

        def next_mask(now, percent_, seed_):
            percent_, seed_ = settings(percent_, seed_)
            following = (seed_ + 1) % 101
            return {**mask_again(now, percent_, following), seed: following}

        def paint(now, event: gr.EventData):
            now = do.check(now)
            return shown(replace(now, removed=checked_mask(mask_of(told(event, "mask"), len(now.removed)))))

        def pick(now, event: gr.EventData):
            return shown(do.picked(do.check(now), told(event, "index")))

        def new_image(now, image):
            return {**shown(replace(do.check(now), image=image, kind="own")), upload: None}

        def another_source(now, choice):
            choice = one_of(choice, STATISTICS.values(), "This source")
            return shown(replace(do.check(now), statistics=choice))

        drawn = [board, percent, visit]
        opened_ = [*drawn, about, thumbs, statistics, model, other]
        choice, numbers = [visit, model, other, percent, seed], [visit, percent, seed]
        # one drawing after the other, each with all cores; hidden progress spares the pictures a badge beside a note
        one = {"concurrency_id": "draw", "concurrency_limit": 1, "show_progress": "hidden"}
        raw = {"preprocess": False}  # a slider's own refuses what is typed, or wiped, beside it
        page.load(start, choice, opened_, **{**one, "show_progress": "minimal"})
        # while a model is fetched, the others draw; `blur` comes once a choice, `input` of the mouse twice
        fetching = {"concurrency_id": "fetch", "concurrency_limit": 2, "show_progress": "minimal", **raw}
        for box in (model, other):
            fetched = box.blur(fetch, [visit, model, other], about, **fetching)
            fetched.success(start, choice, opened_, **fetching)
            fetched.failure(back, visit, [model, other, about], **fetching)
        gr.on([percent.input, seed.input], mask_again, numbers, drawn, trigger_mode="always_last", **one, **raw)
        # in two steps: what is typed arrives before, whichever way the browser's requests overtake one another
        percent.release(lambda: None, **one).then(settle, numbers, drawn, **one, **raw)
        again.click(next_mask, numbers, [*drawn, seed], **one, **raw)
        board.paint(paint, visit, drawn, trigger_mode="always_last", **one)
        thumbs.pick(pick, visit, drawn, **one)
        upload.upload(new_image, [visit, upload], [*drawn, upload], **one).failure(lambda: None, None, upload)
        statistics.input(another_source, [visit, statistics], drawn, **one)
        for way, button in animate.items():
            button.click(
                lambda now, percent_, seed_, way=way: do.gif(do.check(now), way, percent_, seed_), numbers, gif,
                api_name=f"animate_{way}", **{**one, "show_progress": "minimal"}, **raw,
            )  # fmt: skip
    return page
