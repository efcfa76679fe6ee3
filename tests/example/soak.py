"""A training killed at random moments and resumed until it ends: `make soak`, which is no part of `make test`.

`test_resume.py` kills at the moments that are known to be delicate; here nobody chooses.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from examples.derprop_voc.scenes import write_scenes
from tests.example.test_resume import SETTINGS, TINY, assert_same_run

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("KILLS", 30))
SEED = int(os.environ.get("SEED", random.randrange(2**31)))  # in the name of the test: SEED=... draws the same moments
OPTIONS = TINY | SETTINGS["running"] | {"steps": 90, "evaluate_every": 5, "seed": 3}

pytestmark = [pytest.mark.soak, pytest.mark.parametrize("seed", [SEED], ids=f"seed={{}},kills={KILLS}".format)]


def start(out, data):
    options = out.with_suffix(".yaml")
    options.write_text(yaml.safe_dump(OPTIONS | {"data": str(data), "out": str(out)}))
    command = [sys.executable, "-m", "examples.derprop_voc", "train", "--config", str(options), "--resume"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_kill_9_at_random_moments_loses_nothing(seed, tmp_path):
    data, moments = tmp_path / "scenes", random.Random(seed)
    write_scenes(data, labeled=5, unlabeled=6, val=2, size=(40, 48), seed=1)
    begin = time.perf_counter()
    _, errors = (process := start(tmp_path / "whole", data)).communicate()
    assert process.returncode == 0, errors
    duration = time.perf_counter() - begin

    kills, rounds = 0, 0
    while kills < KILLS:
        rounds += 1
        out, finished = tmp_path / f"killed_{rounds}", False
        while not finished:
            process = start(out, data)
            try:
                # Every start spends its first seconds on imports; a run that is always killed there would never end.
                _, errors = process.communicate(timeout=duration * moments.random())
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                kills += 1
                continue
            assert process.returncode == 0, errors
            finished = True
        assert_same_run(out, tmp_path / "whole")
