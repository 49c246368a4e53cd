CASE = 1003                     # a case of its own; yours has another bug, and other runs

BUG = "top-k"

EVIDENCE = "kl_k1 is above 0 and equal to the gap from the first step on: log mu is always larger"
