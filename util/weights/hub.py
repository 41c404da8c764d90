"""Hugging Face's Hub: weights from hf://user/name and timm/name, and a folder of weights to it, with a model card.

The library huggingface_hub does the work: its cache, its token (`hf auth login`, HF_TOKEN), HF_HUB_OFFLINE.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from util.errors import UserError
from util.log import log

# hf://user/name, with @revision and /file where wanted; timm/name is short for hf://timm/name
_ADDRESS = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.+))?|(timm/[\w.-]+)(?:@([\w.-]+))?")
# the first of these that is there is taken
_PREFERRED = (r"model\.safetensors", r".+\.safetensors", r"pytorch_model\.bin", r".+\.pth", r".+\.pt", r".+\.bin")


def local(source: str | Path) -> str | Path:
    """hf://user/name[@revision][/file] or timm/name -> its file in the Hub's cache, fetched unless it is there.

    Anything else, and timm/name where such a file is, as it is. Raises UserError where the Hub has no such thing, wants
    a login, or has several files of weights.
    """
    match = _ADDRESS.fullmatch(str(source))
    if not match:
        if str(source).startswith("hf://"):
            raise UserError(
                f"{str(source)[:200]!r} is no address on the Hub: give hf://user/name or hf://user/name/file"
            )
        return source
    if match[4] and Path(source).exists():
        return source
    repo, revision, name = match[1] or match[4], match[2] or match[5], match[3]
    with _told(f"{source} cannot be fetched: check the name and the network, or fetch it by hand"):
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            name = name or _choose(HfApi().list_repo_files(repo, revision=revision), str(source))
            return Path(HfApi().hf_hub_download(repo, name, revision=revision))
        except (HfHubHTTPError, HFValidationError, UserError):
            raise
        except Exception as error:  # offline, by wish or not: errors of whatever library the Hub's goes through
            log.warning(f"the Hub cannot be asked for {repo} ({type(error).__name__}): looking in its cache")
            folder = Path(HfApi().snapshot_download(repo, revision=revision, local_files_only=True))
            files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
            return folder / (name if name in files else _choose(files if name is None else [], str(source)))


def _choose(names: list[str], source: str) -> str:
    """The file of weights among a repository's: safetensors first, which run nothing."""
    for pattern in _PREFERRED:
        found = [name for name in names if re.fullmatch(pattern, name) and name != "training_args.bin"]
        if len(found) > 1:
            raise UserError(f"{source} has several files of weights: name one, as in hf://user/name/{found[0]}")
        if found:
            return found[0]
    raise UserError(f"{source} has no file of weights, but {', '.join(names[:5]) or 'nothing'}")


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Around what the Hub's library does: `what` was to be done, and its own reason."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError("the Hub needs a package that is missing: pip install huggingface_hub") from error
    except Exception as error:  # its own, of the network's library, of the disk
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{what} ({type(error).__name__}: {reason})") from error


def check_push(repo: str, licence: str, data: str) -> None:
    """Raise UserError unless a folder can be pushed: told what it is, and with a token that the Hub takes."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"--push {repo[:100]!r} is no repository: give user/name")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        raise UserError(
            f"--push needs the weights' licence by the Hub's name: --license mit, --license cc-by-nc-4.0 (the released "
            f"weights' own) or the like, not {licence[:100]!r}"
        )
    if not data.strip():
        raise UserError("--push needs what the weights were trained on: --data 'ImageNet-1K, training set' or the like")
    with _told("the Hub does not let in: log in with hf auth login, or set HF_TOKEN"):
        from huggingface_hub import HfApi

        HfApi().whoami()


def push(folder: Path, repo: str, card: str) -> str:
    """Upload a folder, with `card` as its README.md; returns the address. The folder stays where the Hub fails."""
    (folder / "README.md").write_text(card)
    with _told(f"{folder} is written, but could not be pushed to {repo}"):
        from huggingface_hub import HfApi

        HfApi().create_repo(repo, exist_ok=True)
        HfApi().upload_folder(repo_id=repo, folder_path=folder)
    return f"hf://{repo}"


def model_card(folder: Path, repo: str, source: str, args: dict, licence: str, data: str) -> str:
    """A model card, from a folder of Hugging Face's ViTMAE, its checkpoint `source` and the options `args`."""
    from huggingface_hub import ModelCardData

    config = json.loads((folder / "config.json").read_text())
    name = config["architectures"][0]
    part = "with its decoder" if name == "ViTMAEForPreTraining" else "its encoder"
    head = ModelCardData(
        license=licence, library_name="transformers", pipeline_tag="image-feature-extraction", tags=["mae", "vit"]
    )
    told = {key: args[key] for key in ("model", "epochs", "mask_ratio", "norm_pix_loss", "batch_size") if key in args}
    log_file = Path(source).parent / "log.txt"
    with contextlib.suppress(OSError, IndexError, UnicodeDecodeError):
        told["last line of the log"] = f"`{log_file.read_text().strip().splitlines()[-1]}`"
    training = (
        "".join(f"* {key}: {str(value)[:2000]}\n" for key, value in told.items()) or "Not told by the checkpoint.\n"
    )
    return f"""---
{head.to_yaml()}
---

# {repo}

A masked autoencoder ([He et al. 2021](https://arxiv.org/abs/2111.06377)), {part}: a Vision Transformer
{config["hidden_size"]} wide with {config["num_hidden_layers"]} blocks and {config["num_attention_heads"]} heads, for
images of {config["image_size"]} x {config["image_size"]} pixels and {config["num_channels"]} channels in patches of
{config["patch_size"]}.

## Data

{" ".join(data.split())}

## Training

{training}
## Use

```python
import transformers
model = transformers.{name}.from_pretrained("{repo}")
```
"""
