"""The scaling part of ``speed.py``: how time grows with depth, width, tokens and batches."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import vbpfx
from vbpfx.measurement.timing import alternating

_SMALL = {"depth": 6, "width": 64, "tokens": 64, "batches": 2}
SIZES: dict[str, Sequence[int]] = {
    "depth": (6, 12, 24, 48, 96),
    "width": (64, 128, 256, 512),
    "tokens": (64, 144, 256, 576),
    "batches": (2, 4, 8, 16),
}
LARGEST = (
    "vit_giant_patch14_224",
    "vit_gigantic_patch14_224",
    "eva_giant_patch14_224",
    "convnext_xxlarge",
    "swin_large_patch4_window12_384",
    "swinv2_large_window12_192",
)
_IMAGES = 4


def _vit(depth: int, width: int, tokens: int) -> tuple[nn.Module, int]:
    """Return a vision transformer and its image size."""
    size = 8 * round(tokens**0.5)
    options = {"patch_size": 8, "num_heads": 2, "num_classes": 10, "class_token": False, "global_pool": "avg"}
    return VisionTransformer(img_size=size, depth=depth, embed_dim=width, **options).eval(), size


def _analysis(size: dict[str, int]) -> Callable[[], object]:
    """Return a job that traces and analyses a network whose weights are never allocated."""
    with torch.device("meta"):
        model, pixels = _vit(size["depth"], size["width"], size["tokens"])
    images = torch.empty(2, 3, pixels, pixels, device="meta")
    return lambda: vbpfx.find_blocks(vbpfx.capture(model, images))


def _calibration(size: dict[str, int]) -> Callable[[], object]:
    """Return a job that gathers variances over batches."""
    model, pixels = _vit(size["depth"], size["width"], size["tokens"])
    analysis = vbpfx.find_blocks(vbpfx.capture(model, torch.empty(2, 3, pixels, pixels)))
    observed = vbpfx.prepare(analysis.captured, analysis, covariance=False)
    images = torch.randn(_IMAGES, 3, pixels, pixels)
    return lambda: vbpfx.calibrate(observed, [images] * size["batches"])


STAGES: dict[str, Callable[[dict[str, int]], Callable[[], object]]] = {
    "analysis": _analysis,
    "calibration": _calibration,
}


def measure_scaling(rounds: int) -> dict[str, Any]:
    """Return per stage and quantity the sizes, the median processor seconds, and the slope of their logarithms."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for stage, make in STAGES.items():
        found[stage] = {}
        for quantity, sizes in SIZES.items():
            if stage == "analysis" and quantity == "batches":
                continue
            jobs = {str(value): make(_SMALL | {quantity: value}) for value in sizes}
            gc.collect()
            gc.freeze()  # the garbage collector should not visit the other networks while one is timed
            seconds = alternating(jobs, rounds=rounds, warmup=1, clock=time.process_time)
            gc.unfreeze()
            medians = [statistics.median(taken) for taken in seconds.values()]
            found[stage][quantity] = {"sizes": sizes, "seconds": medians, "exponent": exponent(sizes, medians)}
    return found


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Return the slope b of log t = a + b log n, fitted by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def measure_largest(rounds: int) -> dict[str, Any]:
    """Measure timm's largest networks on the meta device: nodes, blocks, and seconds for tracing and for analysis."""
    torch.set_num_threads(1)
    found = {}
    for name in LARGEST:
        with torch.device("meta"):
            model = timm.create_model(name)
        images = torch.empty(2, *model.pretrained_cfg["input_size"], device="meta")
        captured = vbpfx.capture(model, images)
        analysis = vbpfx.find_blocks(captured)
        jobs: dict[str, Callable[[], object]] = {
            "capture": lambda model=model, images=images: vbpfx.capture(model, images),
            "analysis": lambda captured=captured: vbpfx.find_blocks(captured),
        }
        seconds = alternating(jobs, rounds=rounds, warmup=0, clock=time.process_time)
        found[name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "nodes": len(captured.nodes),
            "blocks": len(analysis.blocks),
            **{job: statistics.median(taken) for job, taken in seconds.items()},
        }
    return found
