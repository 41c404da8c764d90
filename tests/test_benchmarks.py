"""The benchmarks run, compare the same mathematics, and report what they measured."""

import functools
import json
import shlex
import time
import weakref

import pytest
import torch
from helpers import ROOT, run

import models_mae
from benchmarks import attention, common, dataloader, decoders, rivals, tables, throughput

CPU = torch.device("cpu")


def test_the_rivals_compute_the_same_loss():
    """What is timed against ours is the same method: equal weights, images and masks give an equal loss."""
    torch.manual_seed(0)
    ours = models_mae.mae_vit_tiny_patch4(norm_pix_loss=True)
    imgs, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 64)
    expected = ours(imgs, 0.75, noise)[0]
    ours.__class__ = rivals._EmbedsAll
    assert torch.allclose(ours(imgs, 0.75, noise)[0], expected, atol=1e-6)


def test_rivals_take_turns_and_a_failing_one_has_no_figure(capsys):
    calls = []

    def rival(name, figures):
        figures = iter(figures)
        return lambda: calls.append(name) or next(figures)

    def fails():
        raise RuntimeError("out of memory\nlong text")

    left = []
    fails.leave = lambda: left.append("c")  # what it held is freed
    figures = common.measure_in_turn({"a": rival("a", [99, 3, 1, 2]), "b": rival("b", [0, 5, 5, 8]), "c": fails}, 3)
    assert left == ["c"]
    assert calls == ["a", "b"] * 4  # one round of warm-up
    assert figures == {"a": [3, 1, 2], "b": [5, 5, 8], "c": []}
    assert common.median(figures["a"]) == 2 and common.median(figures["c"]) is None
    assert "c: left out (out of memory)" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "gmacs"), [("mae_vit_base_patch16", 9.78), ("vit_large_patch16", 61.55)])
def test_arithmetic_is_that_of_the_documents(name, gmacs):
    macs, size = throughput.forward_macs(name)
    assert abs(macs / 1e9 - gmacs) < 0.01 and size == (224, 224)


@pytest.mark.slow
@pytest.mark.parametrize("one_by_one", [(), ("--one_by_one",)], ids=["in turn", "one by one"])
def test_throughput_prints_a_table_and_writes_json(tmp_path, one_by_one):
    out = tmp_path / "results" / "figures.json"
    options = ("--models", "mae_vit_tiny_patch4", "vit_tiny_patch16", "--batch_size", 2, "--steps", 1, "--rounds", 1)
    skip = [name for name in throughput.PRETRAINING if name not in ("ours, eager", "as the original trains")]
    done = run("benchmarks/throughput.py", *options, *one_by_one, "--skip", *skip, "--matmul", 64, "--json", out)
    written = json.loads(out.read_text())
    rows = written["rows"]
    assert [(row["model"], row["step"]) for row in rows] == [
        (model, step)
        for model in ("mae_vit_tiny_patch4", "vit_tiny_patch16")
        for step in ("ours, eager", "as the original trains")
    ]
    assert all(row["images/s"] > 0 and row["TFLOP/s"] > 0 for row in rows)
    assert rows[1]["x original"] == 1 and abs(rows[0]["x original"] - rows[0]["images/s"] / rows[1]["images/s"]) < 1e-9
    assert "python -m benchmarks.throughput --models" in written["command"] and "torch" in written["versions"]
    assert sum("as the original trains" in line for line in done.stdout.splitlines()) >= 2


def test_the_first_batch_of_each_loader_process_is_not_timed():
    """2 batches of 4 come late, 3 at once."""

    def batches():
        for i in range(5):
            time.sleep(0.5 if i < 2 else 0.01)
            yield torch.zeros(4, 3, 2, 2)

    assert 12 / 0.5 < dataloader.one_pass(2, batches(), None) <= 12 / 0.03  # with the first two at most 20 / 1.03
    with pytest.raises(ValueError, match="5 batches are too few for 5 loader processes: raise --images"):
        dataloader.one_pass(5, batches(), None)


def test_attention_written_out_is_torch_s():
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 5, 4) for _ in range(3)]
    expected = torch.nn.functional.scaled_dot_product_attention(*inputs)
    torch.testing.assert_close(attention.plain(*inputs), expected)
    assert attention.milliseconds(attention.plain, [x.requires_grad_() for x in inputs]) > 0


def test_decoders_are_measured_where_they_give_pillow_s_pixels(monkeypatch, capsys):
    def inverted():
        return lambda data: 255 - decoders.by_pillow(data)

    def missing():
        raise ImportError("No module named 'x'")

    monkeypatch.setattr(decoders, "DECODERS", {**decoders.DECODERS, "inverted": inverted, "missing": missing})
    monkeypatch.setattr("sys.argv", ["decoders.py", "--rounds", "1"])
    decoders.main()
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
    assert rows["Pillow"][1:] == ["1", "1", "1"] and float(rows["ours"][1]) > 0
    assert rows["inverted"] == rows["missing"] == ["-"] * 4


@pytest.mark.slow
def test_dataloader_benchmark_measures_every_loader(tmp_path):
    out = tmp_path / "figures.json"
    run("benchmarks/dataloader.py", "--images", 14, "--batch_size", 4, "--num_workers", 0, "--rounds", 1,
        "--model", "mae_vit_tiny_patch16", "--json", out)  # fmt: skip
    rows = {row["loader"]: row for row in json.loads(out.read_text())["rows"]}
    on_gpu = ["ours, GPU"] if torch.cuda.is_available() else []
    names = ["plain", "timm", "ours, uint8", "ours", *on_gpu, "decode alone", "ours + step", "synthetic + step"]
    assert list(rows) == names
    assert rows["plain"]["x plain"] == 1 and all(row["images/s"] > 0 for row in rows.values())
    assert rows["ours + step"]["images/s"] < rows["ours"]["images/s"]


def test_the_document_s_tables_are_those_of_the_committed_figures():
    text = (ROOT / "BENCHMARKS.md").read_text()
    assert tables.fill(text, ROOT / "benchmarks" / "results") == text


def test_rivals_go_one_by_one_where_asked_and_free_their_memory(monkeypatch):
    events, held = [], []

    def build(key, name, device):
        assert not [ref for ref in held if ref()] or not one_by_one, "the one before still holds its memory"
        weight = torch.zeros(1)
        held.append(weakref.ref(weight))
        return lambda imgs: events.append(key) or weight.add_(1)

    monkeypatch.setattr(throughput, "PRETRAINING", {key: functools.partial(build, key) for key in "ab"})
    for one_by_one in (True, False):
        events.clear()
        args = throughput.get_args(["--batch_size", "1", "--steps", "1", "--rounds", "2"])
        args.one_by_one = one_by_one
        rows = throughput.measure("mae_vit_tiny_patch4", args, CPU, 1.0)
        assert [row["step"] for row in rows] == ["a", "b"]
        # the step that compiles, then a round of warm-up and two that count, of one step each
        assert "".join(events) == ("aaaabbbb" if one_by_one else "aabbabab")


def test_a_rival_that_cannot_run_here_leaves_the_others_their_figures(capsys):
    def without_library():
        raise ModuleNotFoundError("No module named 'transformers'")

    def without_memory():
        raise torch.OutOfMemoryError("out of memory")

    rivals = {"a": without_library, "b": without_memory, "c": lambda: 3.0}
    assert common.measure_in_turn(rivals, 2) == {"a": [], "b": [], "c": [3.0, 3.0]}
    assert "a: left out (No module named 'transformers')" in capsys.readouterr().err


def test_a_run_has_its_variables_and_none_of_the_other_kind_of_device(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(tables.subprocess, "run", lambda command, env, **_: ran.append((command[1:], env)))
    (tmp_path / "BENCHMARKS.md").write_text((ROOT / "BENCHMARKS.md").read_text())
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables.torch.cuda, "is_available", lambda: True)
    tables.main(["cpu_loader", "gpu_base", "--results", str(tmp_path)])
    (cpu, cpu_env), (gpu, gpu_env) = ran
    assert cpu[:2] == ["-m", "benchmarks.dataloader"] and cpu[-2:] == ["--json", str(tmp_path / "cpu_loader.json")]
    assert cpu_env["OMP_NUM_THREADS"] == "1" and cpu_env["CUDA_VISIBLE_DEVICES"] == ""
    assert gpu[:2] == ["-m", "benchmarks.throughput"] and gpu_env.get("CUDA_VISIBLE_DEVICES") != ""
    measured = (ROOT / "BENCHMARKS.md").read_text()
    assert (tmp_path / "BENCHMARKS.md").read_text() == measured  # that folder has not all figures
    tables.main(["--fill", "--results", str(tmp_path)])
    assert (tmp_path / "BENCHMARKS.md").read_text().count("not measured") > measured.count("not measured")
    assert len(ran) == 2
    monkeypatch.setattr(tables, "fill", lambda text, results: f"filled from {results.name}")
    tables.main(["gpu_base"])  # into the default folder
    assert (tmp_path / "BENCHMARKS.md").read_text() == "filled from results"
    del ran[-1]
    tables.main(["--results", str(tmp_path)])
    assert len(ran) == 2 + sum(name.startswith("gpu") for name in tables.RUNS)
    monkeypatch.setattr(tables.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tables.main(["gpu_base"])
    with pytest.raises(SystemExit):
        tables.main(["gpu_bass"])


def test_figures_of_another_command_are_none(tmp_path):
    table, name = tables.TABLES["cpu-loader"], "cpu_loader"
    measured = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    (tmp_path / f"{name}.json").write_text(json.dumps({**measured, "command": measured["command"] + " --images 7"}))
    assert tables.markdown(table, tmp_path) == tables.markdown(table, tmp_path / "nothing")


def test_figures_fill_their_own_cells_and_others_stay_empty(tmp_path):
    """One row of one run was measured."""
    name = "as the original trains"
    row = {"step": name, "images/s": 1234.5, "x original": 1.0, "TFLOP/s": 153.7, "of matmul": 0.1946,
           "peak GB": 60.04, "first step s": None}  # fmt: skip
    where = {"device": "a card", "versions": "torch 9", "date": "2027-01-02", "bf16 matrix product": "790 TFLOP/s",
             "command": tables.RUNS["gpu_large"].command}  # fmt: skip
    (tmp_path / "gpu_large.json").write_text(json.dumps({**where, "rows": [row]}))
    lines = tables.markdown(tables.TABLES["gpu-step"], tmp_path).splitlines()
    empty = tables.markdown(tables.TABLES["gpu-step"], tmp_path / "nothing").splitlines()
    (filled,) = (i for i, line in enumerate(lines) if line.startswith("|") and line != empty[i])
    assert [cell.strip() for cell in lines[filled].split("|")] == ["", "", name, "1,234", "1.00", "154", "19%", "",
                                                                  "60.0", ""]  # fmt: skip
    above = [line for line in lines[:filled] if line.startswith("| `")]
    assert above[-1].startswith("| `mae_vit_large_patch16`, 256 | ours, compiled |")
    (note,) = (line for line in lines if "a card" in line)
    assert "mae_vit_large_patch16" in note and note.endswith(
        "2027-01-02, a card, torch 9; a bf16 matrix product 790 TFLOP/s"
    )
    assert sum(line.endswith("not measured") for line in lines) == len(tables.TABLES["gpu-step"].runs) - 1


@pytest.mark.parametrize("name", tables.RUNS)
def test_a_run_s_command_is_one_and_gives_the_rows_that_are_shown(name):
    """Parsed, not run: what is measured on a GPU must not fail there for want of an option."""
    run_ = tables.RUNS[name]
    if run_.module in ("attention", "decoders"):
        return  # they have no options; the former takes the names of its rows from where this table does
    args = {"throughput": throughput, "dataloader": dataloader}[run_.module].get_args(shlex.split(run_.options))
    if run_.module == "throughput":
        (model,) = args.models
        rows = throughput.PRETRAINING if model in models_mae.MODELS else throughput.FINETUNING
        unmeasured = {*args.skip, *(["ours, CUDA graphs"] if name.startswith("cpu") else [])}
        assert run_.rows == tuple(row for row in rows if row not in unmeasured)
    else:
        assert ("ours + step" in run_.rows) == bool(args.model)
        assert ("ours, GPU" in run_.rows) == (name.startswith("gpu") and args.recipe == "pretrain")
