"""Command line: `python -m examples.derprop_voc <command>`; `--help` on a command lists its options.

Exit codes: 0 done, 1 unforeseen error (with its traceback), 2 bad options, data or checkpoint, or a folder that cannot
be written (one line says which), 3 the loss diverged, 130 interrupted, 141 the reader of the output is gone, 143 ended
by SIGTERM.
"""

import argparse
import difflib
import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from .errors import CheckpointError, ConfigError, DataError, DivergedError

DONE, BAD_INPUT, DIVERGED, INTERRUPTED, PIPE_CLOSED = 0, 2, 3, 130, 141
UNWRITABLE = (
    *(errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOSPC),
    *(errno.ENOTDIR, errno.EPERM, errno.EROFS),
)

# Name -> (module, one line of help). The module has `add_<name>_arguments(parser)` and `<name>_command(arguments)`, and
# is imported for its own command alone: what they need takes seconds to import.
COMMANDS = {
    "demo": ("demo", "train four variants on generated scenes and print their table"),
    "inspect": ("inspection", "check a partition and print its classes and sizes"),
    "split": ("split", "make a seeded partition of the training images"),
    "train": ("train", "train one variant"),
    "evaluate": ("scoring", "score the checkpoints of a run, class by class"),
    "predict": ("predict_folder", "colour masks and overlays for a folder of images"),
    "complete": ("complete", "clicks or strokes on a folder of images made dense"),
    "clicks": ("clicks", "measure what completing sparse labels is worth"),
    "video": ("video", "labels of some frames of a clip carried to the others"),
    "clips": ("clips", "measure what carrying labels along a clip is worth"),
    "edges": ("edges", "measure what a window of colours does at edges"),
    "similarity": ("similarity_maps", "what one pixel of an image is similar to"),
    "choose": ("choose", "what propagation suits a network, by labelled images held out"),
    "shift": ("shift", "measure what statistics of new images are worth"),
    "sweep": ("sweep", "other propagation settings on a finished network"),
    "ablate": ("ablate", "run a grid of variants and seeds, and write their table"),
}


def _unrecognized(unknown: Sequence[str], parser: argparse.ArgumentParser) -> str:
    """The message, with the flag that the first may have been meant to be."""
    close = difflib.get_close_matches(unknown[0].partition("=")[0], parser._option_string_actions, n=1)
    return f"unrecognized arguments: {' '.join(unknown)}" + (f"; did you mean {close[0]}?" if close else "")


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.derprop_voc", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (file, text) in COMMANDS.items():
        subparser = commands.add_parser(name, help=text, description=text)
        if argv and name == argv[0]:
            module = import_module(f".{file}", __package__)
            getattr(module, f"add_{name}_arguments")(subparser)
            subparser.set_defaults(run_command=getattr(module, f"{name}_command"))
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        commands.choices[arguments.command].error(_unrecognized(unknown, commands.choices[arguments.command]))
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    try:
        arguments = _parsed(sys.argv[1:] if argv is None else argv)
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
