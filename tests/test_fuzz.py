"""Mangled options, checkpoints and images: each ends in a right result, or in an error that says what is wrong.

No traceback from the depths, no crash, no hang. A case is a function of its number, so a failure can be repeated alone:
`python tests/test_fuzz.py checkpoint 417`. Many more, all different: `MAE_FUZZ=100 python -m pytest tests/test_fuzz.py`
takes 100 times as many.
"""

import argparse
import contextlib
import copy
import io
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from helpers import ON_CPU, assert_same, write_image_folder
from PIL import Image
from torch import nn

import main_finetune
import main_linprobe
import main_pretrain
from models_mae import MaskedAutoencoderViT
from models_vit import VisionTransformer
from util import cli
from util.data.datasets import Images
from util.dist import Dist
from util.errors import UserError
from util.run import exits
from util.run.resume import resume
from util.transforms import eval_transform, pretrain_transform
from util.weights import checkpoint, untrusted

SECONDS, GIGABYTES = 20, 6  # more than any case takes, even on a busy machine


class Enough(Exception):
    """A script has trained: its options were taken."""


# options

MAINS = {"pretrain": main_pretrain, "finetune": main_finetune, "linprobe": main_linprobe}
VALUES = """
0 -0 1 2 3 4 5 7 8 12 16 30 33 64 0.5 0.999999 1.0 2.5 -1 -0.5 1e-9 1e-320 1e3 1e30 1e308 1e309 -1e308 nan inf -inf
100000000 9999999999999999999999999 0x10 1_000 ² ½ １２ 1,2 [] {} () None null true False auto on off bf16 fp16 cpu cuda
cuda:99 cuda:x cpu:1 mps const rand pixel batch pair elem rand-m9-mstd0.5-inc1 rand-m9-n2 rand- rand-m rand-mx rand-m-9
rand-m9-p2 rand-n0 rand-m1e9 augmix-m5 augmix augmix-w0 3a original v0 original-mstd0.5 mae_vit_tiny_patch4
vit_tiny_patch4 vit_base ~ . .. .. - -- --- /dev/null /dev/null/x /proc/none https:// https://[ https://: http://x
file:///x %s %(prog)s {0} \\ 🦊 env:// tcp://x --epochs --no_such_option --e --no -h skip stop rollback
""".split()
VALUES += ["", " ", " 5", "5 ", "\t5", "a b", "\n", "\udc80", "a" * 300, "a" * 10_000, "9" * 5000, "1" + "0" * 400]


@cache
def option_names(name: str) -> list[tuple[str, object]]:
    """(option, nargs) of everything that a script takes."""
    return [(action.option_strings[0], action.nargs) for action in MAINS[name].get_args_parser()._actions]


def options_case(number: int) -> tuple[str, list[str]]:
    """A script, and options for it with one to three values that it may not like."""
    draw = random.Random(f"options {number}")
    name, given = draw.choice(list(MAINS)), []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        option, nargs = draw.choice(option_names(name))
        n_values = {None: 1, 0: int(draw.random() < 0.1), "+": draw.choice((0, 1, 1, 1, 2, 3))}.get(nargs, nargs)
        values = [draw.choice(VALUES) for _ in range(n_values)]
        if option == "--compile" and values == ["on"]:
            continue  # works, in half a minute
        if option == "--num_workers" and _as_int(values[0]) > 0:
            continue  # works, but Enough leaves the workers alone
        given += [f"{option}={values[0]}"] if len(values) == 1 and draw.random() < 0.3 else [option, *values]
    return name, given


def _as_int(text: str) -> int:
    with contextlib.suppress(ValueError):
        return int(text)
    return -1


@cache
def small_folder() -> Path:
    return write_image_folder(Path(tempfile.mkdtemp(prefix="fuzz-")) / "images", n_train=4, n_val=1)


def run_options(number: int, folder: Path) -> str:
    """Run a script with mangled options through its first epoch, in `folder`."""
    name, given = options_case(number)
    script = MAINS[name]
    model = ("mae_" if name == "pretrain" else "") + "vit_tiny_patch4"
    base = ["--data_path", str(small_folder()), "--model", model, "--input_size", "32", "--batch_size", "4", *ON_CPU]
    base += ["--epochs", "1", "--num_workers", "0", "--output_dir", "", "--log_dir", "", "--warmup_epochs", "0"]
    base += [] if name == "pretrain" else ["--nb_classes", "3"]

    def one_epoch(*args, **kwargs):
        train_one_epoch(*args, **kwargs)
        raise Enough

    errors = io.StringIO()
    train_one_epoch, argv, here = script.train_one_epoch, sys.argv, os.getcwd()
    script.train_one_epoch, sys.argv = one_epoch, [f"main_{name}.py", *base, *given]
    os.chdir(folder)
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            exits.run(script.main, cli.parse(script.get_args_parser(), script.__doc__))
        return "ended"
    except Enough:
        return "trained"
    except SystemExit as end:
        if end.code == 0:
            return "ended"
        message = errors.getvalue()
        if end.code == 3 and "--blr" in message:  # it trained, until the loss was no number any more
            return "trained"
        assert end.code == 2 and "error: " in message, (end.code, message)
        assert "Traceback" not in message, message
        said = message.split("error: ", 1)[1]
        words = [word for part in given for word in (part, *part.split("=", 1))]
        named = any(word.strip() in said or repr(word)[1:-1] in said for word in words if word.strip())
        assert named or not all(word.strip() for word in words), f"names nothing of {words}: {said}"
        return "refused"
    finally:
        script.train_one_epoch, sys.argv = train_one_epoch, argv
        os.chdir(here)


# checkpoints

small = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
mae = partial(MaskedAutoencoderViT, decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2, **small)
vit = partial(VisionTransformer, num_classes=3, global_pool=True, **small)
ARGS = {"input_size": 16, "batch_size": 2, "accum_iter": 1, "epochs": 9, "lr": None, "model": "tiny", "seed": 0}


def trained(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=0.01)
    for param in model.parameters():
        param.grad = torch.ones_like(param) if param.requires_grad else None
    optimizer.step()
    return optimizer


@cache
def whole_states() -> list[dict]:
    """Checkpoints as training writes them: of a masked autoencoder within an epoch, and of a classifier after one."""
    torch.manual_seed(0)
    model, classifier = mae(), vit()
    within = {
        "model": model.state_dict(), "optimizer": trained(model).state_dict(), "epoch": 3, "args": ARGS,
        "scaler": torch.amp.GradScaler("cpu").state_dict(), "iteration": 4, "world_size": 1,
        "progress": {"sums": {"loss": 2.0, "lr": 1.0}, "counts": {"loss": 4, "lr": 4}},
    }  # fmt: skip
    after = {
        "model": classifier.state_dict(), "optimizer": trained(classifier).state_dict(), "epoch": 3, "scaler": {},
        "args": argparse.Namespace(**ARGS), "max_accuracy": 50.0, "best": (50.0, 2),
    }  # fmt: skip
    return [within, after]


def bytes_of(state: object, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


@cache
def whole_files() -> list[bytes]:
    return [bytes_of(state, legacy) for state in whole_states() for legacy in (False, True)]


def mangled_bytes(whole: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """Some bits flipped, a piece lost, doubled, blanked or from another file; or the end missing."""
    content = bytearray(whole)
    # the interesting bytes of a file are often the first and the last ones
    places = (len(content), min(len(content), 600))
    for _ in range(draw.choice((1, 1, 2, 8))):
        if not content:
            break
        start = draw.randrange(min(draw.choice(places), len(content)))
        start = len(content) - 1 - start if draw.random() < 0.3 else start
        length = draw.choice((1, 2, 4, 8, 100, 5000))
        kind = draw.choice(("flip", "flip", "flip", "byte", "cut", "lose", "double", "blank", "number", "other"))
        if kind == "flip":
            content[start] ^= 1 << draw.randrange(8)
        elif kind == "byte":
            content[start] = draw.randrange(256)
        elif kind == "cut":
            del content[start:]
        elif kind == "lose":
            del content[start : start + length]
        elif kind == "double":
            content[start:start] = content[start : start + length]
        elif kind == "blank":
            content[start : start + length] = bytes(len(content[start : start + length]))
        elif kind == "number":
            number = struct.pack(draw.choice("<>") + "I", draw.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**24)))
            content[start : start + 4] = number
        else:
            other = draw.choice(others)
            place = draw.randrange(len(other))
            content[start : start + length] = other[place : place + length]
    return bytes(content)


def mangled_pickle(whole: bytes, draw: random.Random) -> bytes:
    """A zip file whose checksums are right, but whose pickle or tensors are not."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as source, zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as target:
        names = source.namelist()
        pickled = next(name for name in names if name.endswith("data.pkl"))
        victim = pickled if draw.random() < 0.8 else draw.choice(names)
        for name in names:
            content = source.read(name)
            if name == victim:
                content = mangled_bytes(content, draw, [source.read(pickled)])
            target.writestr(name, content)
    return buffer.getvalue()


THINGS = [
    None, True, 0, -1, 3, 2**70, 0.5, float("nan"), float("inf"), "", "16", "a" * 3000, b"", b"x", [], [1, 2, 3], (),
    {}, (16, 16), {1: 2}, {"a": {}}, {"state": {}, "param_groups": []}, [{"params": [0]}], set(), 1j, torch.Size([1]),
    [[]], torch.zeros(()), torch.zeros(0), torch.zeros(3), torch.zeros(1, 17, 8), torch.zeros(1, 17, 8).long(),
    torch.zeros(1, 1, 8).half(), torch.full((1, 17, 8), float("nan")), torch.zeros(1, 17, 8, dtype=torch.complex64),
    torch.zeros(2, 2).to_sparse(), torch.zeros(1, 26, 8), torch.zeros(1, 18, 8), torch.zeros(8), torch.zeros(3, 8),
    argparse.Namespace(input_size=16), argparse.Namespace(), torch.float32, "a\nb", "🦊", [None], {None: None},
    10**400, "\x1b[31m" * 9, torch.zeros(1).expand(10**9), torch.empty(2, device="meta"), torch.zeros(8, 8).t(),
    {"model": {}}, {"input_size": -4}, {"input_size": (4, 0)}, {"input_size": "16"}, {"input_size": [10**6, 10**6]},
]  # fmt: skip


def mangled_state(state: dict, draw: random.Random) -> object:
    """Something of another type or shape in one to three places; or something missing, or too much."""
    state = copy.deepcopy(state)
    if draw.random() < 0.02:
        return draw.choice(THINGS)
    for _ in range(draw.choice((1, 1, 2, 3))):
        inner = state
        while True:
            if isinstance(inner, argparse.Namespace):
                inner = vars(inner)
            keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
            if not keys:
                break
            key = draw.choice(keys)
            deeper = isinstance(inner[key], dict | list | argparse.Namespace) and len(list(_children(inner[key])))
            if not deeper or draw.random() < 0.3:
                break
            inner = inner[key]
        how = draw.random()
        if not keys or how < 0.1:
            if isinstance(inner, dict):
                inner[draw.choice(("extra", 0, "decoder_x", "head.weight", "mask_token", None))] = draw.choice(THINGS)
            else:
                inner.append(draw.choice(THINGS))
        elif how < 0.3:
            del inner[key]
        else:
            inner[key] = draw.choice(THINGS)
    return state


def _children(value: dict | list | argparse.Namespace):
    return vars(value) if isinstance(value, argparse.Namespace) else value


def checkpoint_case(number: int) -> tuple[bytes, int, str]:
    """(file content, which of the whole files it was, how it was mangled)."""
    draw = random.Random(f"checkpoint {number}")
    which, how = draw.randrange(4), draw.choice(("bytes", "pickle", "state", "state"))
    if how == "bytes":
        return mangled_bytes(whole_files()[which], draw, whole_files()), which, how
    if how == "pickle":
        return mangled_pickle(whole_files()[which // 2 * 2], draw), which // 2 * 2, how
    return bytes_of(mangled_state(whole_states()[which // 2], draw), legacy=which % 2 == 1), which, how


def resume_training(path: str, model: nn.Module) -> None:
    """Resume into `model` and take a step, where a state that only looks right would show."""
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=0.01)
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    args = argparse.Namespace(**{**ARGS, "resume": path, "output_dir": "", "start_epoch": 0})
    start = resume(Dist(torch.device("cpu")), args, model, optimizer, scaler)
    assert start.epoch >= 0 and start.part.iteration >= 0
    for param in model.parameters():
        param.grad = torch.ones_like(param) if param.requires_grad else None
    scaler.scale(torch.zeros((), requires_grad=True) * 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.state_dict()


@cache
def models() -> tuple[nn.Module, nn.Module, nn.Module]:
    return mae(), vit(), vit(img_size=(16, 32))


USES: list[Callable[[str], None]] = [
    lambda path: resume_training(path, models()[0]),
    lambda path: resume_training(path, models()[1]),
    lambda path: checkpoint.load_full_mae(path, models()[0]),
    lambda path: checkpoint.load_pretrained(path, models()[1]),
    lambda path: checkpoint.load_pretrained(path, models()[2]),
    lambda path: checkpoint.load_strictly(models()[1], checkpoint.load(path)["model"], path),
]


def run_checkpoint(number: int, folder: Path) -> str:
    """Load a mangled file for two of its purposes."""
    content, which, how = checkpoint_case(number)
    path = folder / f"{number}.pth"
    path.write_bytes(content)
    results = []
    try:
        try:
            state = untrusted.read(path)
        except UserError as error:
            _check_message(error, path)
            return "refused"
        if how == "bytes" and which % 2 == 0:
            assert_same(_plain(state), _plain(whole_states()[which // 2]))  # what the checksums let pass is unharmed
        for use in random.Random(number).sample(USES, 2):
            try:
                use(str(path))
                results.append("loaded")
            except UserError as error:
                _check_message(error, path)
                results.append("refused")
    finally:
        path.unlink()
    return "loaded" if "loaded" in results else "refused"


def _plain(state: dict) -> dict:
    return {key: vars(value) if isinstance(value, argparse.Namespace) else value for key, value in state.items()}


def _check_message(error: UserError, path: Path) -> None:
    message = error.message
    assert str(path) in message, f"names no file: {message}"
    assert len(message) < 3000 and "weights_only" not in message, message


# images


@cache
def whole_images() -> dict[str, bytes]:
    """One of each format and mode, smooth enough that decoders do all of their work."""
    images = {}
    wave = Image.linear_gradient("L").resize((40, 30))
    rgb = Image.merge("RGB", (wave, wave.rotate(90), wave.rotate(180)))
    wide = Image.new("I;16", (40, 30), 3000)
    for name, image, options in (
        ("a.png", rgb, {}), ("b.png", rgb.convert("P"), {}), ("c.png", rgb.convert("RGBA"), {}), ("d.png", wide, {}),
        ("e.png", wave, {}), ("f.jpg", rgb, {}), ("g.jpg", wave, {}), ("h.jpg", rgb.convert("CMYK"), {}),
        ("i.jpg", rgb, {"progressive": True}), ("j.webp", rgb, {}), ("k.webp", rgb, {"lossless": True}),
        ("l.tif", rgb, {}), ("m.tiff", rgb, {"compression": "tiff_lzw"}), ("n.tif", rgb, {"compression": "jpeg"}),
        ("o.bmp", rgb, {}), ("p.bmp", rgb.convert("P"), {}), ("q.ppm", rgb, {}), ("r.pgm", wave, {}),
        ("s.gif", rgb, {}), ("t.tif", wide, {}), ("u.tif", rgb, {"compression": "tiff_deflate"}),
        ("v.webp", rgb, {"save_all": True, "append_images": [rgb.rotate(90)]}),
    ):  # fmt: skip
        kind = {"jpg": "JPEG", "tif": "TIFF", "pgm": "PPM"}.get(name[2:], name[2:].upper())
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        images[name] = buffer.getvalue()
    return images


def png(width: int, height: int, depth: int = 8, colour: int = 2, data: bytes = b"") -> bytes:
    """A PNG whose header says what it likes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def huge(name: str, draw: random.Random) -> bytes:
    """A small file that promises a large image, or one without pixels."""
    content = bytearray(whole_images()[name])
    width, height = (draw.choice((0, 1, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**32 - 1)) for _ in range(2))
    kind = name.split(".")[1]
    if kind == "png":
        return png(width, height, draw.choice((1, 8, 16)), draw.choice((0, 2, 3, 4, 6)), bytes(draw.choice((0, 10**6))))
    if kind == "jpg":  # SOF0 or SOF2: marker, length, precision, height, width
        place = max(content.find(b"\xff\xc0"), content.find(b"\xff\xc2"))
        content[place + 5 : place + 9] = struct.pack(">HH", height % 2**16, width % 2**16)
    elif kind == "bmp":
        content[18:26] = struct.pack("<II", width, height)
    elif kind in ("ppm", "pgm"):
        return content[:2] + f"\n{width} {height}\n255\n".encode() + bytes(1000)
    elif kind == "gif":
        content[6:10] = struct.pack("<HH", width % 2**16, height % 2**16)
    else:
        content[20:40] = struct.pack("<IIIII", width, height, width, height, width)
    return bytes(content)


def image_case(number: int) -> tuple[str, bytes]:
    draw = random.Random(f"image {number}")
    name = draw.choice(list(whole_images()))
    how = draw.random()
    if how < 0.1:
        content = huge(name, draw)
    elif how < 0.15:
        content = draw.choice((b"", b"\0" * 100, b"GIF89a", name.encode(), *whole_files()[:1]))
    else:
        content = mangled_bytes(whole_images()[name], draw, list(whole_images().values()))
    suffix = draw.choice((".png", ".jpg", ".webp", ".tif", ".bmp")) if draw.random() < 0.2 else Path(name).suffix
    return f"{number}{suffix}", content


TRANSFORMS = {"pretrain": pretrain_transform(16, 0.2, 0.5), "evaluation": eval_transform(16)}


def run_image(number: int, folder: Path) -> str:
    """Take a mangled image through the data set, as training and evaluation do."""
    name, content = image_case(number)
    path = folder / name
    path.write_bytes(content)
    try:
        for key, transform in (((0, 0), "pretrain"), (0, "evaluation")):
            pixels, _, _ = Images([(str(path), 0)], TRANSFORMS[transform])[key]
            assert pixels.shape == (16, 16, 3) and pixels.dtype == torch.uint8
        return "decoded"
    except UserError as error:
        assert str(path) in error.message and "--skip_bad_images" in error.message
        return "refused"
    finally:
        path.unlink()


# all of them

KINDS = {"options": run_options, "checkpoint": run_checkpoint, "image": run_image}
N_CASES = {"options": 1000, "checkpoint": 800, "image": 4000}
TIMES = int(os.environ.get("MAE_FUZZ", "1"))


def run_case(kind: str, number: int, folder: Path) -> str:
    """What became of a case; anything but an expected end is an AssertionError that says how to repeat it."""

    def too_long(*_):
        raise TimeoutError(f"over {SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + GIGABYTES * 2**30, limits[1]))
    try:
        return KINDS[kind](number, folder)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        shown = options_case(number) if kind == "options" else ""
        again = f"python tests/test_fuzz.py {kind} {number}"
        raise AssertionError(f"{type(error).__name__}: {error}\n{str(shown)[:500]}\nrepeat it: {again}") from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits time and memory as Linux does")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("share", ["a tenth", pytest.param("the rest", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_mangled_input_gives_a_result_or_a_clear_error(kind, share, tmp_path):
    n_cases = N_CASES[kind] * TIMES
    numbers = range(n_cases // 10) if share == "a tenth" else range(n_cases // 10, n_cases)
    ends: dict[str, int] = {}
    for number in numbers:
        folder = tmp_path / str(number) if kind == "options" else tmp_path
        folder.mkdir(exist_ok=True)
        end = run_case(kind, number, folder)
        ends[end] = ends.get(end, 0) + 1
    print(kind, ends)
    # cases that are all refused at the door, or all harmless, would show nothing
    assert ends.pop("refused") > len(numbers) / 5 and sum(ends.values()) > len(numbers) / 50, ends


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(KINDS[sys.argv[1]](int(sys.argv[2]), Path(folder)))
