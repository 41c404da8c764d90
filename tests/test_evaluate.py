"""main_evaluate.py: every layout against an independent count; any number of processes and kills, the same bytes."""

import csv
import json
import math
import multiprocessing
import multiprocessing.process
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ON_CPU, load, project_log, torchrun, write_image_folder
from PIL import Image
from timm.data import ImageNetInfo

import main_evaluate
import main_finetune
import main_linprobe
import models_vit
from util.data import robustness
from util.data.loader import normalise
from util.data.parts import PartBatches, parts_loader, to_parts
from util.dist import Dist
from util.errors import NonFiniteLossError, UserError
from util.look import results
from util.look.records import evaluate
from util.transforms import CentreCrop, eval_transform
from util.weights import download

WNIDS = ImageNetInfo("imagenet-1k").label_names()
# typed anew, in the order in which the authors of ImageNet-C list them
CORRUPTIONS = (
    "gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur zoom_blur snow frost fog brightness "
    "contrast elastic_transform pixelate jpeg_compression"
).split()
ALEXNET = [.886428, .894468, .922640, .819880, .826268, .785948, .798360, .866816, .826572, .819324, .564592, .853204,
           .646056, .717840, .606500]  # fmt: skip
GROUP_OF = {**dict.fromkeys(CORRUPTIONS[:3], "noise"), **dict.fromkeys(CORRUPTIONS[3:7], "blur"),
            **dict.fromkeys(CORRUPTIONS[7:10], "weather"), **dict.fromkeys(CORRUPTIONS[10:], "digital")}  # fmt: skip


def classifier(n_classes: int = 1000) -> models_vit.VisionTransformer:
    """A small classifier whose answers differ from image to image."""
    torch.manual_seed(0)
    model = models_vit.VisionTransformer(
        img_size=32, patch_size=4, embed_dim=64, depth=4, num_heads=4, num_classes=n_classes, global_pool=True
    )
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.3)
    return model.eval()


def save(path: Path, model: torch.nn.Module, **more) -> Path:
    torch.save({"model": model.state_dict(), "args": {"model": "vit_tiny_patch4", "input_size": 32}, **more}, path)
    return path


@torch.no_grad()
def logits_of(model: torch.nn.Module, pixels: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 3] -> [N, C]: the central 32 x 32 pixels, normalised in numpy, as one batch."""
    top, left = (pixels.shape[1] - 32) // 2, (pixels.shape[2] - 32) // 2
    crop = pixels[:, top : top + 32, left : left + 32].astype(np.float64) / 255
    normalised = (crop - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return model(torch.from_numpy(normalised.transpose(0, 3, 1, 2)).float()).double().numpy()


class World:
    """Small copies of every set below `root`, and what is right about each, kept in memory: (logits, label) by set."""

    def __init__(self, root: Path) -> None:
        self.root, self.random = root, np.random.default_rng(0)
        self.model = classifier()
        self.file = save(root / "tiny.pth", self.model)
        self.truth: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.names: dict[str, list[str]] = {}

    def write(self, key: str, folder: str, allowed: list[int], name_of=WNIDS.__getitem__, n: int = 12, size=(36, 44)):
        """`n` images: of half of them the label is the model's first answer, of others its third, or any."""
        pixels = self.random.integers(0, 256, (n, *size, 3), dtype=np.uint8)
        logits = logits_of(self.model, pixels)
        ranked = np.array(allowed)[np.argsort(-logits[:, allowed], axis=1)]
        rank = self.random.choice([0, 0, 2, min(9, len(allowed) - 1)], n)
        labels = ranked[np.arange(n), rank]
        self.names[key] = []
        for i, label in enumerate(labels):
            number = len(self.names[key]) + 1
            path = self.root / folder / name_of(label) / f"ILSVRC2012_val_{number:08d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[i]).save(path)
            self.names[key].append(str(path))
        self.truth[key] = logits, labels

    def expect(self, key: str, allowed: list[int] | None = None) -> dict[str, float]:
        """The figures of a set, counted one image after another."""
        logits, labels = self.truth[key]
        allowed = allowed or list(range(logits.shape[1]))
        top1 = top5 = loss = 0
        for row, label in zip(logits, labels, strict=True):
            best = sorted(allowed, key=lambda i: -row[i])[:5]
            top1 += best[0] == label
            top5 += label in best
            loss += math.log(sum(math.exp(row[i] - row[label]) for i in allowed))
        n = len(labels)
        return {"images": n, "acc1": 100 * top1 / n, "acc5": 100 * top5 / n, "loss": loss / n}


def places(name: str) -> list[int]:
    return [WNIDS.index(wnid) for wnid in robustness.wnids(name)]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    made = World(tmp_path_factory.mktemp("sets"))
    made.write("imagenet", "imagenet/val", list(range(1000)), n=24)
    made.write("imagenet-v2", "v2", list(range(1000)), name_of=str)
    made.write("imagenet-a", "a", places("imagenet-a"))
    made.write("imagenet-r", "r", places("imagenet-r"))
    made.write("imagenet-sketch", "sketch", list(range(1000)))
    for name in [*CORRUPTIONS, "spatter"]:
        for strength in range(1, 6):
            made.write(f"{name}/{strength}", f"c/{name}/{strength}", list(range(1000)), n=4, size=(32, 32))
    made.write("own", "own", [3, 100, 250, 500, 700, 999])
    # ReaL: for number n of 24, the list n - 1; every third is empty, others hold wrong labels beside the right one
    labels = made.truth["imagenet"][1]
    made.real = [[] if i % 3 == 0 else [int(labels[i]), (int(labels[i]) + 7) % 1000][: i % 3] for i in range(24)]
    (made.root / "real.json").write_text(json.dumps(made.real))
    return made


def options(world: World, *names: str) -> list[str]:
    """The command line's part that names the sets."""
    folders = {"imagenet": "imagenet", "imagenet_real": "real.json", "imagenet_v2": "v2", "imagenet_a": "a",
               "imagenet_r": "r", "imagenet_sketch": "sketch", "imagenet_c": "c"}  # fmt: skip
    given = [(f"--{name}", world.root / folder) for name, folder in folders.items() if not names or name in names]
    return [str(word) for pair in given for word in pair] + ([] if names else ["--set", f"own={world.root / 'own'}"])


def run(*words: object, output_dir: Path, resume: Path) -> dict:
    """The script in this process; returns results.json."""
    everything = ["--resume", resume, "--output_dir", output_dir, "--batch_size", 5, "--num_workers", 0, *ON_CPU]
    # what names no file of its own comes last
    args = main_evaluate.get_args_parser().parse_args([str(word) for word in [*everything, *words]])
    main_evaluate.main(args)
    return json.loads((output_dir / "results.json").read_text())


FILES = ("results.json", "results.csv", "results.md", "results_c.png", "per_class.csv", "predictions.csv")


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> Path:
    """The folder of one run over all sets."""
    folder = tmp_path_factory.mktemp("whole")
    run(*options(world), "--per_class", "--predictions", folder / "predictions.csv", output_dir=folder,
        resume=world.file)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def table(whole) -> dict:
    return json.loads((whole / "results.json").read_text())


SCORED = ("imagenet", "imagenet-v2", "imagenet-a", "imagenet-r", "imagenet-sketch", "own")


def scored(world: World, name: str) -> list[int]:
    """The logits that a set is scored by."""
    if name == "own":  # of the folders that are there
        return sorted({int(label) for label in world.truth["own"][1]})
    return places(name)


@pytest.mark.parametrize("name", SCORED)
def test_figures_of_a_set(name, world, table):
    from scipy.stats import binomtest

    row, right = table["sets"][name], world.expect(name, scored(world, name))
    assert 0 < right["acc1"] < right["acc5"]
    for figure, value in right.items():
        assert row[figure] == pytest.approx(value, abs=2e-5), figure
    hits = round(right["acc1"] * right["images"] / 100)
    interval = binomtest(hits, right["images"]).proportion_ci(method="wilson")
    assert row["acc1_ci95"] == pytest.approx([100 * interval.low, 100 * interval.high], abs=1e-4)
    of = {"imagenet-a": 200, "imagenet-r": 200}.get(name, 1000)
    assert row["partial"] == [len(set(world.truth[name][1])), of]
    assert row["published"] is None and row["difference"] is None


def test_200_classes_and_all_classes_differ(world):
    """Else the rule would not be tested."""
    for name in ("imagenet-a", "imagenet-r", "own"):
        assert world.expect(name, scored(world, name)) != pytest.approx(world.expect(name))


def test_real_labels(world, table):
    logits, _ = world.truth["imagenet"]
    hits1 = hits5 = n = loss = 0
    for row, accepted in zip(logits, world.real, strict=True):
        if accepted:
            best = np.argsort(-row)[:5]
            n, hits1, hits5 = n + 1, hits1 + (best[0] in accepted), hits5 + any(i in accepted for i in best)
            probabilities = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
            loss -= math.log(sum(probabilities[i] for i in accepted))
    row = table["sets"]["imagenet-real"]
    assert (row["images"], n) == (16, 16)
    assert [row["acc1"], row["acc5"]] == pytest.approx([100 * hits1 / n, 100 * hits5 / n], abs=1e-5)
    assert row["loss"] == pytest.approx(loss / n, abs=2e-5)


def corruption_errors(world: World, name: str) -> list[float]:
    return [100 - world.expect(f"{name}/{strength}")["acc1"] for strength in range(1, 6)]


def test_mean_corruption_error(world, table):
    row = table["sets"]["imagenet-c"]
    errors = np.array([corruption_errors(world, name) for name in CORRUPTIONS])
    ce = errors.sum(axis=1) / (5 * np.array(ALEXNET))
    assert row["mce"] == pytest.approx(ce.mean(), abs=1e-5)
    assert row["mean_error"] == pytest.approx(errors.mean(), abs=1e-5)
    assert len(set(errors.flatten())) > 3
    for name, own, value in zip(CORRUPTIONS, errors, ce, strict=True):
        assert row["corruptions"][name]["error"] == pytest.approx(own.tolist(), abs=1e-5)
        assert row["corruptions"][name]["ce"] == pytest.approx(value, abs=1e-5)
    spatter = row["corruptions"]["spatter"]  # listed, and in no mean
    assert spatter["error"] == pytest.approx(corruption_errors(world, "spatter"), abs=1e-5)
    assert spatter["ce"] == pytest.approx(sum(spatter["error"]) / 5 / 0.717512, abs=1e-5)
    assert row["images"] == 16 * 5 * 4 and "reason" not in row


def test_header(world, table):
    import hashlib

    assert list(table) == ["checkpoint", "md5", "model", "input_size", "precision", "versions", "sets"]
    assert table["md5"] == hashlib.md5(world.file.read_bytes()).hexdigest()
    assert (table["model"], table["input_size"], table["precision"]) == ("vit_tiny_patch4", [32, 32], "float32")
    assert table["versions"]["torch"] == torch.__version__.split("+")[0] or torch.__version__
    order = [*robustness.SETS, "own"]
    assert list(table["sets"]) == order


def test_csv_and_markdown(whole, table):
    rows = list(csv.DictReader((whole / "results.csv").open()))
    assert len(rows) == len(table["sets"]) + 16 * 5
    for row in rows:
        own = table["sets"][row["set"]]
        if row["corruption"]:
            error = own["corruptions"][row["corruption"]]["error"][int(row["strength"]) - 1]
            assert (float(row["error"]), int(row["images"])) == (error, 4)
        elif row["set"] != "imagenet-c":
            figures = [own["acc1"], *own["acc1_ci95"], own["acc5"], own["loss"]]
            assert [float(row[name]) for name in ("acc1", "acc1_low", "acc1_high", "acc5", "loss")] == figures
        else:
            assert (float(row["mce"]), float(row["mean_error"])) == (own["mce"], own["mean_error"])
    text = (whole / "results.md").read_text()
    for name, row in table["sets"].items():
        assert f"| {name}" in text and f"{row.get('acc1', row.get('mce')):.2f}" in text
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 2 and all(len({line.count("|") for line in block.splitlines()}) == 1 for block in tables)


def test_predictions(whole, world):
    rows = list(csv.DictReader((whole / "predictions.csv").open()))
    assert len(rows) == 24 + 5 * 12 + 16 * 5 * 4
    by_file = {row["file"]: row for row in rows}
    for name in ("imagenet", "imagenet-a", "own"):
        allowed = scored(world, name)
        logits, labels = world.truth[name]
        for path, row, label in zip(world.names[name], logits, labels, strict=True):
            found = by_file[path]
            share = np.exp(row[allowed] - row[allowed].max())
            share /= share.sum()
            best = np.argsort(-share)[:5]
            k = len(best)
            assert found["label"] == WNIDS[label]
            assert [found[f"class_{i + 1}"] for i in range(k)] == [WNIDS[allowed[i]] for i in best]
            shown = [float(found[f"probability_{i + 1}"]) for i in range(k)]
            assert shown == pytest.approx(share[best].tolist(), abs=1e-5)
            assert all(found[f"class_{i}"] == "" for i in range(k + 1, 6))


def test_parquet_holds_the_same(world, whole, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    run(*options(world, "imagenet_a"), "--predictions", tmp_path / "p.parquet", output_dir=tmp_path, resume=world.file)
    wanted = [row for row in csv.DictReader((whole / "predictions.csv").open()) if row["set"] == "imagenet-a"]
    found = parquet.read_table(tmp_path / "p.parquet").to_pylist()
    assert [{name: "" if value is None else str(value) for name, value in row.items()} for row in found] == [
        {name: str(float(value)) if name.startswith("prob") and value else value for name, value in row.items()}
        for row in wanted
    ]


def test_per_class(whole, world):
    rows = list(csv.DictReader((whole / "per_class.csv").open()))
    logits, labels = world.truth["imagenet"]
    for label in set(labels):
        own = logits[labels == label].argmax(axis=1) == label
        row = next(row for row in rows if (row["set"], row["class"]) == ("imagenet", WNIDS[label]))
        assert (int(row["images"]), float(row["acc1"])) == (len(own), pytest.approx(100 * own.mean(), abs=1e-5))
    assert not (whole / "confusion_imagenet.png").exists()  # 1,000 classes


def test_terminal_shows_aligned_columns(world, tmp_path, capsys):
    run(*options(world, "imagenet", "imagenet_a"), output_dir=tmp_path, resume=world.file)
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("set "))
    end = lines[head].index("loss") + 4
    for line in lines[head + 1 : head + 3]:
        assert line[end - 1].isdigit() and len(line) == end


# the same bytes


@pytest.mark.slow
def test_two_processes_same_bytes(world, whole, tmp_path):
    torchrun("main_evaluate.py", "--resume", world.file, *options(world), "--output_dir", tmp_path, "--batch_size", 5,
             "--num_workers", 1, "--per_class", "--predictions", tmp_path / "predictions.csv", *ON_CPU)  # fmt: skip
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_every_image_goes_to_one_process_in_the_same_batch(world, world_size):
    listed = robustness.list_sets({"imagenet": str(world.root / "imagenet"), "imagenet-c": str(world.root / "c")})
    parts = to_parts(listed, WNIDS, 32)

    def batches(rank: int, size: int) -> list[list[tuple[int, int]]]:
        return list(PartBatches(parts, 5, rank, size))

    shares = [batches(rank, world_size) for rank in range(world_size)]
    assert sorted(sum(shares, [])) == sorted(batches(0, 1))
    keys = [key for batch in sum(shares, []) for key in batch]
    assert sorted(keys) == [(p, i) for p, part in enumerate(parts) for i in range(len(part.files))]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_killed_at_random_moments_same_bytes(world, whole, tmp_path):
    words = [*options(world), "--per_class", "--predictions", tmp_path / "predictions.csv"]
    chance, finished = random.Random(0), []
    fork = multiprocessing.get_context("fork")

    def count() -> int:
        return len(list((tmp_path / "parts").rglob("[!.]*.npz")))  # not what a kill left half-written

    for life in range(8):  # each ends at another part, whatever the machine's speed
        child = fork.Process(target=run, args=words, kwargs={"output_dir": tmp_path, "resume": world.file})
        child.start()
        goal = chance.randint(10 * life + 1, 10 * life + 10)
        while child.is_alive() and count() < goal:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.02))
        child.kill()
        child.join()
        finished.append(count())
    assert finished == sorted(finished) and any(0 < n < 86 for n in finished), finished
    run(*words, output_dir=tmp_path, resume=world.file)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name
    assert not list(tmp_path.rglob(".*.tmp.*"))


def test_goes_on_where_it_was(world, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        main_evaluate, "evaluate", lambda model, part, *a: seen.append(part.key) or evaluate(model, part, *a)
    )
    run(*options(world, "imagenet"), output_dir=tmp_path, resume=world.file)
    both = run(*options(world, "imagenet", "imagenet_a"), output_dir=tmp_path, resume=world.file)
    assert seen == ["imagenet", "imagenet-a"]
    again = run(*options(world, "imagenet_a"), output_dir=tmp_path, resume=world.file)
    assert seen == ["imagenet", "imagenet-a"] and again == both  # what is there stays in the table
    (tmp_path / "parts" / "imagenet-a.npz").write_bytes(b"half")
    run(*options(world, "imagenet_a"), output_dir=tmp_path, resume=world.file)
    assert seen == ["imagenet", "imagenet-a", "imagenet-a"]


def test_other_images_are_evaluated_again(world, tmp_path):
    shutil.copytree(world.root / "own", tmp_path / "own")
    own = ("--set", f"own={tmp_path / 'own'}")
    first = run(*own, output_dir=tmp_path / "out", resume=world.file)
    shutil.copy(
        world.names["own"][0], Path(str(tmp_path / "own"), Path(world.names["own"][0]).parent.name, "one_more.png")
    )
    second = run(*own, output_dir=tmp_path / "out", resume=world.file)
    assert second["sets"]["own"]["images"] == first["sets"]["own"]["images"] + 1


def test_one_loader_starts_its_workers_once(world, tmp_path, monkeypatch):
    started = []
    start = multiprocessing.process.BaseProcess.start
    monkeypatch.setattr(
        multiprocessing.process.BaseProcess, "start", lambda self: started.append(self.name) or start(self)
    )
    run(*options(world, "imagenet_c"), "--num_workers", 1, output_dir=tmp_path, resume=world.file)
    assert len(started) == 1  # for 80 parts


def test_batches_filled_up_for_the_compiler_count_the_same(world):
    parts = to_parts(robustness.list_sets({}, [("own", str(world.root / "own"))]), WNIDS, 32)

    env, records = Dist(torch.device("cpu")), []
    for full in (0, 5):
        loader, (n,) = parts_loader(parts, 5, env, False, 0, False, 0)
        shapes = []
        model = world.model
        hook = model.register_forward_pre_hook(lambda _, inputs: shapes.append(len(inputs[0])))  # noqa: B023
        records.append(evaluate(model, parts[0], iter(loader), n, env, None, full)[0])
        hook.remove()
        assert shapes == ([5, 5, 5] if full else [5, 5, 2])
    assert (records[0]["top"] == records[1]["top"]).all()


# layouts


def test_other_layouts_of_the_same_images(world, table, tmp_path):
    for name in CORRUPTIONS:  # as the archives unpack, but three that lie flat
        group = tmp_path / "c" if name in ("fog", "snow", "frost") else tmp_path / "c" / GROUP_OF[name]
        shutil.copytree(world.root / "c" / name, group / name)
    shutil.copytree(world.root / "c" / "spatter", tmp_path / "c" / "extra" / "spatter")
    found = run("--imagenet_c", tmp_path / "c", "--imagenet", world.root / "imagenet" / "val",
                output_dir=tmp_path / "out", resume=world.file)  # fmt: skip
    assert found["sets"] == {name: table["sets"][name] for name in ("imagenet", "imagenet-c")}


def test_missing_corruptions_and_strengths_make_no_mean(world, table, tmp_path):
    shutil.copytree(world.root / "c", tmp_path / "c")
    shutil.rmtree(tmp_path / "c" / "fog")
    shutil.rmtree(tmp_path / "c" / "snow" / "2")
    row = run("--imagenet_c", tmp_path / "c", output_dir=tmp_path / "out", resume=world.file)["sets"]["imagenet-c"]
    assert row["mce"] is None and row["mean_error"] is None
    assert "fog 1 2 3 4 5" in row["reason"] and "snow 2" in row["reason"] and "frost" not in row["reason"]
    whole = table["sets"]["imagenet-c"]["corruptions"]
    assert "fog" not in row["corruptions"]
    assert row["corruptions"]["snow"]["error"][1] is None and row["corruptions"]["snow"]["ce"] is None
    for name in set(CORRUPTIONS) - {"fog", "snow"}:
        assert row["corruptions"][name] == whole[name]
    assert (tmp_path / "out" / "results_c.png").stat().st_size > 0
    # the archives one after another, the images removed in between: the table grows
    shutil.rmtree(tmp_path / "c")
    for name in ("fog", "snow"):
        shutil.copytree(world.root / "c" / name, tmp_path / "c" / name)
    row = run("--imagenet_c", tmp_path / "c", output_dir=tmp_path / "out", resume=world.file)["sets"]["imagenet-c"]
    assert row == table["sets"]["imagenet-c"]


def test_pixels_of_imagenet_c():
    """224 pixels are not touched where 224 are asked for, all of them are enlarged for 448; others are cropped."""
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 224, 224), dtype=np.uint8))
    part = robustness.Listed("imagenet-c", "--imagenet_c", "", robustness.PackedFiles([("x", 0)]), [WNIDS[0]], "fog", 1)
    for size, resized in (
        (224, None),
        (448, (448, 448)),
        ((224, 224), None),
        ((448, 448), (448, 448)),
        (160, (160,) * 2),
    ):
        transform = to_parts([part], WNIDS, size)[0].transform
        out = transform(pixels)[0].permute(2, 0, 1)
        if resized is None:
            assert torch.equal(out, pixels)
        else:
            image = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize(resized, Image.Resampling.BICUBIC)
            assert np.abs(np.asarray(image).astype(int) - out.permute(1, 2, 0).numpy()).max() <= 1
    other = robustness.Listed("imagenet", "--imagenet", "", part.files, [WNIDS[0]])
    assert to_parts([other], WNIDS, 224)[0].transform == eval_transform(224) != CentreCrop((224,) * 2, (224,) * 2)


# classifiers of other classes


@pytest.mark.parametrize("n_logits", [1001, 21841])
def test_more_logits_than_imagenet(n_logits, world, table, tmp_path):
    """The 1,000 of ImageNet are picked by name; without names that is refused."""
    places = np.random.default_rng(0).permutation(n_logits)[:1000]
    model = classifier(n_logits)
    with torch.no_grad():
        model.head.bias.fill_(100)  # what must not be counted
        model.load_state_dict(
            {**world.model.state_dict(), "head.weight": model.head.weight, "head.bias": model.head.bias}
        )
        model.head.weight[places], model.head.bias[places] = world.model.head.weight, world.model.head.bias
    file = save(tmp_path / "wide.pth", model)
    sets = options(world, "imagenet", "imagenet_real", "imagenet_v2", "imagenet_a")
    with pytest.raises(UserError, match=f"{n_logits} classes and does not name them.*--classes"):
        run(*sets, output_dir=tmp_path / "out", resume=file)
    names = [f"other {i}" for i in range(n_logits)]
    for place, wnid in zip(places, WNIDS, strict=True):
        names[place] = wnid
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    found = run(*sets, "--classes", tmp_path / "names.txt", output_dir=tmp_path / "out", resume=file)["sets"]
    for name, row in found.items():
        right = table["sets"][name]
        assert {**row, "loss": 0} == {**right, "loss": 0}
        assert row["loss"] == pytest.approx(right["loss"], abs=2e-5)


def train(script, folder: Path, data: Path, *words: object) -> Path:
    """A classifier of the script's own, in this process."""
    words = ["--data_path", data, "--output_dir", folder, "--log_dir", "", "--num_workers", 0, *ON_CPU, *words]
    script.main(script.get_args_parser().parse_args([str(word) for word in words]))
    return folder


@pytest.mark.parametrize("script", [main_finetune, main_linprobe])
def test_own_classifier_on_own_sets(script, tmp_path, capsys):
    """Names come with the checkpoint; the figures are those of --eval; sets may have fewer or more folders."""
    data = write_image_folder(tmp_path / "data", classes=("b10", "b9", "cat"))
    small = ("--model", "vit_tiny_patch4", "--input_size", 32, "--nb_classes", 3, "--batch_size", 4)
    train(script, tmp_path / "run", data, *small, "--epochs", 1)
    file = tmp_path / "run" / "checkpoint-0.pth"
    assert load(file)["classes"] == ["b10", "b9", "cat"]
    stats = json.loads((tmp_path / "run" / "log.txt").read_text().splitlines()[-1])
    sets = ("--set", f"val={data / 'val'}")
    pooling = ("--global_pool", "--cls_token")[:: 1 if script is main_finetune else -1]
    row = run(*sets, "--per_class", pooling[0], output_dir=tmp_path / "out", resume=file)["sets"]["val"]
    with pytest.raises(UserError, match=f"{pooling[1]}: .* was trained with {pooling[0]}"):
        run(*sets, pooling[1], output_dir=tmp_path / "out", resume=file)
    assert row["acc1"] == pytest.approx(stats["test_acc1"], abs=1e-5)
    assert row["loss"] == pytest.approx(stats["test_loss"], abs=2e-5) and "partial" not in row
    assert Image.open(tmp_path / "out" / "confusion_val.png").size > (100, 100)
    with pytest.raises(UserError, match="class folders of .* are no class of imagenet|no class of the classifier"):
        run("--imagenet", data / "val", output_dir=tmp_path / "out", resume=file)
    # fewer folders
    few = tmp_path / "few"
    shutil.copytree(data / "val" / "cat", few / "cat")
    row = run("--set", f"few={few}", output_dir=tmp_path / "out", resume=file)["sets"]["few"]
    assert (row["acc1"], row["partial"]) == (100, [1, 3])  # the only logit that the folder names
    # more folders
    shutil.copytree(data / "val" / "cat", few / "dog")
    with pytest.raises(UserError, match="no class of the classifier, such as 'dog'.*--skip_unknown_classes"):
        run("--set", f"more={few}", output_dir=tmp_path / "out", resume=file)
    capsys.readouterr()
    rows = run("--set", f"more={few}", "--skip_unknown_classes", output_dir=tmp_path / "out", resume=file)["sets"]
    assert rows["more"] == rows["few"] and "'dog': left out" in capsys.readouterr().out


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> tuple[Path, Path]:
    """A real classifier of handwritten digits, and a folder of 300 images that it has not seen."""
    from sklearn.datasets import load_digits

    root, data = tmp_path_factory.mktemp("digits"), load_digits()
    scans = [Image.fromarray((scan * (255 / 16)).astype(np.uint8)) for scan in data.images]
    scans = [scan.resize((16, 16), Image.Resampling.BICUBIC).convert("RGB") for scan in scans]
    for i in range(1497, len(scans)):
        path = root / "val" / f"digit {data.target[i]}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        scans[i].save(path)
    torch.manual_seed(0)
    model = models_vit.vit_tiny_patch4(img_size=16, num_classes=10, global_pool=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    pixels = torch.from_numpy(np.stack([np.asarray(scan) for scan in scans[:1497]]))
    imgs, labels = normalise(pixels, torch.zeros(1497, dtype=torch.bool)), torch.from_numpy(data.target[:1497])
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, step / 20) * (1 - step / 400)
        some = torch.randperm(1497)[:32]
        torch.nn.functional.cross_entropy(model(imgs[some]), labels[some]).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {"model": model.state_dict(), "args": {"model": "vit_tiny_patch4", "input_size": 16}}
    torch.save({**state, "classes": [f"digit {i}" for i in range(10)]}, root / "digits.pth")
    return root, root / "digits.pth"


@pytest.mark.slow
def test_real_classifier_on_corrupted_digits(digits, tmp_path):
    """scikit-image corrupts, scikit-learn counts."""
    from skimage.filters import gaussian
    from skimage.util import random_noise
    from sklearn.metrics import accuracy_score, confusion_matrix, recall_score

    root, file = digits
    corruptions = {
        "clean": lambda image, s: image,
        "gaussian_noise": lambda image, s: random_noise(image, "gaussian", rng=0, var=0.08 * s),
        "impulse_noise": lambda image, s: random_noise(image, "s&p", rng=0, amount=0.08 * s),
        "gaussian_blur": lambda image, s: gaussian(image, sigma=0.8 * s),
    }
    sets = []
    for name, corrupt in corruptions.items():
        for strength in (1, 3, 5) if name != "clean" else (1,):
            for path in (root / "val").rglob("*.png"):
                image = corrupt(np.asarray(Image.open(path)) / 255, strength)
                target = tmp_path / f"{name}-{strength}" / path.parent.name / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((image * 255).astype(np.uint8)).save(target)
            sets += ["--set", f"{name}-{strength}={tmp_path / f'{name}-{strength}'}"]
    out = tmp_path / "out"
    rows = run(*sets, "--per_class", "--predictions", out / "p.csv", output_dir=out, resume=file)["sets"]
    assert rows["clean-1"]["images"] == 300 and rows["clean-1"]["acc1"] > 70
    for name in list(corruptions)[1:]:
        accuracies = [rows[f"{name}-{strength}"]["acc1"] for strength in (1, 3, 5)]
        assert accuracies == sorted(accuracies, reverse=True) and accuracies[-1] < rows["clean-1"]["acc1"] - 10, name
    predictions = list(csv.DictReader((out / "p.csv").open()))
    per_class = list(csv.DictReader((out / "per_class.csv").open()))
    names = [f"digit {i}" for i in range(10)]
    for name, row in rows.items():
        own = [(line["label"], line["class_1"]) for line in predictions if line["set"] == name]
        labels, answers = zip(*own, strict=True)
        assert row["acc1"] == pytest.approx(100 * accuracy_score(labels, answers), abs=1e-5)
        recall = recall_score(labels, answers, labels=names, average=None, zero_division=0)
        found = [float(line["acc1"]) for line in per_class if line["set"] == name]
        assert found == pytest.approx((100 * recall).tolist(), abs=1e-5)
    from util.look import tables

    places = [[names.index(value) for value in column] for column in (labels, answers)]
    matrix = tables.confusion(np.array(places[0]), np.array(places[1]), 10)
    assert (matrix == confusion_matrix(labels, answers, labels=names)).all()


# bad input


def folder_of(tmp_path: Path, *paths: str) -> Path:
    for path in paths:
        (tmp_path / "bad" / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(".png"):
            Image.new("RGB", (32, 32)).save(tmp_path / "bad" / path)
        else:
            (tmp_path / "bad" / path).touch()
    return tmp_path / "bad"


FOG = f"fog/1/{WNIDS[0]}/1.png"
BAD = {
    "no folder": ("imagenet", [], "there is no such folder"),
    "no class folders": ("imagenet", ["1.png"], "no class folders"),
    "empty class": ("imagenet", [f"{WNIDS[0]}/1.png", f"{WNIDS[1]}/x.txt"], f"hold no image, such as '{WNIDS[1]}'"),
    "unknown wnid": ("imagenet_sketch", [f"{WNIDS[0]}/1.png", "n99999999/1.png"], "such as 'n99999999'"),
    "packed": ("imagenet_a", ["imagenet-a.tar"], "imagenet-a.tar lies there: unpack it"),
    "not of the 200": ("imagenet_a", [f"{WNIDS[0]}/1.png"], f"no class of imagenet-a, such as '{WNIDS[0]}'"),
    "not of the 200 of R": ("imagenet_r", [f"{WNIDS[0]}/1.png"], f"no class of imagenet-r, such as '{WNIDS[0]}'"),
    "wnids for numbers": ("imagenet_v2", [f"{WNIDS[0]}/1.png"], "none of 0 to 999"),
    "number too large": ("imagenet_v2", ["0/1.png", "1000/1.png"], "'1000' is none of 0 to 999"),
    "number twice": ("imagenet_v2", ["7/1.png", "007/1.png"], "'007' is none of 0 to 999"),
    "misspelt corruption": ("imagenet_c", [FOG, f"frosst/1/{WNIDS[0]}/1.png"], "frosst is no corruption"),
    "misspelt in a group": ("imagenet_c", [f"noise/fogg/1/{WNIDS[0]}/1.png"], "fogg is no corruption"),
    "corruption twice": ("imagenet_c", [FOG, "weather/" + FOG], "fog is there twice"),
    "strength 6": ("imagenet_c", [FOG, f"fog/6/{WNIDS[0]}/1.png"], "'6' is no strength"),
    "no strength": ("imagenet_c", [f"fog/{WNIDS[0]}/1.png"], f"'{WNIDS[0]}' is no strength"),
    "no corruption": ("imagenet_c", ["noise.tar"], "holds no corruption.*noise.tar lies there"),
    "half-unpacked": ("imagenet_c", [FOG, f"fog/2/{WNIDS[0]}/x.part"], "hold no image"),
    "strength without classes": ("imagenet_c", [FOG, "fog/2/x"], "no class folders"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_no_layout_of_the_set(case, world, tmp_path):
    option, paths, message = BAD[case]
    with pytest.raises(UserError, match=message) as caught:
        run(f"--{option}", folder_of(tmp_path, *paths) if paths else tmp_path / "nowhere", output_dir=tmp_path / "out",
            resume=world.file)  # fmt: skip
    assert option in caught.value.message
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"), ("[" * 100000, "cannot be read"),
        ("{}", "no list of lists"), ("[[1000]]", "no list of lists"), ("[[1], 2]", "no list"),
        ("[[0.5]]", "no list of lists"), ("[[1], [2]]", "has 2 lists and none for"), ("[]", "has 0 lists and none for"),
    ],
)  # fmt: skip
def test_bad_real_labels(content, message, world, tmp_path):
    (tmp_path / "real.json").write_text(content)
    with pytest.raises(UserError, match=message):
        run("--imagenet", world.root / "imagenet", "--imagenet_real", tmp_path / "real.json", output_dir=tmp_path,
            resume=world.file)  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no set to evaluate"),
        (["--imagenet_real", "{own}"], "pass --imagenet too"),
        (["--set", "x={own}", "--set", "x={own}"], "twice"),
        (["--set", "x={own}", "--classes", "{nowhere}"], "cannot be read"),
        (["--set", "x={own}", "--classes", "{names}"], "names 2 classes, but the classifier has 1000"),
        (["--set", "x={own}", "--cls_token"], "was trained with --global_pool"),
        (["--set", "x={own}", "--predictions", "{names}"], "must end in .csv or .parquet"),
        (["--set", "x={own}", "--predictions", "{nowhere}/p.csv"], "no file in a folder that is there"),
        (["--set", "x={own}", "--output_dir", ""], "--output_dir is empty"),
        (["--set=--"], "--set needs NAME=FOLDER|expected"),
    ],
)
def test_bad_options(words, message, world, tmp_path):
    (tmp_path / "names.txt").write_text("a\nb\n")
    places = {"own": world.root / "own", "nowhere": tmp_path / "nowhere", "names": tmp_path / "names.txt"}
    with pytest.raises(UserError, match=message):
        run(*(word.format(**places) for word in words), output_dir=tmp_path, resume=world.file)


@pytest.mark.parametrize(
    "text", ["x", "x=", "=x", "a/b=c", ".=c", "..=c", "imagenet=c", "imagenet-c=c", "a b=c", "x" * 200 + "=c"]
)
def test_bad_names_of_sets(text):
    with pytest.raises(SystemExit):
        main_evaluate.get_args_parser().parse_args(["--set", text])


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["a"], "names 1 classes"),
        ([1] * 1000, "no list of texts"),
        (["a"] * 1000, "'a' twice"),
        ("a" * 1000, "no list of"),
    ],
)
def test_bad_names_in_a_checkpoint(classes, message, world, tmp_path):
    with pytest.raises(UserError, match=message):
        run("--set", f"x={world.root / 'own'}", output_dir=tmp_path,
            resume=save(tmp_path / "odd.pth", world.model, classes=classes))  # fmt: skip


def test_no_classifier(world, tmp_path):
    bare = classifier(0)
    with pytest.raises(UserError, match="holds no classifier"):
        run(*options(world, "imagenet"), output_dir=tmp_path, resume=save(tmp_path / "bare.pth", bare))


def test_another_checkpoint_is_refused_and_loses_nothing(world, tmp_path):
    run(*options(world, "imagenet"), output_dir=tmp_path, resume=world.file)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.name.startswith("results")}
    other = classifier()
    with torch.no_grad():
        other.head.bias += 1
    with pytest.raises(UserError, match=r"results.json is of .*tiny.pth with md5 .* name another --output_dir"):
        run(*options(world, "imagenet_a"), output_dir=tmp_path, resume=save(tmp_path / "other.pth", other))
    with pytest.raises(UserError, match="with precision float32, not bfloat16"):
        run(*options(world, "imagenet"), "--amp", "bf16", output_dir=tmp_path, resume=world.file)
    assert before == {path: path.read_bytes() for path in before}
    (tmp_path / "results.json").unlink()  # killed before it was there
    with pytest.raises(UserError, match="imagenet.npz is of .* name another --output_dir"):
        run(*options(world, "imagenet"), "--amp", "bf16", output_dir=tmp_path, resume=world.file)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(UserError, match="is no table of this script"):
        run(*options(world, "imagenet"), output_dir=tmp_path, resume=world.file)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\xff\xd8\xff\xe0 half a JPEG"])
def test_images_that_cannot_be_read(content, world, tmp_path):
    shutil.copytree(world.root / "own", tmp_path / "own")
    bad = tmp_path / "own" / Path(world.names["own"][0]).parent.name / "bad.png"
    bad.write_bytes(content)
    own = ("--set", f"own={tmp_path / 'own'}")
    with pytest.raises(UserError, match="cannot decode .*bad.png"):
        run(*own, output_dir=tmp_path / "out", resume=world.file)
    rows = run(*own, "--skip_bad_images", output_dir=tmp_path / "out", resume=world.file)["sets"]
    right = world.expect("own", scored(world, "own"))
    assert rows["own"]["skipped_images"] == 1 and rows["own"]["images"] == 12  # and no other takes its place
    assert rows["own"]["acc1"] == pytest.approx(right["acc1"], abs=1e-5)
    assert "1 images could not be decoded" in (tmp_path / "out" / "results.md").read_text()


def test_no_image_can_be_read(world, tmp_path):
    (tmp_path / "own" / WNIDS[3]).mkdir(parents=True)
    (tmp_path / "own" / WNIDS[3] / "bad.png").write_bytes(b"x")
    with pytest.raises(UserError, match="own: none of the 1 images can be decoded"):
        run("--set", f"own={tmp_path / 'own'}", "--skip_bad_images", output_dir=tmp_path / "out", resume=world.file)


def test_logits_that_are_not_finite(world, tmp_path):
    broken = classifier()
    with torch.no_grad():
        broken.head.weight *= 1e38  # finite, but its products are not
    with pytest.raises(NonFiniteLossError, match=r"imagenet: the logits of .*\.png are not finite"):
        run(*options(world, "imagenet"), output_dir=tmp_path, resume=save(tmp_path / "huge.pth", broken))


# published figures


def test_published_figures_by_name_and_by_md5():
    assert results.published_for("mine.pth", "1b25e9" + "0" * 26)["imagenet-a"] == 35.9
    assert results.published_for("mine.pth", "2541f2" + "0" * 26)["imagenet-c"] == 33.8
    assert results.published_for("mae_finetuned_vit_large.pth", "51f550" + "0" * 26)["imagenet-r"] == 59.9
    with project_log() as messages:
        assert results.published_for("mae_finetuned_vit_base.pth", "0" * 32)["imagenet-sketch"] == 34.5
    assert "does not begin with 1b25e9" in messages[0]
    assert results.published_for("mine.pth", "0" * 32) == {}
    assert set(download.MD5.values()) >= {"1b25e9", "51f550", "2541f2"}


def test_released_file_by_its_name(world, table, tmp_path, monkeypatch):
    """Where downloads are kept, as if it had been fetched."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    shutil.copy(world.file, tmp_path / "hub" / "checkpoints" / "mae_finetuned_vit_large.pth")
    small = ("--model", "vit_tiny_patch4", "--input_size", 32)
    found = run(
        *options(world, "imagenet", "imagenet_a"), *small, output_dir=tmp_path / "out",
        resume="mae_finetuned_vit_large",
    )  # fmt: skip
    for name, published in (("imagenet", 85.952), ("imagenet-a", 57.1)):
        row = found["sets"][name]
        assert row == table["sets"][name] | {"published": published, "difference": row["difference"]}
        assert row["difference"] == pytest.approx(row["acc1"] - published, abs=1e-5)


def test_published_figures_are_shown_with_the_difference(world, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "published_for", lambda *_: {"imagenet": 99.9, "imagenet-a": 50.0, "imagenet-c": 51.7})
    sets = run(*options(world, "imagenet", "imagenet_a", "imagenet_c"), output_dir=tmp_path, resume=world.file)["sets"]
    for name, figure, value in (("imagenet", "acc1", 99.9), ("imagenet-a", "acc1", 50.0), ("imagenet-c", "mce", 51.7)):
        assert sets[name]["published"] == value
        assert sets[name]["difference"] == pytest.approx(sets[name][figure] - value, abs=1e-5)
    text = (tmp_path / "results.md").read_text()
    assert f"{sets['imagenet']['difference']:+.2f} *" in text and "imagenet: the published figure lies outside" in text
    low, high = sets["imagenet-a"]["acc1_ci95"]
    assert low < 50 < high and f"| 50.0 | {sets['imagenet-a']['difference']:+.2f} |" in text
