"""utils.py: what users of the original import from it, and what importing it costs."""

import os
import subprocess
import sys

import utils


def test_importing_utils_loads_no_heavy_library():
    script = "import sys, utils; print({'torch', 'transformers', 'openai', 'fire', 'numpy'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=os.path.dirname(utils.__file__)
    )
    assert done.stdout == "set()\n"
