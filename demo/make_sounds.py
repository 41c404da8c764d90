"""Write spectrograms of synthesised sounds as an ImageNet-style folder: python demo/make_sounds.py FOLDER

No recordings: six kinds of computed sounds, ten seconds each, in pink noise, so that a long flat input can be tried
without a download. Pictures are grey, 1024 frames high (time, of 10 ms) and 128 bands wide (frequency, of 62.5 Hz).
"""

import math
import sys
from pathlib import Path

import torch
from PIL import Image

RATE = 16_000  # samples a second
FRAMES, BANDS, HOP = 1024, 128, 160
KINDS = ("rising", "falling", "trill", "pulses", "chord", "noise")


def event(kind: str, seconds: float, pitch: float) -> torch.Tensor:
    """One sound of a kind: float [samples], faded in and out. `pitch` in Hz, `seconds` long."""
    t = torch.arange(int(seconds * RATE)) / RATE
    part = t / seconds  # from 0 to 1
    frequency = {
        "rising": pitch * (1 + part),
        "falling": pitch * (2 - part),
        "trill": pitch * (1 + 0.15 * torch.sin(2 * math.pi * 8 * t)),
    }.get(kind, pitch * torch.ones_like(t))
    phase = 2 * math.pi * frequency.cumsum(0) / RATE
    sound = phase.sin()
    if kind == "chord":
        sound = sum((k * phase).sin() / k for k in (1, 1.5, 2, 3))
    elif kind == "pulses":
        sound = sound * (torch.sin(2 * math.pi * 12 * t) > 0)
    elif kind == "noise":
        sound = sound * torch.randn_like(t).cumsum(0).mul(0.2).cos()
    return sound * torch.sin(math.pi * part)


def sound(kind: str, seed: int) -> torch.Tensor:
    """Ten seconds, float [samples]: eight to fifteen events of a kind in noise, all drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        n = FRAMES * HOP
        spectrum = torch.fft.rfft(torch.randn(n))
        noise = torch.fft.irfft(spectrum / torch.arange(1, len(spectrum) + 1).sqrt(), n)
        wave = 0.05 * noise / noise.std()
        for _ in range(int(torch.randint(8, 16, ()))):
            seconds, pitch, loudness = (torch.rand(3) * torch.tensor([1.2, 2000, 0.5])).tolist()
            heard = event(kind, 0.6 + seconds, 400 + pitch) * (0.1 + loudness)
            start = int(torch.randint(n - len(heard), ()))
            wave[start : start + len(heard)] += heard
        return wave


def spectrogram(wave: torch.Tensor) -> Image.Image:
    """float [samples] -> grey picture, time downwards: power in dB, the loudest white, 50 dB less black."""
    stft = torch.stft(wave, n_fft=512, hop_length=HOP, window=torch.hann_window(512), return_complex=True)
    power = stft.abs().square()[: 2 * BANDS, :FRAMES].unflatten(0, (BANDS, 2)).mean(dim=1).T
    db = 10 * power.clamp(min=1e-12).log10()
    grey = ((db - db.max() + 50) / 50).clamp(0, 1) * 255
    return Image.fromarray(grey.round().byte().numpy())


def write_sounds(root: Path, train: int = 60, val: int = 20) -> None:
    """train/<kind>/ and val/<kind>/ below `root`, with so many pictures of each kind; no seed is in both."""
    for k, kind in enumerate(KINDS):
        for i in range(train + val):
            folder = root / ("train" if i < train else "val") / kind
            folder.mkdir(parents=True, exist_ok=True)
            spectrogram(sound(kind, seed=1000 * k + i)).save(folder / f"{i:03d}.png")


if __name__ == "__main__":
    write_sounds(Path(sys.argv[1]))
