"""What makes a step fast: nothing compiles anew, and on a GPU nothing waits."""

import logging

import pytest
import torch
from helpers import quiet_run
from timm.layers import DropPath
from timm.models.vision_transformer import Block
from torch import nn

import engine_pretrain
import models_mae
import models_vit
from util import speed
from util.dist import Dist
from util.lr_sched import Schedule
from util.step import Step

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


class Loader(list):
    """Batches that are on the device already."""


def train(model, device, epochs, n_batches=3):
    """Epochs of the engine, with a learning rate that changes in each step."""
    env = Dist(torch.device(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    step = Step(model, optimizer, env.device)
    run = quiet_run(step)
    side = model.patch_embed.img_size[0]
    for epoch in epochs:
        loader = Loader((torch.randn(4, 3, side, side, device=device), None) for _ in range(n_batches))
        engine_pretrain.train_one_epoch(
            model, loader, step, Schedule(1e-3, 0, 1, 9), epoch, run, mask_ratio=0.75, seed=0
        )


@pytest.fixture
def compilations(monkeypatch):
    """Counts the graphs that dynamo captures; they run uncompiled, which is fast to start."""
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: compile_(module, backend=backend, **options))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield graphs
    torch._dynamo.reset()


def test_schedules_and_logging_cause_no_compilation_after_the_first_epoch(compilations):
    model = models_mae.mae_vit_tiny_patch4()
    speed.prepare(model, "on", False, torch.device("cpu"))
    train(model, "cpu", [0])
    n_graphs = len(compilations)
    # encoder blocks share one graph and decoder blocks another (they have other lengths); none is broken in two
    assert 1 <= n_graphs <= 2
    train(model, "cpu", [1, 2])
    assert len(compilations) == n_graphs
    assert not torch._dynamo.utils.counters["graph_break"]


def test_blocks_larger_than_a_bucket_stay_whole_under_ddp(compilations, tmp_path):
    model = models_mae.MaskedAutoencoderViT(
        img_size=16, patch_size=4, embed_dim=256, depth=2, num_heads=2, decoder_embed_dim=32, decoder_num_heads=2
    )
    speed.prepare(model, "on", False, torch.device("cpu"))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        ddp_model = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1)  # a block of the encoder has 3 MB
        ddp_model(torch.randn(2, 3, 16, 16))[0].backward()
    finally:
        torch.distributed.destroy_process_group()
    assert len(compilations) == 2


@pytest.mark.parametrize("depth", [4, 12])
def test_blocks_share_code_whatever_their_stochastic_depth(depth, compilations):
    """Each block has its own drop probability; the first has none. More than 8 kinds would not be compiled at all."""
    model = models_vit.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=depth, num_heads=2, num_classes=5, drop_path_rate=0.1
    )
    speed.prepare(model, "on", False, torch.device("cpu"))
    for _ in range(2):
        model(torch.randn(2, 3, 16, 16)).sum().backward()
    assert len(compilations) == 2
    model.eval()
    with torch.no_grad():
        model(torch.randn(2, 3, 16, 16))
    assert len(compilations) <= 4  # code for evaluation


@pytest.mark.parametrize(
    ("device", "dtype", "fused"),
    [
        ("cpu", torch.bfloat16, False),
        ("cpu", None, True),
        ("cuda", torch.bfloat16, True),
        ("cuda", torch.float16, True),
    ],
)
def test_attention_is_the_faster_one_for_device_and_precision(device, dtype, fused):
    for model in (models_mae.mae_vit_tiny_patch4(), models_vit.vit_tiny_patch4()):
        speed.choose_kernels(model, dtype, torch.device(device))
        chosen = [block.attn.fused_attn for block in model.modules() if isinstance(block, Block)]
        assert len(chosen) >= 4 and set(chosen) == {fused}
        assert torch.get_float32_matmul_precision() == ("highest" if dtype is None else "high")
        assert torch.backends.cudnn.allow_tf32 == (dtype is not None)
    torch.set_float32_matmul_precision("highest")


def test_attention_written_out_gives_the_fused_one_s_loss_and_gradients():
    results = []
    for dtype in (None, torch.bfloat16):
        torch.manual_seed(0)
        model = models_mae.mae_vit_tiny_patch4()
        speed.choose_kernels(model, dtype, torch.device("cpu"))
        loss, _, _ = model(torch.randn(2, 3, 32, 32), 0.75, torch.rand(2, 64))  # in float32, both
        loss.backward()
        results.append([loss, *(param.grad for param in model.parameters() if param.grad is not None)])
    torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_shared_drop_path_is_timm_s():
    torch.manual_seed(0)
    ours, theirs, x = speed.SharedDropPath(0.3, torch.device("cpu")), DropPath(0.3), torch.ones(20_000, 2, 3)
    for module in (ours, theirs):
        y = module(x)
        assert ((y == y[:, :1, :1]).all(dim=(1, 2))).all()  # whole samples
        assert sorted(y.unique().tolist()) == pytest.approx([0, 1 / 0.7])
        assert abs((y == 0).float().mean() - 0.3) < 0.01
        assert torch.equal(module.eval()(x), x)
    assert ours.train()(x.bfloat16()).dtype == torch.bfloat16


def host_waits(device, n_batches):
    """Names of the calls in which the host waited for the device during one epoch."""
    logging.getLogger("mae").setLevel(logging.WARNING)
    model = models_mae.mae_vit_tiny_patch4().to(device)
    train(model, device, [0], n_batches)
    with torch.profiler.profile() as profile:
        train(model, device, [1], n_batches)
    waits = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "Memcpy DtoH")
    return [event.name for event in profile.events() if event.name.startswith(waits)]


@CUDA
def test_the_host_waits_at_log_points_alone():
    """Log points are the batches 0, 20 and the last: twice as many batches between them add no wait."""
    assert len(host_waits("cuda", 39)) == len(host_waits("cuda", 25)) > 0


@CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_blocks_give_the_eager_loss_and_gradients_on_cuda(dtype):
    losses, gradients = [], []
    for compile_ in ("off", "on"):
        torch.manual_seed(0)
        model = models_mae.mae_vit_base_patch16().cuda()
        speed.prepare(model, compile_, False, torch.device("cuda"))
        imgs, noise = torch.randn(8, 3, 224, 224, device="cuda"), torch.rand(8, 196, device="cuda")
        with torch.autocast("cuda", dtype=dtype, enabled=dtype is not torch.float32):
            loss, _, _ = model(imgs, 0.75, noise)
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([param.grad.flatten() for param in model.parameters() if param.grad is not None]))
    tolerance = 1e-4 if dtype is torch.float32 else 2e-2
    assert abs(losses[0] - losses[1]) < tolerance
    assert (gradients[0] - gradients[1]).norm() / gradients[0].norm() < tolerance


def kept_for_backward(model, forward):
    """Bytes that autograd keeps for the backward pass of `forward()`, the weights aside."""
    weights = {param.untyped_storage().data_ptr() for param in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def test_gradient_checkpointing_of_vit_l_keeps_less_than_40_percent_for_backward():
    """On any machine, in float32: what is kept, and beside it the one block that is computed again."""
    model, imgs = models_mae.mae_vit_large_patch16(), torch.randn(1, 3, 224, 224)
    kept = []
    for grad_checkpointing in (False, True):
        model.set_grad_checkpointing(grad_checkpointing)
        kept.append(kept_for_backward(model, lambda: model(imgs, 0.75)[0]))
    tokens = {module: torch.randn(1, n, module.norm1.normalized_shape[0], requires_grad=True)
              for module, n in ((model.blocks[0], 50), (model.decoder_blocks[0], 197))}  # fmt: skip
    again = max(kept_for_backward(block, lambda: block(x)) for block, x in tokens.items())  # noqa: B023
    assert kept[1] + again < kept[0] / 2.5


@CUDA
def test_gradient_checkpointing_of_vit_l_takes_less_than_40_percent_of_the_memory():
    """2.5 times less for activations and gradients; weights and moments, which nothing can save, come on top."""
    peaks, losses = [], []
    for grad_checkpointing in (False, True):
        torch.manual_seed(0)
        model = models_mae.mae_vit_large_patch16().cuda()
        speed.prepare(model, "off", grad_checkpointing, torch.device("cuda"))
        imgs, noise = torch.randn(64, 3, 224, 224, device="cuda"), torch.rand(64, 196, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        weights = torch.cuda.memory_allocated()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss, _, _ = model(imgs, 0.75, noise)
        loss.backward()
        losses.append(loss.item())
        peaks.append(torch.cuda.max_memory_allocated() - weights)
        del model, loss
    assert losses[0] == losses[1]
    assert peaks[1] < peaks[0] / 2.5
