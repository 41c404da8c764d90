"""A page to play with reconstructions: python demo/app.py [CHECKPOINT ...]. Ready for a Hugging Face Space: README.md.

Without a checkpoint it takes the one that `make demo` trained, where there is one, and offers released files by name.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a Space starts this file as it is

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402

from demo.drawing import RELEASED, opened  # noqa: E402
from demo.page import HERE, THEME, build  # noqa: E402
from demo.uploads import MAX_MEGABYTES, SIDE, Limits  # noqa: E402
from util.errors import UserError, fail  # noqa: E402

VISITORS = 300  # whose pictures, of 1 MB, and last drawings are kept; the one who was away longest starts anew


def local_checkpoints(paths: list[str]) -> dict[str, str]:
    """Paths, or else MAE_CHECKPOINT, or else the newest of each demo, the last demo first -> {name to show: path}."""
    if not paths and os.environ.get("MAE_CHECKPOINT"):
        paths = [os.environ["MAE_CHECKPOINT"]]
    if not paths:
        trained = sorted((ROOT / "demo" / "output").glob("*/pretrain/checkpoint-*.pth"), key=os.path.getmtime)
        newest = {path.parents[1].name: str(path) for path in trained}
        return {
            f"tiny, {name}, pixels": newest[name]
            for name in sorted(newest, key=lambda name: -os.path.getmtime(newest[name]))
        }
    names = {}
    for path in paths:
        name = f"{Path(path).stem} ({Path(path).resolve().parent.name})"
        while name in names:
            name += "'"
        names[name] = path
    return names


def examples() -> dict[str, list[Image.Image]]:
    """{kind: pictures}: photographs of scikit-image; emoji and digits where their packages are installed."""
    from skimage import data

    from demo.make_digits import some_digits
    from demo.make_emoji import some_emoji

    pixels = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.stereo_motorcycle()[0]]
    found = {"photographs": [Image.fromarray(np.asarray(picture)).convert("RGB") for picture in pixels]}
    for picture in found["photographs"]:
        picture.thumbnail((SIDE, SIDE))
    for kind, write in (("emoji", some_emoji), ("digits", some_digits)):
        try:
            found[kind] = write()
        except (ImportError, UserError):
            continue  # a page of photographs does without
    return found


def main() -> None:
    """Read the command line and serve the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", nargs="*", help="checkpoints to offer first (default: the demo's, if there is one)"
    )
    parser.add_argument("--port", type=int, help="where to listen on this machine (default: a free one from 7860)")
    args = parser.parse_args()
    choices = {**local_checkpoints(args.checkpoint), **RELEASED}
    try:
        opened(next(iter(choices.values())))
    except UserError as error:
        fail(UserError(f"{error.message}. Without one there is nothing to show: give a checkpoint, or run make demo"))
    # a folder of our own: what lies in gradio's common one may be others' uploads
    with tempfile.TemporaryDirectory(prefix="mae-page-") as folder:
        os.environ.setdefault("GRADIO_TEMP_DIR", folder)

        def leave(*_):
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(0)  # gradio's threads would wait for browsers that keep the page open

        signal.signal(signal.SIGTERM, leave)
        build(choices, examples()).launch(
            server_port=args.port, css=(HERE / "page.css").read_text(), theme=THEME, footer_links=[],
            max_file_size=f"{MAX_MEGABYTES}mb", state_session_capacity=VISITORS,
            app_kwargs={"middleware": [Middleware(Limits)]},
        )  # fmt: skip


if __name__ == "__main__":
    main()
