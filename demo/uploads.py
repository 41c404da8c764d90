"""What visitors send: their pictures, and how much of them. A visitor may be anybody, with any program.

A file is opened only where it is a regular one that gradio put into its upload folder, and is gone as soon as it was
read. Files that nobody reads (their visitor left in between) are removed by gradio's `delete_cache`.
"""

import io
import os
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import BinaryIO

import gradio as gr
from PIL import Image, ImageOps

from util.data import decode

MAX_MEGABYTES, MAX_MEGAPIXELS = 20, 50
SIDE = 640  # pixels that are kept of a picture: models see 224, and 300 visitors' pictures are in memory at once
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP"]
TOTAL_MEGABYTES, TOTAL_FILES = 500, 500  # of all visitors together, as long as they are not read
MAX_BODY = (MAX_MEGABYTES + 1) * 2**20  # bytes of an upload: one picture, and what browsers write around it
MAX_EVENT = 2**20  # bytes of any other request


class Sorry(gr.Error):
    """What a visitor can mend: a note on the page, nothing in the server's log."""

    def __init__(self, message: str) -> None:
        super().__init__(message, title="Sorry", print_exception=False)


def read_upload(path: object) -> Image.Image:
    """Path of an uploaded file, as a visitor's event tells it -> RGB, at most SIDE pixels wide and high.

    The file is removed. Raises Sorry for anything that is not a picture in gradio's upload folder.
    """
    folder = Path(gr.utils.get_upload_folder()).resolve()
    try:
        real = Path(os.path.realpath(path))  # without links and `..`
        inside = folder in real.parents
        # neither a link that came in between, nor a FIFO without a writer, may hold us up
        file = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK) if inside else None
    except (OSError, TypeError, ValueError):
        file = None
    if file is None:
        raise Sorry("This picture did not arrive. Please choose it again.")
    with open(file, "rb") as opened:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise Sorry("This picture did not arrive. Please choose it again.")
        try:
            return open_picture(opened)
        finally:
            real.unlink(missing_ok=True)


def open_picture(file: BinaryIO) -> Image.Image:
    """File of a picture -> RGB, at most SIDE pixels wide and high, on white where it is transparent; values by
    `decode.to_rgb`. Raises Sorry.
    """
    try:
        raw = file.read()
        image = Image.open(io.BytesIO(raw), formats=FORMATS)
        frame = decode.jpeg_frame(raw) if image.format in ("JPEG", "MPO") else None  # libjpeg may see another size
        pixels = max(image.width * image.height, frame.width * frame.height if frame else 0)
        if pixels > MAX_MEGAPIXELS * 1e6:  # so far nothing is decoded
            raise Sorry(f"This picture has {pixels / 1e6:.0f} megapixels. Please send at most {MAX_MEGAPIXELS}.")
        image.draft("RGB", (SIDE, SIDE))  # a JPEG is decoded at a fraction of its size
        image = ImageOps.exif_transpose(image)
        # what lies behind transparent pixels, often black, nobody means to show; grey of 16 bits has a rule of its own
        if image.has_transparency_data and not image.mode.startswith("I"):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = decode.to_rgb(image)
    except Sorry:
        raise
    except Image.DecompressionBombError as error:
        raise Sorry(f"This picture is far too large. Please send at most {MAX_MEGAPIXELS} megapixels.") from error
    except Exception as error:  # decoders raise whatever they like
        raise Sorry("This file cannot be read as a picture. Please try a JPEG, PNG or WebP.") from error
    image.thumbnail((SIDE, SIDE))
    return Image.frombytes("RGB", image.size, image.tobytes())  # without what else the file said


def stored() -> tuple[int, int]:
    """(bytes, files) in the upload folder."""
    sizes = []
    for folder, _, names in os.walk(gr.utils.get_upload_folder()):
        for name in names:
            try:
                sizes.append(os.lstat(os.path.join(folder, name)).st_size)
            except FileNotFoundError:  # read and removed in between
                continue
    return sum(sizes), len(sizes)


class Limits:
    """ASGI middleware: no request is larger than one picture, and no more uploads are taken than there is room for."""

    def __init__(self, app: Callable[..., Awaitable]) -> None:
        self.app, self.coming = app, 0  # uploads that are being received

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """One request."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            return await self.app(scope, receive, send)
        is_upload = scope["path"].rstrip("/").endswith("/upload")
        self.coming += is_upload
        try:
            size, files = stored() if is_upload else (0, 0)
            if size + self.coming * MAX_BODY > TOTAL_MEGABYTES * 2**20 or files + self.coming > TOTAL_FILES:
                return await refuse(send, 507, "Too many pictures are on their way. Please try again in some minutes.")
            body, more, most = bytearray(), True, MAX_BODY if is_upload else MAX_EVENT
            while more and len(body) <= most:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                body += message.get("body", b"")
                more = message.get("more_body", False)
            if len(body) > most:
                return await refuse(send, 413, f"This is too large. Please send up to {MAX_MEGABYTES} MB.")
            if is_upload and body.lower().count(b"content-disposition:") > 1:
                return await refuse(send, 413, "Please send one picture at a time.")
            given = iter([{"type": "http.request", "body": bytes(body), "more_body": False}])

            async def again() -> dict:
                return next(given, None) or await receive()

            return await self.app(scope, again, send)
        finally:
            self.coming -= is_upload


async def refuse(send: Callable, status: int, words: str) -> None:
    """Answer with words."""
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": words.encode()})
