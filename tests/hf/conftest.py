"""A cache of their own for the modelling files that transformers imports from exports."""

import atexit
import os
import shutil
import tempfile

from tests.launch.conftest import mfjax  # noqa: F401 - a fixture.

# One for the process: what is imported first says where all of `transformers_modules` is.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="transformers_modules-")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)
