"""Is it the rounding that hurts, or the disagreement? And is exact mode exact?

    python -m experiments.exact                       # twins of BF16, from the same base models
    python -m experiments.exact --formats e8m2        # twins of another format
    python -m experiments.exact --check               # is every token of every step exact?

A coarse format X can hurt by its roundings as such, or because rollout and training disagree:

    X          roundings on both sides, and what one forward code leaves of a disagreement
    X exact    the same roundings, no disagreement: the same bits on both sides
    X/fp32     the rollout rounds, training does not: disagreement in full, as between two engines

Each run is scored, as it samples, in its own rollout format. `experiments.speed --only modes`
measures what exact mode costs. Writes results/exact-twins.json and .png, or exact-check.json.
"""
from experiments.grid import grid
from experiments.lab import QUICK, Job, Lab, formats
from precision import parse_format
from run.console import ranged, run_main


def check(lab, modes, steps):
    """Exact runs with 1 and 2 threads, side by side where each has cores of its own."""
    records, workers = [], lab.workers
    flags = (*lab.device(), *steps, *(QUICK if lab.quick else ()))
    for threads in (1, 2):
        lab.workers = max(1, workers // threads)
        records += lab.sweep([Job(m, 0, (*flags, *formats(m)), threads) for m in modes])
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
        p.add_argument("--formats", nargs="+", default=[], help="each in its three modes")
        p.add_argument("--steps", type=ranged(int, 1, 10 ** 6), default=100)
    lab = Lab("exact", __doc__, argv, seeds=5, add=add)
    given, steps = lab.args.formats, ("--steps", str(lab.args.steps))
    for fmt in given:
        parse_format(fmt)
    if lab.args.check:
        modes = [f"{f} exact" for f in given or ("fp32", "bf16", "fp16")]
        return 1 - lab.present(lambda: check(lab, modes, steps), name="exact-check")["exact"]
    modes = [m for f in given or ["bf16"] for m in (f, f"{f} exact", f"{f}/fp32")]
    modes = modes if given else ["fp32", "fp16", *modes]
    grid(lab, modes=modes, job=steps, curves=("accuracy", "kl_k3"), across=2,
         compare=[(a, b) for i, a in enumerate(modes) for b in modes[:i]],
         name="-".join(["exact", *(given or ["twins"])]))
    return 0


if __name__ == "__main__":
    run_main(main)
