"""Build the sdist, and from it the wheel; install both into clean environments; train 20 steps far from the checkout.

    python tests/from_wheel.py [--to build/wheel]       (make test-wheel)

On Python 3.11 and on the newest of 3.12 and 3.13 that starts here.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOADED = """
import pathlib, sys, softprompt_jax
place = pathlib.Path(softprompt_jax.__file__).resolve()
assert not place.is_relative_to(sys.argv[1]), f"{place} lies in the checkout"
assert (place.parent / "py.typed").exists()
print(softprompt_jax.__version__, "on Python", sys.version.split()[0])
"""
TRAIN = [
    *("train", "configs/intents/run.yaml", "backbone=embedded", "steps=20", "evaluate_every=20"),
    *("task.predict_by=decoding", "result_examples=8", "--out", "run", "--quiet"),
]


def call(*command: object, where: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYENV_VERSION")}
    done = subprocess.run([*map(str, command)], cwd=where, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout[-2000:]}")
    return done.stdout


def interpreters() -> list[str]:
    """Return this interpreter, and the newest later one that can make environments; pyenv's are tried too."""
    found = [sys.executable]
    for version in ("3.13", "3.12"):
        pyenv = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}*/bin/python{version}"))
        for candidate in (f"python{version}", *map(str, pyenv)):
            starts = shutil.which(candidate) and subprocess.run([candidate, "-c", "import venv"], capture_output=True)
            if starts and starts.returncode == 0:
                return [*found, candidate]
    return found


def environment(python: str, folder: Path) -> Path:
    call(python, "-m", "venv", "--clear", folder, where=ROOT)
    return folder / "bin" / "python"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=ROOT / "build" / "wheel")
    to = parser.parse_args().to.resolve()
    shutil.rmtree(to, ignore_errors=True)
    pip = ("-m", "pip", "install", "-qq", "--disable-pip-version-check", "--constraint", ROOT / "constraints.txt")

    builder = environment(sys.executable, to / "builder")
    call(builder, *pip, "build", where=ROOT)
    with tempfile.TemporaryDirectory() as copy:  # whatever lies in the checkout beside what git knows stays out
        files = call("git", "ls-files", where=ROOT).splitlines()
        for name in files:
            (Path(copy) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, Path(copy) / name)
        call(builder, "-m", "build", "--outdir", to / "dist", where=Path(copy))
    (wheel,), (sdist,) = to.glob("dist/*.whl"), to.glob("dist/*.tar.gz")
    print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB, {sdist.name}: {sdist.stat().st_size / 2**20:.1f} MiB")

    for number, interpreter in enumerate(interpreters()):
        python = environment(interpreter, to / f"environment-{number}")
        call(python, *pip, wheel, where=to)
        with tempfile.TemporaryDirectory() as elsewhere:
            where, softprompt = Path(elsewhere), python.parent / "softprompt"
            print(call(python, "-c", LOADED, ROOT / "softprompt_jax", where=where).strip(), "from the wheel")
            assert "train" in call(softprompt, "--help", where=where)
            call(softprompt, *TRAIN, where=where)
            assert (where / "run" / "prompt.safetensors").exists()
            assert "length" in call(softprompt, "paper", "--help", where=where) + call(softprompt, "paper", where=where)
    call(python, *pip, "--no-deps", "--force-reinstall", sdist, where=to)
    with tempfile.TemporaryDirectory() as elsewhere:
        print(call(python, "-c", LOADED, ROOT / "softprompt_jax", where=Path(elsewhere)).strip(), "from the sdist")
        call(python.parent / "softprompt", *TRAIN, where=Path(elsewhere))


if __name__ == "__main__":
    main()
