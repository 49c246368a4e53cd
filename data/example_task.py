"""A task of your own for a model that reads: --model FOLDER --task data/example_task.py"""
import random

WORDS = """strawberry banana committee balloon mississippi parallel coffee letter address bookkeeper
    tennessee success""".split()


def load(path):
    pairs = [(word, letter) for word in WORDS for letter in sorted(set(word))]
    random.Random(0).shuffle(pairs)
    return [(f'How often does the letter "{c}" stand in "{w}"? Answer with one number.', str(w.count(c)))
            for w, c in pairs]


def reward(problem, text):
    return float(text.strip() == problem.answer)
