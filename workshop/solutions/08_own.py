import numpy as np


def problem(rng):
    word = "".join(rng.permutation(list("abcdefgh"))[:4])
    return f"sort {word}=", "".join(sorted(word))


def demonstrate(problem, rng):
    word = list(problem.answer)
    if rng.random() < 0.4:                                      # two letters change places
        i = rng.integers(3)
        word[i], word[i + 1] = word[i + 1], word[i]
    return "".join(word)


def reward(problem, text):
    return float(text == problem.answer)


def metric(texts, rewards):
    """Share of the answers that are in order, whether or not they are right."""
    return sum(list(t) == sorted(t) for t in texts) / len(texts)


ARMS = {"fast": "--lr 1e-3", "slow": "--lr 2e-5"}
VALUE = "accuracy"
GOOD = "higher"
EXPECT = "in 40 steps the slow one gets nowhere"


def difference(a, b):
    d = np.subtract(a, b)
    return d.mean(), 4.303 * d.std(ddof=1) / np.sqrt(len(d))


def picture(plt, curves):
    fig, ax = plt.subplots()
    for i, (name, seeds) in enumerate(curves.items()):
        for curve in seeds:
            ax.plot(curve, color=f"C{i}", label=name if curve is seeds[0] else None)
    ax.set(xlabel="step", ylabel="share of right answers")
    ax.legend()
    return fig


SENTENCE = ""                   # with the numbers that your runs gave
VERDICT = ""
