"""The loop that one finds in most places: DataLoader, PIL transforms, float32, the teacher asked at every step.

Nothing here is made slow on purpose, and nothing is imported from kd: networks come as they are.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Images(Dataset):
    """Arrays in memory, as torchvision's CIFAR10 holds them; a PIL image through the transforms at each look."""

    def __init__(self, images: np.ndarray, labels: list[int]):
        """`images` (N, H, W, C) uint8."""
        size = images.shape[1]
        self.images, self.labels = images, labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(size, padding=size // 8),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        """(image, label)."""
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def train(
    student: nn.Module, teacher: nn.Module | None, data: Images, batch_size: int, workers: int, device: str
) -> Iterator[float]:
    """Trains for ever; gives the loss of each step."""
    loader = DataLoader(
        data, batch_size, shuffle=True, num_workers=workers, drop_last=True, pin_memory=device.startswith("cuda")
    )
    student, teacher = student.to(device).train(), teacher.to(device).eval() if teacher is not None else None
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    while True:
        for batch, labels in loader:
            images, targets = batch.to(device), labels.to(device)
            logits = student(images)
            loss = F.cross_entropy(logits, targets)
            if teacher is not None:
                with torch.no_grad():
                    teacher_logits = teacher(images)
                loss = 0.1 * loss + 0.9 * soft_targets(logits, teacher_logits, 4.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()


def soft_targets(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Hinton et al. 2015 (arXiv:1503.02531): KL of the softened outputs, times T squared."""
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.softmax(teacher_logits / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean") * temperature**2
