"""Downloads: written whole or not at all, resumed after a break, checked, and made once for all processes."""

import contextlib
import hashlib
import http.client
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import ParseResult, urlparse

import torch
from tqdm import tqdm

from util.errors import UserError
from util.log import log

try:
    import fcntl
except ImportError:  # Windows, where nothing stops two processes from downloading the same file
    fcntl = None

RELEASES = "https://dl.fbaipublicfiles.com/mae/"
# what the authors published of the md5 sums: their first six digits
_MD5 = {
    "pretrain/mae_pretrain_vit_base.pth": "8cad7c",
    "pretrain/mae_pretrain_vit_large.pth": "b8b06e",
    "pretrain/mae_pretrain_vit_huge.pth": "9bdbb0",
    "finetune/mae_finetuned_vit_base.pth": "1b25e9",
    "finetune/mae_finetuned_vit_large.pth": "51f550",
    "finetune/mae_finetuned_vit_huge.pth": "2541f2",
}
MD5 = {RELEASES + name: digits for name, digits in _MD5.items()}

TIMEOUT_SECONDS = 30  # without a byte, or without an answer
ATTEMPTS = 5  # in a row that bring nothing new; 1, 2, 4 and 8 seconds apart
REPORT_SECONDS = 10


def fetch(url: str) -> Path:
    """URL -> path of its file in torch.hub's cache folder, downloaded unless it is there.

    One process downloads and the others on the same file system wait for it. Raises UserError where the server refuses,
    the network fails ATTEMPTS times in a row, the file is not the published one, or the folder cannot be written.
    """
    path = cache_path(url)
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            if not path.is_file():  # nobody brought it while this process waited
                log.info(f"downloading {url} to {path}")
                part, etag = beside(path, "part"), beside(path, "etag")
                _download(url, part, etag)
                _check_md5(url, part)
                part.replace(path)
                etag.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"the download folder {path.parent} cannot be written ({error}): mend it, or set TORCH_HOME to another"
        ) from error
    return path


def cache_path(url: str) -> Path:
    """Where the file of `url` is kept: a released one by its name alone, so that it can be put there by hand.

    Any other has a folder of its own, since names like checkpoint.pth are not one file the world over.
    """
    name = PurePosixPath(_parsed(url).path).name
    if not re.fullmatch(r"\w[\w.+-]{,199}", name):  # a leading dot is for our own files
        name = "file"
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return folder / name if url.startswith(RELEASES) else folder / hashlib.sha256(url.encode()).hexdigest()[:16] / name


def beside(path: Path, kind: str) -> Path:
    """Our own file for `path`: "part" (what has come so far), "etag" (of which version) or "lock"."""
    return path.with_name(f".{path.name}.{kind}")


def _parsed(url: str) -> ParseResult:
    try:
        parsed = urlparse(url)
        reason = "" if parsed.hostname and parsed.port != 0 else "it names no server"  # .port raises ValueError too
    except ValueError as error:
        reason = error
    if reason:
        raise UserError(f"{url} is no URL ({reason}): give one such as {RELEASES}pretrain/mae_pretrain_vit_base.pth")
    return parsed


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one process at a time in. Where its holder dies, the kernel frees the lock, so nobody waits for ever."""
    with beside(path, "lock").open("a") as lock:
        if fcntl:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info(f"waiting for another process that downloads {path}")
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _download(url: str, part: Path, etag: Path) -> None:
    """Bring the file of `url` to `part`, in as many attempts as it takes while each brings something new."""
    most = failures = 0
    while True:
        try:
            return _attempt(url, part, etag)
        except UserError:
            raise
        except (ValueError, http.client.InvalidURL) as error:
            raise UserError(f"{url} cannot be asked for ({error}): check it") from error
        except (OSError, http.client.HTTPException) as error:
            size = part.stat().st_size if part.is_file() else 0
            failures = 0 if size > most else failures + 1
            most = max(most, size)
            reason = getattr(error, "reason", None) or error
            if code := getattr(error, "code", None):
                reason = f"{code} {reason}"
            if failures == ATTEMPTS or (code and not _may_recover(code)):
                raise UserError(
                    f"cannot download {url} ({reason}): check the URL and the network, or fetch it by hand and give "
                    "the file's path"
                ) from error
            seconds = 2 ** max(failures - 1, 0)
            log.warning(f"the download of {url} broke off at {_mib(size)} ({reason}); again in {seconds} s")
            time.sleep(seconds)


def _may_recover(code: int) -> bool:
    """HTTP status: a server that is busy or broken (5xx), or has no such part (416: the next request starts again)."""
    return code >= 500 or code in (408, 416, 425, 429)


def _attempt(url: str, part: Path, etag: Path) -> None:
    """One request: of the rest, where `part` is the beginning of a file that the server can still name by `etag`."""
    request = urllib.request.Request(url, headers={"User-Agent": "mae", "Accept-Encoding": "identity"})
    size, known = 0, ""
    if part.is_file() and etag.is_file():
        size, known = part.stat().st_size, etag.read_text()
        request.add_header("Range", f"bytes={size}-")
        request.add_header("If-Range", known)
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            etag.unlink(missing_ok=True)
        raise
    with response:
        if url.startswith("https:") and not response.url.startswith("https:"):
            raise UserError(f"{url} leads to {response.url}, which anybody on the way may change: refused")
        if response.status == 206:
            start = f"bytes {size}-"
            if response.headers.get("ETag") != known or not response.headers.get("Content-Range", "").startswith(start):
                etag.unlink(missing_ok=True)
                raise ConnectionError("the server sent another part than the one asked for")
        else:  # the whole file: the server takes no ranges, or has another file by now
            size = 0
            with _disk(part):
                etag.unlink(missing_ok=True)
                part.write_bytes(b"")
                if (tag := response.headers.get("ETag", "")).startswith('"'):  # W/"…" does not promise the same bytes
                    etag.write_text(tag)
        with _disk(part):
            file = part.open("ab", buffering=0)
        with file:
            _receive(response, file, part, size)
            with _disk(part):
                os.fsync(file.fileno())


def _receive(response: http.client.HTTPResponse, file: BinaryIO, part: Path, size: int) -> None:
    """Append the answer to `file`, which has `size` bytes. Raises ConnectionError where the answer ends too early."""
    length = response.headers.get("Content-Length") or ""
    total = size + int(length) if length.isdigit() else None
    reported = time.monotonic()
    bar = tqdm(
        total=total, initial=size, unit="B", unit_scale=True, disable=not sys.stdout.isatty(), leave=False,
        file=sys.stdout,
    )  # fmt: skip
    with bar:
        while chunk := response.read1(2**20):
            size += len(chunk)
            bar.update(len(chunk))
            while chunk:
                with _disk(part):
                    chunk = chunk[file.write(chunk) :]
            if time.monotonic() - reported > REPORT_SECONDS:
                log.debug(f"downloaded {_mib(size)}" + (f" of {_mib(total)}" if total else ""))
                reported = time.monotonic()
    if total is not None and size < total:
        raise ConnectionError(f"{size} of {total} bytes arrived")
    if size == 0:
        raise ConnectionError("the file is empty")


@contextlib.contextmanager
def _disk(part: Path) -> Iterator[None]:
    """Around writing: its errors are not the network's, and no other attempt would help."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the download cannot be written to {part} ({error}): free space, or set TORCH_HOME to another folder"
        ) from error


def _check_md5(url: str, part: Path) -> None:
    if url not in MD5:
        return
    digest = hashlib.md5(usedforsecurity=False)
    with part.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    found = digest.hexdigest()
    if not found.startswith(MD5[url]):
        part.unlink()
        raise UserError(
            f"{url} arrived with md5 {found}, which does not begin with the published {MD5[url]}: it was changed or "
            "damaged on the way, and is not kept. Try again, from another network if it stays so"
        )


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.1f} MiB"
