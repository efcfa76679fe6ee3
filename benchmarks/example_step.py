"""`python -m benchmarks.example_step`: what a training step of the example costs, and what share of it dlprop takes.

One step of `examples.derprop_voc train` on random images: pseudo-labels from the weak view, both halves forward and
backward, the optimiser, and the momentum network. Propagation, derivative loss and averaging are timed once more by
themselves, forward and backward, on the step's own tensors; their shares are of the whole step.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlprop import MomentumAverager
from examples.derprop_voc.config import Config, add_config_arguments, config_from_arguments
from examples.derprop_voc.losses import Objective
from examples.derprop_voc.model import Output, SegmentationNetwork

from . import machine


def measure_step(config: Config, *, num_classes: int, repeats: int) -> dict[str, Any]:
    """Median seconds of the whole step and of the library's parts, and the peak memory of the process."""
    device = torch.device("cuda" if torch.cuda.is_available() and config.accelerator != "cpu" else "cpu")
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    network = SegmentationNetwork(config, num_classes).to(device).train()
    objective = Objective(config)
    averager = MomentumAverager(network, config.average_momentum)
    optimizer = torch.optim.SGD(network.parameter_groups(config.lr, config.head_lr_multiplier), lr=config.lr)
    edge = config.crop_size
    labeled, weak, strong = (
        torch.rand(count, 3, edge, edge, device=device)
        for count in (config.labeled_batch, config.unlabeled_batch, config.unlabeled_batch)
    )
    target = torch.randint(0, num_classes, (config.labeled_batch, edge, edge), device=device)
    valid_l, valid_u = (torch.ones(len(x), edge, edge, dtype=torch.bool, device=device) for x in (labeled, strong))

    def halves(output: Output) -> tuple[Output, Output]:
        count = len(labeled)
        return Output(*(x[:count] for x in output)), Output(*(x[count:] for x in output))

    def step() -> None:
        network.eval()
        with torch.no_grad():
            seen = network(weak)
        network.train()
        pseudo = objective.pseudo_labels(seen, valid_u, ramp=0.5)
        half_l, half_u = halves(network(torch.cat([labeled, strong])))
        terms = objective.labeled(half_l, target, valid_l)
        terms |= objective.unlabeled(half_u, pseudo, pseudo.amax(1) > 0, seen.feats, valid_u)
        optimizer.zero_grad(set_to_none=True)
        objective.total(terms).backward()
        optimizer.step()
        averager.update(network)

    with torch.no_grad():
        output = network(torch.cat([labeled, strong]))
    grad = torch.rand_like(output.logits)

    def leaves() -> tuple[Output, Output]:
        return halves(Output(*(x.detach().requires_grad_() for x in output)))

    def propagation() -> None:
        half_l, half_u = leaves()
        objective.pseudo_labels(half_u, valid_u, ramp=0.5)
        for half, valid, upstream in ((half_l, valid_l, grad[: len(labeled)]), (half_u, valid_u, grad[len(labeled) :])):
            logits = half.logits.detach() if config.detach_logits else half.logits
            propagated: Tensor = objective.propagate(logits, half.feats, mask=valid)
            propagated.backward(upstream)

    def loss() -> None:
        half_l, half_u = leaves()
        objective.derivative_loss(half_l.feats, target, mask=valid_l).backward()
        objective.derivative_loss(half_u.feats, half_u.feats.detach().flip(0)).backward()

    parts: dict[str, Callable[[], None]] = {
        "propagation": propagation,
        "derivative loss": loss,
        "averaging": lambda: averager.update(network),
    }
    seconds = {name: _median(run, repeats, device) for name, run in {"step": step, **parts}.items()}
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "device": str(torch.cuda.get_device_name(device)) if device.type == "cuda" else "cpu",
        "seconds": seconds,
        "share": {name: seconds[name] / seconds["step"] for name in parts},
        "peak_gib": peak,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "config": config.to_dict(),
        "machine": machine.facts(device.type),
    }


def _median(run: Callable[[], None], repeats: int, device: torch.device) -> float:
    samples = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        samples.append(time.perf_counter() - start)
    return statistics.median(samples[1:])  # the first one warms up


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.example_step", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="timed steps after one to warm up")
    parser.add_argument("--save", type=Path, help="JSON to write")
    add_config_arguments(parser)
    arguments = parser.parse_args()
    result = measure_step(config_from_arguments(arguments), num_classes=21, repeats=arguments.repeats)
    config = result["config"]
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in result["share"].items())
    print(
        f"{config['backbone']}, {config['crop_size']}, {config['labeled_batch']} + {config['unlabeled_batch']} images, "
        f"affinity {config['affinity']}, {result['device']}, {result['machine']['threads']} threads: "
        f"{result['seconds']['step']:.2f} s a step, peak {result['peak_gib']:.1f} GiB; {shares}"
    )
    if arguments.save:
        arguments.save.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
