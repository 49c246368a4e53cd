"""run/flags.py: a dataclass of settings as command-line flags.

A setting says all that is known of it in one place, in `setting(...)`: its group, default, help and
bounds; what a GPU, a real model or LoRA make of the default; when it has an effect (a flag without
effect is refused); whether a resumed run may change it; whether it changes what the test asks.
"""
import argparse
import dataclasses
import itertools
import sys

from algorithms import ALGORITHMS, CORRECTIONS, decoupled, parse_correction
from data.tasks import SCRATCH
from operators.device import pick_device
from precision import InputError, nearest, parse_format
from run.console import Parser, ranged
from run.lines import wrapped

# When a flag has an effect: in words, and as a condition on the settings
SCRATCHED = "without --model", lambda c: not c.model
READING = "with --model", lambda c: bool(c.model)
DRAWN = f"for the tasks {', '.join(SCRATCH)}", lambda c: c.task in SCRATCH
IMITATED = f"{DRAWN[0]} without --model", lambda c: c.task in SCRATCH and not c.model
RATIO = "for algorithms whose loss has a ratio", lambda c: ALGORITHMS[c.algo].has_ratio
EXPERTS = "for models with experts", lambda c: bool(c.n_experts or c.model)
SCALED = "in fewer than 8 exponent bits", lambda c: parse_format(c.precision).exp < 8

# The paper's names. Its scripts take Dr.GRPO's advantage and denominator for all of these.
PAPER = {f"pg-{c}": dict(algo="pg", correction=c)
         for c in ("seq-is", "seq-tis", "seq-mis", "token-tis")}
PAPER |= {f"grpo-{c.split(':')[0]}": dict(algo="dr-grpo", old_policy="recomputed", correction=c)
          for c in ("token-tis", "seq-mis:10")}


def setting(group, default, text, low=None, high=None, choices=None, *, when=None, later=False,
            free=False, common=False, **presets):
    """A dataclass field. low, high: bounds of a number, or of each of a pair. when: (words,
    condition on the settings). later: a resumed run may change it. free: it does not change what
    the sanity test asks. common: in --help. presets: the default on a GPU (gpu), with --model
    (model), with --model and --lora-rank (lora)."""
    return dataclasses.field(default=default, metadata=locals())


def flag(name):
    return "--" + name.replace("_", "-")


def preset(config, *names):
    """Setting -> value, for the fields that these presets set."""
    return {f.name: f.metadata["presets"][n] for n in names for f in dataclasses.fields(config)
            if n in f.metadata["presets"]}


def parse(config, argv, doc):
    """Command line -> settings, the flags that were given, --resume, --plan. A resumed run's
    settings are not complete yet: the folder has them."""
    parser = Parser(prog="train_rl.py", add_help=False, allow_abbrev=False)
    for f in dataclasses.fields(config):
        add_flag(parser, f)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--help-all", action="store_true")
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--resume", metavar="DIR", default="")
    ns = vars(parser.parse_args(argv))
    short, full, plan, resume = map(ns.pop, ("help", "help_all", "plan", "resume"))
    if short or full:
        print(help_text(config, doc, full))
        sys.exit()
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in ns.items() if v is not None}
    if "algo" in given:                                     # the paper's names are spelled out
        named = {name: dict(algo=name) for name in ALGORITHMS} | PAPER
        name = given["algo"]
        if name not in named:
            raise InputError(f"no algorithm {name[:40]!r}{nearest(name, named)} (there are "
                             f"{', '.join(named)})")
        given = named[name] | given | dict(algo=named[name]["algo"])
    device, which = pick_device(given.get("device", "auto")), given.get("preset", "auto")
    which = which if which != "auto" else "gpu" if device.type == "cuda" else "cpu"
    kinds = ["gpu"] * (which == "gpu") + ["model"] * bool(given.get("model"))
    kinds += ["lora"] * bool(given.get("lora_rank") and given.get("model"))
    own = ALGORITHMS[given.get("algo", config.algo)].settings
    cfg = config(**preset(config, *kinds) | own | given | dict(preset=which))
    return cfg, given, resume, plan


def add_flag(parser, f):
    m, kind, name = f.metadata, type(f.default), flag(f.name)
    if kind is bool:
        parser.add_argument(name, action=argparse.BooleanOptionalAction)
    elif kind is str:
        parser.add_argument(name, choices=m["choices"])
    else:
        one = ranged(float if kind is tuple else kind, m["low"], m["high"])
        parser.add_argument(name, type=one, nargs=2 if kind is tuple else None)


def check(cfg, given=()):
    """Complain, in one line, about settings that cannot work together, and flags without effect: a
    flag that has none beside the others is a mistake."""
    formats = [parse_format(name) for name in (cfg.rollout_format, cfg.train_format)]
    check_correction(cfg)
    for f in dataclasses.fields(cfg):
        words, has_effect = f.metadata["when"] or ("", lambda cfg: True)
        if f.name in given and not has_effect(cfg):
            raise InputError(f"{flag(f.name)} would have no effect: it counts {words}")
    if cfg.exact and formats[0] != formats[1]:
        raise InputError(f"--exact needs one format on both sides, not {cfg.rollout_format} and "
                         f"{cfg.train_format}")
    if cfg.prompts % cfg.updates_per_batch:
        raise InputError(f"--prompts {cfg.prompts} must be a multiple of --updates-per-batch "
                         f"{cfg.updates_per_batch}")
    if cfg.keep[0] > cfg.keep[1]:
        raise InputError(f"--keep {plain(cfg.keep)}: the first is above the second, no problem can "
                         "be kept")
    return cfg


def check_correction(cfg):
    """--correction is one of ours, with ends that keep something, and counts nothing twice."""
    name, said = cfg.correction.split(":")[0], f"--correction {cfg.correction[:60]}"
    if cfg.correction == "none":
        return
    if name not in CORRECTIONS or name == "none":
        raise InputError(f"no correction {cfg.correction[:40]!r}{nearest(name, CORRECTIONS)} "
                         f"(there are {', '.join(CORRECTIONS)})")
    try:
        low, high = parse_correction(cfg.correction)[2:]
    except ValueError:                                      # no numbers, or too many
        raise InputError(f"{said}: after the name stands a cap, as in seq-mis:10, or a low and a "
                         "high end, as in token-mis:0.5:5") from None
    if not 0 <= low < high:
        raise InputError(f"{said} keeps nothing: from {low:g} to {high:g}")
    if name != "geometric" and ALGORITHMS[cfg.algo].has_ratio and not decoupled(cfg):
        raise InputError(f"{said}: the ratio of --algo {cfg.algo} against the rollout holds the "
                         "mismatch already, and a weight would count it twice; add --old-policy "
                         "recomputed")


def resumed(config, saved, given):
    """The settings of a resumed run: the saved ones with the given flags over them. Another
    algorithm comes with its own settings, and without those of the old one."""
    cfg, settings = dict(saved), dataclasses.fields(config)
    for f in settings:
        if f.name in given and not f.metadata["later"]:
            raise InputError(f"{flag(f.name)} was settled when the run began and cannot change on "
                             "--resume")
    if given.get("algo", cfg["algo"]) not in ALGORITHMS:
        raise InputError(f"the run's --algo {cfg['algo']} is no longer in algorithms.py; name "
                         "another one")
    if "algo" in given:
        own = {k for a in ALGORITHMS.values() for k in a.settings} | {"old_policy", "correction"}
        cfg |= {f.name: f.default for f in settings if f.name in own}
        cfg |= ALGORITHMS[given["algo"]].settings
    if "precision" in given:                         # for both sides, whatever was set apart before
        cfg["rollout_precision"] = ""
    return cfg | given


def changed(cfg, free=False):
    """The settings that make this another test than the preset's, by name. free: those too that do
    not; the folder and the preset itself never count."""
    usual = preset(type(cfg), *["gpu"] * (cfg.preset == "gpu"))
    return [f.name for f in dataclasses.fields(cfg) if (free or not f.metadata["free"])
            and f.name not in ("out", "preset") and getattr(cfg, f.name) != usual.get(f.name, f.default)]


# --------------------------------------------------------------------------------------------------
# Help


def plain(x):
    """A setting's value as one types it."""
    if isinstance(x, tuple):
        return " ".join(map(plain, x))
    return ("off", "on")[x] if isinstance(x, bool) else f"{x:g}" if isinstance(x, float) else str(x)


def entry(name, text):
    return wrapped(text, f"  {name:27} ", " " * 30)


def about(f, full):
    """A setting's lines in the help. full: with its defaults, and when it counts."""
    m, kind, off = f.metadata, type(f.default), f.default is True
    takes = {int: "N", float: "X", tuple: "LOW HIGH", str: "|".join(m["choices"] or ["TEXT"])}
    words = dict(gpu="on a GPU", model="with --model", lora="with --model and --lora-rank")
    values = [f"{words[k]} {plain(v)}" for k, v in m["presets"].items()]
    if f.default != "" and kind is not bool:
        values = [f"default {plain(f.default)}", *values]
    text = m["text"] + f" ({'; '.join(values)})" * bool(full and values)
    text += f". Counts {m['when'][0]}" if full and m["when"] else ""
    return entry(f"{flag('no_' * off + f.name)} {takes.get(kind, '')}", text)


def help_text(config, doc, full):
    """Three examples, then the flags that people use. full: then every setting by group, and what
    each algorithm sets."""
    settings = dataclasses.fields(config)
    examples = [x for x in doc.splitlines() if x.startswith("    python train_rl.py")][:3]
    lines = [doc.splitlines()[0], "", *examples, "", "The flags that people use:",
             *(about(f, False) for f in settings if f.metadata["common"]),
             entry("--resume DIR", "go on, bit for bit, where a run stopped"),
             entry("--plan", "say what the run will need in memory, and run nothing"),
             entry("--help-all", "every setting, with its defaults")]
    if not full:
        return "\n".join(lines)

    def sets(settings):
        return " ".join(f"{flag(k)} {plain(v)}" for k, v in settings.items())
    lines += ["", "Every setting:"]
    for group, some in itertools.groupby(settings, lambda f: f.metadata["group"]):
        lines += ["", group, *(about(f, True) for f in some)]
    lines += ["", "algorithms (--algo), and what they set unless a flag says otherwise"]
    lines += [entry(name, a.about + ("; sets " + sets(a.settings) if a.settings else ""))
              for name, a in ALGORITHMS.items()]
    return "\n".join([*lines, *(entry(name, sets(settings)) for name, settings in PAPER.items())])
