"""What the decoder is to predict, from the pixels of a patch. A new target is added here.

Letters: N batch, L patches per image, P patch side in pixels, C channels. A target is a function: patches
[N, L, P*P*C], float32 -> [N, L, any] of numbers, whose mean squared error is the loss, or ids [N, L], whose
cross-entropy is. It may have `n_outputs`, what the decoder predicts for a patch where that is not P*P*C, and
`inverse`, from predictions back to pixels for the pictures; and `prepare`, which sees some training patches first.
"""

import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.export.passes import move_to_device_pass

from util.errors import UserError
from util.log import log

N_COMPONENTS = 96  # paper, section 4.1, "Reconstruction target"
N_FITTED = 256  # images whose patches the components are fitted on, and a tokenizer tried on


def pixel(patches: torch.Tensor) -> torch.Tensor:
    """[..., P*P*C] -> the same: pixels as the loader normalised them (paper, section 3, "Reconstruction target")."""
    return patches


def norm(patches: torch.Tensor) -> torch.Tensor:
    """[..., P*P*C] -> [..., P*P*C]: each patch by its own mean and deviation (unbiased; 1e-6 beside the variance, for
    patches of one colour). Contrast counts the same everywhere, which gives better features: 85.4 against 84.9 %
    fine-tuned, 73.9 against 73.5 % with a linear probe (paper, table 1d).
    """
    mean, var = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
    return (patches - mean) / (var + 1e-6).sqrt()


class PCA(nn.Module):
    """patches [..., P*P*C] -> [..., M]: the M largest coefficients of their principal components (paper, table 1d).

    Mean and components are buffers: a checkpoint holds them, and a run that goes on keeps them. Zero until `prepare`.
    """

    def __init__(self, n_pixels: int, n_components: int = N_COMPONENTS) -> None:
        super().__init__()
        self.n_outputs = min(n_components, n_pixels)
        self.register_buffer("mean", torch.zeros(n_pixels))
        self.register_buffer("components", torch.zeros(self.n_outputs, n_pixels))

    def prepare(self, patches: torch.Tensor) -> None:
        """Fit the components to a sample [..., P*P*C], exactly, in float64 on the CPU; unless there are some already,
        from a checkpoint.
        """
        if self.components.any():
            return
        patches = patches.flatten(0, -2).double().cpu()
        variances, directions = torch.linalg.eigh(patches.T.cov().reshape(patches.shape[1], -1))  # ascending
        components = directions.T.flip(0)[: self.n_outputs]
        # a direction's sign is free: the largest entry positive, so that every machine finds the same
        largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
        self.components.copy_(components * largest.sign())
        self.mean.copy_(patches.mean(dim=0))
        share = (variances[-self.n_outputs :].sum() / variances.sum().clamp(min=1e-30)).item()
        log.info(f"{self.n_outputs} components hold {100 * share:.1f} % of the variance of {len(patches)} patches")

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[..., P*P*C] -> coefficients [..., M]."""
        with torch.autocast(patches.device.type, enabled=False):
            return (patches - self.mean) @ self.components.T

    def inverse(self, coefficients: torch.Tensor) -> torch.Tensor:
        """[..., M] -> the nearest patches [..., P*P*C] that have these coefficients."""
        return coefficients @ self.components + self.mean


class Tokens:
    """patches [N, L, P*P*C] -> ids [N, L] of a user's tokenizer, as BEiT predicts them (paper, table 1d).

    Not a module: its weights are no part of the run, its checkpoints or its optimizer. A model that comes from a
    checkpoint has none (None), and can predict ids but not be trained.
    """

    def __init__(
        self, n_outputs: int, tokenizer: Callable[[torch.Tensor], torch.Tensor] | None = None,
        img_size: tuple[int, int] = (0, 0), patch_size: int = 0,
    ) -> None:  # fmt: skip
        self.n_outputs, self.tokenizer, self.img_size, self.patch_size = n_outputs, tokenizer, img_size, patch_size

    @torch.no_grad()
    def __call__(self, patches: torch.Tensor) -> torch.Tensor:
        if self.tokenizer is None:
            raise UserError("this model predicts the ids of a tokenizer, which no checkpoint holds: give --tokenizer")
        p = self.patch_size
        columns = patches.unflatten(2, (p * p, -1)).transpose(2, 3).flatten(2).transpose(1, 2)  # [N, C*P*P, L]
        with torch.autocast(patches.device.type, enabled=False):
            return self.tokenizer(F.fold(columns, self.img_size, kernel_size=p, stride=p))

    def inverse(self, logits: torch.Tensor) -> torch.Tensor:
        """Raises UserError: ids of a tokenizer have no pixels."""
        raise UserError("this model predicts the ids of a tokenizer, which have no pixels: there is nothing to draw")

    def prepare(self, patches: torch.Tensor) -> None:
        """Try the tokenizer on a sample [n, L, P*P*C]. Raises UserError unless ids of the vocabulary come."""
        for sample in (patches, patches[:1]):  # the last batch's size is not the first's
            try:
                ids = self(sample)
            except (RuntimeError, ValueError, TypeError) as error:
                reason = str(error).strip().splitlines()[-1:]
                raise UserError(
                    f"--tokenizer fails on {len(sample)} images of {self.img_size} pixels: {' '.join(reason)[:300]}"
                ) from error
            shape, dtype = tuple(getattr(ids, "shape", ())), getattr(ids, "dtype", type(ids).__name__)
            if shape != tuple(sample.shape[:2]) or dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
                raise UserError(
                    f"--tokenizer gives {dtype} of shape {shape} for {len(sample)} images of {sample.shape[1]} "
                    f"patches: it has to give an integer for each, {tuple(sample.shape[:2])}"
                )
            least, most = int(ids.min()), int(ids.max())
            if least < 0 or most >= self.n_outputs:
                raise UserError(
                    f"--tokenizer gives ids from {least} to {most}, outside a vocabulary of {self.n_outputs}: give its "
                    "size with --vocab_size"
                )


def load_tokenizer(path: str, device: torch.device, vocab_size: int | None = None) -> tuple[nn.Module, int]:
    """A TorchScript or torch.export file -> (the program on `device`, the size of its vocabulary).

    The file is code that runs here: the path comes from the user alone, never from a checkpoint. The size is
    `vocab_size`, or what the file has beside the program (extra file `vocab_size`), or the program's attribute
    `vocab_size`. Raises UserError where the file cannot be read or tells no size.
    """
    if not Path(path).is_file():
        raise UserError(f"--tokenizer {path}: no such file; give a TorchScript or torch.export program")
    extra = {"vocab_size": ""}
    try:
        if any(name.endswith("archive_format") for name in zipfile.ZipFile(path).namelist()):
            program = move_to_device_pass(torch.export.load(path, extra_files=extra), device).module()
        else:
            program = torch.jit.load(path, map_location=device, _extra_files=extra).eval()
    except Exception as error:  # whatever is in the file
        reason = str(error).strip().splitlines()[:1]
        raise UserError(
            f"--tokenizer {path} is no TorchScript or torch.export program: {' '.join(reason)[:300]}"
        ) from error
    told = vocab_size or extra["vocab_size"] or getattr(program, "vocab_size", None)
    try:
        return program, int(told)
    except (TypeError, ValueError):
        raise UserError(f"--tokenizer {path} does not tell how many ids it has: give --vocab_size") from None


# --target NAME -> the target, or its class where `for_model` makes it
TARGETS: dict[str, Callable] = {"pixel": pixel, "norm": norm, "pca": PCA, "tokens": Tokens}


def chosen(name: str | None, norm_pix_loss: bool, **of_one: tuple[str, object]) -> str:
    """--target and --norm_pix_loss -> the target's name; `of_one`: options as name=(their target's name, value).

    Raises UserError where they contradict one another, or tokens have no tokenizer.
    """
    if norm_pix_loss and name not in (None, "norm"):
        raise UserError(f"--norm_pix_loss is --target norm, and contradicts --target {name}: leave one of them out")
    name = name or ("norm" if norm_pix_loss else "pixel")
    for option, (target, value) in of_one.items():
        if value and name != target:
            raise UserError(f"--{option} {value} is for --target {target}, but the target is {name}: leave it out")
    if name == "tokens" and not of_one["tokenizer"][1]:
        raise UserError("--target tokens needs a tokenizer: give a TorchScript or torch.export file as --tokenizer")
    return name


def for_model(
    name: str, model: nn.Module, device: torch.device, pca_components: int | None = None, tokenizer: str = "",
    vocab_size: int | None = None,
) -> Callable[[torch.Tensor], torch.Tensor]:  # fmt: skip
    """The target of this name for a masked autoencoder; one with `prepare` is to see some training patches first."""
    if name == "pca":
        return PCA(model.decoder_pred.out_features, pca_components or N_COMPONENTS)
    if name == "tokens":
        program, n_ids = load_tokenizer(tokenizer, device, vocab_size)
        return Tokens(n_ids, program, model.patch_embed.img_size, model.patch_embed.patch_size[0])
    return TARGETS[name]


def sample_patches(model: nn.Module, loader: Iterable[tuple[torch.Tensor, object]]) -> torch.Tensor:
    """The patches [n, L, P*P*C] of the first `N_FITTED` images of `loader`, or of all, on their device."""
    patches, n = [], 0
    for imgs, _ in loader:
        patches.append(model.patchify(imgs).float())
        n += len(imgs)
        if n >= N_FITTED:
            break
    return torch.cat(patches)[:N_FITTED]
