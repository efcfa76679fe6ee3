"""What the command line tells in one line. Nothing here imports torch, so that `--help` answers at once."""


class ConfigError(ValueError):
    """An option that is unknown, of the wrong type or out of range."""


class DataError(ValueError):
    """Data that cannot be trained on; the message names the file, what was expected and what was found, in one line."""

    def __str__(self) -> str:
        # A loader's worker process hands over its whole traceback as the message; the error is its end.
        return super().__str__().rpartition("DataError: ")[2].rstrip()


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written, or that does not belong to this run."""


class DivergedError(RuntimeError):
    """The loss became NaN or infinite; the message names the step and the batch's images."""
