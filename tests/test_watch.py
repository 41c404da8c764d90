"""What pretraining shows beside its loss: it is right, it changes nothing, and it tells a run that learns nothing."""

import json
from collections import Counter

import numpy as np
import pytest
import test_transfer
import torch
from helpers import ON_CPU, assert_same, load, project_log, run, torchrun, write_image_folder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_pretrain
import models_mae
from util.data import transfer
from util.data.datasets import Images
from util.data.listing import list_images
from util.dist import Dist
from util.errors import UserError
from util.look.features import from_files, knn_accuracy
from util.look.watch import Watch, _labelled_files, mean_image_loss
from util.run.report import TensorBoard
from util.run.run_log import RunLog
from util.transforms import pretrain_transform

CPU = Dist(torch.device("cpu"))
TINY = ("--model", "mae_vit_tiny_patch4", "--input_size", 16, "--batch_size", 8, "--warmup_epochs", 1, *ON_CPU)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("images"), n_train=8, n_val=4)


def watch(folder, env=CPU, **options):
    files = list_images(folder / "train")
    settings = dict(mask_ratio=0.75, amp="off", picture_every=0, knn_every=0, num_workers=0) | options
    return Watch(env, str(folder), Images(files, pretrain_transform(16, 0.5, 0.5)), 16, **settings)


def mae(**options):
    torch.manual_seed(0)
    return models_mae.mae_vit_tiny_patch4(img_size=16, **options)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_the_mean_image_s_loss_is_that_of_predicting_it_for_other_images(norm_pix):
    model = mae(norm_pix_loss=norm_pix)
    torch.manual_seed(1)
    common = torch.randn(1, 3, 16, 16)
    seen, others = (common + 0.5 * torch.randn(n, 3, 16, 16) for n in (4000, 4000))
    patches = model.patchify(seen).double().numpy()
    if norm_pix:
        centred = patches - patches.mean(-1, keepdims=True)
        patches = centred / np.sqrt((centred**2).sum(-1, keepdims=True) / 47 + 1e-6)
    mean_image = torch.from_numpy(patches.mean(0)).float().expand(4000, -1, -1)
    measured = model.forward_loss(others, mean_image, torch.ones(4000, 16)).item()
    assert mean_image_loss(model, seen) == pytest.approx(measured, rel=0.01)
    if not norm_pix:
        assert mean_image_loss(model, seen) == pytest.approx(0.25, rel=0.01)


def test_with_normalised_pixels_of_unlike_images_it_is_1():
    assert mean_image_loss(mae(norm_pix_loss=True), torch.randn(2000, 3, 16, 16)) == pytest.approx(1, rel=0.03)


def after_losses(watcher, losses):
    """The warnings of a run with these losses, as (epoch, text)."""
    model, run_log, warnings = mae(), RunLog(CPU), []
    for epoch, loss in enumerate(losses):
        with project_log() as messages:
            watcher.after_epoch(epoch, model, loss, run_log)
        warnings += [(epoch, message) for message in messages if "nothing is learned yet" in message]
    return warnings


def test_a_run_that_sits_at_the_mean_image_s_loss_is_told_so_every_few_epochs(images):
    with project_log() as messages:
        watcher = watch(images)
        after_losses(watcher, [9.0])
    level = watcher.mean_image_loss
    assert f"gives {level:.4f}" in " ".join(messages)
    warnings = after_losses(watch(images), [level] * 23)
    assert [epoch for epoch, _ in warnings] == [10, 21]
    assert f"the loss is {level:.4f}" in warnings[0][1] and "--blr" in warnings[0][1]
    assert after_losses(watch(images), [3 * level] * 11), "above it as well"


def test_a_run_that_learns_is_left_alone(images):
    watcher = watch(images)
    after_losses(watcher, [9.0])
    level = watcher.mean_image_loss
    assert not after_losses(watch(images), [0.9 * level] * 20), "below the level, even if it stands"
    assert not after_losses(watch(images), [level * (3 - 0.1 * epoch) for epoch in range(25)]), "on its way down"


def test_k_nn_counts_right_votes_whatever_the_chunks(monkeypatch):
    torch.manual_seed(0)
    train, test = (torch.randn(300, 5), torch.arange(300) % 3), (torch.randn(2500, 5), torch.arange(2500) % 3)
    right = 0
    directions = train[0].numpy() / np.linalg.norm(train[0].numpy(), axis=1, keepdims=True)
    for feature, label in zip(test[0].numpy(), test[1].tolist(), strict=True):
        nearest = np.argsort(-directions @ feature)[:7]
        right += np.bincount(train[1].numpy()[nearest], minlength=3).argmax() == label
    assert knn_accuracy(train, test, k=7) == pytest.approx(100 * right / 2500)


def test_votes_cost_no_column_a_class():
    labels = torch.arange(2000) * 10**9  # a one-hot of the neighbours would have 2e12 columns
    features = torch.eye(2000)
    assert knn_accuracy((features, labels), (features, labels), k=1) == 100


def events(folder):
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


@pytest.fixture(scope="module")
def watched(images, tmp_path_factory):
    """A run of 2 epochs that is watched in each, with a broken image in val/."""
    out = tmp_path_factory.mktemp("watched")
    broken = images / "val" / "ant" / "broken.png"
    broken.write_bytes(b"no image")
    options = (*TINY, "--data_path", images, "--epochs", 2, "--num_workers", 0, "--output_dir", out, "--log_dir", out)
    try:
        done = run("main_pretrain.py", *options, "--picture_every", 1, "--knn_every", 1)
    finally:
        broken.unlink()
    return out, done.stdout


def test_tensorboard_gets_pictures_accuracies_and_gradient_norms(watched):
    out, _ = watched
    seen = events(out)
    pictures = seen.Images("reconstructions")
    assert [picture.step for picture in pictures] == [0, 1]
    assert (pictures[0].width, pictures[0].height) == (8 * 134 + 6, 22 + 4 * 134), "8 images, two in a row"
    assert pictures[0].encoded_image_string != pictures[1].encoded_image_string, "the model has moved on"
    assert [point.step for point in seen.Scalars("perf/knn_acc1")] == [0, 1]
    norms = [point.value for point in seen.Scalars("grad_norm")]
    assert len(norms) == len(seen.Scalars("train_loss")) == 6 and min(norms) > 0


def test_log_and_json_lines_have_them_too(watched):
    out, said = watched
    lines = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    assert [set(line) for line in lines] == [{"train_lr", "train_loss", "epoch", "knn_acc1"}] * 2
    for line in lines:
        assert f"* k-NN Acc@1 {line['knn_acc1']:.3f} (k 8, 24 training and 13 validation images" in said
    assert "chance 33.333" in said and "grad_norm: " in said and "to compare the loss with" in said


@pytest.mark.slow
def test_watching_changes_nothing(watched, images, tmp_path):
    out = tmp_path / "unwatched"
    options = (*TINY, "--data_path", images, "--epochs", 2, "--num_workers", 0, "--output_dir", out, "--log_dir", "")
    run("main_pretrain.py", *options, "--picture_every", 0)
    assert_same(load(out / "checkpoint-1.pth")["model"], load(watched[0] / "checkpoint-1.pth")["model"])


@pytest.mark.slow
def test_two_processes_find_the_neighbours_that_one_finds(images, tmp_path):
    accuracies = []
    for start, out in ((run, tmp_path / "one"), (torchrun, tmp_path / "two")):
        options = (*TINY, "--data_path", images, "--epochs", 1, "--num_workers", 0, "--lr", 0, "--knn_every", 1)
        start("main_pretrain.py", *options, "--output_dir", out, "--log_dir", "")
        accuracies.append(json.loads((out / "log.txt").read_text())["knn_acc1"])
    assert accuracies[0] == pytest.approx(accuracies[1])


def test_neighbours_without_class_folders_are_refused_before_the_model_is_built(images, tmp_path):
    done = run(
        "main_pretrain.py",
        "--data_path",
        images / "train",
        "--batch_size",
        8,
        "--knn_every",
        1,
        "--output_dir",
        "",
        code=2,
    )
    assert "--knn_every needs class folders" in done.stderr and "parameters" not in done.stdout
    write_image_folder(tmp_path, n_train=1, n_val=1, classes=("ant", "bee"))
    (tmp_path / "val" / "bee").rename(tmp_path / "val" / "cow")
    with pytest.raises(ValueError, match="different class folders"):
        watch(tmp_path, knn_every=1)


@pytest.fixture
def no_val(tmp_path):
    """Class folders in whose val/ nothing can be decoded."""
    folder = write_image_folder(tmp_path / "images", n_train=3, n_val=1)
    for path in (folder / "val").rglob("*.png"):
        path.write_bytes(b"no image")
    return folder


def said_after(watcher, out, n_epochs=2):
    """What is logged by epochs of a run, and what they return."""
    run_log, seen = RunLog(CPU, "", [TensorBoard(str(out), {})]), []
    with project_log() as messages:
        seen = [watcher.after_epoch(epoch, mae(), 1.0, run_log) for epoch in range(n_epochs)]
    run_log.close()
    return messages, seen


def test_training_goes_on_without_pictures_where_val_has_none(no_val, tmp_path):
    messages, _ = said_after(watch(no_val, picture_every=1), tmp_path / "board")
    assert [message for message in messages if "none of the 3 images can be decoded" in message] == [
        message for message in messages if message.startswith("no pictures from here on: ")
    ]
    assert len(messages) == 2 and "to compare the loss with" in messages[0], "once, and the rest goes on"


def test_training_goes_on_without_neighbours_where_val_has_none(no_val, tmp_path):
    messages, seen = said_after(watch(no_val, knn_every=1), tmp_path / "board")
    assert seen == [{}, {}]
    assert sum(message.startswith("no nearest neighbours from here on: none of the 3") for message in messages) == 1


def other_output(model):
    model.decoder_pred = torch.nn.Linear(64, 7)


def other_target(model):
    model.target = lambda patches: patches[..., :7]


def no_target(model):
    model.target = None


def other_mask(model):
    model.forward_encoder = None


@pytest.mark.parametrize("change", [other_output, other_target, no_target, other_mask])
def test_no_model_ends_its_run_in_a_picture(change, images, tmp_path):
    """Of whatever kind its exception is: one warning, and nothing more of this kind for the rest of the run."""
    model, run_log = mae(), RunLog(CPU, "", [TensorBoard(str(tmp_path), {})])
    change(model)
    watcher = watch(images, picture_every=1, knn_every=1)
    with project_log() as messages:
        seen = [watcher.after_epoch(epoch, model, 1.0, run_log) for epoch in range(3)]
    off = [message for message in messages if "from here on" in message]
    assert any(message.startswith("no pictures from here on: ") for message in off)
    assert len(off) == len({message.split(":")[0] for message in off}), "each once"
    assert all("knn_acc1" in one for one in seen), "what works goes on"
    assert model.training


def test_an_epoch_is_saved_before_anybody_looks_at_it(images, tmp_path, monkeypatch):
    """Also where the look ends the process, as running out of memory does."""

    def end(self, *_):
        raise SystemExit("killed")

    monkeypatch.setattr(Watch, "after_epoch", end)
    args = [*TINY, "--data_path", images, "--epochs", 2, "--num_workers", 0, "--output_dir", tmp_path, "--log_dir", ""]
    with pytest.raises(SystemExit):
        main_pretrain.main(main_pretrain.get_args_parser().parse_args([str(arg) for arg in args]))
    assert load(tmp_path / "checkpoint-0.pth")["epoch"] == 0
    assert json.loads((tmp_path / "log.txt").read_text())["epoch"] == 0


def test_the_mean_image_s_loss_is_the_model_s_own():
    """A loss that is edited in place is what the training is compared with."""
    model, imgs = mae(), torch.randn(50, 3, 16, 16)
    model.forward_loss = lambda imgs, pred, mask: (pred - model.patchify(imgs)).abs().mean()
    patches = model.patchify(imgs).numpy()
    expected = np.mean([np.abs(patches[i] - np.delete(patches, i, 0).mean(0)).mean() for i in range(50)])
    assert mean_image_loss(model, imgs) == pytest.approx(expected, rel=1e-4)


def test_a_rank_does_as_the_one_that_could_not_read(images, tmp_path, monkeypatch):
    monkeypatch.setattr("util.look.watch.gather_on_all", lambda mine: [mine, UserError("a disk is gone")])
    monkeypatch.setattr("util.look.watch.gather", None)  # would wait for the other rank
    messages, seen = said_after(watch(images, knn_every=1), tmp_path / "board", n_epochs=1)
    assert seen == [{}] and "no nearest neighbours from here on: a disk is gone" in messages


def test_pictures_of_a_hub_s_images_are_not_looked_for_where_the_caller_stands(images, monkeypatch):
    monkeypatch.chdir(images)
    files = list_images(images / "train")
    watcher = Watch(
        CPU, None, Images(files, pretrain_transform(16, 0.5, 0.5)), 16, mask_ratio=0.75, amp="off", picture_every=1,
        knn_every=0, num_workers=0,
    )  # fmt: skip
    assert list(watcher.pictured.dataset.source) == files


@pytest.fixture
def listed(images, tmp_path):
    """The same images in lists, in an order of their own, with labels."""
    for split in ("train", "val"):
        files = sorted((images / split).rglob("*.png"), key=lambda path: path.name[::-1])
        (tmp_path / f"{split}.csv").write_text("".join(f"{path},{path.parent.name}\n" for path in files))
    return tmp_path


def knn(*data, out):
    run("main_pretrain.py", *TINY, *data, "--epochs", 1, "--num_workers", 0, "--lr", 0, "--output_dir", out,
        "--log_dir", out, "--knn_every", 1, "--picture_every", 1)  # fmt: skip
    picture = events(out).Images("reconstructions")[0].encoded_image_string
    return json.loads((out / "log.txt").read_text())["knn_acc1"], picture


def test_lists_have_the_neighbours_and_pictures_of_the_same_folders(images, listed, tmp_path):
    lists = ("--data_path", listed / "train.csv", "--val_path", listed / "val.csv")
    accuracy, picture = knn(*lists, out=tmp_path / "lists")
    assert accuracy == pytest.approx(knn("--data_path", images, out=tmp_path / "folders")[0])
    watcher = watch(images, val_path=str(listed / "val.csv"))
    seen = [watcher.pictured.dataset.source[i][0] for i in watcher.pictured.indices]
    assert len(seen) == 8 and all("/val/" in path for path in seen), "pictures alone take them from there, too"


def test_class_numbers_of_lists_may_be_ids_of_many_digits(listed, images):
    ids = {"0": "7", "1": "90000000000000001", "2": "90000000000000002"}
    expected = watch(images, knn_every=1).knn_files
    for split in ("train", "val"):
        lines = (listed / f"{split}.csv").read_text().splitlines()
        rows = [line.rsplit(",", 1) for line in lines if line != "path,label"]
        classes = sorted({label for _, label in rows})
        rows = [(path, ids[str(classes.index(label))]) for path, label in rows]
        (listed / f"{split}.csv").write_text("".join(f"{path},{label}\n" for path, label in rows))
    dataset = Images(list_images(images / "train"), pretrain_transform(16, 0.5, 0.5))
    settings = dict(mask_ratio=0.75, amp="off", picture_every=0, knn_every=1, num_workers=0)
    watcher = Watch(CPU, str(listed / "train.csv"), dataset, 16, val_path=str(listed / "val.csv"), **settings)
    for found, part in zip(watcher.knn_files, expected, strict=True):
        assert Counter(label for _, label in found) == Counter(label for _, label in part)


@pytest.mark.parametrize("name", ["inat2019", "places205"])
def test_neighbours_of_a_published_set(name, tmp_path):
    (tmp_path / "set").mkdir()
    test_transfer.WRITERS[name](tmp_path / "set")
    files = transfer.labelled(name, str(tmp_path / "set"), ("train", "val"), 11, True, False)
    watcher = Watch(
        CPU, str(tmp_path / "set"), Images(files[0], pretrain_transform(16, 0.5, 0.5)), 16, name=name, mask_ratio=0.75,
        amp="off", picture_every=1, knn_every=1, num_workers=0,
    )  # fmt: skip
    assert [list(part) for part in watcher.knn_files] == [list(part) for part in files[:2]]
    messages, (seen, _) = said_after(watcher, tmp_path / "board")
    own = [(mae().encode(from_files([path for path, _ in part], mae()))[1].mean((2, 3)).detach(),
            torch.tensor([label for _, label in part])) for part in files[:2]]  # fmt: skip
    assert seen["knn_acc1"] == pytest.approx(knn_accuracy(*own, k=1))
    assert any("12 training and 5 validation images" in message for message in messages)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"root": "train.csv"}, "--val_path: not given"),
        ({"root": "train.csv", "val_path": "none.csv"}, "none.csv"),
        ({"root": "train.csv", "val_path": "plain.csv"}, "plain.csv, line 1"),
        ({"root": "train.csv", "val_path": "other.csv"}, "no line of train.csv has the label 'yak'"),
        ({"root": "images", "val_path": "val.csv"}, "images is no list"),
        ({"root": "images", "name": "inat2018", "val_path": "val.csv"}, "leave one of them out"),
        ({"root": "images", "name": "inat2018"}, "train2018.json"),
        ({"root": "images", "name": "wds/some"}, "not --dataset wds/some"),
    ],
)
def test_neighbours_of_lists_that_do_not_fit_are_refused(options, said, images, listed, monkeypatch):
    monkeypatch.chdir(listed)
    (listed / "images").symlink_to(images)
    (listed / "plain.csv").write_text("a.png\n")
    (listed / "other.csv").write_text("a.png,yak\n")
    dataset = Images(list_images(images / "train"), pretrain_transform(16, 0.5, 0.5))
    settings = dict(mask_ratio=0.75, amp="off", picture_every=0, knn_every=1, num_workers=0)
    with pytest.raises(UserError, match=f"--knn_every.*{said}"):
        Watch(CPU, options.pop("root"), dataset, 16, **settings, **options)


def test_more_processes_than_images_are_refused_before_training(images):
    with pytest.raises(ValueError, match="each of 13 processes, but there are 24 to train on and 12 to validate on"):
        watch(images, Dist(torch.device("cpu"), world_size=13), knn_every=1)
    watch(images, Dist(torch.device("cpu"), world_size=12), knn_every=1)


def test_what_does_not_divide_by_the_ranks_is_left_out_of_all_classes(images):
    dataset = Images(list_images(images / "train"), pretrain_transform(16, 0.5, 0.5))
    train, val = _labelled_files(str(images), "", None, dataset, world_size=5)
    assert (len(train), len(val)) == (20, 10)
    assert max(Counter(label for _, label in train).values()) == 7
    assert min(Counter(label for _, label in val).values()) == 3
