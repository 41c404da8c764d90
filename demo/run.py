"""The main job on real images, in minutes on two CPU cores: python -m demo.run [digits]

Writes OpenMoji's emoji (or scikit-learn's handwritten digits) as an image folder; pretrains a tiny masked autoencoder
with main_pretrain.py; measures what its encoder has learned, by a linear probe (main_linprobe.py) and by nearest
neighbours, against the same encoder untrained; draws what it reconstructs of validation images that it has never seen.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import models_mae
from util import rng
from util.data.datasets import Images
from util.data.listing import list_classes
from util.data.loader import DeviceLoader, eval_loader
from util.dist import Dist
from util.errors import UserError, fail
from util.look.features import knn_accuracy, mean_features
from util.look.visualize import reconstruct, seeded_noise, sheet
from util.run import files
from util.transforms import eval_transform
from util.weights import checkpoint

ROOT = Path(__file__).resolve().parent.parent
MODEL = "tiny_patch4"


@dataclass(frozen=True)
class Set:
    """Pictures of the demo: side in pixels, classes, and options that suit them."""

    side: int
    classes: int
    epochs: int  # of pretraining
    probe_epochs: int
    batch_size: int
    blr: float
    options: str
    probe: str
    shown: int  # validation images in the figure


SETS = {
    "emoji": Set(40, 9, 55, 10, 64, 12e-3, "--crop_min 0.6", "--blr 25 --crop_min 0.7", 16),
    # a mirrored digit, or a corner of one, is another shape
    "digits": Set(32, 10, 60, 20, 64, 12e-3, "--crop_min 0.5 --hflip 0", "--blr 60 --crop_min 0.7 --hflip 0", 10),
}


def main() -> None:
    """Run all steps, print accuracies and the path of the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", nargs="?", choices=SETS, default="emoji", help="which pictures (default: emoji)")
    parser.add_argument("--output", type=Path, help="folder (default: one in demo/output)")
    usual = ", ".join(f"{name} {chosen.epochs}" for name, chosen in SETS.items())
    parser.add_argument("--epochs", type=int, help=f"epochs of pretraining (default: {usual})")
    parser.add_argument("--seed", type=int, default=0, help="decides weights, order and masks (default: 0)")
    args = parser.parse_args()
    try:
        out = args.output or ROOT / "demo" / "output" / args.set
        demo(args.set, out, args.epochs or SETS[args.set].epochs, args.seed)
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:  # the script that runs has had it too, and is gone
        sys.exit("stopped")


def demo(name: str, out: Path, epochs: int, seed: int) -> None:
    """All steps for the pictures of one set."""
    start, chosen, data = time.perf_counter(), SETS[name], out / name
    for folder in ("pretrain", "probe_untrained", "probe_trained", name):  # of an earlier demo
        shutil.rmtree(out / folder, ignore_errors=True)
    write(name, data)
    n_train, n_val = (sum(1 for _ in (data / split).rglob("*.png")) for split in ("train", "val"))
    print(f"{n_train} {name} to learn from and {n_val} for validation, in {os.path.relpath(data)}", flush=True)

    untrained = write_untrained(out / "untrained.pth", chosen.side, seed)
    script(
        "main_pretrain.py", epochs, "--data_path", data,
        f"--model mae_vit_{MODEL} --input_size {chosen.side} --amp off --batch_size {chosen.batch_size}",
        f"--epochs {epochs} --warmup_epochs {epochs / 10} --blr {chosen.blr} --seed {seed} {chosen.options}",
        f"--num_workers 1 --save_every {epochs}", "--output_dir", out / "pretrain", "--log_dir", out / "pretrain",
    )  # fmt: skip
    trained = out / "pretrain" / f"checkpoint-{epochs - 1}.pth"

    weights = {"untrained": untrained, "trained": trained}
    probes = [probe(file, chosen, data, out / f"probe_{which}") for which, file in weights.items()]
    neighbours = [nearest_neighbours(file, chosen.side, data) for file in weights.values()]
    picture = draw(trained, chosen, data, out / "reconstructions.png")

    print(f"\n{f'accuracy on the {n_val} validation images':<40}{'untrained':>12}{'pretrained':>12}")
    for row, values in (("linear probe", probes), ("5 nearest neighbours", neighbours)):
        print(f"{row:<40}" + "".join(f"{value:>11.1f}%" for value in values))
    print(f"\nWhat it reconstructs from a quarter of each image: {os.path.relpath(picture)}")
    print(f"That took {(time.perf_counter() - start) / 60:.1f} minutes. Next:")
    for command, what in following(out, trained):
        print(f"  {command:<51}  {what}" if len(command) < 52 else f"  {command}\n{what:>{len(what) + 55}}")


def following(out: Path, trained: Path) -> list[tuple[str, str]]:
    """(command, what it does) of what to try with a demo in `out`, from the folder where it ran."""
    python = Path(os.path.relpath(sys.executable))
    words = [os.path.relpath(path) for path in (python.with_name("tensorboard"), out, python, trained)]
    tensorboard, logs, python, weights = map(shlex.quote, words)
    page = "make app" if out.parent == ROOT / "demo" / "output" else f"{python} demo/app.py {weights}"
    own = f"{python} main_pretrain.py --data_path FOLDER --model mae_vit_tiny_patch16 --output_dir output_dir"
    return [
        (page, "a page to play with this model"),
        (f"{tensorboard} --logdir {logs}", "its curves"),
        (own, "your own photographs; more: README.md, PRETRAIN.md"),
    ]


def write(name: str, data: Path) -> None:
    """The pictures of a set, as files. Their packages are only needed here."""
    if name == "emoji":
        from demo.make_emoji import write_emoji as write_all
    else:
        from demo.make_digits import write_digits as write_all
    write_all(data)


def script(name: str, epochs: int, *options: str | Path) -> None:
    """Run one of the training scripts as a user would: its command, then a line for each of its epochs.

    What else it says is in train.log of its output folder. Raises UserError where it fails.
    """
    words = [word for part in options for word in ([part] if isinstance(part, Path) else part.split())]
    shown = [os.path.relpath(word) if isinstance(word, Path) else word for word in words]
    print("\n$ python", name, shlex.join(shown), flush=True)
    log = words[words.index("--output_dir") + 1] / "log.txt"
    # threads that wait must sleep: spinning, they keep the loader's workers from running where cores are few
    env = {"OMP_WAIT_POLICY": "passive", **os.environ}
    start, told = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, ROOT / name, *words]
        with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=errors) as running:
            while running.poll() is None or told < len(lines(log)):
                for line in lines(log)[told:]:
                    told += 1
                    print(f"epoch {told}/{epochs}  {summary(line)}  {time.perf_counter() - start:.0f} s", flush=True)
                time.sleep(0.2)
        errors.seek(0)
        if running.returncode:
            raise UserError(f"{name} ended with exit code {running.returncode}: {errors.read().strip()[-1500:]}")


def lines(log: Path) -> list[str]:
    """The whole lines of a file that is being written."""
    return log.read_text().split("\n")[:-1] if log.exists() else []


def summary(line: str) -> str:
    """One line of log.txt, in words."""
    stats = json.loads(line)
    accuracy = f"  accuracy {stats['test_acc1']:.1f} %" if "test_acc1" in stats else ""
    return f"loss {stats['train_loss']:.3f}{accuracy}"


def write_untrained(path: Path, side: int, seed: int) -> Path:
    """A checkpoint of the model that pretraining with this seed starts from."""
    rng.seed_init(seed)
    files.save(path, {"model": models_mae.MODELS[f"mae_vit_{MODEL}"](img_size=side).state_dict()})
    return path


def probe(weights: Path, chosen: Set, data: Path, out: Path) -> float:
    """Accuracy (%) of main_linprobe.py on frozen features of `weights`, after its last epoch."""
    epochs = chosen.probe_epochs
    script(
        "main_linprobe.py", epochs, "--data_path", data, "--finetune", weights, "--output_dir", out, "--log_dir", out,
        f"--model vit_{MODEL} --input_size {chosen.side} --nb_classes {chosen.classes} --amp off --global_pool",
        f"--save_every {epochs} --batch_size 128 --epochs {epochs} --warmup_epochs 2 {chosen.probe}",
    )  # fmt: skip
    return json.loads(lines(out / "log.txt")[-1])["test_acc1"]


def load_mae(weights: Path, side: int) -> torch.nn.Module:
    """The demo's model with the weights of a checkpoint."""
    model = models_mae.MODELS[f"mae_vit_{MODEL}"](img_size=side)
    checkpoint.load_full_mae(weights, model)
    return model


def batches(files: list[tuple[str, int]], side: int, batch_size: int) -> DeviceLoader:
    """Images and labels on the CPU, as evaluation sees them."""
    env = Dist(torch.device("cpu"))
    images = Images(files, eval_transform(side))
    return eval_loader(images, batch_size, env, sharded=False, num_workers=0, pin_mem=False)


def nearest_neighbours(weights: Path, side: int, data: Path) -> float:
    """Accuracy (%) of the vote of the 5 nearest training images."""
    model = load_mae(weights, side)
    loaders = (batches(list_classes(data / split)[0], side, batch_size=256) for split in ("train", "val"))
    return knn_accuracy(*(mean_features(model, loader) for loader in loaders), k=5)


def draw(weights: Path, chosen: Set, data: Path, path: Path) -> Path:
    """Reconstructions of validation images, of all classes."""
    files, _ = list_classes(data / "val")
    step = len(files) / chosen.shown
    imgs, _ = next(
        iter(batches([files[int((i + 0.5) * step)] for i in range(chosen.shown)], chosen.side, chosen.shown))
    )
    model = load_mae(weights, chosen.side)
    noise = seeded_noise(len(imgs), model.patch_embed.num_patches, seed=0)
    sheet(reconstruct(model, imgs, noise=noise), side=96, across=2).save(path)
    return path


if __name__ == "__main__":
    main()
