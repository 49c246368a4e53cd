"use strict";
const D = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id), all = (q, at = document) => [...at.querySelectorAll(q)];
const shown = (x, digits = 3) => x === null ? "not finite" : x === 0 ? "0" : Math.abs(x) < 1e-3 ? x.toExponential(1) : x.toPrecision(digits);

// ---- curves: one panel a quantity, their cursors tied together
const PANELS = [["accuracy", ["accuracy"], false], ["mismatch, nats", ["logp_gap_mean", "logp_gap_max", "kl_k3"], true],
  ["entropy, nats", ["entropy"], false], ["norm of the gradient", ["grad_norm"], true], ["length, tokens", ["length"], false],
  ["groups that agree", ["frac_zero_std"], false], ["loss", ["loss"], false], ["seconds a step", ["t_rollout", "t_train"], false]];

const NAMES = { logp_gap_mean: "mean gap", logp_gap_max: "largest gap", kl_k3: "KL a token", t_rollout: "rollout, seconds", t_train: "training" };

function curves() {
  const css = getComputedStyle(document.documentElement), ink = css.getPropertyValue("--ink").trim();
  const colors = ["--one", "--two", "--three"].map(c => css.getPropertyValue(c).trim());
  const several = D.runs.length > 1, grid = { stroke: css.getPropertyValue("--line").trim(), width: .5 };
  const steps = [...new Set(D.runs.flatMap(r => r.steps))].sort((a, b) => a - b);
  const labels = [...new Set(D.runs.map(r => r.label))];
  const line = (run, key, log) => { const at = new Map(run.steps.map((s, i) => [s, run.curves[key][i]]));
    return steps.map(s => { const y = at.get(s); return y === undefined || y === null || log && y <= 0 ? null : y; }); };
  for (const [title, keys, log] of PANELS) {
    const series = [{ label: "step" }], data = [steps], bands = [];
    const add = (label, y, more) => { series.push({ label, value: (u, v) => v === null || v === undefined ? "–" : shown(v), ...more }); data.push(y); };
    const style = i => ({ stroke: colors[i % 3], width: 1.6, dash: [[], [6, 3], [2, 2]][(several ? Math.floor(i / 3) : i) % 3] });
    if (!several) keys.forEach((k, i) => add(NAMES[k] || title, line(D.runs[0], k, log), style(i)));
    else labels.forEach((label, i) => {
      const ys = D.runs.filter(r => r.label === label).map(r => line(r, keys[0], false));
      const over = f => steps.map((_, t) => { const v = ys.map(y => y[t]).filter(y => y !== null); const x = v.length ? f(v) : null;
        return log && x <= 0 ? null : x; });
      add(ys.length > 1 ? `${label}, mean of ${ys.length} and range` : label, over(v => v.reduce((a, b) => a + b) / v.length), style(i));
      if (ys.length > 1) { const n = series.length; const edge = { stroke: "transparent", points: { show: false } };
        add("highest", over(v => Math.max(...v)), edge); add("lowest", over(v => Math.min(...v)), edge);
        bands.push({ series: [n, n + 1], fill: colors[i % 3] + "30" }); }
    });
    if (title === "accuracy" && steps.length > 1) {
      add("the sanity test's mark", steps.map(() => 0.95), { stroke: grid.stroke, points: { show: false } });
      const ends = several ? [null] : D.runs[0].heldout, last = steps.length - 1;
      if (ends[0] !== null) add("held-out, before and after", steps.map((_, i) => i === 0 ? ends[0] : i === last ? ends[1] : null),
        { ...style(1), dash: [2, 4], spanGaps: true, points: { show: true, size: 8 } });
    }
    if (data.slice(1).every(y => y.every(v => v === null))) continue;
    const axis = { stroke: ink, grid, ticks: grid };
    new uPlot({ title: several ? NAMES[keys[0]] || title : title, width: 345, height: 210, series, bands, cursor: { sync: { key: "steps" } },
      scales: { x: { time: false }, y: log ? { distr: 3 } : title === "accuracy" ? { range: [0, 1] } : {} },
      axes: [{ ...axis, label: "step", labelSize: 16, size: 34 }, { ...axis, size: 66, ...(log ? { grid: { show: false }, ticks: { show: false },
        filter: (u, v) => { const tens = v.filter(x => x && Math.abs(Math.log10(x) % 1) < 1e-9); return v.map(x => tens.includes(x) &&
          Math.round(Math.log10(x)) % Math.ceil(tens.length / 5) === 0 ? x : null); } } : {}), values: (u, v) => v.map(x => x === null ? "" : Math.abs(x) < 1e-3 && x ? x.toExponential() : String(+x.toPrecision(4))) }] }, data, $("plots"));
  }
}

// ---- answers: a step at a time, tokens colored by a quantity on one scale for all steps
const groups = all(".group"), articles = all("#answers article");
const QUANTITIES = {
  gap: [(a, t) => Math.abs(a.mu[t] - a.pi[t]), true], entropy: [(a, t) => a.entropy[t], false],
  improbable: [(a, t) => 1 - Math.exp(a.pi[t]), false], ratio: [(a, t) => Math.abs(Math.expm1(a.pi[t] - a.mu[t])), true],
  advantage: [a => Math.abs(a.advantage), false] };

function paint(name) {
  const [value, log] = QUANTITIES[name];
  let top = 0;
  for (const g of D.groups) for (const a of g) for (let t = 0; t < a.mu.length; t++) top = Math.max(top, value(a, t));
  groups.forEach((el, g) => all(".answer", el).forEach(p => {
    const a = D.groups[g][p.dataset.a];
    [...p.children].forEach((i, t) => { const x = value(a, t) / (top || 1);
      i.style.setProperty("--v", x <= 0 ? 0 : log ? Math.max(0, 1 + Math.log10(x) / 5) : x); });
  }));
  $("scale").textContent = top ? `no color: ${log ? shown(top / 1e5, 2) + " or less" : 0}; strongest: ${shown(top, 2)}` : "all 0";
}

function detail(i) {
  const p = i.parentElement, t = [...p.children].indexOf(i), a = D.groups[groups.indexOf(p.closest(".group"))][p.dataset.a];
  all("i.on").forEach(other => other.classList.remove("on"));
  i.classList.add("on");
  $("detail").textContent = `“${i.textContent}”  log mu ${shown(a.mu[t], 6)}  log pi ${shown(a.pi[t], 6)}  difference ${shown(a.mu[t] - a.pi[t], 2)}` +
    `  ratio ${shown(Math.exp(a.pi[t] - a.mu[t]), 6)}  probability ${shown(Math.exp(a.pi[t]))}  entropy ${shown(a.entropy[t])}  advantage ${shown(a.advantage)}`;
}

let place = 0;
function show(n) {
  place = Math.max(0, Math.min(articles.length - 1, n));
  articles.forEach((el, i) => { el.hidden = i !== place; });
  $("slider").value = place;
  $("where").textContent = `step ${articles[place].dataset.step}, ${place + 1} of ${articles.length} recorded`;
  try { history.replaceState(null, "", "#step-" + articles[place].dataset.step); } catch (e) { /* a page in a frame */ }
}

function answers() {
  $("controls").hidden = false;
  $("slider").max = articles.length - 1;
  $("slider").oninput = e => show(+e.target.value);
  $("back").onclick = () => show(place - 1);
  $("forth").onclick = () => show(place + 1);
  $("quantity").onchange = e => paint(e.target.value);
  $("answers").onmouseover = $("answers").onclick = e => { if (e.target.matches(".answer i")) detail(e.target); };
  document.addEventListener("keydown", e => {
    if (e.target.matches?.("input, select, textarea") || e.ctrlKey || e.metaKey || e.altKey) return;
    if (e.key === "ArrowLeft") show(place - 1);
    if (e.key === "ArrowRight") show(place + 1);
  });
  const asked = articles.findIndex(el => "#step-" + el.dataset.step === location.hash);
  show(asked >= 0 ? asked : 0);
  paint("gap");
}

curves();
if (articles.length) answers();
$("copy").hidden = false;
$("copy").onclick = () => {
  const text = all("#numbers-table tr").map(r => [...r.children].map(c => c.textContent).join("\t")).join("\n");
  navigator.clipboard ? navigator.clipboard.writeText(text) : getSelection().selectAllChildren($("numbers-table"));
};
if (D.watch) setTimeout(() => location.reload(), 5000);
