"""run/console.py: command lines whose errors are one line."""
import argparse
import sys

import torch

from precision import InputError, nearest


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, with the nearest flag for an unknown one."""

    def parse_args(self, args=None, namespace=None):
        ns, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [s for a in self._actions for s in a.option_strings if s.startswith("--")]
            self.error(f"unknown argument {unknown[0][:80]}{nearest(unknown[0].split('=')[0], known)}")
        return ns

    def error(self, message):
        print(f"{self.prog}: {message[:300]} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)


def ranged(kind, low, high):
    """For argparse's `type`: a number of this kind between low and high."""
    def number(text):
        try:
            x = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not {what}") from None
        if not low <= x <= high:
            raise argparse.ArgumentTypeError(f"{text[:40]} is out of range, {low} to {high}")
        return x
    return number


def run_main(main):
    """Run a command: what the user got wrong is one line and exit status 1, without a stack
    trace."""
    name = sys.argv[0].rsplit("/", 1)[-1]
    try:
        status = main()
        sys.stdout.flush()                                     # a closed pipe is seen here, not later
        sys.exit(status)
    except KeyboardInterrupt:
        print("\ninterrupted")
        sys.exit(130)
    except InputError as e:
        print(f"{name}: {e}", file=sys.stderr)
        sys.exit(1)
    except torch.OutOfMemoryError as e:
        print(f"{name}: the GPU is out of memory; lower --micro-batch (training), --rollout-rows or "
              f"--prompts (sampling), or the model. {str(e).splitlines()[0]}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:                                                 # `sample.py ... | head`
        sys.stderr.close()
        sys.exit(1)
