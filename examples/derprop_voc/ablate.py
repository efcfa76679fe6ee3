"""`ablate`: a grid of variants and seeds, one process a run; a table of means, standard deviations and differences."""

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .config import Config, add_config_arguments, make_config, read_yaml, values_from_arguments
from .data import digest, training_lists
from .errors import ConfigError, DataError
from .files import write_bytes, write_json, write_yaml
from .sources import find_source
from .state import changed_options
from .tables import add_differences, details, draw_quality, markdown, summarise


@dataclass(frozen=True)
class Job:
    """One variant with one seed."""

    variant: str
    config: Config

    @property
    def out(self) -> Path:
        """The run's folder."""
        return Path(self.config.out)


def add_ablate_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `ablate`."""
    group = parser.add_argument_group("grid")
    group.add_argument("--grid", type=Path, required=True, metavar="YAML", help="lines `name: {option: value, ...}`")
    group.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of every variant (%(default)s)")
    group.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help="variants of the grid to run; empty: all; the table has all that are done",
    )
    group.add_argument("--against", metavar="NAME", help="add differences from this variant, in pairs of one seed")
    group.add_argument("--jobs", type=int, default=1, help="runs at the same time; give each --threads (%(default)s)")
    group.add_argument("--dry-run", action="store_true", help="print the runs and what is there of them, run nothing")
    add_config_arguments(parser)


def ablate_command(arguments: argparse.Namespace) -> None:
    """Runs what is missing of a grid and writes its tables and curves into the output folder.

    Stopped at any moment, the same command goes on: finished runs are kept, an unfinished one resumes.

    Raises:
        ConfigError: for an unknown variant or option, and for runs that failed (after all others were done).
    """
    base = values_from_arguments(arguments)
    if "seed" in base:
        raise ConfigError(f"seed: ablate takes several, --seeds {base['seed']}")
    out = Path(base.pop("out", "runs/ablation"))
    grid = read_grid(arguments.grid)
    jobs = make_jobs(base, grid, arguments.seeds, out, only=arguments.only)
    variants = list(dict.fromkeys(job.variant for job in jobs))
    if arguments.against not in (None, *variants):
        raise ConfigError(f"against: expected one of {', '.join(variants)}, got {arguments.against!r}")
    every = make_jobs(base, grid, arguments.seeds, out)
    there = {job.out for job in every if is_done(job)}
    missing = [job for job in jobs if job.out not in there]
    if arguments.jobs < 1:
        raise ConfigError(f"jobs: expected at least 1, got {arguments.jobs}")
    print(f"{len(jobs)} runs, {len(jobs) - len(missing)} of them done", flush=True)
    if arguments.dry_run:
        for job in jobs:
            print(f"{'missing' if job in missing else 'done':8} {job.out}")
        return
    failed = run_all(missing, arguments.jobs)
    done = [job for job in every if is_done(job)]
    if done:
        runs = [(job.variant, read_results(job)) for job in done]
        rows = summarise(runs)
        if arguments.against in [row["variant"] for row in rows]:
            add_differences(rows, arguments.against)
        write_json(out / "table.json", {"rows": rows})
        write_bytes(out / "table.md", (markdown(rows) + "\n").encode())
        write_bytes(out / "details.md", (details(rows) + "\n").encode())
        draw_quality(out / "curves.png", runs)
        print(f"\n{markdown(rows)}\n\nWrote {out}/table.md, details.md, table.json and curves.png.")
    if failed:
        raise ConfigError(f"{len(failed)} of {len(jobs)} runs failed: {'; '.join(failed)}")


def read_grid(path: Path) -> dict[str, dict[str, Any]]:
    """Variants of a grid file by name, in its order."""
    grid = read_yaml(path)
    for name, options in grid.items():
        if not isinstance(options, dict) or "/" in str(name) or not str(name).strip("."):
            raise ConfigError(f"{path}: {name}: expected `name: {{option: value, ...}}`, found {options!r}")
        for reserved in ("out", "seed"):
            if reserved in options:
                raise ConfigError(f"{path}: {name}: {reserved} is set by ablate itself")
    if not grid:
        raise ConfigError(f"{path}: expected at least one variant, found none")
    return {str(name): options for name, options in grid.items()}


def make_jobs(
    base: Mapping[str, Any],
    grid: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    out: Path,
    *,
    only: Sequence[str] = (),
) -> list[Job]:
    """Every variant with every seed; all options are checked before anything runs."""
    for name in only:
        if name not in grid:
            raise ConfigError(f"only: expected names of the grid ({', '.join(grid)}), got {name!r}")
    return [
        Job(name, make_config({**base, **options, "seed": seed, "out": str(out / name / f"seed_{seed}")}))
        for name, options in grid.items()
        if not only or name in only
        for seed in dict.fromkeys(seeds)
    ]


def is_done(job: Job) -> bool:
    """Whether the job's folder holds its results.

    Raises:
        ConfigError: when they are there, but of other options.
    """
    path = job.out / "results.json"
    if not path.is_file():
        return False
    results = read_results(job)
    found = results["config"]
    for name, theirs, ours in [*changed_options(found, job.config), *_changed_files(found, job.config)]:
        raise ConfigError(f"{path}: {name} is {theirs!r} there, {ours!r} here; choose another --out")
    if _lists(job.config) not in (None, results.get("lists")):
        raise ConfigError(
            f"{path}: the lists of {job.config.partition} have changed since; bring them back, or choose another --out"
        )
    return True


def _lists(config: Config) -> str | None:
    """What results call the training lists; None where the data is not at hand, so that a table can still be made."""
    try:
        return digest(training_lists(config, find_source(replace(config, download=False))).values())
    except DataError:
        return None


def _changed_files(theirs: Mapping[str, Any], config: Config) -> list[tuple[str, Any, Any]]:
    """What a resumed run may read from another place, and a table may not."""
    pairs = [(name, theirs.get(name), getattr(config, name)) for name in ("data", "weights")]
    return [pair for pair in pairs if Path(str(pair[1])).name != Path(pair[2]).name]


def command(job: Job) -> list[str]:
    """What runs a job, or goes on with it."""
    return [sys.executable, "-m", __package__, "train", "--config", str(job.out / "job.yaml"), "--resume"]


def run_all(jobs: Sequence[Job], count: int) -> list[str]:
    """Runs jobs in processes of their own, `count` at a time; gives a line for each that failed.

    An interruption, SIGTERM among them, ends the processes that run; their checkpoints stay.
    """
    running: list[subprocess.Popen[bytes]] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))

    def start(job: Job) -> int:
        job.out.mkdir(parents=True, exist_ok=True)
        write_yaml(job.out / "job.yaml", job.config.to_dict())
        with (job.out / "output.txt").open("ab") as output:
            process = subprocess.Popen(command(job), stdout=output, stderr=output, stdin=subprocess.DEVNULL)
            running.append(process)
            return process.wait()

    failed = []
    with ThreadPoolExecutor(count) as pool:
        futures = {pool.submit(start, job): job for job in jobs}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                job, code = futures[future], future.result()
                print(f"{done} of {len(jobs)}: {job.out}{f' FAILED, exit code {code}' if code else ''}", flush=True)
                if code:
                    failed.append(f"{job.out}/output.txt (exit code {code}): {_last_line(job.out / 'output.txt')}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.terminate()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    return failed


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"


def read_results(job: Job) -> dict[str, Any]:
    """What a finished run wrote."""
    results: dict[str, Any] = json.loads((job.out / "results.json").read_text(encoding="utf-8"))
    return results
