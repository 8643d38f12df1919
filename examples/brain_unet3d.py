"""A 3D U-Net that learns grey and white matter, trained twice: exactly, and inside a memory budget.

The images are the MNI ICBM152 2009a template (Fonov et al., NeuroImage 54, 2011) that ships inside nilearn: a T1 image
of 197 x 233 x 189 voxels of 1 mm, with maps of how likely each voxel is grey or white matter. It is *one* brain, the
average of 152, and mirrored so that its halves are equal. Training patches therefore come from the back of the head
and the test from the front; the score tells whether a budget harms learning, not how well strangers are segmented.

    python examples/brain_unet3d.py --budget 60% --seeds 3

needs the extra `nets` and requirements/nets.txt.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from _data import packaged_file
from _training import main
from torch import Tensor, nn

PATCH = 40
BATCH = 2
# Patches of the test slab; all that lies behind it is for training.
TEST_DEPTH = 2
CLASSES = ("background", "grey matter", "white matter")


def load_map(kind: str) -> np.ndarray:
    """The template's map `kind` ("t1", "gm" or "wm"), 0 to 255, axes right, front and up."""
    import nibabel

    path = packaged_file("nilearn", f"datasets/data/mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz")
    return np.asarray(nibabel.load(path).dataobj)  # type: ignore[attr-defined]


class Brain:
    """Patches from the back of the template for training, a grid of patches over its front for the score."""

    title = (
        "Grey and white matter of the MNI152 template (one averaged brain: trained on its back, tested on its front)"
    )
    learning_rate = 3e-3

    def __init__(self) -> None:
        t1, grey, white = (load_map(kind) for kind in ("t1", "gm", "wm"))
        inside = np.argwhere(t1 > 0)
        box = tuple(slice(low, high + 1) for low, high in zip(inside.min(0), inside.max(0), strict=True))
        brain = t1[box].astype(np.float32)
        tissue = brain[brain > 0]
        self.image = torch.from_numpy((brain - tissue.mean()) / tissue.std())
        # More likely than not, and never both.
        labels = np.where(white[box] > 127, 2, np.where(grey[box] > 127, 1, 0))
        self.labels = torch.from_numpy(labels)
        self.border = self.image.shape[1] - TEST_DEPTH * PATCH

    def build(self) -> nn.Module:
        from monai.networks.nets import UNet

        return UNet(3, in_channels=1, out_channels=len(CLASSES), channels=(16, 32, 64), strides=(2, 2), num_res_units=2)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        limits = (self.image.shape[0], self.border, self.image.shape[2])
        corners = [
            [int(torch.randint(limit - PATCH + 1, (), generator=generator)) for limit in limits] for _ in range(BATCH)
        ]
        return self.patches(corners)

    def patches(self, corners: list[list[int]]) -> tuple[Tensor, Tensor]:
        """The patches with these lowest corners: images of batch x 1 x PATCH³ and their labels of batch x PATCH³."""
        places = [tuple(slice(low, low + PATCH) for low in corner) for corner in corners]
        images = torch.stack([self.image[place] for place in places])
        return images.unsqueeze(1), torch.stack([self.labels[place] for place in places])

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target)

    def score(self, model: nn.Module) -> dict[str, float]:
        """Dice overlap in the front slab: of both tissues on average, and of each."""
        overlap, total = torch.zeros(len(CLASSES)), torch.zeros(len(CLASSES))
        for corner in self.test_corners():
            images, target = self.patches([corner])
            found = model(images).argmax(1)
            for tissue in range(len(CLASSES)):
                hit, true = found == tissue, target == tissue
                overlap[tissue] += (hit & true).sum()
                total[tissue] += hit.sum() + true.sum()
        dice = (2 * overlap / total).tolist()[1:]
        return {"Dice": sum(dice) / len(dice), **{f"Dice, {n}": d for n, d in zip(CLASSES[1:], dice, strict=True)}}

    def test_corners(self) -> list[list[int]]:
        """Lowest corners of patches side by side over the front slab; a rim narrower than a patch is left out."""
        width, _, height = self.image.shape
        return [
            [x, self.border + PATCH * y, z]
            for x in range(width % PATCH // 2, width - PATCH + 1, PATCH)
            for y in range(TEST_DEPTH)
            for z in range(height % PATCH // 2, height - PATCH + 1, PATCH)
        ]


if __name__ == "__main__":
    main(Brain(), steps=200, quick_steps=10)
