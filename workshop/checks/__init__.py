"""A check an exercise. `check(mine)` yields what is right and raises Wrong, with the reason, at the
first thing that is not. `jobs(mine, flags)` names the runs of `python -m workshop run N`, and
`install(mine)` puts what the participant wrote into the program. What is compared with comes from
definitions and worked numbers, never from the solutions."""
