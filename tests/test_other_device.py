"""Models on another device than the CPU, such as a GPU: where tensors must be, and how the device rounds.

The test device (tests/other_device.cpp) refuses the same calls as a GPU and computes on the CPU, so that results can be
compared.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import device_jobs
import pytest
import torch

# Relative rounding error in float32, because products of other shapes are summed in another order.
ROUNDING = 5e-6
# TF32 rounds each factor by a relative 2^-11, at most 5e-4; sums of many products have smaller errors.
ROUNDED = 1e-5

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Return a function that runs a job of device_jobs in a process with the device."""
    library = device_jobs.build(tmp_path_factory.mktemp("device"))
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawned, device_jobs.start, (library,)) as pool:
        yield lambda job, *arguments: pool.submit(job, *arguments).result()


def test_the_device_refuses_and_rounds_like_a_gpu(run: Run) -> None:
    found = run(device_jobs.the_device)
    assert all(found["refused"].values()), found["refused"]
    assert found["taken"] == ["elsewhere", "elsewhere", "cpu"]
    assert found["unrounded"] < ROUNDING < ROUNDED < found["rounded"]


@pytest.mark.parametrize(
    ("name", "frontend"), [(name, f) for name, case in device_jobs.CASES.items() for f in case.frontends]
)
def test_the_same_network_as_on_the_cpu(run: Run, name: str, frontend: str) -> None:
    """Neurons and outputs are the same, and a network that was pruned on one device runs on the other."""
    found = run(device_jobs.like_the_cpu, name, frontend, "vbp" if frontend == "export" else "auto")
    here, there = found["kept"]
    assert here == there
    assert found["devices"] == {"elsewhere"}
    assert max(found["difference"]) < ROUNDING


@pytest.mark.parametrize(("start", "end"), [("elsewhere", "cpu"), ("cpu", "elsewhere")])
@pytest.mark.parametrize(
    ("kind", "frontend"), [("llama", "export"), ("bert", "export"), ("own code", "export"), ("own code", "symbolic")]
)
def test_saved_on_one_device_loaded_on_another(run: Run, kind: str, frontend: str, start: str, end: str) -> None:
    """Tracing records the model's device in the graph, and torch.export does so wherever masks and positions are made."""
    found = run(device_jobs.saved_elsewhere, kind, frontend, start, end)
    assert found["difference"] < ROUNDING
    assert found["in ONNX"]


@pytest.mark.parametrize("options", [{}, {"method": "vbp"}, {"criterion": "greedy_obs", "compensation": "ridge", "reconstruct": False}])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(run: Run, dtype: torch.dtype, options: dict[str, Any]) -> None:
    found = run(device_jobs.half_precision, dtype, options)
    assert found["error"] <= found["tolerance"]
    assert sum(found["plan"].values()) == 2 * 40 - round(0.4 * 80)


def test_rounded_convolutions_do_not_disturb_the_oracle(run: Run) -> None:
    found = run(device_jobs.convolutions)
    assert max(found["error"], found["capture"]) < ROUNDING
    assert found["allowed"] == "tf32"


def test_sums_are_of_exact_products(run: Run) -> None:
    found = run(device_jobs.covariances)
    assert max(found["covariance"], found["regression"]) < ROUNDING < ROUNDED < found["product"]


def test_networks_and_data_need_not_be_on_one_device(run: Run) -> None:
    found = run(device_jobs.other_functions)
    assert len(set(found["kept"])) == 1
    stays = {name: {"elsewhere"} for name in ("teacher", "pruned", "own", "tuned", "with labels")}
    assert found["devices"] == stays | {"for the CPU": {"cpu"}}
    assert all(isinstance(parity, float) and parity < ROUNDING for parity in found["bench"])
    assert found["latency"]
    assert found["evaluations"][0] == pytest.approx(found["evaluations"][1], rel=1e-4)
