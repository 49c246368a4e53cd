"""run/flags.py: a dataclass of settings as command-line flags.

A setting says all that is known of it in one place, in `setting(...)`: its group, default, help and
bounds; what a GPU, a real model or LoRA make of the default; when it has an effect (a flag without
effect is refused); whether a resumed run may change it; whether it changes what the test asks.
"""
import dataclasses
import math
import textwrap

from algorithms import ALGORITHMS, CORRECTIONS, decoupled, parse_correction
from data.tasks import SCRATCH
from operators.device import pick_device
from precision import InputError, nearest, parse_format
from run.console import Parser, number

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


def setting(group, default, text, low=None, high=None, choices=None, *, gpu=None, model=None, lora=None,
            when=None, later=False, free=False, common=False):
    """A dataclass field. low, high: bounds of a number, or of each of a pair. gpu, model, lora: the
    default on a GPU, with --model, with --lora-rank. when: (words, condition on the settings).
    later: a resumed run may change it. free: it does not change what the sanity test asks. common:
    in --help."""
    presets = {k: v for k, v in dict(gpu=gpu, model=model, lora=lora).items() if v is not None}
    return dataclasses.field(default=default, metadata=dict(
        group=group, text=text, low=low, high=high, choices=choices, presets=presets, when=when,
        later=later, free=free, common=common))


def flag(name):
    return "--" + name.replace("_", "-")


def preset(config, *names):
    """Setting -> value, for the fields that these presets set."""
    return {f.name: f.metadata["presets"][n] for n in names for f in dataclasses.fields(config)
            if n in f.metadata["presets"]}


class Help(Exception):
    """--help or --help-all was given."""


def parse(config, argv, doc):
    """Command line -> (settings, the flags that were given, the actions resume and plan). A resumed
    run's settings are not complete yet: the folder has them."""
    parser = Parser(prog="train_rl.py", add_help=False, allow_abbrev=False)
    for f in dataclasses.fields(config):
        add_flag(parser, f)
    for name in ("-h", "--help", "--help-all", "--plan"):
        parser.add_argument(name, action="store_true")
    parser.add_argument("--resume", metavar="DIR", default="")
    ns = vars(parser.parse_args(argv))
    if ns.pop("h") | ns.pop("help"):
        raise Help(short_help(config, doc))
    if ns.pop("help_all"):
        raise Help(long_help(config, doc))
    actions = dict(resume=ns.pop("resume"), plan=ns.pop("plan"))
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in ns.items() if v is not None}
    given = by_algorithm(given)
    on_gpu = pick_device(given.get("device", "auto")).type == "cuda"
    which = given.get("preset", "auto")
    which = ("gpu" if on_gpu else "cpu") if which == "auto" else which
    kinds = ["gpu"] * (which == "gpu") + ["model"] * bool(given.get("model"))
    kinds += ["lora"] * bool(given.get("lora_rank") and given.get("model"))
    own = ALGORITHMS[given.get("algo", config.algo)].settings
    return config(**{**preset(config, *kinds), **own, **given, "preset": which}), given, actions


def by_algorithm(given):
    """The paper's names of algorithms are spelled out."""
    name = given.get("algo")
    if name is None:
        return given
    if name not in {**ALGORITHMS, **PAPER}:
        raise InputError(f"no algorithm {name[:40]!r}{nearest(name, {**ALGORITHMS, **PAPER})} (there are "
                         f"{', '.join({**ALGORITHMS, **PAPER})})")
    return {**PAPER.get(name, {}), **given, "algo": PAPER.get(name, dict(algo=name))["algo"]}


def add_flag(parser, f):
    m, kind = f.metadata, type(f.default)
    if kind is bool:
        parser.add_argument(flag(f.name), action="store_true", default=None)
        parser.add_argument("--no-" + flag(f.name)[2:], dest=f.name, action="store_false", default=None)
    elif kind is str:
        parser.add_argument(flag(f.name), choices=m["choices"])
    else:
        one = float if kind is tuple else kind
        parser.add_argument(flag(f.name), type=lambda s: number(one, m["low"], m["high"], s),
                            nargs=2 if kind is tuple else None)


def refuse_idle(cfg, given):
    """A flag that has no effect beside the others is a mistake, and said to be one."""
    for f in dataclasses.fields(cfg):
        if f.name in given and f.metadata["when"]:
            words, condition = f.metadata["when"]
            if not condition(cfg):
                raise InputError(f"{flag(f.name)} would have no effect: it counts {words}")


def check(cfg, given=()):
    """Complain, in one line, about settings that cannot work together, and flags without effect."""
    for name in (cfg.rollout_format, cfg.train_format):
        parse_format(name)
    check_correction(cfg)
    refuse_idle(cfg, given)
    if cfg.exact and parse_format(cfg.rollout_format) != parse_format(cfg.train_format):
        raise InputError(f"--exact needs one format on both sides, not {cfg.rollout_format} and "
                         f"{cfg.train_format}")
    if cfg.prompts % cfg.updates_per_batch:
        raise InputError(f"--prompts {cfg.prompts} must be a multiple of --updates-per-batch "
                         f"{cfg.updates_per_batch}")
    if cfg.keep[0] > cfg.keep[1]:
        raise InputError(f"--keep {cfg.keep[0]:g} {cfg.keep[1]:g}: the first is above the second, no "
                         "problem can be kept")
    return cfg


def check_correction(cfg):
    """--correction is one of ours, with ends that keep something, and counts nothing twice."""
    name = cfg.correction.split(":")[0]
    if cfg.correction == "none":
        return
    if name not in CORRECTIONS or name == "none":
        raise InputError(f"no correction {cfg.correction[:40]!r}{nearest(name, CORRECTIONS)} (there are "
                         f"{', '.join(CORRECTIONS)})")
    try:
        _, _, low, high = parse_correction(cfg.correction)
    except ValueError:                                      # no numbers, or too many
        raise InputError(f"--correction {cfg.correction[:60]}: after the name stands a cap, as in "
                         "seq-mis:10, or a low and a high end, as in token-mis:0.5:5") from None
    if not 0 <= low < high:
        raise InputError(f"--correction {cfg.correction[:60]} keeps nothing: from {low:g} to {high:g}")
    if name != "geometric" and ALGORITHMS[cfg.algo].has_ratio and not decoupled(cfg):
        raise InputError(f"--correction {cfg.correction}: the ratio of --algo {cfg.algo} against the "
                         "rollout holds the mismatch already, and a weight would count it twice; add "
                         "--old-policy recomputed")


def refuse_settled(config, given):
    """What was decided when a run began."""
    for f in dataclasses.fields(config):
        if f.name in given and not f.metadata["later"]:
            raise InputError(f"{flag(f.name)} was settled when the run began and cannot change on --resume")


def resumed(config, saved, given):
    """The settings of a resumed run: the saved ones with the given flags over them. Another
    algorithm comes with its own settings, and without those of the old one."""
    refuse_settled(config, given)
    cfg = dict(saved)
    if given.get("algo", cfg["algo"]) not in ALGORITHMS:
        raise InputError(f"the run's --algo {cfg['algo']} is no longer in algorithms.py; name another one")
    if "algo" in given:
        own = {k for a in ALGORITHMS.values() for k in a.settings} | {"old_policy", "correction"}
        cfg |= {f.name: f.default for f in dataclasses.fields(config) if f.name in own}
        cfg |= ALGORITHMS[given["algo"]].settings
    if "precision" in given:                         # for both sides, whatever was set apart before
        cfg["rollout_precision"] = ""
    return cfg | given


def changed(cfg):
    """The settings that make this another test than the preset's, by name."""
    usual = type(cfg)(**{**preset(type(cfg), *["gpu"] * (cfg.preset == "gpu")), "preset": cfg.preset})
    return [f.name for f in dataclasses.fields(cfg)
            if not f.metadata["free"] and getattr(cfg, f.name) != getattr(usual, f.name)]


# --------------------------------------------------------------------------------------------------
# Help


def entry(f, full):
    """A flag's lines in the help."""
    m, default = f.metadata, f.default
    value = {str: "", int: " N", float: " X", tuple: " LOW HIGH", bool: ""}[type(default)]
    name = ("--no-" + flag(f.name)[2:] if default is True else flag(f.name)) + value
    name += " " + ("|".join(m["choices"]) if m["choices"] else "TEXT") if isinstance(default, str) else ""
    text = m["text"]
    if full:
        words = dict(gpu="on a GPU", model="with --model", lora="with --model and --lora-rank")
        shown = default != "" and not isinstance(default, bool)
        values = [f"default {plain(default)}"] if shown else []
        values += [f"{words[k]} {plain(v)}" for k, v in m["presets"].items()]
        text += f" ({'; '.join(values)})" if values else ""
        text += f". Counts {m['when'][0]}" if m["when"] else ""
    lines = textwrap.wrap(text, 68, break_on_hyphens=False)
    if len(name) > 27:
        return "\n".join([f"  {name}", *(" " * 30 + x for x in lines)])
    return "\n".join([f"  {name:27} {lines[0]}", *(" " * 30 + x for x in lines[1:])])


def plain(x):
    if isinstance(x, bool):
        return "on" if x else "off"
    if isinstance(x, tuple):
        return " ".join(map(plain, x))
    return "infinity" if x == math.inf else f"{x:g}" if isinstance(x, float) else str(x)


def short_help(config, doc):
    """Three examples, then the flags that people use."""
    examples = [x for x in doc.splitlines() if x.startswith("    python train_rl.py")][:3]
    common = [entry(f, False) for f in dataclasses.fields(config) if f.metadata["common"]]
    return "\n".join([doc.splitlines()[0], "", *examples, "", "The flags that people use:", *common,
                      "  --resume DIR                go on, bit for bit, where a run stopped",
                      "  --plan                      say what the run will need in memory, and run nothing",
                      "  --help-all                  every setting, with its defaults"])


def long_help(config, doc):
    """Every setting by group, and what each algorithm sets."""
    lines, group = [short_help(config, doc), "", "Every setting:"], None
    for f in dataclasses.fields(config):
        if f.metadata["group"] != group:
            group = f.metadata["group"]
            lines += ["", group]
        lines.append(entry(f, True))
    lines += ["", "algorithms (--algo), and what they set unless a flag says otherwise"]
    for name, a in ALGORITHMS.items():
        sets = "".join(f" {flag(k)} {plain(v)}" for k, v in a.settings.items())
        lines += [f"  {name:12} {x}" if i == 0 else " " * 15 + x
                  for i, x in enumerate(textwrap.wrap(a.about + (f"; sets{sets}" if sets else ""), 82))]
    for name, settings in PAPER.items():
        lines.append(f"  {name:15}" + "".join(f" {flag(k)} {plain(v)}" for k, v in settings.items()))
    return "\n".join(lines)
