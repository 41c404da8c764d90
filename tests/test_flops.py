"""The arithmetic behind images/s and utilisation, against torch's own counter and the published table."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import models_mae
import models_vit
from util import flops
from util.dist import Dist


def counted_macs(run):
    # attention as plain products: the counter of torch 2.11 does not know the CPU's fused kernel
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("size", [32, (16, 48)])
def test_pretraining_arithmetic_is_what_torch_counts(size):
    """The full forward pass, plus the patches that the encoder spares itself to embed: the method's count has them."""
    model = models_mae.mae_vit_tiny_patch4(img_size=size)
    height, width = (size, size) if isinstance(size, int) else size
    n_patches, kept = model.patch_embed.num_patches, model.patch_embed.num_patches // 4
    counted = counted_macs(lambda: model(torch.zeros(1, 3, height, width), 0.75))
    spared = (n_patches - kept) * 48 * 64
    assert counted + spared == sum(flops.pretrain_macs(model, kept))


def test_classifier_arithmetic_is_what_torch_counts():
    model = models_vit.vit_tiny_patch4(num_classes=0)
    assert counted_macs(lambda: model(torch.zeros(2, 3, 32, 32))) == pytest.approx(2 * flops.classifier_macs(model))


@pytest.mark.parametrize(
    ("name", "kept", "gmacs"),
    [
        ("mae_vit_base_patch16", 49, (0.12, 4.29, 5.37)),
        ("mae_vit_large_patch16", 49, (0.15, 15.22, 5.38)),
        ("mae_vit_huge_patch14", 64, (0.19, 41.24, 7.13)),
    ],
)
def test_arithmetic_of_the_paper_s_models(name, kept, gmacs):
    model = models_mae.MODELS[name]()
    assert [round(macs / 1e9, 2) for macs in flops.pretrain_macs(model, kept)] == pytest.approx(gmacs, abs=0.0051)


def test_rates_follow_from_seconds_and_peak():
    env = Dist(torch.device("cpu"), world_size=4)
    throughput = flops.throughput(1e9, images_per_step=256, env=env, peak_tflops=10)
    assert throughput.rates(0.5) == {"images_per_second": 512, "mfu": pytest.approx(512 * 6e9 / 40e12)}
    assert flops.throughput(1e9, 256, env, None) == flops.Throughput(256, 6e9, None)
    assert "mfu" not in flops.throughput(1e9, 256, env, None).rates(0.5)


@pytest.mark.parametrize(
    ("card", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A10", 125e12), ("NVIDIA RTX A1000", None), ("NVIDIA T400", None)],
)
def test_peak_goes_by_whole_words_of_the_card_s_name(card, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    assert flops.throughput(1e9, 1, Dist(torch.device("cuda")), None).peak_flops == peak
