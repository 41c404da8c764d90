"""The benchmarks run, compare the same mathematics, and report what they measured."""

import json

import pytest
import torch
from helpers import run

import models_mae
from benchmarks import common, rivals, throughput

CPU = torch.device("cpu")


def test_the_rivals_compute_the_same_loss():
    """What is timed against ours is the same method: equal weights, images and masks give an equal loss."""
    torch.manual_seed(0)
    ours = models_mae.mae_vit_tiny_patch4(norm_pix_loss=True)
    imgs, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 64)
    expected = ours(imgs, 0.75, noise, loss_only=True)
    ours.__class__ = rivals._EmbedsAll
    assert torch.allclose(ours(imgs, 0.75, noise)[0], expected, atol=1e-6)


def test_rivals_take_turns_and_a_failing_one_has_no_figure(capsys):
    calls = []

    def rival(name, figures):
        figures = iter(figures)
        return lambda: calls.append(name) or next(figures)

    def fails():
        raise RuntimeError("out of memory\nlong text")

    figures = common.measure_in_turn({"a": rival("a", [99, 3, 1, 2]), "b": rival("b", [0, 5, 5, 8]), "c": fails}, 3)
    assert calls == ["a", "b"] * 4  # one round of warm-up
    assert figures == {"a": [3, 1, 2], "b": [5, 5, 8], "c": []}
    assert common.median(figures["a"]) == 2 and common.median(figures["c"]) is None
    assert "c: left out (out of memory)" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "gmacs"), [("mae_vit_base_patch16", 9.78), ("vit_large_patch16", 61.55)])
def test_arithmetic_is_that_of_the_documents(name, gmacs):
    assert abs(throughput.forward_macs(name) / 1e9 - gmacs) < 0.01


@pytest.mark.slow
def test_throughput_prints_a_table_and_writes_json(tmp_path):
    out = tmp_path / "figures.json"
    options = ("--models", "mae_vit_tiny_patch16", "vit_tiny_patch16", "--batch_size", 2, "--steps", 1, "--rounds", 1)
    done = run("benchmarks/throughput.py", *options, "--only", "ours, eager", "as the original trains",
               "--matmul", 64, "--json", out)  # fmt: skip
    written = json.loads(out.read_text())
    rows = written["rows"]
    assert [(row["model"], row["step"]) for row in rows] == [
        (model, step)
        for model in ("mae_vit_tiny_patch16", "vit_tiny_patch16")
        for step in ("ours, eager", "as the original trains")
    ]
    assert all(row["images/s"] > 0 and row["TFLOP/s"] > 0 for row in rows)
    assert rows[1]["x original"] == 1 and abs(rows[0]["x original"] - rows[0]["images/s"] / rows[1]["images/s"]) < 1e-9
    assert "python -m benchmarks.throughput --models" in written["command"] and "torch" in written["versions"]
    assert sum("as the original trains" in line for line in done.stdout.splitlines()) >= 2


@pytest.mark.slow
def test_dataloader_benchmark_measures_every_loader(tmp_path):
    out = tmp_path / "figures.json"
    run("benchmarks/dataloader.py", "--images", 14, "--batch_size", 4, "--num_workers", 0, "--rounds", 1,
        "--model", "mae_vit_tiny_patch16", "--json", out)  # fmt: skip
    rows = {row["loader"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["plain", "timm", "ours, uint8", "ours", "decode alone", "ours + step", "synthetic + step"]
    assert rows["plain"]["x plain"] == 1 and all(row["images/s"] > 0 for row in rows.values())
    assert rows["ours + step"]["images/s"] < rows["ours"]["images/s"]
