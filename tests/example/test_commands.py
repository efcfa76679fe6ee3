"""The command line as a whole: what it lists, and that listing it takes no time."""

import os
import subprocess
import sys

import pytest

from examples.derprop_voc.__main__ import COMMANDS, main
from examples.derprop_voc.files import write_bytes


def test_help_lists_every_command_and_imports_no_torch():
    call = "import sys; from examples.derprop_voc.__main__ import main\n"
    call += "try: main(['--help'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert all(f" {name} {text} " in said for name, (_, text) in COMMANDS.items())
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as exited:
        main([name, "--help"])
    assert exited.value.code == 0
    assert COMMANDS[name][1] in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: command"),
        (["trian"], "invalid choice: 'trian'"),
        (["train", "--varient", "full"], "unrecognized arguments: --varient full; did you mean --variant?"),
        (["train", "--stepps=3"], "unrecognized arguments: --stepps=3; did you mean --steps?"),
        (["train", "--qqq"], "unrecognized arguments: --qqq\n"),
    ],
)
def test_what_is_no_command_or_option_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    said = capsys.readouterr().err
    assert exited.value.code == 2
    assert message in said
    assert said.count("\n") <= 3


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_bytes(pipe, b"whole")
    assert (os.read(reader, 100), pipe.is_fifo()) == (b"whole", True)
    os.close(reader)
