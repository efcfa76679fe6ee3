"""The wheel in an empty environment with nothing but its own dependencies: `make wheel-test`.

It downloads torch, so it is not collected with the other tests.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import dlprop

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.index
def test_the_wheel_runs_the_readme_with_its_own_dependencies():
    # Not tmp_path, of which pytest keeps the last three: an environment with torch takes gigabytes.
    with tempfile.TemporaryDirectory() as folder:
        outside = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}

        def python(*arguments: str, executable: str = f"{folder}/empty/bin/python") -> str:
            done = subprocess.run([executable, *arguments], cwd=folder, env=outside, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout

        python("-m", "build", "--wheel", "--outdir", folder, str(ROOT), executable=sys.executable)
        (wheel,) = Path(folder).glob("*.whl")
        python("-m", "venv", f"{folder}/empty", executable=sys.executable)
        python("-m", "pip", "install", "--disable-pip-version-check", str(wheel))
        python("-m", "pip", "check")
        assert "torchvision" not in python("-m", "pip", "list")  # of the extras, which must not leak in

        snippet = Path(folder) / "snippet.py"
        code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)[0]
        snippet.write_text(f"{code}print(dense.shape)\n")
        assert python("-W", "error", str(snippet)) == "torch.Size([1, 256, 384])\n"
        version, origin = python("-c", "import dlprop; print(dlprop.__version__, dlprop.__file__)").split()
        assert version == dlprop.__version__
        assert Path(origin).is_relative_to(Path(folder, "empty").resolve())
