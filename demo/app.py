"""A page to play with reconstructions: python demo/app.py [CHECKPOINT ...]. Ready for a Hugging Face Space: README.md.

Without a checkpoint it takes the one that `make demo` trained, where there is one, and offers released files by name.
"""

import argparse
import functools
import os
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a Space starts this file as it is

import gradio as gr  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402
from torchvision.transforms.functional import to_pil_image  # noqa: E402

from util import exits  # noqa: E402
from util.build import open_model  # noqa: E402
from util.errors import UserError  # noqa: E402
from util.visualize import (  # noqa: E402
    KINDS,
    from_images,
    mask_noise,
    reconstruct,
    removed_patches,
    seeded_noise,
)

RELEASED = {
    "ViT-L, pixels": "mae_visualize_vit_large",
    "ViT-L, pixels and GAN loss": "mae_visualize_vit_large_ganloss",
    "ViT-B, pixels": "mae_visualize_vit_base",
    "ViT-B, normalised pixels": "mae_pretrain_vit_base_full",
}
SHOWN = 448  # height of a picture in pixels
MAX_MEGABYTES, MAX_MEGAPIXELS = 20, 50
STATISTICS = {"visible neighbours": "neighbours", "true patch (using the answer)": "answer"}
CAPTIONS = {
    "original": "Original",
    "masked": "What it sees",
    "reconstructed": "What it predicts",
    "pasted": "Both together",
}
ABOUT = """# What a masked autoencoder sees
Most of the picture is hidden, and the model fills it in from the rest. Choose a picture, hide what you like: **click
patches in the second picture** to hide or show them."""
CSS = """
.gradio-container { max-width: 1200px !important; margin: auto; }
#pictures { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 14px; }
@media (max-width: 760px) { #pictures { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 10px; } }
#pictures > * { min-width: 0 !important; gap: 4px; }
#pictures .prose p, .caption p { font-weight: 600; font-size: 0.92rem; margin: 0; }
#pictures .block { border-radius: 6px; }
#pictures img { width: 100%; }
#masked { outline: 2px solid var(--color-accent); }
#masked img { cursor: crosshair; }
#loss p { font-size: 1.05rem; }
#examples .grid-container { grid-template-columns: repeat(5, minmax(0, 1fr)) !important; }
"""
THEME = gr.themes.Default(
    primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
)


def local_checkpoints(paths: list[str]) -> dict[str, str]:
    """Paths, or else MAE_CHECKPOINT, or else the newest one that the demo trained -> {name to show: path}."""
    if not paths and os.environ.get("MAE_CHECKPOINT"):
        paths = [os.environ["MAE_CHECKPOINT"]]
    if not paths:
        trained = (ROOT / "demo" / "output" / "pretrain").glob("checkpoint-*.pth")
        paths = [str(path) for path in sorted(trained, key=lambda path: path.stat().st_mtime)[-1:]]
    return {f"{Path(path).stem} ({Path(path).resolve().parent.name})": path for path in paths}


def sorry(message: str) -> gr.Error:
    """What a visitor can mend, to raise: a note on the page, nothing in the server's log."""
    return gr.Error(message, title="Sorry", print_exception=False)


_loading = threading.Lock()


@functools.lru_cache(maxsize=2)
def _opened(source: str) -> torch.nn.Module:
    return open_model(source)


def model_of(source: str) -> torch.nn.Module:
    """A checkpoint's model, loaded once for everybody; nobody changes it. A failure becomes a message on the page."""
    try:
        with _loading:
            return _opened(source)
    except UserError as error:
        raise sorry(error.message) from error


def open_upload(path: str | Path) -> Image.Image:
    """An uploaded file -> RGB, at most 1024 pixels wide and high. Raises gr.Error with a friendly message."""
    try:
        image = Image.open(path)
        megapixels = image.width * image.height / 1e6  # the header tells, nothing is decoded yet
        if megapixels > MAX_MEGAPIXELS:
            raise sorry(
                f"This picture has {megapixels:.0f} megapixels. Please make it smaller: up to {MAX_MEGAPIXELS}."
            )
        image.draft("RGB", (1024, 1024))  # a JPEG is decoded at a fraction of its size
        image = ImageOps.exif_transpose(image).convert("RGB")
    except gr.Error:
        raise
    except Image.DecompressionBombError as error:
        raise sorry(
            f"This picture is far too large. Please make it smaller: up to {MAX_MEGAPIXELS} megapixels."
        ) from error
    except Exception as error:  # decoders raise whatever they like
        raise sorry("This file cannot be read as a picture. Please try a JPEG, PNG or WebP.") from error
    image.thumbnail((1024, 1024))
    return image


def random_mask(source: str, mask_ratio: float, seed: int) -> list[bool]:
    """Which patches are removed, in image order."""
    length = model_of(source).patch_embed.num_patches
    return removed_patches(seeded_noise(1, length, int(seed)), mask_ratio)[0].tolist()


def draw(source: str, image: Image.Image | None, removed: list[bool], statistics: str) -> list:
    """-> the four pictures, and a line about the loss. It depends on its arguments alone: nobody sees another's."""
    if image is None:
        raise sorry("Please drop a picture first, or pick an example.")
    model = model_of(source)
    start = time.perf_counter()
    try:
        ratio, noise = mask_noise(torch.tensor([removed]))
    except UserError as error:
        raise sorry("Leave at least one patch to see, and hide at least one.") from error
    pictures = reconstruct(model, from_images([image], model.patch_embed.img_size), ratio, noise, statistics)
    seconds = time.perf_counter() - start
    width = round(SHOWN * model.patch_embed.img_size[1] / model.patch_embed.img_size[0])
    shown = [
        to_pil_image(getattr(pictures, kind)[0]).resize((width, SHOWN), Image.Resampling.NEAREST) for kind in KINDS
    ]
    line = f"**Loss {pictures.loss:.4f}** over {sum(removed)} hidden of {len(removed)} patches, in {seconds:.2f} s."
    if pictures.statistics == "neighbours":
        line += " This model predicts normalised pixels; mean and contrast come from the visible neighbours."
    if pictures.statistics == "answer":
        line += " **Uses the answer**: mean and contrast of each hidden patch come from the true picture."
    return [*shown, line]


def toggle(source: str, removed: list[bool], x: float, y: float, width: int, height: int) -> list[bool]:
    """A click at pixel (x, y) of a picture -> the mask with that patch hidden, or shown again."""
    rows, columns = model_of(source).patch_embed.grid_size
    row, column = int(y / height * rows), int(x / width * columns)
    index = min(row, rows - 1) * columns + min(column, columns - 1)
    return [not hidden if i == index else hidden for i, hidden in enumerate(removed)]


def write_examples(folder: Path) -> dict[str, list[str]]:
    """Photographs of scikit-image, and handwritten digits of scikit-learn for models of small pictures."""
    from skimage import data

    from demo.make_digits import write_digits

    folder.mkdir(parents=True, exist_ok=True)
    photographs = []
    for name in ("astronaut", "chelsea", "coffee", "rocket", "motorcycle"):
        pixels = data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(data, name)()
        photographs.append(str(folder / f"{name}.jpg"))
        Image.fromarray(np.asarray(pixels)).convert("RGB").save(photographs[-1], quality=92)
    write_digits(folder / "digits")
    digits = [str(sorted((folder / "digits" / "val" / str(label)).glob("*.png"))[3]) for label in (2, 3, 5, 8, 0)]
    return {"photographs": photographs, "digits": digits}


def examples_for(source: str, examples: dict[str, list[str]]) -> list[str]:
    """Digits for models of less than 64 pixels, which have never seen a photograph."""
    return examples["digits" if min(model_of(source).patch_embed.img_size) < 64 else "photographs"]


def build(checkpoints: dict[str, str], examples: dict[str, list[str]]) -> gr.Blocks:
    """The page. What a visitor chose is in the page and in gr.State, which each visitor has for himself."""
    choices = {**checkpoints, **RELEASED}
    first = next(iter(choices.values()))
    with gr.Blocks(title="Masked autoencoder", analytics_enabled=False) as page:
        gr.Markdown(ABOUT)
        shown = []
        with gr.Row(elem_id="pictures"):
            for kind in KINDS:
                with gr.Column(min_width=0):
                    gr.Markdown(CAPTIONS[kind])
                    buttons = [] if kind == "masked" else ["download", "fullscreen"]
                    shown.append(
                        gr.Image(
                            elem_id=kind, show_label=False, interactive=False, format="png", type="pil",
                            buttons=buttons, alt_text=CAPTIONS[kind],
                        )
                    )  # fmt: skip
        loss = gr.Markdown(elem_id="loss")
        with gr.Row():
            with gr.Column(min_width=300):
                ratio = gr.Slider(0.05, 0.95, value=0.75, step=0.05, label="Share of patches to hide", elem_id="ratio")
                seed = gr.Slider(0, 100, value=0, step=1, label="Seed (which of them)", elem_id="seed")
                again = gr.Button("Another random mask", variant="primary", elem_id="again")
                source = gr.Dropdown(list(choices.items()), value=first, label="Model", elem_id="model")
                statistics = gr.Radio(
                    list(STATISTICS.items()), value="neighbours", visible=False, elem_id="statistics",
                    label="Mean and contrast of a hidden patch come from",
                )  # fmt: skip
            with gr.Column(min_width=300):
                gr.Markdown("Examples", elem_classes="caption")
                gallery = gr.Gallery(
                    show_label=False, columns=5, height=116, allow_preview=False, elem_id="examples", buttons=[],
                    object_fit="cover",
                )  # fmt: skip
                gr.Markdown("Your picture", elem_classes="caption")
                upload = gr.Image(
                    show_label=False, sources=["upload", "clipboard"], height=190, elem_id="upload", buttons=[]
                )
                # gradio's own reading has no words for broken and huge files; a subclass would need its own frontend
                upload.preprocess = lambda payload: None if payload is None else open_upload(payload.path)
        image, removed, offered = gr.State(), gr.State([]), gr.State([])

        def redraw(source, image, removed, statistics):
            return draw(source, image, removed, statistics)

        def start(source, ratio, seed, statistics, image):
            paths = examples_for(source, examples)
            image = image or open_upload(paths[0])
            removed = random_mask(source, ratio, seed)
            normalised = gr.Radio(visible=model_of(source).norm_pix_loss)
            return [*draw(source, image, removed, statistics), paths, paths, normalised, image, removed]

        def mask_again(source, image, ratio, seed, statistics):
            removed = random_mask(source, ratio, seed)
            return [*draw(source, image, removed, statistics), removed]

        def new_image(source, image, removed, statistics):
            return [*draw(source, image, removed, statistics), image]

        def pick(source, offered, removed, statistics, event: gr.SelectData):
            return new_image(source, open_upload(offered[event.index]), removed, statistics)

        def click(source, image, removed, statistics, masked, event: gr.SelectData):
            if not removed or masked is None:
                raise sorry("Please drop a picture first, or pick an example.")
            removed = toggle(source, removed, *event.index, *masked.size)
            return [*draw(source, image, removed, statistics), removed]

        pictures, begin = [*shown, loss], [source, ratio, seed, statistics]
        opened = [*pictures, gallery, offered, statistics, image, removed]
        masking = [mask_again, [source, image, ratio, seed, statistics], [*pictures, removed]]
        quiet = {"show_progress": "hidden"}  # also spares the pictures a badge where a note tells what is wrong
        page.load(start, [*begin, image], opened, show_progress="minimal")
        # another model has other examples, and what was shown of them would not suit it
        source.change(lambda *given: start(*given, None), begin, opened, show_progress="minimal")
        gr.on([ratio.input, seed.input], *masking, trigger_mode="always_last", **quiet)
        again.click(lambda seed: (int(seed) + 1) % 101, seed, seed, **quiet).then(*masking, **quiet)
        statistics.change(redraw, [source, image, removed, statistics], pictures, **quiet)
        upload.upload(new_image, [source, upload, removed, statistics], [*pictures, image], **quiet)
        gallery.select(pick, [source, offered, removed, statistics], [*pictures, image], **quiet)
        clicked = [source, image, removed, statistics, shown[1]]
        shown[1].select(click, clicked, [*pictures, removed], trigger_mode="multiple", **quiet)
    return page


def main() -> None:
    """Read the command line and serve the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", nargs="*", help="checkpoints to offer first (default: the demo's, if there is one)"
    )
    parser.add_argument("--port", type=int, help="where to listen on this machine (default: a free one from 7860)")
    args = parser.parse_args()
    checkpoints = local_checkpoints(args.checkpoint)
    try:
        _opened(next(iter({**checkpoints, **RELEASED}.values())))
    except UserError as error:
        exits.fail(
            UserError(f"{error.message}. Without one there is nothing to show: give a checkpoint, or run make demo")
        )
    examples = write_examples(Path(gr.utils.get_upload_folder()) / "mae_examples")
    page = build(checkpoints, examples)
    page.launch(
        server_port=args.port, css=CSS, theme=THEME, max_file_size=f"{MAX_MEGABYTES}mb",
        footer_links=[], state_session_capacity=300,  # each visitor's picture takes up to 3 MB
    )  # fmt: skip


if __name__ == "__main__":
    main()
