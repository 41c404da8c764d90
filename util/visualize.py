"""Pictures of what a masked autoencoder sees and predicts. All drawing is here.

Letters: N batch, L patches, H height, W width. Pictures are tensors in [0, 1].
"""

from dataclasses import dataclass, fields

import torch
from PIL import Image, ImageDraw
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torchvision.transforms.functional import to_pil_image


@dataclass(frozen=True)
class Pictures:
    """Four [N, 3, H, W] pictures of each image, and the loss of the batch.

    `pasted` has the reconstruction where patches were removed, and the kept patches as they are.
    """

    original: torch.Tensor
    masked: torch.Tensor
    reconstructed: torch.Tensor
    pasted: torch.Tensor
    loss: float


@torch.no_grad()
def reconstruct(
    model: nn.Module, imgs: torch.Tensor, mask_ratio: float = 0.75, noise: torch.Tensor | None = None
) -> Pictures:
    """Normalised images [N, 3, H, W] (and mask noise [N, L]) -> Pictures. `model`, see models_mae.py, must predict
    plain pixels.
    """
    if model.norm_pix_loss:
        raise ValueError("a model trained with --norm_pix_loss predicts normalised patches, not pixels")
    model.eval()
    loss, pred, mask = model(imgs, mask_ratio, noise)
    removed = model.unpatchify(mask[:, :, None].expand_as(pred))
    prediction = model.unpatchify(pred.float())
    mean, std = (imgs.new_tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))

    def show(pixels: torch.Tensor) -> torch.Tensor:
        return (pixels * std + mean).clamp(0, 1)

    original, reconstructed = show(imgs), show(prediction)
    masked = torch.where(removed > 0, 0.5, original)  # removed patches in grey
    pasted = torch.where(removed > 0, reconstructed, original)
    return Pictures(original, masked, reconstructed, pasted, loss.item())


def sheet(pictures: Pictures, side: int = 128, gap: int = 6) -> Image.Image:
    """Pictures -> one image: a row for each image, a titled column for each kind; cells are `side` pixels high."""
    titles = [field.name for field in fields(Pictures) if field.name != "loss"]
    columns = [getattr(pictures, title) for title in titles]
    n, _, height, width = columns[0].shape
    cell = (round(side * width / height), side)
    title_height = 18
    canvas = Image.new("RGB", (len(columns) * (cell[0] + gap) + gap, n * (side + gap) + gap + title_height), "white")
    draw = ImageDraw.Draw(canvas)
    for column, (title, images) in enumerate(zip(titles, columns, strict=True)):
        x = gap + column * (cell[0] + gap)
        draw.text((x, gap // 2), title, fill="black")
        for row, image in enumerate(images):
            enlarged = to_pil_image(image.cpu()).resize(cell, Image.Resampling.NEAREST)
            canvas.paste(enlarged, (x, title_height + gap + row * (side + gap)))
    return canvas
