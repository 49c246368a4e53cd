"""Addition with its working written out, column by column from the right, and then the result behind a #:

    187+737=  ->  7+7+0=14;8+3+1=12;1+7+1=9;#924

Each column reads digit + digit + carry = sum. The demonstrator gets each column wrong with probability `noise` and goes on
from what it wrote, so imitation alone answers (1 - noise)^digits of the problems right, and no amount of it more. RL can:
it sees only whether the result is right. `digits` is the dial for the length of the chain of thought.
"""
from data import Problem, Task


class Addition(Task):
    draws, loads = True, False

    def __init__(self, digits, noise):
        self.digits, self.noise = digits, noise
        self.prompt_length = 2 * digits + 2
        self.answer_length = 9 * digits + 1 + (digits + 1) + 1           # columns, #, result, stop token

    def problem(self, rng):
        # Python's own integers: numpy's would overflow at 19 digits
        a, b = (int("".join(map(str, rng.integers([1] + [0] * (self.digits - 1), 10)))) for _ in range(2))
        return Problem(f"{a}+{b}=", str(a + b))

    def demonstrate(self, problem, rng):
        a, b = problem.prompt[:-1].split("+")
        carry, columns, result = 0, [], ""
        for x, y in zip(reversed(a), reversed(b)):
            total = int(x) + int(y) + carry
            if rng.random() < self.noise:
                total = (total + int(rng.integers(1, 20))) % 20           # any of the other 19 sums that can be written
            columns.append(f"{x}+{y}+{carry}={total};")
            result = f"{total % 10}{result}"
            carry = total // 10
        return "".join(columns) + "#" + ("1" if carry else "") + result

    def reward(self, problem, text):
        """1.0 when what follows the # is the sum and nothing else. The working is not looked at."""
        return float(text.partition("#")[2] == problem.answer)
