"""Command line: `python -m examples.derprop_voc <command>`; `--help` on a command lists its options.

Exit codes: 0 done, 1 unforeseen error (with its traceback), 2 bad options or data (one line says which), 3 the loss
diverged, 130 interrupted.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

from .config import ConfigError, add_config_arguments, config_from_arguments
from .data import DataError
from .demo import add_demo_arguments, demo
from .train import DivergedError, run

DONE, BAD_INPUT, DIVERGED, INTERRUPTED = 0, 2, 3, 130


def train_command(arguments: argparse.Namespace) -> None:
    """Trains one variant and prints its scores."""
    results = run(config_from_arguments(arguments))
    for network, scores in results["last"].items():
        if scores:
            p, propagated = (100 * scores[key]["miou"] for key in ("prediction", "propagated"))
            print(f"{network:9} network: mIoU of P {p:.2f}, of P~ {propagated:.2f}")
    out = results["config"]["out"]
    print(f"{results['seconds']['train']:.0f} s of training; wrote {out}/results.json, panel.png, last.pt, config.yaml")


# Name -> (one line of help, what adds its flags, what runs it).
COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None]]] = {
    "demo": ("train four variants on generated scenes and print their table", add_demo_arguments, demo),
    "train": ("train one variant on a folder in VOC layout", add_config_arguments, train_command),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.derprop_voc", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (text, add_arguments, command) in COMMANDS.items():
        subparser = commands.add_parser(name, help=text, description=text)
        add_arguments(subparser)
        subparser.set_defaults(run_command=command)
    arguments = parser.parse_args(argv)
    try:
        arguments.run_command(arguments)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except DivergedError as error:
        print(f"diverged: {error}", file=sys.stderr)
        return DIVERGED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return DONE


if __name__ == "__main__":
    sys.exit(main())
