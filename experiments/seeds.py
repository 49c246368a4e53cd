"""The default job over many seeds: how often does it PASS, how long does it take?

    python -m experiments.seeds

Seeds 0 to 9, one run at a time, with all cores, in an empty cache of its own: each makes its own
base model. Writes results/seeds-default.json and .png.
"""
import dataclasses
import os
import tempfile

from experiments.command import show
from experiments.grid import grid
from experiments.lab import SCALARS, Lab
from run.console import run_main


def told(records, summary):
    passed = sum(r.get("passed") is True for r in records)
    print(f"\n{passed} of {len(records)} PASS (training accuracy of 0.95, over the whole kept set)")
    for s in summary.values():
        show({k: s[k] or {} for k in SCALARS})
    return dict(passed=passed)


def main(argv=None):
    lab, name = Lab("seeds", __doc__, argv, seeds=10), "seeds default"
    lab.workers = 1
    with tempfile.TemporaryDirectory() as cold:
        def alone(job):
            cache = ("TENBIT_CACHE", f"{cold}/{job.seed}")
            return dataclasses.replace(job, threads=os.cpu_count() or 1, env=(cache,))
        grid(lab, {name: ""}, job=(), change=alone, also=told, name=name,
             curves=("accuracy", "kl_k3"))


if __name__ == "__main__":
    run_main(main)
