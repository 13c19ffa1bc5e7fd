"""Little folders of images for the tests of kd.data."""

import torch


def make_folder(root, *, per_class=4, size=(10, 10), extension="png", val=False):
    """root/{train,test}[,val]/{cat,dog,owl}; `size=None`: several shapes and formats."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    counts = {"train": per_class, "test": 3, **({"val": 2} if val else {})}
    for split, count in counts.items():
        for name in ("cat", "dog", "owl"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                h, w = size or (20 + 7 * number, 60 - 3 * number)
                end = extension if size else ("png", "jpg", "bmp", "webp")[number % 4]
                pixels = torch.randint(1, 256, (h, w, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(root / split / name / f"{number}.{end}")
    return root


def spec_of(root, **changes):
    """The mapping that dataset=folder resolves to."""
    return {"name": "folder", "_target_": "kd.data.sources.folder", "root": root and str(root), **changes}
