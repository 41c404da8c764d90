"""Downloads, from a server on this machine that breaks off, stalls, lies and refuses."""

import contextlib
import hashlib
import multiprocessing
import os
import re
import resource
import shutil
import signal
import ssl
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, project_log

from util.errors import UserError
from util.weights import checkpoint, download

BYTES = np.random.default_rng(0).bytes(300_000)
OTHER = np.random.default_rng(1).bytes(300_000)


class Server(ThreadingHTTPServer):
    """Serves `files` {path: bytes}; what goes wrong with each request is taken from `faults`, in order.

    A fault is an HTTP status, ("cut", n) or ("stall", n) after n bytes, or a function that changes the server first.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.asked = {"/w.pth": BYTES}, [], []
        self.etag, self.ranges, self.longest = '"v1"', True, None  # the most bytes of a part
        self.redirects: dict[str, str] = {}
        self.finished = threading.Event()

    def handle_error(self, *_) -> None:
        """Clients that go away are what this is about."""

    def url(self, path: str = "/w.pth", scheme: str = "http") -> str:
        return f"{scheme}://localhost:{self.server_port}{path}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        fault = server.faults.pop(0) if server.faults else None
        server.asked.append(wanted)
        if callable(fault):
            fault = fault()
        if self.path in server.redirects:
            fault = 302
        if isinstance(fault, int) or self.path.split("?")[0] not in server.files:
            self.send_response(fault if isinstance(fault, int) else 404)
            self.send_header("Location", server.redirects.get(self.path, ""))
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_file(server.files[self.path.split("?")[0]], wanted, fault or ("whole", None))

    def send_file(self, body: bytes, wanted: str | None, fault: tuple) -> None:
        server, start, stop = self.server, 0, len(body)
        if wanted and server.ranges:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                self.send_response(416)
                self.send_header("Content-Length", "0")
                return self.end_headers()
            stop = min(stop, start + (server.longest or stop))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(body)}")
        else:
            self.send_response(200)
        if server.etag:
            self.send_header("ETag", server.etag)
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        what, n = fault
        self.wfile.write(body[start:stop][:n])
        if what == "stall":
            server.finished.wait(20)


@contextlib.contextmanager
def running(server: Server):
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.finished.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server, and a download folder of its own; no waiting between attempts."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "time", SimpleNamespace(sleep=lambda seconds: None, monotonic=time.monotonic))
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.5)
    with running(Server()) as server:
        yield server


def left_over(url: str) -> list[str]:
    return sorted(path.name for path in download.cache_path(url).parent.iterdir() if not path.name.endswith(".lock"))


def part(url: str, etag: str = '"v1"') -> Path:
    return download._part(download.cache_path(url), etag)


def test_file_arrives_whole_once_and_is_kept(server):
    url = server.url()
    path = download.fetch(url)
    assert path.name == "w.pth" and path.read_bytes() == BYTES
    assert download.fetch(url) == path and server.asked == [None]
    assert left_over(url) == ["w.pth"]


@pytest.mark.parametrize("how", ["cut", "stall"])
def test_broken_download_goes_on_where_it_broke(how, server):
    server.faults = [(how, 100_000), (how, 50_000)]
    start = time.monotonic()
    with project_log() as lines:
        assert download.fetch(server.url()).read_bytes() == BYTES
    assert time.monotonic() - start < 10, "the server alone ended it, after 20 s"
    assert server.asked == [None, "bytes=100000-", "bytes=150000-"]
    assert sum("broke off" in line for line in lines) == 2
    assert left_over(server.url()) == ["w.pth"]


def test_breaks_that_bring_something_are_not_counted(server):
    server.faults = [("cut", 20_000)] * 12
    assert download.fetch(server.url()).read_bytes() == BYTES
    assert len(server.asked) == 13 > download.ATTEMPTS


def test_server_without_ranges_starts_again_but_not_for_ever(server):
    server.ranges = False
    server.faults = [("cut", 200_000), ("cut", 100_000)]
    assert download.fetch(server.url()).read_bytes() == BYTES
    assert server.asked == [None, "bytes=200000-", "bytes=100000-"]
    server.files["/other.pth"], server.asked = OTHER, []
    server.faults = [("cut", 100_000), ("cut", 90_000)] * 25
    with pytest.raises(UserError, match="00 of 300000 bytes"):
        download.fetch(server.url("/other.pth"))
    assert len(server.asked) == 1 + download.ATTEMPTS


@pytest.mark.parametrize("etag", ["", 'W/"v1"'])
def test_file_that_cannot_be_named_exactly_is_never_resumed(etag, server):
    server.etag, server.faults = etag, [("cut", 200_000)]
    assert download.fetch(server.url()).read_bytes() == BYTES
    assert server.asked == [None, None]


def test_file_that_changes_in_between_is_not_patched_together(server):
    def change():
        server.files["/w.pth"], server.etag = OTHER, '"v2"'

    server.faults = [("cut", 200_000), change]
    assert download.fetch(server.url()).read_bytes() == OTHER
    assert server.asked == [None, "bytes=200000-", None]
    assert left_over(server.url()) == ["w.pth"]


@pytest.mark.parametrize("longest", [1, 100, 333])
def test_server_may_send_less_than_the_rest(longest, server):
    """Whether the file is whole, Content-Range says."""
    server.files["/w.pth"], server.longest, server.faults = BYTES[:1000], longest, [("cut", 900)]
    assert download.fetch(server.url()).read_bytes() == BYTES[:1000]
    assert server.asked == [None] + [f"bytes={start}-" for start in range(900, 1000, longest)]


def test_next_run_goes_on_with_what_the_last_one_left(server, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    server.faults = [("cut", 100_000), 503, ("cut", 150_000), 503]
    for size in (100_000, 250_000):
        with pytest.raises(UserError, match="503"):
            download.fetch(server.url())
        assert not download.cache_path(server.url()).exists()
        assert part(server.url()).stat().st_size == size
    assert download.fetch(server.url()).read_bytes() == BYTES
    assert server.asked[-1] == "bytes=250000-"


def test_beginning_that_is_longer_than_the_file_is_thrown_away(server):
    part(server.url()).parent.mkdir(parents=True)
    part(server.url()).write_bytes(BYTES * 2)
    assert download.fetch(server.url()).read_bytes() == BYTES
    assert server.asked == ["bytes=600000-", None]


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_refusal_is_told_at_once(status, server):
    server.faults = [status]
    with pytest.raises(UserError, match=f"cannot download {server.url()} .*{status}"):
        download.fetch(server.url())
    assert len(server.asked) == 1


def test_busy_server_is_asked_again_but_not_for_ever(server):
    server.faults = [503, 429, 500, 408]
    assert download.fetch(server.url()).read_bytes() == BYTES
    server.faults, server.asked = [503] * 50, []
    with pytest.raises(UserError, match="503"):
        download.fetch(server.url("/other"))
    assert len(server.asked) == download.ATTEMPTS


def test_nobody_at_the_address_is_told_with_the_url(server, monkeypatch):
    waited = []
    monkeypatch.setattr(download.time, "sleep", waited.append)
    for url in ("http://127.0.0.1:1/w.pth", "http://no-such-host.invalid/w.pth"):
        with pytest.raises(UserError, match=f"cannot download {url}"):
            download.fetch(url)
    assert waited == [1, 2, 4, 8] * 2


@pytest.mark.parametrize(
    "url",
    ["https://", "https:///w.pth", "https://[bad/w", "https://a:99999/w", "https://a:x/w", "https://:80/w"]
    + ["https://a/a b", "https://a/é", "https://a..b/w", "https://" + "a" * 70 + ".org/w"],
)
def test_what_is_no_url_is_refused_at_once(url, server):
    with pytest.raises(UserError, match=re.escape(url)):
        download.fetch(url)


def test_no_message_has_control_characters_or_no_end(server):
    with pytest.raises(UserError) as refused:
        download.fetch("https://a/\x1b[31m\x7f" + "x" * 10**6)
    assert refused.value.message.isprintable() and len(refused.value.message) < 500


def test_empty_file_is_refused(server):
    server.files["/w.pth"] = b""
    with pytest.raises(UserError, match="empty"):
        download.fetch(server.url())
    assert not download.cache_path(server.url()).exists()


def test_file_that_is_not_the_published_one_is_refused_and_not_kept(server, monkeypatch):
    md5 = hashlib.md5(BYTES).hexdigest()
    monkeypatch.setitem(download.MD5, server.url(), md5[:6])
    server.files["/w.pth"] = OTHER
    with pytest.raises(UserError, match=f"{hashlib.md5(OTHER).hexdigest()}.*{md5[:6]}"):
        download.fetch(server.url())
    assert left_over(server.url()) == []
    server.files["/w.pth"] = BYTES
    assert download.fetch(server.url()).read_bytes() == BYTES and server.asked == [None, None]


def test_published_sums_are_those_of_the_readme():
    rows = re.findall(r"^\| \[([\w/.]+)\]\((\S+)\) \| (\S+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    rows = [row for row in rows if "/maws/" not in row[1]]  # of others, who published none
    assert len(rows) == 13 and all(url == download.RELEASES + name for name, url, _ in rows)
    assert {url: digits for _, url, digits in rows if digits != "-"} == download.MD5


def test_urls_that_share_a_name_are_kept_apart(server):
    server.files |= {"/a/w.pth": b"a", "/b/w.pth": b"b"}
    for path in ("/a/w.pth", "/b/w.pth", "/a/w.pth?version=2"):
        found = download.fetch(server.url(path))
        assert found.name == "w.pth" and found.read_bytes() == path[1].encode()
    assert len(server.asked) == 3


def test_a_released_file_is_kept_by_its_name_and_found_where_it_was_put_by_hand(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "mae_pretrain_vit_base.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"put there by hand")
    assert download.fetch(download.RELEASES + "pretrain/mae_pretrain_vit_base.pth") == path


@pytest.mark.parametrize(
    "path", ["", "/", "/..", "/a/..%2f..%2fw", "/.part", "/.lock", "/" + "x" * 5000, "/a\\b", "/~"]
)
def test_no_name_leads_out_of_the_folder(path, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    found = download.cache_path("https://example.org" + path)
    assert found.resolve().parent.parent == (tmp_path / "hub" / "checkpoints").resolve()
    found.parent.mkdir(parents=True)
    found.write_bytes(b"it can be written")
    assert not found.name.startswith(".")


def test_long_download_says_how_far_it_is(server, monkeypatch, capsys):
    monkeypatch.setattr(download, "REPORT_SECONDS", 0)
    download.fetch(server.url())
    assert re.search(r" \d+%.* \d+k/300k ", capsys.readouterr().out)


# several processes, and a disk that refuses: in forks of this one

fork = multiprocessing.get_context("fork")


def fetch_in_a_fork(url: str, results, max_bytes: int | None = None) -> None:
    if max_bytes:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit then fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, max_bytes))
    try:
        results.put(str(download.fetch(url)))
    except UserError as error:
        results.put(f"UserError: {error.message}")


def start(n: int, url: str, results, *more) -> list:
    processes = [fork.Process(target=fetch_in_a_fork, args=(url, results, *more)) for _ in range(n)]
    for process in processes:
        process.start()
    return processes


def test_one_process_downloads_for_all(server):
    results = fork.Queue()
    server.faults = [("stall", 1000)]  # long enough for all to come
    processes = start(4, server.url(), results)
    assert {results.get(timeout=20) for _ in processes} == {str(download.cache_path(server.url()))}
    for process in processes:
        process.join(20)
    assert server.asked == [None, "bytes=1000-"]
    assert download.fetch(server.url()).read_bytes() == BYTES


def test_killed_process_leaves_the_download_to_the_next(server, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 20)
    results = fork.Queue()
    server.faults = [("stall", 1000)]
    (first,) = start(1, server.url(), results)
    begun = part(server.url())
    deadline = time.monotonic() + 10
    while not (begun.is_file() and begun.stat().st_size == 1000) and time.monotonic() < deadline:
        time.sleep(0.01)
    (second,) = start(1, server.url(), results)
    second.join(0.3)
    assert second.is_alive() and len(server.asked) == 1, "it should wait for the first"
    os.kill(first.pid, signal.SIGKILL)
    assert results.get(timeout=20) == str(download.cache_path(server.url()))
    for process in (first, second):
        process.join(20)
    assert server.asked == [None, "bytes=1000-"]
    assert download.fetch(server.url()).read_bytes() == BYTES


def test_full_disk_is_told_and_not_tried_again(server):
    results = fork.Queue()
    (process,) = start(1, server.url(), results, 100_000)
    message = results.get(timeout=20)
    process.join(20)
    assert "cannot be written" in message and "TORCH_HOME" in message and len(server.asked) == 1
    assert not download.cache_path(server.url()).exists()
    assert download.fetch(server.url()).read_bytes() == BYTES  # goes on once there is space
    assert server.asked[1] == "bytes=100000-"


def test_folder_that_cannot_be_made_is_told(server, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="TORCH_HOME"):
        download.fetch(server.url())
    assert server.asked == []


# what somebody else left in the folder


def plant(kind: str, path: Path, victim: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    make = {"link": path.symlink_to, "hard link": path.hardlink_to, "dangling": lambda to: path.symlink_to(f"{to}x")}
    make |= {"fifo": lambda to: os.mkfifo(path), "folder": lambda to: path.mkdir()}
    make |= {"garbage": lambda to: path.write_bytes(b"\xff\0garbage")}
    make[kind](victim)


@pytest.mark.parametrize("kind", ["link", "hard link", "dangling", "fifo", "folder", "garbage"])
@pytest.mark.parametrize("name", ["file", "lock", "old part", "old etag", "part", "once"])
def test_what_was_planted_is_not_followed_and_nothing_hangs(name, kind, server, tmp_path):
    """Downloaded all the same, or refused with the name of what is in the way; never written through it."""
    url = server.url()
    path, victim = download.cache_path(url), tmp_path / "victim"
    victim.write_bytes(b"mine")
    places = {"file": path, "lock": ".w.pth.lock", "old part": ".w.pth.part", "old etag": ".w.pth.etag"}
    places |= {"part": part(url), "once": part(url, "")}
    place = path.with_name(str(places[name])) if isinstance(places[name], str) else places[name]
    plant(kind, place, victim)
    results = fork.Queue()
    (process,) = start(1, url, results)
    answer = results.get(timeout=20)
    process.join(20)
    assert victim.read_bytes() == b"mine" and not Path(f"{victim}x").exists()
    if name == "file" and kind in ("link", "hard link", "garbage"):
        assert answer == str(path) and server.asked == []  # a file that is there is the file
    elif answer.startswith("UserError"):
        assert str(path.parent) in answer and name in ("file", "lock", "part", "once") and kind != "garbage"
    elif kind == "garbage" and name == "part":
        assert path.read_bytes()[9:] == BYTES[9:]  # nothing tells it from our own
    else:
        assert path.read_bytes() == BYTES
    if name.startswith("old") or (name in ("part", "once") and kind != "folder"):
        assert answer == str(path)


def test_link_that_is_planted_at_the_last_moment_is_not_followed(server, tmp_path, monkeypatch):
    url = server.url()
    (tmp_path / "victim").write_bytes(b"mine")
    plant("link", part(url), tmp_path / "victim")
    monkeypatch.setattr(Path, "glob", lambda *_: [])  # not yet there where we looked
    with pytest.raises(UserError, match=re.escape(str(part(url)))):
        download.fetch(url)
    assert (tmp_path / "victim").read_bytes() == b"mine"


@pytest.mark.parametrize(
    "content_range",
    ["", "bytes", "bytes 100000-299999/*", "bytes 0-299999/300000", "bytes 100001-299999/300000", "bytes x-y/z"]
    + ["bytes 100000-300000/300000", "bytes 100000-99999/300000", "bytes 100000-299999/" + "9" * 5000, "items 1-2/3"],
)
def test_part_that_is_not_the_one_asked_for_is_thrown_away(content_range, server, monkeypatch):
    """The next request is one for the whole file."""
    send_header = Handler.send_header

    def lie(self, name, value):
        send_header(self, name, content_range if name == "Content-Range" else value)

    monkeypatch.setattr(Handler, "send_header", lie)
    server.faults = [("cut", 100_000)]
    assert download.fetch(server.url()).read_bytes() == BYTES
    assert server.asked == [None, "bytes=100000-", None]


# the whole way, as users go it: https


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """(Key, certificate) of localhost, files."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("certificate")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
        check=True, capture_output=True,
    )  # fmt: skip
    return key, certificate


@pytest.fixture
def https(server, certificate, monkeypatch):
    """The server, with a certificate that this process trusts."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate[1], certificate[0])
    server.socket = context.wrap_socket(server.socket, server_side=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[1]))
    return server


def test_checkpoint_is_loaded_from_an_https_url_that_breaks_off(https, tmp_path):
    weights = {"weight": torch.arange(30_000.0)}
    torch.save({"model": weights}, tmp_path / "w.pth")
    https.files["/mae/w.pth"] = (tmp_path / "w.pth").read_bytes()
    https.faults = [("cut", 70_000)]
    url = https.url("/mae/w.pth?download=1", "https")
    for _ in range(2):
        assert torch.equal(checkpoint.load(url)["model"]["weight"], weights["weight"])
    assert https.asked == [None, "bytes=70000-"]


def test_page_in_place_of_a_checkpoint_is_named_with_the_url_and_where_it_lies(https):
    https.files["/w.pth"] = b"<!DOCTYPE html><html><body>Please log in</body></html>"
    url = https.url(scheme="https")
    with pytest.raises(UserError, match="HTML") as error:
        checkpoint.load(url)
    assert url in error.value.message and str(download.cache_path(url)) in error.value.message


def test_server_that_nobody_vouches_for_is_refused(https, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(UserError, match="(?i)certificate"):
        checkpoint.load(https.url(scheme="https"))
    assert https.asked == []


@pytest.mark.parametrize("hops", [0, 1, 3])
@pytest.mark.parametrize("scheme", ["http", "HTTP", "ftp", "file"])
def test_way_that_leaves_https_is_refused_before_it_is_gone(scheme, hops, https, tmp_path):
    """Wherever it leaves it, and though it would lead back."""
    https.files["/good"] = BYTES
    (tmp_path / "mine").write_bytes(b"mine")
    with running(Server()) as plain:
        plain.redirects["/hop"] = https.url("/good", "https")
        https.redirects = {f"/{i}": f"/{i + 1}" for i in range(hops)}
        https.redirects[f"/{hops}"] = f"file://{tmp_path}/mine" if scheme == "file" else plain.url("/hop", scheme)
        with pytest.raises(UserError, match="leads to |302"):
            download.fetch(https.url("/0", "https"))
        assert plain.asked == [] and len(https.asked) == hops + 1
        https.redirects[f"/{hops}"] = https.url("/good", "https")
        assert download.fetch(https.url("/0", "https")).read_bytes() == BYTES


def _forever(connection, before: bytes, piece: bytes, seconds: float) -> None:
    connection.sendall(before)
    while True:
        connection.sendall(piece)
        time.sleep(seconds)


OK = b'HTTP/1.1 200 OK\r\nETag: "v1"\r\n'
SLOW = {
    "100 Continue without end": (b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0),
    "100 Continue now and then": (b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.1),
    "a header of one letter after the other": (OK + b"X: ", b"x", 0.1),
    "a file of one byte after the other": (OK + b"Content-Length: 300000\r\n\r\n", b"x", 0.1),
    "one byte after the other of a file of unknown size": (OK + b"\r\n", b"x", 0.1),
    "a chunk's size of one digit after the other": (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"0", 0.1),
    "trailers without end": (OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n", b"x: y\r\n", 0),
    "a redirect with a page without end": (b"HTTP/1.1 302 Found\r\nLocation: /again\r\n\r\n", b"x" * 1000, 0),
}


@pytest.mark.parametrize("what", SLOW)
def test_server_that_keeps_sending_next_to_nothing_is_left(what, https, monkeypatch):
    monkeypatch.setattr(download, "PATIENCE_SECONDS", 0.7)
    monkeypatch.setattr(Handler, "do_GET", lambda self: _forever(self.connection, *SLOW[what]))
    start = time.monotonic()
    # on a busy machine the last of the patience may pass in a single read
    with pytest.raises(UserError, match="redirect" if "redirect" in what else "under 1024 bytes|timed out"):
        download.fetch(https.url(scheme="https"))
    assert time.monotonic() - start < 5


def test_slow_but_steady_server_is_not_left(https, monkeypatch):
    """Patience comes back with what arrives: 20 times 2,000 bytes, 0.1 s apart."""
    monkeypatch.setattr(download, "PATIENCE_SECONDS", 0.7)

    def send(self):
        self.connection.sendall(OK + b"Content-Length: 40000\r\n\r\n")
        for i in range(20):
            self.connection.sendall(BYTES[2000 * i : 2000 * (i + 1)])
            time.sleep(0.1)

    monkeypatch.setattr(Handler, "do_GET", send)
    assert download.fetch(https.url(scheme="https")).read_bytes() == BYTES[:40_000]


def test_reason_that_a_server_gives_is_shown_without_control_characters(https, monkeypatch):
    line = b"HTTP/1.1 404 \x1b[31mred" + b"x" * 5000 + b"\r\nContent-Length: 0\r\n\r\n"
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.connection.sendall(line))
    with pytest.raises(UserError, match="404") as refused:
        download.fetch(https.url(scheme="https"))
    assert refused.value.message.isprintable() and len(refused.value.message) < 1000


def test_only_https_is_taken_for_an_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("http://example.org/w.pth", "ftp://example.org/w.pth", "file:///etc/passwd"):
        with pytest.raises(UserError, match=f"no checkpoint {re.escape(name)}: .*https://"):
            checkpoint.load(name)
