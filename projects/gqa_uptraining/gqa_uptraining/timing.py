"""Time of the detectors with all, half, a quarter and one of the kv heads."""

import time

import torch
from torch import nn

from deform_gqa.datasets.coco import write_json
from deform_gqa.profiling.environment import describe_environment

from .execution import Experiment, build_detector
from .rows import KV_HEADS, Row, base_row

IMAGE_SIZE = (240, 320)
WARMUP_ROUNDS = 3
ROUNDS = 30
TIMES_FILE = 'times.json'


def measure_times(experiment: Experiment) -> None:
    """CPU time of one thread for an image, from pixels to the head's maps.

    CPU time, unlike wall-clock time, hardly depends on what else the machine does. The
    detectors take turns, so that what remains of that hits all alike. Weights do not
    matter: they are the first ones.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = [base_row(0), *(Row(0, kv_heads, 'mean') for kv_heads in KV_HEADS)]
    detectors = {
        row.kv_heads: build_detector(experiment.config(row)).eval() for row in rows
    }
    times_ms = {name: [] for name in detectors}
    image = torch.randn(1, 3, *IMAGE_SIZE)
    for turn in range(WARMUP_ROUNDS + ROUNDS):
        for name, detector in detectors.items():
            elapsed_ms = _forward_ms(detector, image)
            if turn >= WARMUP_ROUNDS:
                times_ms[name].append(elapsed_ms)
    torch.set_num_threads(threads)
    experiment.results.mkdir(parents=True, exist_ok=True)
    write_json(
        experiment.results / TIMES_FILE,
        dict(
            times_ms=times_ms,
            image_size=IMAGE_SIZE,
            parameters={name: _parameters(model) for name, model in detectors.items()},
            environment=describe_environment(torch.device('cpu')),
        ),
    )


def _forward_ms(detector: nn.Module, image: torch.Tensor) -> float:
    with torch.no_grad():
        start = time.thread_time_ns()
        detector(image, mode='tensor')
        return (time.thread_time_ns() - start) / 1e6


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
