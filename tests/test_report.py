"""report.html: what it says, that a model's text stays text, and that a real browser shows it."""
import html.parser
import json
import math
import pathlib
import re
import shutil
import subprocess
import sys
import types

import pytest
from test_commands import SMALL, run

from precision import InputError
from report import page
from report.__main__ import main as command
from report.checks import BAD, GOOD, LOOK, checks
from run.diary import number
from run.trackers import tracker

METRICS = dict(accuracy=0.5, loss=1e-4, grad_norm=0.1, entropy=0.1, clipped_share=0.0, truncated=0.0, kl_k3=1e-9,
               logp_gap_mean=1e-5, logp_gap_max=1e-3, skipped_steps=0, frac_zero_std=0.2, ratio_outliers=0.0, length=3.0,
               t_rollout=0.1, t_train=0.2)
CONFIG = dict(seed=0, out="", precision="fp16", rollout_precision="", steps=6, lr=1e-3)
HOSTILE = ["<script>boom()</script>", "</script><script>boom()</script>", "\" onmouseover=\"boom()",
           "'><img src=x onerror=boom()>", "\u2028\u2029", "\u202eevil\u202c", "\x00\x07\x1b[31m", "&lt;b&gt;", "{{data}}", "]]>",
           "<!--", "\ud800", "x" * 100_000]


def answer(text="12", reward=1.0, mu=(-0.5, -0.25), pi=(-0.5, -0.2501)):
    return dict(text=text, reward=reward, advantage=reward - 0.5, stopped=True, tokens=[text[:1] or " ", text[1:] or " "],
                mu=list(mu), pi=list(pi), entropy=[0.3, 0.1])


def a_run(folder, steps=6, texts=("12", "13"), result=None, config=CONFIG, samples=None, **metrics):
    """A folder as a run leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [dict(config=config, command=["train_rl.py"], torch="2", device="cpu", system="Linux")]
    rows += [METRICS | dict(step=i, accuracy=0.5 + 0.05 * i) | metrics for i in range(1, steps + 1)]
    rows += [dict(result=result)] * bool(result)
    if samples is None:
        samples = [dict(step=s, prompt="q" + texts[0], right_answer=texts[0],
                        answers=[answer(t, float(i == 0)) for i, t in enumerate(texts)]) for s in (1, steps)]
        samples += [dict(step=s, worst=dict(prompt="q", before="a", token=f"t{s}", after="b", mu=-1.0, pi=-1.0 - s / 1000))
                    for s in range(1, steps + 1)]
    for name, some in (("metrics.jsonl", rows), ("samples.jsonl", samples)):
        (folder / name).write_text("".join(json.dumps(r) + "\n" for r in some), encoding="utf-8")
    return folder


class Elements(html.parser.HTMLParser):
    """Tags, their attributes, and the text outside of scripts and styles."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.text, self.inside = [], set(), [], None
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {k for k, _ in attrs}
        self.inside = tag if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if not self.inside:
            self.text.append(data)


def words(source):
    return " ".join(" ".join(Elements(source).text).split())


def test_it_says_what_the_run_did(tmp_path):
    result = dict(accuracy=0.975, heldout_before=0.4, heldout_after=0.9, passed=True, changed=[])
    said = words(page.build([a_run(tmp_path, result=result)]))
    assert ("PASS: 0.550 of the sampled answers were right in step 1, 0.975 after step 6; of held-out problems 0.400 "
            "before, 0.900 after.") in said
    assert "Why is my loss near 0?" in said and "None: nothing was off." in said
    assert "right answer 12" in said.replace("  ", " ") and "1 of 2 right" in said


def test_settings_that_differ_are_named_while_it_runs(tmp_path):
    folder = a_run(tmp_path)
    rows = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows[0] = json.dumps(json.loads(rows[0]) | dict(differs=["precision", "lr"]))
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    assert "changed from the preset: --precision fp16, --lr 0.001" in words(page.build([folder]))


def test_failures_come_first_and_the_worst_token_too(tmp_path):
    source = page.build([a_run(tmp_path)])
    assert source.index('class="wrong"') < source.index('class="right"')
    first = re.search(r"<table><tr><th>step.*?</tr><tr>(.*?)</tr>", source)[1]
    assert "<mark>t6</mark>" in first and "6.0e-03" in first


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_what_a_model_writes_is_text(tmp_path, text):
    """The page has the same elements and attributes as with a harmless text, and shows it."""
    plain, hostile = (page.build([a_run(tmp_path / str(i), texts=(t, t + "!"))]) for i, t in enumerate(("harmless", text)))
    a, b = Elements(plain), Elements(hostile)
    assert a.tags == b.tags and a.attributes == b.attributes
    shown = "".join(b.text)
    if text.isprintable() and "{" not in text:
        assert text[:50] in shown
    assert not set(shown) & set("\x00\x07\x1b\u202e\u2028\u2029\ud800")
    hostile.encode("utf-8")


def test_a_broken_run_an_old_one_and_one_that_has_just_begun(tmp_path):
    folder = a_run(tmp_path / "a", steps=3)
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as f:
        f.write('{"step": 4, "accur')                                     # a kill
    assert "Step 3 of 6" in words(page.build([folder]))
    old = [dict(step=1, prompt="1+1=", text="2", reward=1.0, right_answer="2", stopped=True)]
    assert "step 1 · 1+1= → 2 (reward 1)" in words(page.build([a_run(tmp_path / "b", samples=old)]))
    assert "No step is done yet" in words(page.build([a_run(tmp_path / "c", steps=0, samples=[])]))
    (a_run(tmp_path / "d") / "samples.jsonl").unlink()
    assert "No whole groups were recorded" in words(page.build([tmp_path / "d"]))
    with pytest.raises(InputError, match=r"no metrics\.jsonl"):
        page.build([tmp_path])


def test_numbers_that_are_not_finite(tmp_path):
    source = page.build([a_run(tmp_path, grad_norm="inf", loss="nan", samples=[dict(
        step=1, prompt="q", right_answer="1", answers=[answer(mu=("-inf", -1.0), pi=("nan", -1.0))])])])
    data = json.loads(re.search(r'id="data">(.*?)</script>', source)[1])
    assert data["groups"][0][0]["mu"][0] is None and data["runs"][0]["curves"]["grad_norm"] == [None] * 6
    assert number(math.inf) == "inf" and number(1 / 3) == 0.3333333


def test_a_page_has_room_for_so_many_tokens(tmp_path):
    samples = [dict(step=s, prompt="q", right_answer="1", answers=[answer()] * 500) for s in range(1, 201)]
    run = page.Report(a_run(tmp_path, steps=200, samples=samples))
    steps = [g["step"] for g in run.groups]
    assert steps[0] == 1 and steps[-1] == 200 and len(steps) == page.TOKENS // 1000
    assert max(b - a for a, b in zip(steps, steps[1:])) <= 6


def test_a_step_that_was_done_twice_counts_once(tmp_path):
    folder = a_run(tmp_path)
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as f:
        f.write(json.dumps(METRICS | dict(step=6, accuracy=0.99)) + "\n")
    assert [m["accuracy"] for m in page.Report(folder).steps][-1] == 0.99 and len(page.Report(folder).steps) == 6


# --- side by side


def test_runs_side_by_side(tmp_path):
    """Those that differ by their seed alone share a label, and so a curve."""
    folders = [a_run(tmp_path / f"{lr}-{seed}", config=CONFIG | dict(seed=seed, lr=lr)) for lr in (1e-3, 1e-2) for seed in (0, 1)]

    def labels(source):
        return [r["label"] for r in json.loads(re.search(r'id="data">(.*?)</script>', source)[1])["runs"]]
    source = page.build(folders)
    assert labels(source) == ["--lr 0.001"] * 2 + ["--lr 0.01"] * 2
    assert labels(page.build([folders[0], folders[2]])) == ["0.001-0", "0.01-0"]         # no seeds to put together
    alike = [a_run(tmp_path / name, config=CONFIG) for name in ("sound", "sick")]
    both = page.build(alike)
    assert labels(both) == ["sound", "sick"] and "sick, step 1" in words(both) and "frac_zero_std" in words(both)
    said = words(source)
    assert "Side by side" in said and "--seed" in said and "q12" in said and "--precision" not in said
    command([str(folders[0]), str(folders[1]), "--out", str(tmp_path / "two.html")])
    assert "Side by side" in (tmp_path / "two.html").read_text(encoding="utf-8")


# --- checks


def series(n=10, **lists):
    return [METRICS | {k: v[i] if isinstance(v, list) else v for k, v in lists.items()} for i in range(n)]


@pytest.mark.parametrize("place, name, color, lists", [
    (0, "loss", LOOK, dict(frac_zero_std=1.0)), (1, "learning", GOOD, dict(accuracy=[i / 10 for i in range(10)])),
    (1, "learning", BAD, dict(accuracy=[0.9] * 5 + [0.2] * 5)), (1, "learning", LOOK, dict(accuracy=0.5)),
    (1, "learning", GOOD, dict(accuracy=0.97)), (2, "entropy", LOOK, dict(entropy=[1.0] * 5 + [0.01] * 5)),
    (3, "clipped", BAD, dict(clipped_share=0.5)), (4, "truncated", LOOK, dict(truncated=0.1)),
    (5, "gap", BAD, dict(kl_k3=0.1)), (5, "gap", LOOK, dict(kl_k3=5e-4)), (6, "skipped", BAD, dict(skipped_steps=5)),
    (7, "signal", BAD, dict(frac_zero_std=0.95)), (7, "signal", GOOD, dict(frac_zero_std=0.95, accuracy=0.99))])
def test_a_check_takes_the_color_that_it_should(place, name, color, lists):
    found = checks(series(**lists))
    assert len(found) == 8 and found[place][0] == color
    healthy = dict(accuracy=[0.5 + i / 25 for i in range(10)])
    assert all(c == GOOD for c, *_ in checks(series(**healthy)))
    assert checks(series(3))[1][0] in (GOOD, LOOK, BAD) and checks([]) == []


# --- what a run records


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "cache").symlink_to(cache)
    code, out, err = run(folder, *SMALL, "--steps", "4", "--sample-every", "2", "--precision", "fp32", "--rollout-precision",
                         "e8m3", "--watch", "--out", "run")
    assert code == 0, err
    return folder / "run", out


def test_a_run_leaves_whole_groups_and_the_worst_token_of_every_step(recorded):
    folder, out = recorded
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    largest = {m["step"]: m["logp_gap_max"] for m in steps if "step" in m}
    worst = {r["step"]: abs(r["worst"]["mu"] - r["worst"]["pi"]) for r in rows if "worst" in r}
    assert worst == pytest.approx(largest, rel=1e-4) and len(worst) == 4
    groups = [r for r in rows if "answers" in r]
    assert {g["step"] for g in groups} == {1, 3, 4}                       # every second one, and the last
    for g in groups:
        assert len(g["answers"]) == 8 and abs(sum(a["advantage"] for a in g["answers"])) < 1e-5
        for a in g["answers"]:
            assert len(a["tokens"]) == len(a["mu"]) == len(a["pi"]) == len(a["entropy"]) and max(a["mu"]) <= 0
            assert "<" in "".join(a["tokens"]) or "".join(a["tokens"]).removesuffix("■" if a["stopped"] else "") == a["text"]
    gaps = {s: max(abs(m - p) for g in groups if g["step"] == s for a in g["answers"] for m, p in zip(a["mu"], a["pi"]))
            for s in (1, 3, 4)}
    assert gaps == pytest.approx({s: largest[s] for s in gaps}, rel=1e-4)   # the worst token's group is there


def test_the_report_is_there_at_the_end_and_no_longer_reloads(recorded):
    folder, out = recorded
    source = (folder / "report.html").read_text(encoding="utf-8")
    assert f"report, to open in a browser: {pathlib.Path('run') / 'report.html'}" in out
    assert '"watch": false' in source and '"watch": true' in page.build([folder], watch=True)
    assert len(source) < 3 << 20 and "http-equiv=\"Content-Security-Policy\"" in source
    assert not re.findall(r"(?:src|href)=\"(?!#)[^\"]*\"", source)          # nothing is fetched


# --- trackers


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_the_same_metrics(name, monkeypatch, tmp_path):
    seen = []
    fake = types.SimpleNamespace(init=lambda **kw: seen.append(kw), log=lambda m, step: seen.append((step, m)))
    monkeypatch.setitem(sys.modules, name, fake)
    tracker(name, tmp_path, dict(lr=1))(3, dict(accuracy=0.5))
    assert seen == [dict(project="tenbit", name=tmp_path.name, config=dict(lr=1)), (3, dict(accuracy=0.5))]


def test_a_tracker_that_is_missing_is_one_line_and_none_is_imported_otherwise(monkeypatch, tmp_path):
    for name in ("wandb", "tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    assert tracker("none", tmp_path, {})(1, {}) is None
    for name in ("wandb", "tensorboard"):
        with pytest.raises(InputError, match=f"--log-to {name} needs {name}: pip install {name}"):
            tracker(name, tmp_path, {})


# --- a real browser

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser = pytest.mark.skipif(not BROWSER, reason="no Chromium here")


def dom(tmp_path, source, script=""):
    """The page in a browser, after this script has run in it -> its document, what the console said."""
    path = tmp_path / "page.html"
    path.write_text(source.replace("</html>", f"<script>{script}</script></html>"), encoding="utf-8", errors="replace")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
               f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--dump-dom", path.as_uri()]
    p = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=120)
    return p.stdout, [line for line in p.stderr.splitlines() if "CONSOLE" in line]


SCRIPT = """
const out = {}, key = k => document.dispatchEvent(new KeyboardEvent("keydown", { key: k, bubbles: true }));
const visible = () => [...document.querySelectorAll("#answers article")].filter(a => !a.hidden).map(a => a.dataset.step);
out.plots = document.querySelectorAll("#plots canvas").length;
out.first = visible(); key("ArrowRight"); out.next = visible(); key("ArrowLeft"); out.back = visible();
key("ArrowLeft"); out.end = visible();
const token = document.querySelector(".answer i");
token.dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
out.detail = document.getElementById("detail").textContent;
const shades = () => [...document.querySelectorAll(".answer i")].map(i => i.style.getPropertyValue("--v"));
out.gap = shades();
const q = document.getElementById("quantity"); q.value = "entropy"; q.dispatchEvent(new Event("change"));
out.entropy = shades(); out.scale = document.getElementById("scale").textContent;
out.alerts = window.boomed || 0;
const pre = document.createElement("pre"); pre.id = "found"; pre.textContent = JSON.stringify(out); document.body.append(pre);
"""


def found(document):
    return json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', document, re.DOTALL)[1]))


@browser
def test_a_browser_shows_it(tmp_path):
    document, console = dom(tmp_path, page.build([a_run(tmp_path / "run")]), SCRIPT)
    out = found(document)
    assert console == [] and out["plots"] == 8
    assert (out["first"], out["next"], out["back"], out["end"]) == (["1"], ["6"], ["1"], ["1"])
    assert "log mu -0.5" in out["detail"] and "entropy 0.300" in out["detail"] and "advantage" in out["detail"]
    assert out["gap"] != out["entropy"] and "strongest: 0.30" in out["scale"]
    assert [float(x) for x in out["entropy"][:2]] == pytest.approx([1, 1 / 3], abs=1e-3)


@browser
def test_a_browser_shows_several_runs(tmp_path):
    folders = [a_run(tmp_path / str(s), config=CONFIG | dict(seed=s), grad_norm=0.2 * s) for s in (0, 1)]
    script = ("window.plots = []; const Real = uPlot;"
              "uPlot = function (...a) { const p = new Real(...a); plots.push(p); return p; };")
    look = "out.norm = plots[3].data[1]; "
    source = page.build(folders).replace("const D = JSON", script + "const D = JSON", 1)
    document, console = dom(tmp_path, source, SCRIPT.replace("const pre", look + "const pre"))
    assert console == [] and found(document)["plots"] == 8 and "mean of 2 and range" in document
    assert found(document)["norm"] == pytest.approx([0.1] * 6)            # of 0 and 0.2


@browser
def test_hostile_texts_do_nothing_in_a_browser(tmp_path):
    trap = "<script>function boom() { window.boomed = 1 }</script><style>"
    source = page.build([a_run(tmp_path / "run", texts=HOSTILE)]).replace("<style>", trap, 1)
    document, console = dom(tmp_path, source, SCRIPT)
    assert console == [] and found(document)["alerts"] == 0


@browser
def test_without_scripts_the_text_is_there(tmp_path):
    source = page.build([a_run(tmp_path / "run")])
    bare = re.sub(r"<script.*?</script>", "", source, flags=re.DOTALL)
    document, _ = dom(tmp_path, bare, "")
    said = words(document)
    assert "right answer" in said and "Largest mismatch" in said and "Curves need JavaScript" in said


def test_a_folder_that_is_not_there_is_not_made(tmp_path):
    with pytest.raises(InputError, match="no metrics.jsonl"):
        page.write([tmp_path / "nowhere"])
    assert not (tmp_path / "nowhere").exists()
