"""Run the cases, two at a time, and print a table of counts: `make test-faults`, or LONG=1 for an hour of them."""

from __future__ import annotations

import argparse
import collections
import importlib
import json
import multiprocessing
import os
import pkgutil
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
KINDS = {  # what a kind is called, its module, its cases in CI and with LONG=1
    "kill": ("kills at random moments", "kills", 10, 60),
    "damage": ("damaged files", "damage", 60, 300),
    "hostile": ("hostile files", "hostile", 30, 100),
    "input": ("bad inputs", "inputs", 300, 300),
    "request": ("requests to a server", "requests", 500, 5000),
}
Found = tuple[str, str, str, float]  # case, title, problem, seconds
AGAIN = "make test-faults FAULTS_ARGS="
made: dict[str, Any] = {}  # what the children of the pool inherit


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of all draws")
    parser.add_argument("--only", metavar="KIND[:NUMBER]", help=f"one kind or case, of {', '.join(KINDS)}")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "faults", help="where the cases lie")
    parser.add_argument("--results", type=Path, help="write the table as JSON too")
    parser.add_argument("-v", "--verbose", action="store_true", help="print every case")
    return parser.parse_args()


def settle(folder: Path) -> None:
    """Set the environment of all children, then import everything; JAX must not start here."""
    folder.mkdir(parents=True, exist_ok=True)
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    quick += " --xla_cpu_parallel_codegen_split_count=1"
    if sys.version_info < (3, 12):  # jax 0.12 aborts where it does not know a flag
        quick += " --xla_cpu_use_fusion_emitters=false"
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",  # an exported program holds who has called: here another one each time
        "XLA_FLAGS": quick,
        "HF_HUB_OFFLINE": "0",  # not the hub's own switch but ours is to be what stops a fetch
        "HF_HOME": str(folder / "hub"),
        "SOFTPROMPT_CACHE": str(folder / "cache"),
        "XDG_STATE_HOME": str(folder / "state"),
    }
    import softprompt_jax

    for module in pkgutil.walk_packages(softprompt_jax.__path__, "softprompt_jax."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for _, module, *_ in KINDS.values():
        importlib.import_module(f"faults.{module}")
    from jax._src import xla_bridge

    assert not xla_bridge._backends, "JAX has started before the children were forked"


def module_of(kind: str) -> Any:
    return sys.modules[f"faults.{KINDS[kind][1]}"]


def one(case: str) -> Found:
    """Run a case, by its name."""
    kind, number, seed = case.split(":")
    began = time.monotonic()
    try:
        title, problem = module_of(kind).run(int(number), int(seed), made["place"], made[kind])
    except Exception as error:  # of the suite itself: a case that cannot be run is not as expected
        title, problem = "", f"{type(error).__name__}: {error}; {traceback.format_exc().splitlines()[-3]}"
    folder = made["place"].root / "cases" / f"{kind}-{number}"
    if not problem:
        shutil.rmtree(folder, ignore_errors=True)
    return f"{kind}:{number}", title, problem, time.monotonic() - began


def cases(wanted: argparse.Namespace, long: bool) -> Iterator[str]:
    only, _, number = (wanted.only or "").partition(":")
    for kind, (_, _, *counts) in KINDS.items():
        if only in ("", kind):
            yield from (f"{kind}:{i}:{wanted.seed}" for i in ([int(number)] if number else range(counts[long])))


def main() -> None:
    wanted, long, began = arguments(), bool(os.environ.get("LONG")), time.monotonic()
    settle(wanted.folder)
    chosen = collections.defaultdict(list)
    for case in cases(wanted, long):
        chosen[case.split(":")[0]].append(case)
    if not chosen:
        sys.exit(f"--only {wanted.only}: expected one of {', '.join(KINDS)}, with a number such as kill:3")
    from faults import place

    made["place"] = place.prepare(wanted.folder)
    for kind in chosen:
        made[kind] = module_of(kind).prepare(made["place"])
    print(f"prepared in {time.monotonic() - began:.0f} s", flush=True)
    rows, failed = [], 0
    for kind, of_kind in chosen.items():
        start, problems, notes, facts = time.monotonic(), 0, collections.Counter(), {}
        if kind == "request":
            found, facts = module_of(kind).run(
                [int(case.split(":")[1]) for case in of_kind], wanted.seed, made["place"], made[kind]
            )
        else:
            with multiprocessing.get_context("fork").Pool(2) as pool:  # each forks its cases from itself
                found = told(pool.imap_unordered(one, of_kind, chunksize=1), wanted)
        for case, title, problem, _ in found:
            problems += bool(problem)
            if kind == "damage":
                notes[title.rpartition(": ")[2] if ": " in title else "no effect"] += not problem
            if problem:
                print(f"{case} {title}\n    {problem}\n    again: {AGAIN}'--only {case} --seed {wanted.seed}'")
        failed += problems
        row = {"kind": KINDS[kind][0], "cases": len(of_kind), "as_expected": len(of_kind) - problems}
        rows.append(row | {"seconds": round(time.monotonic() - start)} | facts | ({"ends": notes} if notes else {}))
        print(line(rows[-1]), flush=True)
    result = {"seed": wanted.seed, "long": long, "seconds": round(time.monotonic() - began), "rows": rows}
    print(f"\n{'kind':24} cases  as expected  seconds", *map(line, rows), sep="\n")
    print(f"seed {wanted.seed}, {result['seconds']} s with what was prepared")
    for row in rows:
        if row.keys() & {"memory_mib", "ends"}:
            print(row["kind"], *(f"{name}: {row[name]}" for name in ("memory_mib", "ends") if name in row))
    if wanted.results:
        wanted.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(bool(failed))


def line(row: dict[str, Any]) -> str:
    return f"{row['kind']:24} {row['cases']:5}  {row['as_expected']:11}  {row['seconds']:7}"


def told(found: Iterator[Found], wanted: argparse.Namespace) -> list[Found]:
    every = []
    for case, title, problem, seconds in found:
        every.append((case, title, problem, seconds))
        if wanted.verbose:
            print(f"{case} {seconds:.1f} s {title}{' FAILED' if problem else ''}", flush=True)
    return every


if __name__ == "__main__":
    main()
