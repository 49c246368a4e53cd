"""report/page.py: one HTML file out of a run's folder. Data, style and script are in it: nothing is
fetched, and the text can be read without a script. Whatever a model wrote is text here, never
markup.
"""
import html
import json
import math
import os
import pathlib
import re

from precision import InputError
from report.checks import checks
from run.checkpoint import replacing
from run.flags import flag, plain
from run.folder import read
from run.lines import notes

HERE = pathlib.Path(__file__).resolve().parent
TOKENS = 40_000                         # of answers on the page, at most
WORST = 20                              # tokens that are listed
CURVES = ("accuracy logp_gap_mean logp_gap_max kl_k3 entropy grad_norm length loss lr loss_scale "
          "frac_zero_std clipped_share truncated t_rollout t_train").split()
FIRST = "accuracy logp_gap_mean entropy grad_norm length frac_zero_std loss t_rollout".split()
# Characters that a browser would act on, or not show: controls, marks of direction, line separators
UNSEEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069"
                    "\ufeff\ud800-\udfff]")


def text(s):
    """A model's or a user's text as HTML. What cannot be seen is spelled out."""
    shown = UNSEEN.sub(lambda m: f"<U+{ord(m[0]):04X}>", str(s))
    return html.escape(shown, quote=True)


def data(x):
    """JSON for a script element: no text in it can end the element."""
    dumped = json.dumps(x, allow_nan=False)                       # all of it ASCII
    return dumped.replace("<", "\\u003c").replace("&", "\\u0026").replace(">", "\\u003e")


def finite(x):
    """A number of a log, where what is not finite is a text -> a float, or None."""
    x = float(x)
    return x if math.isfinite(x) else None


class Report:
    """What a run's folder holds. groups: of samples.jsonl, newest form only; old: older lines."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        rows = [*read(self.folder / "metrics.jsonl")]
        self.about = next((r for r in rows if "config" in r), None)
        if self.about is None:
            raise InputError(f"no metrics.jsonl of a run in {folder}")
        self.config = self.about["config"]
        self.steps = [*{r["step"]: r for r in rows if "step" in r}.values()]
        self.result = next((r["result"] for r in reversed(rows) if "result" in r), None)
        samples = [*read(self.folder / "samples.jsonl")]
        self.groups = thin([r for r in samples if "answers" in r])
        self.old = [r for r in samples if "text" in r][-20:]
        worst = [r["worst"] | dict(step=r["step"]) for r in samples if "worst" in r]
        self.worst = sorted(worst, key=lambda w: -abs(float(w["mu"]) - float(w["pi"])))[:WORST]

    def verdict(self):
        """The run in a sentence."""
        if not self.steps:
            return "No step is done yet."
        first, last, r = self.steps[0], self.steps[-1], self.result
        begin = f"{first['accuracy']:.3f} of the sampled answers were right in step {first['step']}, "
        if not r:
            now = f"{last['accuracy']:.3f} now."
            return f"Step {last['step']} of {self.config['steps']}: {begin}{now}"
        other = "No verdict, since settings differ from the sanity test's"
        word = {True: "PASS", False: "FAIL"}.get(r["passed"], other)
        out = f"{word}: {begin}{r['accuracy']:.3f} after step {last['step']}"
        if r.get("heldout_before") is not None:
            before, after = r["heldout_before"], r["heldout_after"]
            out += f"; of held-out problems {before:.3f} before, {after:.3f} after"
        return out + "."

    def notes(self):
        """What `note:` lines said, and when: [(step, sentence)]."""
        told = {}
        return [(m["step"], sentence) for i, m in enumerate(self.steps, 1)
                for sentence in notes(self.steps[:i], told)]


def thin(groups):
    """No more tokens than a page can show: steps are left out evenly, never the first or last."""
    steps = list(dict.fromkeys(g["step"] for g in groups))
    total = sum(len(a["tokens"]) for g in groups for a in g["answers"])
    keep = max(2, int(len(steps) * TOKENS / max(total, 1)))
    if keep < len(steps):
        steps = {steps[round(i * (len(steps) - 1) / (keep - 1))] for i in range(keep)}
    return [g for g in groups if g["step"] in set(steps)]


# --------------------------------------------------------------------------------------------------
# HTML


def element(tag, *inside, **attributes):
    named = {k.rstrip("_").replace("_", "-"): text(v) for k, v in attributes.items()}
    words = "".join(f' {k}="{v}"' for k, v in named.items())
    return f"<{tag}{words}>{''.join(inside)}</{tag}>"


def judged(answer):
    return "right" if float(answer["reward"]) >= 1 else "wrong"


def table(head, rows, **attributes):
    """Cells are HTML."""
    lines = ["".join(element("th", c) for c in head)]
    lines += ["".join(element("td", c) for c in row) for row in rows]
    return element("table", *(element("tr", line) for line in lines), **attributes)


def shade(mu, pi, top):
    """How dark a token is: its |log mu - log pi| on a logarithmic scale, 0 to 1; `top` is 1, and a
    hundred thousandth of it 0."""
    gap = abs(float(mu) - float(pi))
    return max(0.0, min(1.0, 1 + math.log10(gap / top) / 5)) if gap > 0 and top > 0 else 0.0


def group(g, top):
    """A problem and its answers, failures first. A token is an element, found by its place."""
    out = []
    for i, a in sorted(enumerate(g["answers"]), key=lambda pair: float(pair[1]["reward"])):
        tokens = "".join(element("i", text(t), style=f"--v:{shade(m, p, top):.2f}")
                         for t, m, p in zip(a["tokens"], a["mu"], a["pi"]))
        head = (f"reward {float(a['reward']):g} · advantage {float(a['advantage']):+.3g} · "
                f"{len(a['tokens'])} tokens" + " · cut off" * (not a["stopped"]))
        line = element("p", tokens, class_="answer", data_a=i)
        out.append(element("div", element("small", head), line, class_=judged(a)))
    right = sum(judged(a) == "right" for a in g["answers"])
    asked, wanted = element("b", text(g["prompt"])), element("b", text(g["right_answer"]))
    head = f"{asked} · right answer {wanted} · {right} of {len(g['answers'])} right"
    return element("div", element("p", head), *out, class_="group")


def samples(run):
    if not run.groups:
        old = [element("p", f"step {r['step']} · {text(r['prompt'])} → {text(r['text'])} "
                       f"(reward {float(r['reward']):g})") for r in run.old]
        return element("p", "No whole groups were recorded.") + "".join(old)
    top, steps = largest(run), dict.fromkeys(g["step"] for g in run.groups)
    of = {s: [group(g, top) for g in run.groups if g["step"] == s] for s in steps}
    return "".join(element("article", element("h3", f"Step {s}"), *some, data_step=s)
                   for s, some in of.items())


def largest(run):
    return max((abs(float(m) - float(p)) for g in run.groups for a in g["answers"]
                for m, p in zip(a["mu"], a["pi"])), default=0.0)


def worst(run):
    def row(w):
        mu, pi = float(w["mu"]), float(w["pi"])
        around = text(w["before"][-60:]) + element("mark", text(w["token"])) + text(w["after"][:30])
        return (str(w["step"]), text(w["prompt"]), around, f"{math.exp(pi):.2g}", f"{mu:.6f}",
                f"{pi:.6f}", f"{abs(mu - pi):.1e}")
    head = ("step", "problem", "the token in its answer", "probability", "log mu, nats",
            "log pi, nats", "|difference|")
    return table(head, map(row, run.worst))


def settings(run):
    """Those that differ from the preset's, and what it ran on."""
    c, about = run.config, run.about
    changed = about.get("differs") or (run.result or {}).get("changed", ())
    changed = [f"{flag(k)} {plain(tuple(v) if isinstance(v, list) else v)}"
               for k, v in c.items() if k in changed]
    where = " · ".join(str(about[k]) for k in ("device", "system") if about.get(k))
    rollout = c["rollout_precision"] or c["precision"]
    lines = [f"{run.folder} · seed {c['seed']} · rollout {rollout}, training {c['precision']} · "
             f"torch {about.get('torch')} on {where}",
             " ".join(about.get("command", ()))]
    lines += [f"changed from the preset: {', '.join(changed)}"] * bool(changed)
    return "<br>".join(map(text, lines))


def numbers(run):
    keys = list(dict.fromkeys(k for m in run.steps for k in m))

    def cell(x):
        return text(f"{x:.4g}" if isinstance(x, float) else x)
    rows = [[cell(m.get(k, "")) for k in keys] for m in run.steps]
    return table(keys, rows, id="numbers-table")


def good(found):
    """How many checks are, in words."""
    return f"{sum(color == 'good' for color, *_ in found)} of {len(found)} good"


def differing(runs):
    """Settings in which runs differ, but for the folder."""
    values = {k: {json.dumps(r.config.get(k)) for r in runs} for k in runs[0].config if k != "out"}
    return [k for k, some in values.items() if len(some) > 1]


def script_data(runs, watch):
    """What the script draws, and shows of a token that one points at."""
    keys = [k for k in differing(runs) if k != "seed"]    # who shares a label differs by the seed
    labels = [" ".join(f"{flag(k)} {r.config.get(k)}" for k in keys) or "these settings" for r in runs]
    seeds = {(label, r.config.get("seed")) for label, r in zip(labels, runs)}
    if len(runs) > 1 and (len(set(labels)) == len(runs) or len(seeds) < len(runs)):
        labels = short_names(runs)                                  # there are no seeds to put together
    out = []
    for label, r in zip(labels, runs):
        curves = {k: [finite(m[k]) if k in m else None for m in r.steps]
                  for k in (CURVES if len(runs) == 1 else FIRST)}
        ends = [(r.result or {}).get(f"heldout_{when}") for when in ("before", "after")]
        steps = [m["step"] for m in r.steps]
        out.append(dict(label=label, steps=steps, curves=curves, heldout=ends))
    groups = [[{k: [finite(x) for x in a[k]] for k in ("mu", "pi", "entropy")}
               | dict(advantage=finite(a["advantage"])) for a in g["answers"]]
              for g in runs[0].groups]
    return dict(runs=out, groups=groups, watch=watch)


def build(folders, watch=False):
    """The page as a text. folders: of one run, or of several to be laid side by side."""
    runs = [Report(f) for f in folders]
    run, names = runs[0], ("page.html", "page.css", "page.js", "uplot.js", "uplot.css")
    page, css, js, uplot, uplot_css = ((HERE / n).read_text(encoding="utf-8") for n in names)
    notes = "".join(element("li", f"step {step}: {text(s)}") for step, s in run.notes())
    graded, several = checks(run.steps), len(runs) > 1
    found = [element("li", element("b", text(question)), " ", text(figure), "<br>", text(s),
                     class_=color) for color, question, figure, s in graded]
    fill = dict(
        title=text(f"{len(runs)} runs" if several else run.folder.name), settings=settings(run),
        verdict=text(f"{len(runs)} runs; details of the first" if several else run.verdict()),
        which=f" ({text(run.folder)})" * several, good=good(graded),
        beside='<a href="#compare">Side by side</a> ' * several,
        checks="".join(found), samples=samples(run), worst=worst(run), numbers=numbers(run),
        notes=element("ul", notes) if notes else element("p", "None: nothing was off."),
        compare=compare(runs) if several else "", both=both(runs) if several else "",
        curves=PLOTS * several, plots=PLOTS * (not several), style=uplot_css + css, script=uplot + js,
        data=data(script_data(runs, watch)))
    return re.sub(r"\{\{(\w+)\}\}", lambda m: fill[m[1]], page)


def write(folders, path="", watch=False):
    """The page as a file, by default report.html in the first run's folder. The old one or the new
    one is there at every moment."""
    path = pathlib.Path(path or pathlib.Path(folders[0]) / "report.html")
    page = build(folders, watch).encode("utf-8", "replace")         # before a folder is made for it
    with replacing(path) as f:
        f.write(page)
    return path


def short_names(runs):
    """Of their folders what tells them apart."""
    paths = [r.folder.resolve() for r in runs]
    common = os.path.commonpath(paths) if len(set(paths)) > 1 else paths[0].parent
    return [str(p.relative_to(common)) for p in paths]


def compare(runs):
    """Settings that differ, how each ended, and every metric of all, in the first step and the last
    five."""
    keys, names = differing(runs), short_names(runs)
    rows = [[*map(text, (name, *(r.config.get(k) for k in keys), r.verdict(), good(checks(r.steps)),
                         " ".join(f"Step {step}: {s}." for step, s in r.notes()[:3])))]
            for name, r in zip(names, runs)]
    out = table(["run", *map(flag, keys), "how it stands", "checks", "first notes"], rows,
                class_="wrapped")
    head = ["metric", *(text(f"{name}, {when}") for when in ("step 1", "end") for name in names)]
    metrics = list(dict.fromkeys(k for r in runs for m in r.steps for k in m if k != "step"))
    ends = [r.steps[:1] for r in runs] + [r.steps[-5:] for r in runs]
    lines = [[text(k), *(mean(some, k) for some in ends)] for k in metrics]
    numbers = element("div", table(head, lines), class_="wide")
    end = element("summary", "every metric: the first step, and the mean of the last five")
    return element("section", element("h2", "Side by side"), out, element("details", end, numbers),
                   id="compare")


def mean(steps, key):
    found = [float(m[key]) for m in steps if key in m]
    return text(f"{sum(found) / len(found):.4g}") if found else ""


def both(runs):
    """What each run answered to the same problems."""
    last, out = [{g["prompt"]: g for g in r.groups} for r in runs], ""
    for prompt in [p for p in last[0] if all(p in others for others in last)][:5]:
        groups = [others[prompt] for others in last]
        head = [f"{text(name)}, step {g['step']}" for name, g in zip(short_names(runs), groups)]
        cells = ["".join(element("p", text(a["text"]), class_=judged(a)) for a in g["answers"])
                 for g in groups]
        out += element("h3", text(prompt)) + table(head, [cells])
    if not set(last[0]).intersection(*last):
        out = element("p", "No problem was recorded in all of them.")
    return element("section", element("h2", "The same problems"), out, id="both")


PLOTS = ('<section id="curves"><h2>Curves</h2><div id="plots"></div><noscript><p>Curves need JavaScript. '
         "Their numbers are in the table below.</p></noscript></section>")
