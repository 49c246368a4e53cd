"""Exercise 8: your own experiment. The page is workshop/pages/08_own.md"""

# 1. A task, in about 20 lines: docs/tasks.md, data/example_scratch.py


def problem(rng):
    """rng: a numpy Generator -> (prompt, answer), two short texts."""
    return "what?", "that"


def demonstrate(problem, rng):
    """-> the text of an answer to problem.prompt, right in 30 % to 90 % of the cases."""
    return problem.answer


def reward(problem, text):
    """-> 1 if the text is a right answer to the problem, else 0 (or between)."""
    return 1.0


# 2. A metric


def metric(texts, rewards):
    """A step's answers, a list of texts, and their rewards, a numpy array -> one number."""
    return 0.0


# 3. An experiment: two arms, three seeds. A name and flags of train_rl.py for each, one thing apart.
# The job has --lr 1e-3 --group 8 --prompts 16 --steps 40 --temperature 1 --precision fp16
ARMS = {"A": "", "B": ""}
VALUE = ""                      # what they are compared by: a metric, "mine" or another
GOOD = ""                       # "higher" or "lower" is better
EXPECT = ""                     # before the runs: what do you expect, and why?


def difference(a, b):
    """Two lists, VALUE in the end of three seeds of each arm: a[0] and b[0] are of seed 0. -> the mean of a - b,
    and half of its 95 % interval: 4.303 sd / sqrt(3), sd the deviation of the differences."""
    return 0.0, 0.0


def picture(plt, curves):
    """curves: {arm: [VALUE step by step, of each seed]} -> a matplotlib figure, with labels."""
    return plt.figure()


# What was found: the names of the arms, the mean difference, the interval's ends
SENTENCE = ""
VERDICT = ""                    # the name of the better arm, or "not shown"
