"""Hugging Face's Hub, played by a server on this machine; torch.hub from this folder."""

import hashlib
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import safetensors.torch
import torch
from helpers import ROOT, assert_same

import models_mae
import models_vit
from util import export
from util.data.bands import Bands, of_model
from util.errors import UserError
from util.weights import build, checkpoint, convert, download, hub

COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """Lists and sends `server.repos` {user/name: {file: bytes}}, as huggingface.co does."""

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        path = self.path.split("?")[0].removeprefix("/api/models/").strip("/")
        repo = "/".join(path.split("/")[:2])
        files = self.server.repos.get(repo, {})
        if repo in self.server.repos and "/tree/" in path:
            listed = [{"type": "file", "path": name, "size": len(body), "oid": "0"} for name, body in files.items()]
            self.answer(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})
        elif "/resolve/" in path and (body := files.get(path.split("/resolve/")[1].partition("/")[2])) is not None:
            self.answer(200, body, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT})
        elif repo in self.server.repos:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def answer(self, status: int, body: bytes, headers: dict) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hugging_face(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos, server.asked = {}, []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("HF_TOKEN", "hf_of_mine")
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    template = f"{constants.ENDPOINT}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return models_mae.mae_vit_tiny_patch4().state_dict()


def as_file(weights: dict, folder, ending: str = ".safetensors") -> bytes:
    path = folder / f"weights{ending}"
    if ending == ".safetensors":
        convert.write_safetensors(path, weights)
    else:
        torch.save({"model": weights}, path)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("files", "taken"),
    [
        (["config.json", "pytorch_model.bin", "model.safetensors", "x.safetensors"], "model.safetensors"),
        (["pytorch_model.bin", "mine.safetensors"], "mine.safetensors"),
        (["training_args.bin", "pytorch_model.bin"], "pytorch_model.bin"),
        (["README.md", "checkpoint-3.pth"], "checkpoint-3.pth"),
    ],
)
def test_one_file_of_weights_is_chosen(files, taken, hugging_face):
    hugging_face.repos["me/mae"] = {name: name.encode() for name in files}
    path = hub.local("hf://me/mae")
    assert path.name == taken and path.read_bytes() == taken.encode()
    assert "Bearer hf_of_mine" in {token for _, token in hugging_face.asked}


def test_file_and_revision_may_be_named(hugging_face):
    hugging_face.repos["me/mae"] = {"a.pth": b"a", "old/b.pth": b"b"}
    assert hub.local("hf://me/mae/a.pth").read_bytes() == b"a"
    assert hub.local("hf://me/mae@v1.0/old/b.pth").read_bytes() == b"b"
    assert "/resolve/v1.0/" in hugging_face.asked[-1][0]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("hf://me/none", "hf://me/none cannot be fetched.*RepositoryNotFound"),
        ("hf://me/mae/none.pth", "cannot be fetched.*EntryNotFound"),
        ("hf://me/two", "several files of weights: name one, as in hf://user/name/a.pth"),
        ("hf://me/text", "no file of weights, but README.md"),
        ("hf://me", "no address on the Hub: give hf://user/name"),
        ("hf://me/a b", "no address on the Hub"),
        ("timm/none", "timm/none cannot be fetched"),
    ],
)
def test_what_the_hub_does_not_have_is_told(source, reason, hugging_face):
    hugging_face.repos |= {"me/mae": {"a.pth": b""}, "me/text": {"README.md": b""}}
    hugging_face.repos["me/two"] = {"a.pth": b"", "b.pth": b""}
    with pytest.raises(UserError, match=reason) as told:
        checkpoint.load(source)
    assert told.value.message.isprintable() and len(told.value.message) < 1000


@pytest.mark.parametrize("how", ["by wish", "no network"])
def test_cache_is_enough_offline(how, hugging_face, monkeypatch):
    hugging_face.repos["me/mae"] = {"model.safetensors": b"x"}
    path = hub.local("hf://me/mae")
    if how == "by wish":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # between its attempts
    hugging_face.asked.clear()
    assert hub.local("hf://me/mae") == path and hugging_face.asked == []
    with pytest.raises(UserError, match="hf://me/other cannot be fetched"):
        hub.local("hf://me/other")


def test_timm_name_is_of_its_hub_unless_a_file_is_there(hugging_face, weights, tmp_path, monkeypatch):
    encoder = {name: tensor for name, tensor in weights.items() if not build.is_decoder(name)}
    hugging_face.repos["timm/vit_tiny.mae"] = {"model.safetensors": as_file(encoder, tmp_path)}
    assert_same(dict(checkpoint.load("timm/vit_tiny.mae")["model"]), encoder)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "timm").mkdir()
    torch.save({"model": weights}, tmp_path / "timm" / "vit_tiny.mae")
    assert_same(checkpoint.load("timm/vit_tiny.mae")["model"], weights)


def test_weights_of_the_hub_go_where_files_go(hugging_face, weights, tmp_path):
    hugging_face.repos["me/mae"] = {"checkpoint-9.pth": as_file(weights, tmp_path, ".pth")}
    classifier = models_vit.vit_tiny_patch4(num_classes=3)
    checkpoint.load_pretrained("hf://me/mae", classifier)
    assert torch.equal(classifier.blocks[3].mlp.fc1.weight, weights["blocks.3.mlp.fc1.weight"])
    path, _ = export.export("hf://me/mae", "safetensors", "full", tmp_path / "x", "mae_vit_tiny_patch4")
    assert_same(safetensors.torch.load_file(path), weights)


# pushing


@pytest.fixture
def pushed(monkeypatch):
    """What would have been pushed: (repo, {file: content}); the Hub's own calls are recorded."""
    calls = []

    def upload_folder(self, repo_id, folder_path):
        calls.append((repo_id, {path.name: path.read_bytes() for path in folder_path.iterdir()}))

    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", lambda self: {"name": "me"})
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo, exist_ok: calls.append(repo))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    return calls


def run_export(monkeypatch, *args) -> None:
    monkeypatch.setattr(sys, "argv", ["export", *map(str, args)])
    export.main()


@pytest.fixture
def trained(weights, tmp_path):
    """A checkpoint with its log."""
    args = {"model": "mae_vit_tiny_patch4", "input_size": 32, "epochs": 10, "data_path": "/home/me/secret"}
    torch.save({"model": weights, "args": args}, tmp_path / "checkpoint-9.pth")
    (tmp_path / "log.txt").write_text('{"epoch": 8}\n{"train_loss": 0.41, "epoch": 9}\n')
    return tmp_path / "checkpoint-9.pth"


@pytest.mark.parametrize("part", ["encoder", "full"])
def test_pushed_folder_has_a_card_from_the_checkpoint(part, trained, pushed, tmp_path, monkeypatch, capsys):
    options = ["--push", "me/mae", "--license", "mit", "--data", "Digits,\n# of scikit-learn"]
    run_export(monkeypatch, trained, "--to", "hf", "--part", part, "--output", tmp_path / "hf", *options)
    assert "pushed to hf://me/mae" in capsys.readouterr().out
    assert pushed[0] == "me/mae" and pushed[1][0] == "me/mae"
    files = pushed[1][1]
    assert files.keys() == {"config.json", "preprocessor_config.json", "model.safetensors", "README.md"}
    card = huggingface_hub.ModelCard(files["README.md"].decode())
    assert card.data.license == "mit" and card.data.library_name == "transformers"
    for said in ("64 wide", "4 blocks", "4 heads", "32 x 32", "patches of 4", "Digits, # of scikit-learn"):
        assert said in " ".join(card.text.split())
    assert '{"train_loss": 0.41, "epoch": 9}' in card.text and "epochs: 10" in card.text
    assert ("ForPreTraining" in card.text) == (part == "full") and "secret" not in card.text


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--to", "timm", "--license", "mit", "--data", "x"], "--push me/mae is for --to hf"),
        (["--to", "hf", "--data", "x"], "licence.*--license cc-by-nc-4.0"),
        (["--to", "hf", "--license", "My own", "--data", "x"], "licence.*not 'My own'"),
        (["--to", "hf", "--license", "mit"], "trained on: --data"),
        (["--to", "hf", "--license", "mit", "--data", "x", "--push", "mae"], "'mae' is no repository"),
    ],
)
def test_push_without_what_it_needs_writes_nothing(options, reason, trained, pushed, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as left:
        run_export(monkeypatch, trained, "--output", tmp_path / "hf", "--push", "me/mae", *options)
    error = capsys.readouterr().err
    assert left.value.code == 2 and re.search(reason, error.replace("\n", " ")), error
    assert pushed == [] and not (tmp_path / "hf").exists()


def test_hub_that_refuses_is_told_and_the_folder_stays(trained, pushed, tmp_path, monkeypatch, capsys):
    def refuse(self, *_, **__):
        raise OSError("403 \x1b[31mForbidden")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    options = ["--push", "me/mae", "--license", "mit", "--data", "x", "--output", tmp_path / "hf"]
    with pytest.raises(SystemExit) as left:
        run_export(monkeypatch, trained, "--to", "hf", *options)
    error = capsys.readouterr().err
    assert left.value.code == 2 and "could not be pushed to me/mae" in error and "\x1b[31m" not in error
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", refuse)
    with pytest.raises(SystemExit):
        run_export(monkeypatch, trained, "--to", "hf", *options[:-1], tmp_path / "other")
    assert "hf auth login" in capsys.readouterr().err and not (tmp_path / "other").exists()


# torch.hub


def from_hub(name: str, **options):
    return torch.hub.load(str(ROOT), name, source="local", **options)


@pytest.mark.parametrize("name", [*models_mae.MODELS, *models_vit.MODELS])
def test_torch_hub_builds_every_model(name):
    with torch.device("meta"):  # shapes alone
        expected, found = (models_mae.MODELS | models_vit.MODELS)[name](img_size=112), from_hub(name, img_size=112)
    shapes = {key: value.shape for key, value in expected.state_dict().items()}
    assert {key: value.shape for key, value in found.state_dict().items()} == shapes


def test_torch_hub_gives_weights_of_a_file(trained, weights):
    assert_same(dict(from_hub("mae_vit_tiny_patch4", pretrained=str(trained)).state_dict()), weights)
    larger = from_hub("mae_vit_tiny_patch4", pretrained=str(trained), img_size=48, norm_pix_loss=True)
    assert larger.patch_embed.img_size == (48, 48) and larger.norm_pix_loss and not larger.training
    classifier = from_hub("vit_tiny_patch4", pretrained=str(trained), num_classes=7, global_pool=True, img_size=48)
    assert classifier.head.out_features == 7
    assert torch.equal(classifier.blocks[0].attn.qkv.weight, weights["blocks.0.attn.qkv.weight"])
    torch.testing.assert_close(classifier.pos_embed, larger.pos_embed)


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("probe", [True, False])
def test_torch_hub_gives_a_classifier_as_the_file_has_it_unless_told_otherwise(pool, probe, tmp_path):
    torch.manual_seed(0)
    trained = models_vit.vit_tiny_patch4(img_size=32, num_classes=5, global_pool=pool, in_chans=4).eval()
    torch.nn.init.normal_(trained.head.weight)
    weights = trained.state_dict()
    if probe:
        weights = {key: value for key, value in weights.items() if not key.startswith("head.")}
        weights |= {"head.0.running_mean": torch.zeros(64), "head.0.running_var": torch.ones(64) - models_vit.PROBE_EPS}
        weights |= {"head.0.num_batches_tracked": torch.tensor(9)}
        weights |= {"head.1.weight": trained.head.weight, "head.1.bias": trained.head.bias}
    torch.save({"model": weights, "args": {"model": "vit_tiny_patch4"}}, tmp_path / "c.pth")
    imgs = torch.randn(2, 4, 32, 32)
    of = {"pretrained": str(tmp_path / "c.pth")}
    for same in ({}, {"num_classes": 5}, {"img_size": 32}, {"global_pool": pool, "num_classes": 5, "in_chans": 4}):
        with torch.no_grad():
            torch.testing.assert_close(from_hub("vit_tiny_patch4", **of, **same)(imgs), trained(imgs))
    larger = from_hub("vit_tiny_patch4", **of, img_size=48)
    assert torch.equal(larger.head.weight, trained.head.weight) or probe
    assert larger(torch.randn(2, 4, 48, 48)).shape == (2, 5)
    other = from_hub("vit_tiny_patch4", **of, num_classes=7, img_size=48, drop_path_rate=0.1)
    assert other.head.out_features == 7 and other.global_pool is pool
    assert torch.equal(other.blocks[3].mlp.fc1.weight, trained.blocks[3].mlp.fc1.weight)
    if pool:
        assert torch.equal(other.fc_norm.weight, trained.fc_norm.weight)
    noisy = from_hub("vit_tiny_patch4", **of, drop_path_rate=0.1)
    assert noisy.head.out_features == 5
    if not probe:
        with torch.no_grad():
            torch.testing.assert_close(noisy(imgs), trained(imgs))


@pytest.mark.parametrize("channels", [3, 13])
def test_torch_hub_takes_channels_from_the_file_and_an_encoder_of_an_autoencoder(channels, tmp_path):
    mae = models_mae.mae_vit_tiny_patch4(in_chans=channels, img_size=48).eval()
    args = {"mean": [0.5] * channels, "std": [0.1] * channels, "pixel_type": "uint16"}
    torch.save({"model": mae.state_dict(), "args": args}, tmp_path / "mae.pth")
    encoder = from_hub("vit_tiny_patch4", pretrained=str(tmp_path / "mae.pth"))
    imgs = torch.randn(2, channels, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(encoder(imgs), mae.encode(imgs)[0])  # the class token
    classifier = from_hub("vit_tiny_patch4", pretrained=str(tmp_path / "mae.pth"), num_classes=5, img_size=48)
    assert classifier(imgs).shape == (2, 5)
    assert of_model(classifier) == of_model(encoder) == Bands(channels, (0.5,) * channels, (0.1,) * channels, "uint16")
    assert from_hub("mae_vit_tiny_patch4", pretrained=str(tmp_path / "mae.pth"))(imgs)[1].shape[:2] == (2, 144)
    with pytest.raises(UserError, match="decoder_depth, in_chans: .*mae.pth decides that"):
        from_hub("mae_vit_tiny_patch4", pretrained=str(tmp_path / "mae.pth"), in_chans=1, decoder_depth=2)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mae_vit_base_patch16", "pretrain/mae_pretrain_vit_base_full.pth"),
        ("mae_vit_huge_patch14_dec512d8b", "pretrain/mae_pretrain_vit_huge_full.pth"),
        ("vit_large_patch16", "finetune/mae_finetuned_vit_large.pth"),
        ("vit_tiny_patch16", ""),
    ],
)
def test_torch_hub_takes_the_released_file(name, file, monkeypatch):
    asked = []

    def fetch(url):
        asked.append(url)
        raise UserError("no network here")

    monkeypatch.setattr(download, "fetch", fetch)
    with pytest.raises(UserError, match="no network here" if file else "nobody released"):
        from_hub(name, pretrained=True)
    assert asked == ([download.RELEASES + file] if file else [])
