"""Command line: `python -m examples.derprop_voc <command>`; `--help` on a command lists its options.

Exit codes: 0 done, 1 unforeseen error (with its traceback), 2 bad options, data or checkpoint, or a folder that cannot
be written (one line says which), 3 the loss diverged, 130 interrupted, 141 the reader of the output is gone.
"""

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence

from .ablate import ablate, add_ablate_arguments
from .choose import add_choose_arguments, choose
from .clicks import add_clicks_arguments, clicks
from .clips import add_clips_arguments, clips
from .complete import add_complete_arguments, complete_command
from .config import ConfigError, add_config_arguments, config_from_arguments
from .data import DataError
from .demo import add_demo_arguments, demo
from .distributed import rank
from .edges import add_edges_arguments, edges
from .files import CheckpointError
from .inspection import inspect_command
from .predict_folder import add_predict_arguments, predict_command
from .scoring import add_evaluate_arguments, score
from .shift import add_shift_arguments, shift
from .similarity_maps import add_similarity_arguments, similarity_command
from .split import add_split_arguments, split_command
from .sweep import add_sweep_arguments, sweep
from .train import DivergedError, run
from .video import add_video_arguments, video

DONE, BAD_INPUT, DIVERGED, INTERRUPTED, PIPE_CLOSED = 0, 2, 3, 130, 141
UNWRITABLE = (errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.ENOSPC, errno.EROFS)


def train_command(arguments: argparse.Namespace) -> None:
    """Trains one variant and prints its scores."""
    results = run(config_from_arguments(arguments), resume=arguments.resume)
    if rank():
        return
    for network, scores in results["last"].items():
        if scores:
            p, propagated = (100 * scores[key]["miou"] for key in ("prediction", "propagated"))
            print(f"{network:9} network: mIoU of P {p:.2f}, of P~ {propagated:.2f}")
    config, steps = results["config"], results["steps"]
    if results["last"]["averaged"] and config["average_every"] == "epoch" and steps["run"] <= steps["epoch"]:
        print("The averaged network is the trained one: Eq. 6 acts once an epoch, and this run has one (average_every)")
    out = config["out"]
    print(f"{results['seconds']['train']:.0f} s of training; results, pictures and checkpoints are in {out}")


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `train`."""
    add_config_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="go on from latest.pt of the run folder, if there is one")


# Name -> (one line of help, what adds its flags, what runs it).
COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None]]] = {
    "demo": ("train four variants on generated scenes and print their table", add_demo_arguments, demo),
    "inspect": ("check a partition and print its classes and sizes", add_config_arguments, inspect_command),
    "split": ("make a seeded partition of the training images", add_split_arguments, split_command),
    "train": ("train one variant", add_train_arguments, train_command),
    "evaluate": ("score the checkpoints of a run, class by class", add_evaluate_arguments, score),
    "predict": ("colour masks and overlays for a folder of images", add_predict_arguments, predict_command),
    "complete": ("clicks or strokes on a folder of images made dense", add_complete_arguments, complete_command),
    "clicks": ("measure what completing sparse labels is worth", add_clicks_arguments, clicks),
    "video": ("labels of some frames of a clip carried to the others", add_video_arguments, video),
    "clips": ("measure what carrying labels along a clip is worth", add_clips_arguments, clips),
    "edges": ("measure what a window of colours does at edges", add_edges_arguments, edges),
    "similarity": ("what one pixel of an image is similar to", add_similarity_arguments, similarity_command),
    "choose": ("what propagation suits a network, by labelled images held out", add_choose_arguments, choose),
    "shift": ("measure what statistics of new images are worth", add_shift_arguments, shift),
    "sweep": ("other propagation settings on a finished network", add_sweep_arguments, sweep),
    "ablate": ("run a grid of variants and seeds, and write their table", add_ablate_arguments, ablate),
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
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, `head` for one, has seen enough; nothing is left to be flushed at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except (ConfigError, DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        print(f"error: {error.filename or 'output'}: {error.strerror}", file=sys.stderr)
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
