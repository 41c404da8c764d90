"""Weights of timm and Hugging Face as --finetune: their libraries write the files, and give the numbers to match."""

import argparse
import json
import re
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from helpers import assert_same, project_log, write_image_folder

import main_finetune
import main_linprobe
import main_pretrain
import models_mae
import models_vit
from util.errors import UserError
from util.weights import build, checkpoint, convert, download

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


# files of other projects: an encoder under any key and prefix

VIT = models_vit.vit_tiny_patch4(num_classes=5)
ENCODER = {name: value for name, value in VIT.state_dict().items() if not name.startswith("head.")}
OTHER = {name: value + 1 for name, value in ENCODER.items()}
FULL = models_mae.mae_vit_tiny_patch4().state_dict()
FULL |= ENCODER
PROJECTOR = {"head.mlp.0.weight": torch.zeros(3, 64), "head.last_layer.weight_g": torch.zeros(3, 1)}


def behind(prefix: str, weights: dict) -> dict:
    return {prefix + name: value for name, value in weights.items()}


def compiled_inside(name: str) -> str:
    return name.replace("blocks.0.", "blocks.0._orig_mod.").replace("blocks.1.", "blocks.module.1.")


FOREIGN = {
    "DistributedDataParallel": ({"model": behind("module.", ENCODER)}, "'module.'"),
    "bare, DistributedDataParallel": (behind("module.", ENCODER), "'module.'"),
    "compiled": ({"model": behind("_orig_mod.", FULL)}, "'_orig_mod.'"),
    "wrapped thrice": ({"model": behind("module._orig_mod.module.", ENCODER)}, "'module._orig_mod.module.'"),
    "compiled blocks": ({"model": {compiled_inside(name): value for name, value in FULL.items()}}, "without a prefix"),
    "backbone": ({"model": behind("backbone.", ENCODER)}, "'backbone.'"),
    "encoder, bare": (behind("encoder.", ENCODER), "'encoder.'"),
    "model in model": ({"model": behind("model.", FULL)}, "'model.'"),
    "Lightning": (
        {"state_dict": behind("backbone.vit.", ENCODER) | {"loss.w": torch.zeros(1)}, "hyper_parameters": {}},
        "'backbone.vit.' under 'state_dict'; left out 1 more, such as 'loss.w'",
    ),
    "Lightning, compiled": ({"state_dict": behind("model._orig_mod.", FULL)}, "'model._orig_mod.' under 'state_dict'"),
    "DINO": (
        {"student": behind("module.backbone.", OTHER), "teacher": behind("backbone.", ENCODER) | PROJECTOR},
        "'backbone.' under 'teacher'; left out 2 more, such as 'head.mlp.0.weight'; there are also names that begin "
        "with 'module.backbone.' under 'student'",
    ),
    "MoCo v3": (
        {"state_dict": behind("module.momentum_encoder.", OTHER) | behind("module.base_encoder.", ENCODER)
         | behind("module.base_encoder.", {"head.0.weight": torch.zeros(8, 64)}), "optimizer": {}},
        "'module.base_encoder.' under 'state_dict'",
    ),
    "timm's trainer": (
        {"state_dict": OTHER, "state_dict_ema": ENCODER, "args": argparse.Namespace(model="v", input_size=[3, 9, 9])},
        "without a prefix under 'state_dict_ema'; there are also names without a prefix under 'state_dict'",
    ),
    "timm's trainer, no average": ({"state_dict": ENCODER, "arch": "vit"}, "without a prefix under 'state_dict'"),
    "average beside": ({"model": ENCODER, "model_ema": OTHER}, ""),
    "MAWS": (ENCODER, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_an_encoder_is_found_under_any_key_and_prefix_and_the_log_says_where(name, tmp_path):
    state, told = FOREIGN[name]
    torch.save(state, tmp_path / "w.pth")
    model = models_vit.vit_tiny_patch4(num_classes=2)
    with project_log() as lines:
        checkpoint.load_pretrained(tmp_path / "w.pth", model)
    weights = model.state_dict()
    assert_same({key: weights[key] for key in ENCODER}, ENCODER)
    took = [line for line in lines if "took the weights" in line]
    assert (told in took[0] and len(took) == 1) if told else not took
    encoder = build.open_model(tmp_path / "w.pth", encoder_only=True)
    weights = encoder.state_dict()
    assert_same({key: weights[key] for key in ENCODER}, ENCODER)
    assert encoder.encode(torch.zeros(1, 3, 32, 32))[0].shape == (1, 64)


def test_mmpretrain_s_encoder_is_found_under_its_names(tmp_path):
    """As its converters for DeiT write them: tools/model_converters/deit3_to_mmpretrain.py."""
    theirs = {}
    for name, value in ENCODER.items():
        for ours, other in (("patch_embed.proj.", "patch_embed.projection."), ("blocks.", "layers."), ("norm1", "ln1"),
                            ("norm2", "ln2"), ("mlp.fc1", "ffn.layers.0.0"), ("mlp.fc2", "ffn.layers.1")):  # fmt: skip
            name = name.replace(ours, other)
        theirs["backbone." + ("ln1" + name.removeprefix("norm") if name.startswith("norm.") else name)] = value
    torch.save({"meta": {}, "state_dict": theirs | {"head.layers.head.weight": torch.zeros(3, 64)}}, tmp_path / "w.pth")
    model = models_vit.vit_tiny_patch4(num_classes=2)
    checkpoint.load_pretrained(tmp_path / "w.pth", model)
    weights = model.state_dict()
    assert_same({key: weights[key] for key in ENCODER}, ENCODER)
    assert_same({f"backbone.{key}": value for key, value in convert.to_mmseg(ENCODER).items()}, theirs)


@pytest.mark.parametrize(
    "state",
    [{"state_dict": behind("online.", ENCODER) | behind("target.", OTHER)}, {"net_1": ENCODER, "net_2": OTHER},
     behind("student.", ENCODER) | behind("student.twin.", OTHER)],
    ids=range(3),
)  # fmt: skip
def test_which_of_several_encoders_is_asked_where_no_rule_tells(state, tmp_path):
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match="several encoders .*(target|net_2|twin).*save the one to use alone"):
        checkpoint.load(tmp_path / "w.pth")


OTHER_PARTS = {
    "deit_tiny_distilled_patch16_224": "a distillation token (DeiT), dist_token",
    "beit_base_patch16_224": "LayerScale (BEiT, DeiT III, DINOv2), blocks.0.gamma_1",
    "deit3_small_patch16_224": "LayerScale (BEiT, DeiT III, DINOv2), blocks.0.ls1.gamma",
    "vit_small_patch14_reg4_dinov2": "register tokens (DINOv2, DINOv3), reg_token",
    "vit_base_patch16_clip_224": "a norm in front of its blocks (CLIP), norm_pre.bias",
}


@pytest.mark.parametrize("name", OTHER_PARTS)
def test_what_other_vision_transformers_have_is_the_reason_that_is_told(name, tmp_path):
    source = timm.create_model(name, pretrained=False, depth=1)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    width = source.embed_dim
    model = models_vit.VisionTransformer(embed_dim=width, depth=1, num_heads=3, patch_size=16, num_classes=3)
    for load in (
        lambda: checkpoint.load_pretrained(tmp_path / "w.pth", model),
        lambda: build.open_model(tmp_path / "w.pth", "vit_tiny_patch16"),
    ):
        with pytest.raises(UserError, match=re.escape(f"w.pth has {OTHER_PARTS[name]}, which the models here do not")):
            load()


def hugging_face_vit(architecture: str, config: str = "ViTConfig"):
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 4, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
             "intermediate_size": 256, "layer_norm_eps": 1e-6, "num_labels": 5}  # fmt: skip
    return getattr(transformers, architecture)(getattr(transformers, config)(**sizes)).eval()


def test_hugging_face_s_classifier_opens_as_one(tmp_path):
    source = hugging_face_vit("ViTForImageClassification")
    source.save_pretrained(tmp_path)
    torch.save(published_names(source), tmp_path / "published.bin")
    imgs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = source(imgs).logits
        for name in ("model.safetensors", "published.bin"):
            model = build.open_model(tmp_path / name)
            torch.testing.assert_close(model(imgs), expected, atol=1e-5, rtol=1e-5)


def test_hugging_face_s_other_models_are_taken_or_refused_with_the_reason(tmp_path):
    hugging_face_vit("ViTModel").save_pretrained(tmp_path)
    with project_log() as lines:
        checkpoint.load_pretrained(tmp_path / "model.safetensors", models_vit.vit_tiny_patch4(num_classes=2))
    assert any("left out vit.pooler.dense" in line for line in lines)
    hugging_face_vit("DeiTForImageClassificationWithTeacher", "DeiTConfig").save_pretrained(tmp_path / "deit")
    with pytest.raises(UserError, match="a distillation token"):
        checkpoint.load_pretrained(tmp_path / "deit" / "model.safetensors", models_vit.vit_tiny_patch4(num_classes=2))


def test_a_method_of_one_s_own_may_name_its_parts_as_wrappers_do(tmp_path):
    """A model that has a file's names takes them as they are: no prefix is cut off."""
    own = torch.nn.ModuleDict({"module": models_vit.vit_tiny_patch4(), "teacher": models_vit.vit_tiny_patch4()})
    again = torch.nn.ModuleDict({"module": models_vit.vit_tiny_patch4(), "teacher": models_vit.vit_tiny_patch4()})
    torch.save({"model": own.state_dict()}, tmp_path / "w.pth")
    checkpoint.load_strictly(again, checkpoint.load(tmp_path / "w.pth")["model"], "w.pth")
    assert_same(dict(again.state_dict()), dict(own.state_dict()))


@pytest.mark.parametrize("state", [{"model": behind("net.", {"conv.weight": torch.zeros(1)})}, {"model": ENCODER}])
def test_only_keys_that_a_file_has_or_lacks_are_told_of_it(state, tmp_path):
    torch.save(state, tmp_path / "w.pth")
    for open_it in (
        lambda: build.open_model(tmp_path / "w.pth", "mae_vit_tiny_patch16", encoder_only=True),
        lambda: build.open_model(tmp_path / "w.pth", "mae_vit_tiny_patch4"),
    ):
        with pytest.raises(UserError) as error:
            open_it()
        holds = error.value.message.split("does not fit")[0].split("cannot reconstruct")[0]
        assert "decoder" not in holds and ("net.conv.weight" in holds or "an encoder alone" in holds)


# --eval: what is evaluated is what the file holds


def eval_options(*options: str, script=main_finetune) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = script.get_args_parser()
    return parser.parse_args(["--eval", *options]), parser


def classifier_file(folder, pool: bool = True, args: dict | None = None, **options) -> str:
    model = models_vit.vit_tiny_patch4(num_classes=7, global_pool=pool, **options)
    torch.save({"model": model.state_dict()} | ({"args": args} if args else {}), folder / "c.pth")
    return str(folder / "c.pth")


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("args", [None, {"model": "vit_tiny_patch4", "input_size": [16, 64]}])
def test_eval_takes_model_size_classes_and_pooling_from_the_file(args, pool, tmp_path):
    size = (16, 64) if args else 32
    path = classifier_file(tmp_path, pool, args, img_size=size)
    given, parser = eval_options("--resume", path)
    with project_log() as lines:
        weights = build.take_options(given, parser, probe=False)
    taken = given.model, given.input_size, given.nb_classes, given.global_pool
    assert taken == ("vit_tiny_patch4", size, 7, pool)
    checkpoint.load_strictly(models_vit.vit_tiny_patch4(img_size=size, num_classes=7, global_pool=pool), weights, path)
    options = f"--model vit_tiny_patch4 --input_size {'16 64' if args else 32} --nb_classes 7"
    assert lines[-1].endswith(options + ("" if pool else " --cls_token"))


def test_eval_says_nothing_where_the_options_are_the_file_s(tmp_path):
    path = classifier_file(tmp_path)
    given, parser = eval_options(
        "--resume", path, "--model", "vit_tiny_patch4", "--input_size", "32", "32", "--nb_classes", "7"
    )
    with project_log() as lines:
        build.take_options(given, parser, probe=False)
    assert not lines


@pytest.mark.parametrize(
    ("options", "told"),
    [(["--model", "vit_base_patch16"], "takes --model vit_tiny_patch4: leave out --model vit_base_patch16"),
     (["--input_size", "64"], "takes --input_size 32: leave out --input_size 64"),
     (["--nb_classes", "10", "--cls_token"],
      "takes --nb_classes 7 --global_pool: leave out --nb_classes 10 --cls_token")],
    ids=["model", "size", "two"],
)  # fmt: skip
def test_an_option_that_contradicts_the_file_is_told_in_one_line(options, told, tmp_path):
    given, parser = eval_options("--resume", classifier_file(tmp_path), *options)
    with pytest.raises(UserError) as error:
        build.take_options(given, parser, probe=False)
    assert error.value.message.endswith(told) and len(error.value.message) < 400


def test_eval_tells_classifiers_probes_and_autoencoders_apart(tmp_path):
    given, parser = eval_options("--resume", classifier_file(tmp_path, False), script=main_linprobe)
    with pytest.raises(UserError, match="no linear probe: evaluate it by main_finetune.py"):
        build.take_options(given, parser, probe=True)
    source = models_vit.vit_tiny_patch4(num_classes=7).eval()
    source.head = torch.nn.Sequential(torch.nn.BatchNorm1d(64, affine=False, eps=1e-6), source.head).eval()
    source.head[0].running_mean += 0.3
    torch.save({"model": source.state_dict()}, tmp_path / "probe.pth")
    for script, probe in ((main_linprobe, True), (main_finetune, False)):
        given, parser = eval_options("--resume", str(tmp_path / "probe.pth"), script=script)
        weights = build.take_options(given, parser, probe=probe)
        assert not given.global_pool and given.nb_classes == 7 and ("head.1.weight" in weights) == probe
    model = models_vit.vit_tiny_patch4(num_classes=7).eval()
    model.load_state_dict(weights)
    imgs = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(imgs), source(imgs), atol=1e-5, rtol=1e-5)
    for weights in (FULL, ENCODER):
        torch.save({"model": weights}, tmp_path / "mae.pth")
        given, parser = eval_options("--resume", str(tmp_path / "mae.pth"))
        with pytest.raises(UserError, match="--eval needs a classifier, and .* holds .*--finetune"):
            build.take_options(given, parser, probe=False)


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


@pytest.mark.parametrize("name", build.RELEASED)
def test_every_released_file_is_found_with_and_without_its_ending(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url = build.RELEASED[name].url
    short = str(Path(name).with_suffix(""))
    assert build.find(name) == build.find(short) == build.find(url) == url and url.endswith(f"/{name}")
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).touch()  # a file of this name goes first
    assert build.find(name) == name and build.find("other.pth") == "other.pth"


@pytest.mark.parametrize(
    ("script", "option"),
    [(main_pretrain, "--init"), (main_pretrain, "--resume"), (main_finetune, "--finetune"), (main_finetune, "--resume"),
     (main_linprobe, "--finetune")],
)  # fmt: skip
def test_the_scripts_take_a_released_file_by_its_name(script, option, tmp_path, monkeypatch):
    """All options that take weights; what the run keeps tells the file itself."""
    pretraining = script is main_pretrain
    classifier = {"num_classes": 3, "global_pool": script is main_finetune}
    made = models_mae.mae_vit_tiny_patch4() if pretraining else models_vit.vit_tiny_patch4(**classifier)
    torch.save({"model": made.state_dict()}, tmp_path / "weights.pth")
    released = build.Released(str(tmp_path / "weights.pth"), "mae_vit_tiny_patch4")
    monkeypatch.setitem(build.RELEASED, "published.pth", released)
    data, out = write_image_folder(tmp_path / "data", n_train=4, n_val=1), tmp_path / "run"
    options = ["--model", f"{'mae_' * pretraining}vit_tiny_patch4", "--input_size", 32, "--data_path", data,
               "--epochs", 1, "--warmup_epochs", 0, "--batch_size", 4, "--num_workers", 0, "--lr", 0, "--device", "cpu",
               option, "published", "--output_dir", out] + ["--nb_classes", 3] * (not pretraining)  # fmt: skip
    script.main(script.get_args_parser().parse_args([str(value) for value in options]))
    state = checkpoint.load(out / "checkpoint-0.pth")
    assert state["args"][option[2:]] == released.url
    name = "blocks.0.attn.qkv.weight"
    torch.testing.assert_close(state["model"][name], made.state_dict()[name], rtol=0, atol=1e-4)  # --min_lr moves it


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
