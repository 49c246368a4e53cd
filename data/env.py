"""A task as a model sees it: its problems as tokens, and its judgement of answers."""
from data.guard import Guard
from data.tokenizer import Bytes

ANSWER = 512            # tokens of an answer at most, where neither the task nor --max-answer says


class Env:
    """task: data.Task; tokenizer: data.tokenizer.Bytes or an hf.tokenizer.HFTokenizer;
    prompt_length, answer_length: tokens at most, the stop token included."""

    def __init__(self, task, tokenizer=Bytes, answer_length=0, say=print):
        self.task, self.tokenizer = task, tokenizer
        # a model that reads is asked in words; one without a chat form imitates the problem's signs
        self.reads = tokenizer is not Bytes and (task.loads or tokenizer.form != "plain")
        if tokenizer is Bytes and task.draws and not task.answer_length:
            task.measure()                                  # one of your own, for a model from scratch
        self.prompt_length = task.prompt_length
        self.answer_length = answer_length or task.answer_length or ANSWER
        self.guard = Guard(task, say=say)

    def tokens(self, problem):
        """What the model is to read."""
        text = self.task.prompt(problem.prompt) if self.reads else problem.prompt
        return self.tokenizer.prompt(text, self.task.system)

    def rewards(self, problems, rollout):
        """R answers, the same number to each problem -> R rewards. An answer that was cut off gets
        0."""
        n, texts = len(rollout.length) // len(problems), rollout.texts(self.tokenizer)
        asked = [i for i, stopped in enumerate(rollout.stopped.tolist()) if stopped]
        given = self.guard.rewards([(problems[i // n], texts[i]) for i in asked])
        given = dict(zip(asked, given))
        return [given.get(i, 0.0) for i in range(len(texts))]
