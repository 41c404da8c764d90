"""Downloads: written whole or not at all, resumed after a break, checked, and made once for all processes."""

import contextlib
import hashlib
import http.client
import mmap
import os
import re
import stat
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import urlparse

import filelock
import torch
from tqdm import tqdm

from util.errors import UserError, printable
from util.log import log

RELEASES = "https://dl.fbaipublicfiles.com/mae/"
_MD5 = {"pretrain/mae_pretrain": "8cad7c b8b06e 9bdbb0", "finetune/mae_finetuned": "1b25e9 51f550 2541f2"}
MD5 = {  # what the authors published of the sums: their first six digits
    f"{RELEASES}{name}_vit_{size}.pth": digits
    for name, sums in _MD5.items()
    for size, digits in zip(("base", "large", "huge"), sums.split(), strict=True)
}

TIMEOUT_SECONDS = 30  # without a byte
PATIENCE_SECONDS, SLOWEST = 300, 1024  # with fewer bytes of the file than that per second, on average
ATTEMPTS = 5  # in a row that bring nothing new; 1, 2, 4 and 8 seconds apart
NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)
REPORT_SECONDS = 10  # between lines of progress, where nobody watches a terminal


def fetch(url: str) -> Path:
    """URL -> path of its file in torch.hub's cache folder, downloaded unless it is there.

    One process downloads and the others on the same file system wait for it. Raises UserError where the server refuses
    or leads from https to something else, the network fails ATTEMPTS times in a row or is too slow, the file is not the
    published one, or the folder cannot be written.
    """
    path = cache_path(url)
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log.info(f"downloading {url} to {path}, unless another process does")
        with filelock.FileLock(path.with_name(f".{path.name}.lock")):  # freed by the kernel where its holder dies
            if not path.is_file():
                part = _download(url, path)
                if url in MD5:
                    _check_md5(url, part)
                part.replace(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error}): free space, mend the folder, or set TORCH_HOME to another one"
        ) from error
    return path


def cache_path(url: str) -> Path:
    """Where the file of `url` is kept: a released one by its name alone, so that it can be put there by hand.

    Any other has a folder of its own, since names like checkpoint.pth are not one file the world over.
    """
    try:
        parsed = urlparse(url)
        usable = re.fullmatch("[!-~]+", url) and parsed.port != 0 and (parsed.hostname or "").encode("idna")
    except ValueError:
        usable = False
    if not usable:
        raise UserError(f"{printable(url)[:300]} is no URL: give one like {RELEASES}pretrain/mae_pretrain_vit_base.pth")
    name = PurePosixPath(parsed.path).name
    if not re.fullmatch(r"\w[\w.+-]{,199}", name):  # a leading dot is for our own files
        name = "file"
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return folder / name if url.startswith(RELEASES) else folder / hashlib.sha256(url.encode()).hexdigest()[:16] / name


def _download(url: str, path: Path) -> Path:
    """Bring the file of `url` beside `path`, in as many attempts as it takes while each brings something new."""
    with contextlib.closing(_Watched()) as network:
        most = failures = 0
        while True:
            try:
                part, is_whole = _attempt(network, url, path)
                if is_whole:
                    return part
            except (ValueError, *NETWORK_ERRORS) as error:
                if isinstance(error, UserError):
                    raise
                failures = failures + 1 if network.most == most else 0
                most = network.most
                # a server may be busy or broken (5xx), or lack such a part (416): the next request starts again
                is_refused = getattr(error, "code", 500) < 500 and error.code not in (408, 416, 425, 429)
                if is_refused or failures == ATTEMPTS or time.monotonic() > network.end:
                    raise UserError(
                        f"cannot download {url} ({printable(error)[:300]}): check the URL and the network, or fetch it "
                        "by hand and give the file's path"
                    ) from error
                seconds = 2 ** max(failures - 1, 0)
                log.warning(f"the download of {url} broke off ({printable(error)[:300]}); again in {seconds} s")
                time.sleep(seconds)


def _attempt(network: "_Watched", url: str, path: Path) -> tuple[Path, bool]:
    """One request, of the file or of its rest -> (its part, whether that is whole now)."""
    with contextlib.ExitStack() as stack:
        request, size = urllib.request.Request(url, headers={"User-Agent": "mae"}), 0
        if file := _part_to_go_on_with(path):
            size = stack.enter_context(file).tell()
            request.add_header("Range", f"bytes={size}-")
        try:
            opener = urllib.request.build_opener(network, _OnlyHttps)
            response = stack.enter_context(opener.open(request, timeout=TIMEOUT_SECONDS))
        except urllib.error.HTTPError as error:
            if error.code == 416 and file:
                os.unlink(file.name)
            raise
        part = _part(path, response.headers.get("ETag", ""))
        said = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", response.headers.get("Content-Range", ""))
        first, last, total = map(int, said.groups()) if said else (-1, 0, 0)
        end = last + 1  # it may be less than the rest
        if response.status != 206 or not file or str(part) != file.name or not size == first <= last < total:
            for other in path.parent.glob(f".{path.name}.*.part"):
                other.unlink()
            if response.status == 206:
                raise ConnectionError("the server sent another part than the one asked for")
            # the whole file: nothing had come, or the server takes no ranges, or has another version by now
            file = stack.enter_context(open(part, "xb", buffering=0))  # x: never through a link
            size, end, total = 0, response.length, response.length
        network.bar.total = total
        while chunk := response.read1(2**20 if end is None else min(2**20, end - size)):
            size += len(chunk)
            network.reached(size)
            while chunk:
                chunk = chunk[file.write(chunk) :]
        if not size or size < (end or 0):
            raise ConnectionError(f"{size} of {total} bytes arrived" if end else "the file is empty")
        os.fsync(file.fileno())
        return part, total is None or size == total


def _part(path: Path, etag: str) -> Path:
    """Where to collect the version `etag` of the file: its name says so, lest another be taken for its beginning."""
    # a weak one, W/"...", does not promise the same bytes
    version = hashlib.sha256(etag.encode()).hexdigest()[:16] if etag.startswith('"') else "once"
    return path.with_name(f".{path.name}.{version}.part")


def _part_to_go_on_with(path: Path) -> BinaryIO | None:
    """A part, open to append to; None where there is none, or a link, a FIFO or the like in its place."""
    safe = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    for part in path.parent.glob(f".{path.name}.*.part"):
        with contextlib.suppress(OSError):
            file = open(part, "ab", buffering=0, opener=lambda name, flags: os.open(name, flags | safe, 0o666))
            state = os.fstat(file.fileno())
            if stat.S_ISREG(state.st_mode) and state.st_nlink == 1 and part != _part(path, ""):
                return file
            file.close()
    return None


class _Watched(urllib.request.HTTPSHandler):
    """https, read while SLOWEST new bytes of the file come per second: a timeout starts again with every byte."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self.end = 0, time.monotonic() + PATIENCE_SECONDS
        every = 0.1 if sys.stdout.isatty() else REPORT_SECONDS
        self.bar = tqdm(unit="B", unit_scale=True, file=sys.stdout, mininterval=every)

    def close(self) -> None:
        self.bar.close()

    def reached(self, size: int) -> None:
        self.bar.update(size - self.bar.n)
        new = max(size - self.most, 0)
        self.most += new
        self.end = min(self.end + new / SLOWEST, time.monotonic() + PATIENCE_SECONDS)

    def https_open(self, req):
        def connect(host: str, **options) -> http.client.HTTPSConnection:
            connection = http.client.HTTPSConnection(host, **options)
            connection.response_class = answer
            return connection

        def answer(*args, **options) -> http.client.HTTPResponse:
            response = http.client.HTTPResponse(*args, **options)
            receive = response.fp.raw.readinto

            def readinto(buffer) -> int:
                if time.monotonic() > self.end:
                    raise TimeoutError(f"under {SLOWEST} bytes of the file per second for {PATIENCE_SECONDS} s")
                try:
                    return receive(buffer)
                except OSError as error:  # told from those of the disk
                    raise ConnectionError(error) from error

            response.fp.raw.readinto = readinto
            return response

        return self.do_open(connect, req)


class _OnlyHttps(urllib.request.HTTPRedirectHandler):
    """Follow https to https alone, at every hop: what else is asked for, anybody on the way may answer."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        fp.close()  # or its body would be read, however long
        if req.type == "https" and urlparse(newurl).scheme != "https":
            raise UserError(
                f"{req.full_url} leads to {printable(newurl)[:300]}, which anybody on the way may change: refused"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_md5(url: str, part: Path) -> None:
    with part.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if not found.startswith(MD5[url]):
        part.unlink()
        raise UserError(
            f"{url} arrived with md5 {found}, and the published one begins with {MD5[url]}: it was changed or damaged "
            "on the way, and is not kept. Try again, from another network if it stays so"
        )
