"""Is it the rounding that hurts, or the disagreement? And is exact mode exact?

    python -m experiments.exact                       # twins of BF16, from the same base models
    python -m experiments.exact --check               # is every token of every step exact?

BF16 can hurt by its roundings as such, or because rollout and training disagree:

    bf16          roundings on both sides, and what one forward code leaves of a disagreement
    bf16 exact    the same roundings, no disagreement: the same bits on both sides
    bf16/fp32     the rollout rounds, training does not: disagreement in full, as of two engines

Each run is scored, as it samples, in its own rollout format. `experiments.speed --only modes`
measures what exact mode costs. Writes results/exact-twins.json and .png, or exact-check.json.
"""
from experiments.grid import grid
from experiments.lab import QUICK, Job, Lab, formats
from run.console import run_main

TWINS = "fp32", "fp16", "bf16", "bf16 exact", "bf16/fp32"
STEPS = "--steps", "100"


def check(lab):
    """Exact runs with 1 and 2 threads, side by side where each has cores of its own."""
    records, workers = [], lab.workers
    flags = (*lab.device(), *STEPS, *(QUICK if lab.quick else ()))
    for threads in (1, 2):
        lab.workers = max(1, workers // threads)
        records += lab.sweep([Job(f"{f} exact", 0, (*flags, *formats(f"{f} exact")), threads)
                              for f in ("fp32", "bf16", "fp16")])
    done = [r["curves"] for r in records if "failed" not in r]
    tokens, steps = int(sum(sum(c["tokens"]) for c in done)), sum(len(c["tokens"]) for c in done)
    largest = max((max(c["logp_gap_max"]) for c in done), default=None)
    good = len(done) == len(records) and largest == 0.0
    print(f"{'exact' if good else 'NOT EXACT'}: {tokens} tokens in {steps} steps of {len(done)} "
          f"runs, largest |gap| {largest}")
    return dict(exact=good, tokens=tokens, steps=steps, largest_gap=largest), records


def main(argv=None):
    def add(p):
        p.add_argument("--check", action="store_true", help="exact modes with 1 and 2 threads")
    lab = Lab("exact", __doc__, argv, seeds=5, add=add)
    if lab.args.check:
        return 1 - lab.present(lambda: check(lab), name="exact check")["exact"]
    grid(lab, modes=TWINS, job=STEPS, curves=("accuracy", "kl_k3"), name="exact twins",
         compare=[(a, b) for i, a in enumerate(TWINS) for b in TWINS[:i]])
    return 0


if __name__ == "__main__":
    run_main(main)
