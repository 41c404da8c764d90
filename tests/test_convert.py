"""Weights of timm and Hugging Face as --finetune: their libraries write the files, and give the numbers to match."""

import json
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from helpers import assert_same, project_log

import models_mae
import models_vit
from util import build, checkpoint, convert, download
from util.errors import UserError

transformers = pytest.importorskip("transformers")

CONFIG = dict(
    image_size=32, patch_size=8, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
    decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=4, decoder_intermediate_size=64,
    layer_norm_eps=1e-6,
)  # fmt: skip


def ours():
    torch.manual_seed(1)
    return models_mae.MaskedAutoencoderViT(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, decoder_embed_dim=16, decoder_depth=2,
        decoder_num_heads=4, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
    ).eval()  # fmt: skip


def classifier(**options):
    torch.manual_seed(2)
    small = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)
    return models_vit.VisionTransformer(**small, **options).eval()


def theirs(architecture="ViTMAEForPreTraining", **options):
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(transformers.ViTMAEConfig(**CONFIG, **options)).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1 * torch.randn_like(param))
    return model


def published_names(model):
    """The weights of a ViTMAE model of transformers 5, named as in the files on the hub."""
    renamed = {
        "vit.layers.": "vit.encoder.layer.", "attention.q_proj": "attention.attention.query",
        "attention.k_proj": "attention.attention.key", "attention.v_proj": "attention.attention.value",
        "attention.o_proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    }  # fmt: skip
    weights = {}
    for name, tensor in model.state_dict().items():
        for new, old in renamed.items():
            name = name.replace(new, old)
        weights[name] = tensor
    return weights


def written(model, folder, form) -> Path:
    """A file of a ViTMAE model, as its library or the hub has it."""
    if form == "transformers 5":
        model.save_pretrained(folder)
        return folder / "model.safetensors"
    if form == "published bin":
        torch.save(published_names(model), folder / "pytorch_model.bin")
        return folder / "pytorch_model.bin"
    safetensors.torch.save_file(published_names(model), folder / "published.safetensors")
    return folder / "published.safetensors"


FORMS = ["transformers 5", "published bin", "published safetensors"]


@pytest.mark.parametrize("form", FORMS)
def test_hugging_face_s_autoencoder_gives_its_loss_and_prediction_here(tmp_path, form):
    source, model = theirs(), ours()
    checkpoint.load_full_mae(written(source, tmp_path, form), model)
    imgs, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    with torch.no_grad():
        loss, pred, mask = model(imgs, 0.75, noise)
        expected = source(imgs, noise=noise)
    torch.testing.assert_close(pred, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("architecture", ["ViTMAEForPreTraining", "ViTMAEModel"])
def test_hugging_face_s_encoder_starts_a_classifier(tmp_path, architecture, form):
    source, model = theirs(architecture), classifier(num_classes=5)
    with project_log() as messages:
        checkpoint.load_pretrained(str(written(source, tmp_path, form)), model)
    assert "head.bias, head.weight" in messages[-1], "only the head is new"
    encoder = getattr(source, "vit", source)
    encoder.config.mask_ratio = 0.0
    imgs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = encoder(imgs).last_hidden_state[:, 0]
        torch.testing.assert_close(model.forward_features(imgs), expected, atol=1e-5, rtol=1e-5)


def test_hugging_face_s_names_there_and_back():
    weights = ours().state_dict()
    assert_same(convert.from_hugging_face(convert.to_hugging_face(weights)), dict(weights))


def test_a_query_without_its_key_is_refused(tmp_path):
    weights = published_names(theirs())
    del weights["vit.encoder.layer.1.attention.attention.key.weight"]
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="layer.1.attention.attention.query.weight is there, but its key"):
        checkpoint.load(tmp_path / "pytorch_model.bin")


def test_other_weights_of_hugging_face_are_named(tmp_path):
    weights = {**published_names(theirs()), "adapter.weight": torch.zeros(2)}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"1 unknown \[adapter.weight\]"):
        checkpoint.load_full_mae(tmp_path / "pytorch_model.bin", ours())


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_timm_s_encoder_starts_a_classifier(tmp_path, ending):
    torch.manual_seed(0)
    source = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0).eval()
    path = tmp_path / f"vit_tiny_patch16_224.{ending}"
    if ending == "safetensors":
        safetensors.torch.save_file(source.state_dict(), path)
    else:
        torch.save(source.state_dict(), path)
    model = models_vit.vit_tiny_patch16(num_classes=3).eval()
    checkpoint.load_pretrained(str(path), model)
    imgs = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(imgs), source(imgs), atol=1e-5, rtol=1e-5)


def test_other_weights_are_refused(tmp_path):
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    safetensors.torch.save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    for path in tmp_path.iterdir():
        with pytest.raises(UserError, match="no state dict under the key 'model', but is a dict of 'fc.weight'"):
            checkpoint.load(path)


def test_safetensors_keep_what_describes_the_model(tmp_path):
    args = {"model": "mae_vit_tiny_patch4", "input_size": [32, 64], "norm_pix_loss": True}
    convert.write_safetensors(tmp_path / "a.safetensors", ours().state_dict(), args)
    state = checkpoint.load(tmp_path / "a.safetensors")
    assert state["args"] == args
    assert_same(dict(state["model"]), dict(ours().state_dict()))


# the model that a file describes, and released files by name


def test_a_training_checkpoint_opens_as_the_model_that_it_was(tmp_path):
    source = models_mae.mae_vit_tiny_patch4(img_size=(16, 32), norm_pix_loss=True)
    args = {"model": "mae_vit_tiny_patch4", "input_size": (16, 32), "norm_pix_loss": True, "lr": 1.0}
    torch.save({"model": source.state_dict(), "args": args}, tmp_path / "checkpoint-3.pth")
    model = build.open_model(tmp_path / "checkpoint-3.pth")
    assert model.patch_embed.img_size == (16, 32) and model.norm_pix_loss and not model.training
    assert_same(dict(model.state_dict()), dict(source.state_dict()))
    assert not build.open_model(tmp_path / "checkpoint-3.pth", norm_pix_loss=False).norm_pix_loss
    with pytest.raises(UserError, match="does not fit the model"):
        build.open_model(tmp_path / "checkpoint-3.pth", "mae_vit_tiny_patch16")


def test_a_classifier_opens_with_its_head_and_pooling(tmp_path):
    for pool in (True, False):
        source = models_vit.vit_tiny_patch4(num_classes=7, global_pool=pool)
        state = {"model": source.state_dict(), "args": {"model": "vit_tiny_patch4", "input_size": 32}}
        torch.save(state, tmp_path / "c.pth")
        model = build.open_model(tmp_path / "c.pth")
        imgs = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(model(imgs), source.eval()(imgs))


def test_a_file_that_does_not_tell_its_model_is_known_by_its_shapes_or_asks_for_it(tmp_path):
    source = models_mae.mae_vit_tiny_patch4()
    torch.save({"model": source.state_dict()}, tmp_path / "known.pth")
    for name in ("", "mae_vit_tiny_patch4"):
        model = build.open_model(tmp_path / "known.pth", name)
        assert_same(dict(model.state_dict()), dict(source.state_dict()))
    with pytest.raises(UserError, match="--model 'nonsense' is not known"):
        build.open_model(tmp_path / "known.pth", "nonsense")
    torch.save({"model": ours().state_dict()}, tmp_path / "mystery.pth")  # a width that no model here has
    with pytest.raises(UserError, match="mystery.pth does not tell.*width 24, 2 blocks, patches of 8.*--model"):
        build.open_model(tmp_path / "mystery.pth")


def test_an_encoder_alone_opens_only_as_one(tmp_path):
    source = models_mae.mae_vit_tiny_patch4().eval()
    weights = {name: value for name, value in source.state_dict().items() if not build.is_decoder(name)}
    torch.save({"model": weights}, tmp_path / "encoder.pth")
    with pytest.raises(UserError, match="mae_visualize_vit"):
        build.open_model(tmp_path / "encoder.pth", "mae_vit_tiny_patch4")
    model = build.open_model(tmp_path / "encoder.pth", "mae_vit_tiny_patch4", encoder_only=True)
    imgs = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.encode(imgs), source.encode(imgs))


def test_a_released_file_comes_by_name_and_tells_its_model(tmp_path, monkeypatch):
    asked = []
    source = models_mae.mae_vit_tiny_patch4(norm_pix_loss=True)
    torch.save({"model": source.state_dict()}, tmp_path / "mae_pretrain_vit_base_full.pth")
    monkeypatch.setattr(download, "fetch", lambda url: asked.append(url) or tmp_path / url.split("/")[-1])
    url = "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_base_full.pth"
    monkeypatch.setitem(build.RELEASED, url.split("/")[-1], build.Released(url, "mae_vit_tiny_patch4", True))
    for name in ("mae_pretrain_vit_base_full", "mae_pretrain_vit_base_full.pth", url):
        model = build.open_model(name)
        assert model.norm_pix_loss
        assert_same(dict(model.state_dict()), dict(source.state_dict()))
    assert asked == [url] * 3
    assert build.open_model(tmp_path / "mae_pretrain_vit_base_full.pth").norm_pix_loss, "a copy as well"
    assert len(asked) == 3


def test_the_table_of_released_files_is_that_of_the_readme():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:]] for line in readme.splitlines() if line.startswith("| [")]
    told = {row[0].split("(")[1].rstrip(")"): row for row in rows if "dl.fbaipublic" in row[0]}
    assert set(told) == {file.url for file in build.RELEASED.values()}
    for file in build.RELEASED.values():
        _, md5, holds, *_ = told[file.url]
        assert md5 == download.MD5.get(file.url, "-")
        assert file.model in models_mae.MODELS | models_vit.MODELS
        if holds != "the same":
            assert ("normalised" in holds) == file.norm_pix_loss


def test_json_of_the_header_is_plain(tmp_path):
    convert.write_safetensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, {"model": "m"})
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert json.loads(file.metadata()["args"]) == {"model": "m"}
