"""Small students and teachers for fine-tuning, in a file that a script under torchrun can import without the tests."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

FEATURES, CLASSES = 6, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.BatchNorm1d(FEATURES), nn.Linear(FEATURES, 16), nn.Linear(16, FEATURES)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.drop(torch.nn.functional.gelu(self.fc1(self.norm(x)))))


class Net(nn.Module):
    """Two residual blocks and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


class Plain(nn.Module):
    """A network without dropout and BatchNorm, so that a step does not depend on how its samples are split."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(FEATURES, 16), nn.Linear(16, CLASSES)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())


def pair(kind: type[nn.Module] = Net) -> tuple[nn.Module, nn.Module]:
    """Return a student and its teacher, both in float64; the student is a perturbed copy."""
    torch.manual_seed(1)
    teacher = kind().double().eval()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return student, teacher


def batches(count: int = 8, size: int = 6) -> list[Tensor]:
    torch.manual_seed(2)
    return [torch.randn(size, FEATURES, dtype=torch.float64) for _ in range(count)]
