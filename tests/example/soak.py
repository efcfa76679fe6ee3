"""A training killed at random moments and resumed until it ends: `make soak`, which is no part of `make test`.

`test_resume.py` kills at the moments that are known to be delicate; here nobody chooses.
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.example.runs import SCENES as SCENES
from tests.example.runs import SETTINGS, TINY, assert_same_run

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("KILLS", 30))
SEED = int(os.environ.get("SEED", random.randrange(2**31)))  # in the name of the test: SEED=... draws the same moments
OPTIONS = TINY | SETTINGS["running"] | {"steps": 90, "evaluate_every": 5, "seed": 3}

pytestmark = [pytest.mark.soak, pytest.mark.parametrize("seed", [SEED], ids=[f"seed={SEED},kills={KILLS}"])]


def start(out, data):
    options = out.with_suffix(".yaml")
    options.write_text(yaml.safe_dump(OPTIONS | {"data": str(data), "out": str(out)}))
    command = [sys.executable, "-m", "examples.derprop_voc", "train", "--config", str(options), "--resume"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_kill_9_at_random_moments_loses_nothing(seed, scenes, tmp_path):
    moments = random.Random(seed)
    begin = time.perf_counter()
    _, errors = (process := start(tmp_path / "whole", scenes)).communicate()
    assert process.returncode == 0, errors
    duration = time.perf_counter() - begin

    kills, rounds = 0, 0
    while kills < KILLS:
        rounds += 1
        out = tmp_path / f"killed_{rounds}"
        while True:
            process = start(out, scenes)
            try:
                # At any moment between the start, whose first seconds are imports, and the end of a whole run.
                _, errors = process.communicate(timeout=duration * moments.random())
            except subprocess.TimeoutExpired:
                process.kill()  # SIGKILL
                process.communicate()
                kills += 1
                continue
            assert process.returncode == 0, errors
            break
        assert_same_run(out, tmp_path / "whole")
