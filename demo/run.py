"""The main job on real images, in minutes on two CPU cores: python -m demo.run

Writes scikit-learn's handwritten digits as an image folder; pretrains a tiny masked autoencoder with main_pretrain.py;
measures what its encoder has learned, by a linear probe (main_linprobe.py) and by nearest neighbours, against the same
encoder untrained; draws what it reconstructs of validation images that it has never seen.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import models_mae
from demo.make_digits import write_digits
from util import checkpoint, files, rng
from util.datasets import Images, list_classes
from util.dist import Dist
from util.knn import knn_accuracy, mean_features
from util.loader import DeviceLoader, eval_loader
from util.transforms import eval_transform
from util.visualize import reconstruct, seeded_noise, sheet

ROOT = Path(__file__).resolve().parent.parent
MODEL, SIDE = "tiny_patch4", 32
EPOCHS = 60  # of 22 steps of 64 images


def main() -> None:
    """Run all steps, print accuracies and the path of the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "demo" / "output", help="folder (default: demo/output)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"epochs of pretraining (default: {EPOCHS})")
    parser.add_argument("--seed", type=int, default=0, help="decides weights, order and masks (default: 0)")
    args = parser.parse_args()
    for name in ("pretrain", "probe_untrained", "probe_trained"):  # of an earlier demo
        shutil.rmtree(args.output / name, ignore_errors=True)
    out, data = args.output, args.output / "digits"
    write_digits(data)
    n_val = sum(1 for _ in (data / "val").rglob("*.png"))
    print(f"handwritten digits, {n_val} of them for validation, in {data}\n")

    untrained = write_untrained(out / "untrained.pth", args.seed)
    script(
        "main_pretrain.py", "--data_path", data, f"--model mae_vit_{MODEL} --input_size {SIDE} --amp off",
        f"--batch_size 64 --epochs {args.epochs} --warmup_epochs {args.epochs / 10} --blr 12e-3 --seed {args.seed}",
        "--crop_min 0.5 --hflip 0 --num_workers 1",  # a mirrored digit, or a corner of one, is another shape
        f"--save_every {args.epochs}", "--output_dir", out / "pretrain", "--log_dir", out / "pretrain",
    )  # fmt: skip
    trained = out / "pretrain" / f"checkpoint-{args.epochs - 1}.pth"

    rows = [
        ("linear probe", probe(untrained, data, out / "probe_untrained"), probe(trained, data, out / "probe_trained")),
        ("5 nearest neighbours", nearest_neighbours(untrained, data), nearest_neighbours(trained, data)),
    ]
    picture = draw(trained, data, out / "reconstructions.png")

    print(f"\n{f'accuracy on the {n_val} validation images':<40}{'untrained':>12}{'pretrained':>12}")
    for name, before, after in rows:
        print(f"{name:<40}{before:>11.1f}%{after:>11.1f}%")
    print(f"\nWhat it reconstructs from a quarter of each image: {picture}")


def script(name: str, *options: str | Path) -> None:
    """Run one of the training scripts as a user would, showing its command and its output."""
    words = [word for part in options for word in ([part] if isinstance(part, Path) else part.split())]
    shown = [os.path.relpath(word) if isinstance(word, Path) else word for word in words]
    print("$ python", name, shlex.join(shown), flush=True)
    # threads that wait must sleep: spinning, they keep the loader's workers from running where cores are few
    subprocess.run([sys.executable, ROOT / name, *words], check=True, env={"OMP_WAIT_POLICY": "passive", **os.environ})


def write_untrained(path: Path, seed: int) -> Path:
    """A checkpoint of the model that pretraining with this seed starts from."""
    rng.seed_init(seed)
    model = models_mae.MODELS[f"mae_vit_{MODEL}"](img_size=SIDE)
    files.save(path, {"model": model.state_dict()})
    return path


def probe(weights: Path, data: Path, out: Path) -> float:
    """Accuracy (%) of main_linprobe.py on frozen features of `weights`, after its last epoch."""
    script(
        "main_linprobe.py", "--data_path", data, "--finetune", weights, "--output_dir", out, "--log_dir", out,
        f"--model vit_{MODEL} --input_size {SIDE} --nb_classes 10 --amp off --global_pool --save_every 20",
        "--batch_size 128 --epochs 20 --warmup_epochs 2 --blr 60 --crop_min 0.7 --hflip 0",
    )  # fmt: skip
    return json.loads((out / "log.txt").read_text().splitlines()[-1])["test_acc1"]


def load_mae(weights: Path) -> torch.nn.Module:
    """The demo's model with the weights of a checkpoint."""
    model = models_mae.MODELS[f"mae_vit_{MODEL}"](img_size=SIDE)
    checkpoint.load_full_mae(weights, model)
    return model


def batches(files: list[tuple[str, int]], batch_size: int) -> DeviceLoader:
    """Images and labels on the CPU, as evaluation sees them."""
    env = Dist(torch.device("cpu"))
    return eval_loader(
        Images(files, eval_transform(SIDE)), batch_size, env, sharded=False, num_workers=0, pin_mem=False
    )


def nearest_neighbours(weights: Path, data: Path) -> float:
    """Accuracy (%) of the vote of the 5 nearest training images."""
    model = load_mae(weights)
    splits = []
    for split in ("train", "val"):
        loader = batches(list_classes(data / split)[0], batch_size=256)
        splits.append(mean_features(model, loader))
    return knn_accuracy(*splits, k=5)


def draw(weights: Path, data: Path, path: Path) -> Path:
    """Reconstructions of one validation image of each class."""
    files, classes = list_classes(data / "val")
    firsts = [next(file for file in files if file[1] == label) for label in range(len(classes))]
    imgs, _ = next(iter(batches(firsts, batch_size=len(firsts))))
    model = load_mae(weights)
    noise = seeded_noise(len(imgs), model.patch_embed.num_patches, seed=0)
    sheet(reconstruct(model, imgs, noise=noise), side=96, across=2).save(path)
    return path


if __name__ == "__main__":
    main()
