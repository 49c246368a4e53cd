def weight(logp, logp_rollout):
    return (logp - logp_rollout).exp().clamp(max=2)


ARMS = {
    "fp32": "--precision fp32 --old-policy recomputed",
    "mismatch": "--precision e8m2 --rollout-precision fp32 --old-policy recomputed",
    "token-tis": "--precision e8m2 --rollout-precision fp32 --old-policy recomputed "
                 "--correction token-tis",
    "matched": "--precision e8m2 --old-policy recomputed",
}
COLLAPSED = ["mismatch"]        # what the runs on your machine did is what counts
MATCHED = "c"
