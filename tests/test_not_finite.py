"""A loss or gradient that is not finite: it moves no weight, and --on_nan decides what happens then."""

import math

import pytest
import torch
from helpers import assert_same, load, project_log, torchrun, write_image_folder
from test_scripts import PRETRAIN, log_txt, train
from torch import nn

import main_pretrain
from util.dist import shutdown
from util.errors import NonFiniteLossError
from util.lars import LARS
from util.run import exits, progress
from util.run.files import checkpoints
from util.run.not_finite import IN_A_ROW, WINDOW, Strikes
from util.step import Step

DEVICE = torch.device("cpu")
OPTIMIZERS = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.1, fused=True),
    "AdamW, not fused": lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.1, fused=False),  # as on mps
    "LARS": lambda params: LARS(params, lr=0.1, weight_decay=0.1),
}


def steps_of(kind: str, factors: list[float], clip_grad: float | None = None) -> tuple[nn.Module, list[float]]:
    """A linear layer after one step for each factor, which its loss is multiplied by; and the gradient norms."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    step = Step(model, OPTIMIZERS[kind](model.parameters()), DEVICE, clip_grad=clip_grad)
    x, norms = torch.randn(4, 3), []
    for factor in factors:
        step(lambda: model(x).square().mean() * factor, update=True)  # noqa: B023
        norms.append(step.grad_norm.item())
    return step, norms


@pytest.mark.parametrize("clip_grad", [None, 0.01])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_bad_update_leaves_weights_moments_and_counters_as_they_were(kind, bad, clip_grad):
    with_bad, norms = steps_of(kind, [1.0, bad, 1.0, bad, bad, 0.5], clip_grad)
    without, good_norms = steps_of(kind, [1.0, 1.0, 0.5], clip_grad)
    assert_same(with_bad.model.state_dict(), without.model.state_dict())
    assert_same(with_bad.optimizer.state_dict(), without.optimizer.state_dict())
    assert [norm for norm in norms if math.isfinite(norm)] == good_norms and len(norms) == 6
    expected = sum(p.grad.square().sum() for p in graded(kind)) ** 0.5
    assert good_norms[0] == pytest.approx(expected.item())


def graded(kind: str) -> list[nn.Parameter]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    model(torch.randn(4, 3)).square().mean().backward()
    return list(model.parameters())


def test_lars_takes_loss_scaling_s_word_on_the_device():
    """As torch's fused optimizers: gradients that are scaled are divided, and those that overflow are left out."""
    models = [nn.Linear(3, 2, bias=False) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    scaled, plain = (LARS(model.parameters(), lr=0.1) for model in models)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor in (1.0, math.inf, 2.0):
        scaler.scale(models[0].weight.square().sum() * factor).backward()
        scaler.step(scaled)
        scaler.update()
        if math.isfinite(factor):
            (models[1].weight.square().sum() * factor).backward()
            plain.step()
        scaled.zero_grad(), plain.zero_grad()
    assert torch.allclose(models[0].weight, models[1].weight)
    assert scaler.get_scale() == 4.0


# what the strikes say


def judged(policy: str, bad: set[int], n: int, accum_iter: int = 1, every: int = 20, roll_back=lambda: True) -> list:
    """Messages of n passes read 20 at a time, of which some are bad; the last one may be an error."""
    strikes = Strikes(policy, accum_iter, roll_back, lambda: 1.0)
    passes = [(i, {"lr": 0.1, "loss": math.nan if i in bad else 1.0}, math.inf if i in bad else 2.5) for i in range(n)]
    with project_log() as lines:
        try:
            for first in range(0, n, every):
                strikes.judge("Epoch: [3]", passes[first : first + every])
        except NonFiniteLossError as error:
            lines.append(str(error))
    return lines


def test_one_strike_is_forgiven_and_two_within_the_window_stop():
    (line,) = judged("stop", {30}, 100)
    assert "left" not in line and "moves no weight" in line
    first, error = judged("stop", {30, 47}, 100)
    for part in ("Epoch: [3]", "iteration 47", "iterations 40 to 59", "lr 0.1", "gradient norm inf", "before 2.5"):
        assert part in error, part
    assert "--blr" in error
    assert len(judged("stop", {30, 31 + WINDOW}, WINDOW + 50)) == 2  # warnings both
    assert "second time" in judged("stop", {30, 30 + WINDOW}, WINDOW + 50)[-1]


def test_passes_of_one_step_are_one_strike_even_across_a_log_point():
    assert len(judged("stop", {16, 17, 18, 19}, 100, accum_iter=4)) == 1
    assert len(judged("stop", {18, 19, 20, 21}, 100, accum_iter=4, every=20)) == 2  # two steps
    assert len(judged("stop", {8, 10, 11}, 100, accum_iter=4, every=10)) == 1


def test_steps_that_log_points_cut_in_pieces_count_once():
    """32 or 64 passes a step, read 20 at a time."""
    assert "second time" in judged("stop", {5, 5 + 32 * 900}, 32 * 910, accum_iter=32)[-1]
    lines = judged("skip", set(range(5000)), 64 * 25, accum_iter=64)
    assert len(lines) == IN_A_ROW and f"iteration {64 * IN_A_ROW - 1} " in lines[-1]
    assert len(judged("stop", set(range(64, 128)), 64 * 25, accum_iter=64)) == 1
    # what is still under way is not judged yet
    assert judged("stop", {3}, 20, accum_iter=32) == [] and len(judged("stop", {3}, 40, accum_iter=32)) == 1


def test_gradients_that_no_loss_scale_makes_finite_stop_the_run():
    model = nn.Linear(3, 2)
    step = Step(model, OPTIMIZERS["AdamW"](model.parameters()), DEVICE, torch.float16)
    strikes, before = Strikes("skip", 1, lambda: True, step.scaler.get_scale), model.weight.detach().clone()
    with pytest.raises(NonFiniteLossError, match="loss scale has fallen to .*e-05 .*--amp bf16"):
        for i in range(100):
            loss = step(lambda: model(torch.ones(1, 3)).float().sum() * 1e37, update=True)
            strikes.judge("Epoch: [0]", [(i, {"loss": loss.item()}, 0.0)])
    assert i == 29 and torch.equal(model.weight, before)


def test_loss_scale_that_was_resumed_below_the_bound_may_rise():
    scales = iter([5e-5, 5e-5, 1e-4, 2e-4, 1e-4, 5e-5])
    strikes = Strikes("stop", 1, lambda: True, lambda: next(scales))
    for i in range(5):
        strikes.judge("Epoch: [0]", [(i, {"loss": 1.0}, 0.0)])
    with pytest.raises(NonFiniteLossError, match="5e-05"):
        strikes.judge("Epoch: [0]", [(5, {"loss": 1.0}, 0.0)])


def test_skip_goes_on_until_nothing_is_good_any_more():
    bad = set(range(0, 100, 2))
    assert len(judged("skip", bad, 100)) == 50 and "20th in a row" not in judged("skip", bad, 100)[-1]
    lines = judged("skip", set(range(50, 100)), 100)
    assert len(lines) == IN_A_ROW and "in a row" in lines[-1]


def test_rollback_goes_back_three_times_at_most_and_stops_without_a_checkpoint():
    calls = []
    lines = judged("rollback", {1, 2, 21, 22, 41, 42, 61, 62}, 100, roll_back=lambda: calls.append(1) or True)
    assert len(calls) == 3 and "back to the last checkpoint" in lines[1] and "second time" in lines[-1]
    assert "second time" in judged("rollback", {1, 2}, 100, roll_back=lambda: False)[-1]


# runs


def poison(monkeypatch, *bad: int) -> None:
    """The batches of these numbers, counted from the start of the process, become NaN."""
    count, before = [0], progress.Progress.__iter__

    def batches(self):
        for i, (imgs, labels) in before(self):
            yield i, (imgs * math.nan if count[0] in bad else imgs, labels)
            count[0] += 1

    monkeypatch.setattr(progress.Progress, "__iter__", batches)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """48 training images: 12 batches of 4."""
    return write_image_folder(tmp_path_factory.mktemp("images"), n_train=16, n_val=1)


def test_run_with_one_bad_batch_goes_on_and_says_so(images, tmp_path, monkeypatch):
    poison(monkeypatch, 5)
    said = train("pretrain", tmp_path, *PRETRAIN, "--data_path", images, "--epochs", 2)
    assert said.count("NOT FINITE") == 1 and "iteration 5" in said
    assert all(math.isfinite(line["train_loss"]) for line in log_txt(tmp_path))
    assert load(tmp_path / "checkpoint-1.pth")["optimizer"]["state"][0]["step"] == 23


def test_stop_saves_the_weights_without_the_bad_updates(images, tmp_path, monkeypatch, capsys):
    args = (*PRETRAIN, "--data_path", images, "--epochs", 2)
    with monkeypatch.context() as patch:
        poison(patch, 14, 15)
        options = main_pretrain.get_args_parser().parse_args(
            [str(arg) for arg in (*args, "--output_dir", tmp_path, "--log_dir", "")]
        )
        with pytest.raises(SystemExit) as left:
            exits.run(main_pretrain.main, options)
    assert left.value.code == 3
    error = capsys.readouterr().err
    assert "Epoch: [1]" in error and "gradient norm nan at iteration 3" in error and "lr " in error
    assert list(checkpoints(tmp_path)) == [(1, 0), (1, 12)]
    state = load(tmp_path / "partial-1-12.pth")
    assert all(value.isfinite().all() for value in state["model"].values())
    assert state["optimizer"]["state"][0]["step"] == 22 and state["progress"]["counts"]["loss"] == 10
    train("pretrain", tmp_path, *args, "--resume", "auto")  # it can be gone on with


def test_skip_goes_on_and_rollback_goes_back(images, tmp_path, monkeypatch):
    args = (*PRETRAIN, "--data_path", images, "--epochs", 2)
    poison(monkeypatch, 14, 15, 16)
    said = train("pretrain", tmp_path / "skip", *args, "--on_nan", "skip")
    assert said.count("NOT FINITE:") == 3
    assert load(tmp_path / "skip" / "checkpoint-1.pth")["optimizer"]["state"][0]["step"] == 21
    poison(monkeypatch, 14, 15)
    said = train("pretrain", tmp_path / "back", *args, "--on_nan", "rollback")
    assert "NOT FINITE AGAIN" in said and "back to the last checkpoint" in said
    # read at the end of the epoch: the weights of the epoch before
    ends = [load(tmp_path / "back" / f"checkpoint-{epoch}.pth") for epoch in (0, 1)]
    assert_same(dict(ends[0]["model"]), dict(ends[1]["model"]))
    assert ends[1]["optimizer"]["state"][0]["step"] == 12 and ends[1]["epoch"] == 1


@pytest.mark.parametrize("under_way", [35, None])
def test_rollback_within_a_step_leaves_that_step_out(under_way, images, tmp_path, monkeypatch):
    """3 steps of 16 passes an epoch; log points at 20 and 40 cut the last two. The bad ones are 0 and 1 of epoch 1."""
    poison(monkeypatch, 48 + 3, 48 + 18, *([48 + under_way] if under_way else []))
    args = (*PRETRAIN, "--data_path", images, "--batch_size", 1, "--accum_iter", 16, "--epochs", 2)
    said = train("pretrain", tmp_path, *args, "--on_nan", "rollback")
    assert said.count("NOT FINITE") == 2 and said.count("back to the last checkpoint") == 1
    ends = [load(tmp_path / f"checkpoint-{epoch}.pth") for epoch in (0, 1)]
    assert_same(dict(ends[0]["model"]), dict(ends[1]["model"]))
    assert ends[1]["optimizer"]["state"][0]["step"] == 3
    train("pretrain", tmp_path, *args, "--epochs", 3, "--resume", "auto")
    assert load(tmp_path / "checkpoint-2.pth")["optimizer"]["state"][0]["step"] == 6


@pytest.mark.parametrize("mid_step", [True, False])
def test_update_that_was_dropped_moves_nothing_and_the_next_one_does(mid_step):
    model = nn.Linear(3, 2)
    step = Step(model, OPTIMIZERS["AdamW"](model.parameters()), DEVICE, accum_iter=2)
    x, before = torch.ones(1, 3), model.weight.detach().clone()
    if mid_step:
        step(lambda: model(x).sum() * math.nan, update=False)
        step.drop()
        step(lambda: model(x).sum(), update=True)
        assert torch.equal(model.weight, before) and step.grad_norm == 0
    else:
        step.drop()
    step(lambda: model(x).sum(), update=False)
    step(lambda: model(x).sum(), update=True)
    assert not torch.equal(model.weight, before) and step.grad_norm == pytest.approx(8**0.5)


@pytest.mark.slow
def test_bad_batch_on_one_rank_is_left_out_by_both_and_two_stop_both(images, tmp_path):
    """Neither rank leaves alone: that would be a hang, or a crash, of the other."""
    torchrun(__file__, tmp_path, images)
    results = [load(tmp_path / f"rank-{rank}.pth") for rank in (0, 1)]
    for result in results:
        assert result["code"] == 3
    assert_same(results[0]["weights"], results[1]["weights"])
    assert all(value.isfinite().all() for value in results[0]["weights"].values())
    error = results[0]["error"]
    assert "iteration 4" in error and "gradient norm nan" in error
    state = load(tmp_path / "out" / "partial-0-6.pth")
    assert_same(dict(state["model"]), results[0]["weights"])
    assert state["optimizer"]["state"][0]["step"] == 4


def worker(folder: str, images: str) -> None:
    """Rank 1 meets two bad batches; notes how the script left, and with which weights."""
    import os

    rank, kept, patch = int(os.environ["RANK"]), {}, pytest.MonkeyPatch()
    if rank == 1:
        poison(patch, 2, 4)
    build = main_pretrain.Step
    patch.setattr(main_pretrain, "Step", lambda model, *more: kept.setdefault("step", build(model, *more)))
    args = (*PRETRAIN, "--data_path", images, "--epochs", 2, "--output_dir", f"{folder}/out", "--log_dir", "")
    args = main_pretrain.get_args_parser().parse_args([str(arg) for arg in args])
    result = {"code": 0}
    try:
        main_pretrain.main(args)
    except NonFiniteLossError as error:
        result = {"code": exits.EXIT_NOT_FINITE, "error": str(error)}
    weights = {name: value.clone() for name, value in kept["step"].model.module.state_dict().items()}
    torch.save({**result, "weights": weights}, f"{folder}/rank-{rank}.pth")
    shutdown()


if __name__ == "__main__":
    import gc
    import sys

    worker(*sys.argv[1:])
    gc.collect()  # as util/run/exits.py does, and why
