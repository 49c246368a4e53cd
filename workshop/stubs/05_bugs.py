"""Exercise 5: eight silent bugs. The page is workshop/pages/05_bugs.md"""

CASE = 0                        # your trainer: `start 5` drew it. Its bug is one of the eight

# Which of these is it? "stop token never trained", "top-k", "gradients never added",
# "rollout keeps old weights", "weights never updated", "one noise per group",
# "clip before unscale", "advantages of other answers"
BUG = ""

# How do you know? Name a metric and say what it does that the sound run's does not. (The check reads
# the metric's name. Your neighbor reads the rest.)
EVIDENCE = ""
