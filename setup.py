"""Everything is stated in pyproject.toml; this file only copies `configs/` into what is installed."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Build the package with the checkout's `configs/` in it (an editable install reads the checkout)."""

    def run(self):
        super().run()
        if not self.editable_mode:
            to = Path(self.build_lib) / "softprompt_jax" / "configs"
            shutil.copytree("configs", to, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.py", "__pycache__"))


setup(cmdclass={"build_py": BuildWithConfigs})
