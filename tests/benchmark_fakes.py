"""A classifier and images for tests of the benchmark; processes that tests start use them too."""

from __future__ import annotations

import dataclasses
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ttt_plugins.benchmark import CorruptionData
from ttt_plugins.data.images import LabelledImages


@dataclasses.dataclass(frozen=True)
class FakeConfig:
    lr: float = 8.0
    params: tuple[str, ...] = ("shift",)


WEIGHT = torch.randn(10, 3, generator=torch.Generator().manual_seed(5)) * 9


class FakeAdapter(nn.Module):
    """A linear classifier whose logits depend on every image since the last reset."""

    num_classes = 10
    input_size = (3, 32, 32)

    def __init__(self, method: str = "fake", lr: float = 8.0, classes: int = 10):
        super().__init__()
        self.weight = nn.Parameter(WEIGHT[:classes].clone())
        self.method, self.config, self.num_classes = method, FakeConfig(lr), classes
        self.forwards = self.backwards = self.skipped_updates = 0
        self.seed, self.checks_pixels = 0, True
        self.backbone = SimpleNamespace(model=self, source_state_dict=dict)
        self.resets = 0
        self.reset()
        self.resets = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.float32
        assert images.min() >= 0
        assert images.max() <= 1
        logits = (images.mean((2, 3)) - 0.5) @ self.weight.detach().T + self.shift
        self.shift = self.shift - self.config.lr * logits.softmax(1).mean(0)
        self.forwards += len(images)
        self.backwards += len(images) if self.config.lr else 0
        return logits

    def reset(self) -> None:
        self.resets += 1
        self.shift = torch.zeros(len(self.weight))

    def adaptation_state(self) -> dict[str, torch.Tensor]:
        return {"shift": self.shift.clone()}

    def load_adaptation_state(self, state: dict[str, torch.Tensor]) -> None:
        self.shift = state["shift"].clone()

    def learned_tensors(self) -> dict[str, torch.Tensor]:
        return {}

    def with_tensors(self, config: FakeConfig) -> FakeAdapter:
        return self  # it draws nothing

    def describe(self) -> str:
        return f"{self.method}, for tests"


def random_cell(rng: np.random.Generator, count: int):
    """Images (N, 32, 32, 3) uint8 and labels (N,) that a fresh `FakeAdapter` mostly knows."""
    tint = rng.integers(0, 256, (count, 1, 1, 3))
    noise = rng.integers(-20, 20, (count, 32, 32, 3))
    known = ((tint[:, 0, 0] / 255 - 0.5) @ WEIGHT.numpy().T).argmax(1)
    labels = np.where(rng.random(count) < 0.8, known, rng.integers(0, 10, count))
    return np.clip(tint + noise, 0, 255).astype(np.uint8), labels


def memory_data(counts, clean: int = 0) -> CorruptionData:
    rng = np.random.default_rng(0)

    def labelled(count):
        images, labels = random_cell(rng, count)
        return LabelledImages(torch.from_numpy(images).permute(0, 3, 1, 2), torch.tensor(labels))

    cells = {cell: labelled(count) for cell, count in counts.items()}
    return CorruptionData.from_arrays(cells, labelled(clean) if clean else None)


def write_parquet(path, count: int, seed: int) -> np.ndarray:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    images, labels = random_cell(np.random.default_rng(seed), count)
    rows = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    parquet.write_table(pa.table({"image": rows, "label": labels}), path)
    return labels


def figures(results):
    """Everything about the cells of a run but how long they took and the memory."""
    found = []
    for method in results.methods:
        for cell in method.cells:
            kept = dataclasses.asdict(cell)
            del kept["seconds"], kept["peak_memory"]
            found.append((method.name, method.clean_accuracy, method.skipped_updates, kept))
    return found
