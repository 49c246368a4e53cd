"""README.md, RESULTS.md and docs/: what they name is there, and the worked example adds up."""
import dataclasses
import math
import re

import pytest
import torch
from test_structure import FILES, ROOT, file_of

from algorithms import Tokens, centred, clipped, constant
from data.tasks import make_task
from train_rl import Config

FOUND = [ROOT / "README.md", ROOT / "RESULTS.md", *(p for f in ("docs", "workshop") for p in sorted((ROOT / f).rglob("*.md")))]
PAGES = {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in FOUND if "mine" not in p.parts}
OWN = "experiments", "data", "run", "tests", "report"                   # whose modules are commands


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 180


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page):
    """Links to files and to headings, modules that are run, flags, and files in backticks."""
    text, folder = PAGES[page], (ROOT / page).parent
    links = re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", text)
    assert not [file for file, _ in links if "://" not in file and not (folder / file).exists()]
    headings = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.M)}
    assert not [anchor for file, anchor in links if anchor and not file and anchor not in headings]
    own = {m for m in re.findall(r"python -m ([\w.]+)", text) if m.partition(".")[0] in OWN}
    own -= {f[:-3].replace("/", ".") for f in re.findall(r"^ +# (\w+/\w+\.py):", text, re.M)}      # yours to write
    assert not [m for m in own if not file_of(m) and not (ROOT / f"{m.replace('.', '/')}.py").exists()]
    source = "".join(path.read_text(encoding="utf-8") for path in FILES.values())
    settings = {f.name.replace("_", "-") for f in dataclasses.fields(Config)}
    foreign = {"--index-url", "--no-index", "--find-links", "--cert", "--help"}          # pip's, argparse's
    flags = {f for f in re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text)} - foreign
    assert not [f for f in flags if f[2:].removeprefix("no-") not in settings and f'"{f}"' not in source]
    named = re.findall(r"`((?:operators|run|data|hf|experiments|tests|docs|report|workshop)/[\w./]*)`", text)
    assert not [n for n in named if not (ROOT / n).exists() and not n.startswith(("data/fetched", "workshop/mine"))]


def test_the_step_in_numbers_adds_up():
    """README's example of one step, computed by the program's own functions."""
    said = PAGES["README.md"]
    advantage = centred(torch.tensor([[1.0, 1.0, 0.0, 1.0]]))[0]
    assert advantage.tolist() == [0.25, 0.25, -0.75, 0.25] and "1 - 0.75 = +0.25" in said and "| -0.75 |" in said

    def token(pi):
        logp = torch.tensor([[math.log(pi)]], requires_grad=True)
        mu, mask = torch.tensor([[math.log(0.2)]]), torch.ones(1, 1, dtype=torch.bool)
        t = Tokens(mask, logp, torch.zeros(1, 1), mu, mu, advantage[2:3])
        loss = clipped(t).sum()
        loss.backward()
        return [x.item() for x in (mu - logp, (logp - mu).exp(), loss, logp.grad)]
    room = make_task("addition", Config().digits, 0.0).answer_length
    weight, units = constant(torch.ones(4, room, dtype=torch.bool), room)
    gap, ratio, loss, grad = token(0.201)
    assert f"of log mu - log pi = {gap:.3f}" in said and f"So r = {ratio:.3f}" in said
    assert f"-(-0.75) x {ratio:.3f} = {loss:.3f}" in said and grad > 0        # going down the gradient lowers log pi
    assert f"4 answers x {room} tokens = {loss * float(weight[0]) / float(units.sum()):.4f}" in said
    _, ratio, _, grad = token(0.150)
    assert f"r is {ratio:.2f}" in said and grad == 0
