const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const [T, M, S, P, N, FROM, MEAN, LOW, HIGH, KIND, SEEDS, BEST, STEPS] = Array(13).keys();
const KINDS = { seeds: "95 % t-interval over seeds", bootstrap: "95 % bootstrap of one seed's validation set", "": "no interval: one seed" };
const hidden = { p: new Set(), n: new Set(), s: new Set() };
const state = { target: 0, metric: 0, shot: 0, curve: "" };
// a name that would run out of the chart; its whole stands in the tip and in the table
const shortened = (text, most) => text.length > most ? `${text.slice(0, Math.floor(most) - 1)}…` : text;
const shotText = shot => shot === 0 ? "all" : String(shot);
const shotWords = shot => shot === 0 ? "all training images" : `${shot} training image${shot === 1 ? "" : "s"} per class`;
const byShot = (a, b) => (a || Infinity) - (b || Infinity);
const lower = () => data.metrics[state.metric].lower;
const metricTitle = () => data.metrics[state.metric].title;
const number = value => value.toFixed(lower() ? 4 : 2);

function modelTitle(model) {
  const source = data.sources[model.s];
  return [data.networks[model.n], data.pretrainings[model.p]].filter(Boolean).join(", ") + (source ? ` (${source})` : "");
}
// the largest network, which stands last, has whole lines and plain bars
const wayOf = n => data.networks.length - 1 - n;
const look = model => ({ p: model.p, n: wayOf(model.n), theirs: data.sources[model.s] !== "" });
const visible = (p, n, s) => !hidden.p.has(p) && !hidden.n.has(n) && !hidden.s.has(s);
const rowsOf = all => data.rows.filter(r => r[T] === state.target && r[M] === state.metric && (all || visible(r[P], r[N], r[FROM])));
const shotsOf = rows => [...new Set(rows.map(r => r[S]))].sort(byShot);

function modelsOf(rows) {
  const found = new Map();
  for (const r of rows) found.set(`${r[FROM]} ${r[N]} ${r[P]}`, { p: r[P], n: r[N], s: r[FROM] });
  return [...found.values()].sort((a, b) => a.s - b.s || a.n - b.n || a.p - b.p);
}
const rowOf = (rows, model, shot) => rows.find(r => r[P] === model.p && r[N] === model.n && r[FROM] === model.s && r[S] === shot);

function says(row) {
  const lines = [modelTitle({ p: row[P], n: row[N], s: row[FROM] }), shotWords(row[S]), `${metricTitle()}: ${number(row[MEAN])}`];
  if (row[LOW] !== null) lines.push(`${number(row[LOW])} to ${number(row[HIGH])} (${KINDS[row[KIND]]})`); else lines.push(KINDS[""]);
  lines.push(`seeds: ${row[SEEDS]}`);
  if (row[STEPS]) lines.push(`steps: ${row[STEPS]}`);
  if (row[BEST]) lines.push("★ best: clear of all other intervals");
  return lines;
}
const spread = rows => rows.flatMap(r => r[LOW] === null ? [r[MEAN]] : [r[MEAN], r[LOW], r[HIGH]]);
const widthOf = box => printing ? 660 : Math.max(280, Math.floor(box.clientWidth));
const nothing = (box, text) => { const p = document.createElement("p"); p.className = "empty"; p.textContent = text; box.replaceChildren(p); };
const label = what => `${what}: ${metricTitle()} on ${data.targets[state.target].title}.`;
let printing = false;

function starAt(chart, x, y) { chart.add("text", { class: "star", x, y }, "★"); }

function drawBars(rows) {
  const box = $("bars"), width = widthOf(box), shots = shotsOf(rows), models = modelsOf(rows);
  if (!rows.length) return nothing(box, "Nothing is selected.");
  if ((width - 50) / (shots.length * (models.length + 0.8)) < 7) return drawLyingBars(box, width, rows, models);
  const chart = new Chart(box, label("Bars by number of training images"), width, 340, { left: 44, right: 6, top: 26, bottom: 40 });
  chart.tall = true; hatching(chart.svg);
  chart.yAxis(lower() ? extent([0, ...spread(rows)], false).map((v, i) => i ? v : 0) : [0, Math.min(100, Math.max(...spread(rows)) * 1.04) || 1], metricTitle());
  const group = (chart.right - chart.margin.left) / shots.length, wide = Math.min(70, group / (models.length + 0.8));
  const first = (group - wide * models.length) / 2;
  shots.forEach((shot, place) => models.forEach((model, index) => {
    const row = rowOf(rows, model, shot);
    if (!row) return;
    const x = chart.margin.left + place * group + first + index * wide, y = chart.y(row[MEAN]);
    const node = bar(chart, look(model), x, y, Math.max(1, wide - 1), chart.bottom - y);
    if (row[LOW] !== null) chart.whisker(x + wide / 2 - 0.5, Math.max(row[LOW], 0), Math.min(row[HIGH], lower() ? Infinity : 100), Math.min(4, wide / 3));
    if (row[BEST]) starAt(chart, x + wide / 2, chart.y(Math.max(row[HIGH] || 0, row[MEAN])) - 5);
    chart.mark(node, x + wide / 2, y, says(row), row[MEAN]);
  }));
  chart.xLabels(shots.map((shot, place) => [chart.margin.left + (place + 0.5) * group, shotText(shot)]), "training images per class");
  chart.finish();
}

// On a narrow screen: the bars of one number of training images, below one another, each under its name.
function drawLyingBars(box, width, rows, models) {
  const mine = models.map(model => [model, rowOf(rows, model, state.shot)]).filter(([, row]) => row);
  if (!mine.length) return nothing(box, `Nothing selected has ${shotWords(state.shot)}.`);
  const step = 34, height = 46 + mine.length * step, left = 8, right = width - 62;
  const chart = new Chart(box, label(`Bars, ${shotWords(state.shot)}`), width, height, { left, right: 62, top: 20, bottom: 6 });
  hatching(chart.svg);
  const top = lower() ? Math.max(...spread(mine.map(m => m[1]))) || 1 : 100, x = value => left + Math.min(Math.max(value, 0), top) / top * (right - left);
  chart.add("text", { class: "soft", x: 2, y: 13 }, `${metricTitle()}, ${shotWords(state.shot)}`);
  mine.forEach(([model, row], place) => {
    const y = 28 + place * step;
    chart.add("text", { x: left, y: y + 8 }, shortened(modelTitle(model), width / 7.4));
    const node = bar(chart, look(model), left, y + 13, x(row[MEAN]) - left, 12);
    if (row[LOW] !== null) chart.add("path", { class: "whisker", d: `M${x(row[LOW])},${y + 15}V${y + 23}M${x(row[LOW])},${y + 19}H${x(row[HIGH])}M${x(row[HIGH])},${y + 15}V${y + 23}` });
    chart.add("text", { x: right + 8, y: y + 24 }, number(row[MEAN]) + (row[BEST] ? " ★" : ""));
    chart.mark(node, x(row[MEAN]), y + 19, says(row), row[MEAN]);
  });
  chart.add("line", { class: "axis", x1: left, x2: left, y1: 24, y2: height - 6 });
  chart.finish();
}

// Lines over a few named places: numbers of training images, or networks.
function drawLines(box, what, rows, places, lines, xTitle) {
  const width = widthOf(box), chart = new Chart(box, label(what), width, 340, { left: 44, right: 10, top: 26, bottom: 40 });
  chart.yAxis(extent(spread(rows), !lower()), metricTitle());
  const step = (chart.right - chart.margin.left) / places.length;
  lines.forEach((item, index) => {
    const shift = lines.length > 1 ? (index / (lines.length - 1) - 0.5) * Math.min(0.5 * step, 9 * lines.length) : 0;
    const points = item.rows.map(([place, row]) => [chart.margin.left + (place + 0.5) * step + shift, chart.y(row[MEAN]), row]);
    chart.add("g").append(line(item.look, points.map(p => [p[0], p[1]])));
    for (const [x, y, row] of points) {
      if (row[LOW] !== null) chart.whisker(x, Math.max(row[LOW], lower() ? -Infinity : 0), Math.min(row[HIGH], lower() ? Infinity : 100), 3, colour(item.look.p, "s"));
      const node = shape(item.look, x, y);
      chart.svg.append(node);
      if (row[BEST]) starAt(chart, x, chart.y(Math.min(row[HIGH], lower() ? Infinity : 100)) - 4);
      chart.mark(node, x, y, says(row), row[MEAN]);
    }
  });
  chart.xLabels(places.map((place, index) => [chart.margin.left + (index + 0.5) * step, place]), xTitle);
  chart.finish();
}

function drawFew(rows) {
  if (!rows.length) return nothing($("few"), "Nothing is selected.");
  const shots = shotsOf(rows);
  const lines = modelsOf(rows).map(model => ({ look: look(model),
    rows: shots.map((shot, place) => [place, rowOf(rows, model, shot)]).filter(pair => pair[1]) }));
  drawLines($("few"), "Few-shot", rows, shots.map(shotText), lines, "training images per class");
}

function drawSize(rows) {
  const mine = rows.filter(r => r[S] === state.shot && data.networks[r[N]]), sizes = [...new Set(mine.map(r => r[N]))].sort((a, b) => a - b);
  if (sizes.length < 2) return nothing($("size"), `There are not two networks with ${shotWords(state.shot)}.`);
  const keys = [...new Set(mine.map(r => `${r[FROM]} ${r[P]}`))];
  const lines = keys.map(key => {
    const own = mine.filter(r => `${r[FROM]} ${r[P]}` === key).sort((a, b) => a[N] - b[N]);
    return { look: { p: own[0][P], n: 0, theirs: data.sources[own[0][FROM]] !== "" }, rows: own.map(r => [sizes.indexOf(r[N]), r]) };
  });
  drawLines($("size"), `By network size, ${shotWords(state.shot)}`, mine, sizes.map(n => data.networks[n]), lines, `network (${shotWords(state.shot)})`);
}

function drawCurves() {
  const box = $("curves"), own = data.curves.filter(c => c.target === state.target && !hidden.p.has(c.p) && !hidden.n.has(c.n) && !hidden.s.has(0));
  const shown = own.filter(c => c.shot === state.shot && c.metric === state.curve);
  $("curve-metric").parentElement.hidden = !data.curves.length;
  if (!data.curves.length) return nothing(box, "There are no events: curves need the runs' folders.");
  if (!shown.length) return nothing(box, `Nothing selected has curves with ${shotWords(state.shot)}.`);
  const about = data.curveMetrics[state.curve], width = widthOf(box);
  const chart = new Chart(box, `Learning curves: ${about.title}, ${shotWords(state.shot)}.`, width, 340, { left: 44, right: 14, top: 26, bottom: 40 });
  chart.yAxis(extent(shown.flatMap(c => [...c.low, ...c.high]), !about.lower), about.title);
  const last = Math.max(...shown.flatMap(c => c.steps)), x = step => chart.margin.left + step / (last || 1) * (chart.right - chart.margin.left);
  for (const c of shown) {
    const model = { p: c.p, n: c.n, s: 0 }, ends = (values, way) => c.steps.map((step, i) => `${x(step)},${chart.y(values[i])}`)[way]();
    if (c.seeds > 1) chart.add("polygon", { class: `band ${colour(c.p, "f")}`, points: [...ends(c.high, "slice"), ...ends(c.low, "reverse")].join(" ") });
    chart.svg.append(line(look(model), c.steps.map((step, i) => [x(step), chart.y(c.mean[i])])));
    c.steps.forEach((step, i) => {
      const node = c.steps.length > 40 ? make("circle", { r: 1.5, cx: x(step), cy: chart.y(c.mean[i]), class: colour(c.p, "f") }) : shape(look(model), x(step), chart.y(c.mean[i]));
      chart.svg.append(node);
      const digits = about.lower ? 4 : 2, range = c.seeds > 1 ? [`${c.low[i].toFixed(digits)} to ${c.high[i].toFixed(digits)} over ${c.seeds} seeds`] : ["one seed"];
      chart.mark(node, x(step), chart.y(c.mean[i]), [modelTitle(model), `step ${step}, ${shotWords(c.shot)}`, `${about.title}: ${c.mean[i].toFixed(digits)}`, ...range], c.mean[i]);
    });
  }
  chart.xLabels(ticks(0, last, width < 500 ? 4 : 8).filter(Number.isInteger).map(step => [x(step), String(step)]), `fine-tuning step (${shotWords(state.shot)})`);
  chart.finish();
}

function cell(name, text, attributes) {
  const node = document.createElement(name);
  node.textContent = text;
  for (const [key, value] of Object.entries(attributes || {})) node.setAttribute(key, value);
  return node;
}

function drawTable(rows) {
  const shots = shotsOf(rows), table = $("values"), head = document.createElement("tr"), body = document.createElement("tbody");
  head.append(cell("th", "model", { scope: "col", class: "text" }), ...shots.map(shot => cell("th", shotText(shot), { scope: "col" })));
  for (const model of modelsOf(rows)) {
    const tr = document.createElement("tr");
    tr.append(cell("th", modelTitle(model), { scope: "row" }));
    for (const shot of shots) {
      const row = rowOf(rows, model, shot), td = cell("td", row ? number(row[MEAN]) + (row[BEST] ? " ★" : "") : "–", row && row[BEST] ? { class: "best" } : {});
      if (row) td.dataset.mean = row[MEAN];
      if (row && row[LOW] !== null) {
        const ends = row[KIND] === "seeds" ? `± ${number((row[HIGH] - row[LOW]) / 2)}` : `${number(row[LOW])}–${number(row[HIGH])}†`;
        td.append(cell("span", ends, { class: "interval" }));
      }
      tr.append(td);
    }
    body.append(tr);
  }
  const thead = document.createElement("thead");
  thead.append(head);
  table.replaceChildren(cell("caption", `${data.targets[state.target].title}, ${metricTitle()}, by training images per class`), thead, body);
  const kinds = [...new Set(rows.map(r => r[KIND]))].map(kind => (kind === "bootstrap" ? "† " : kind ? "± " : "") + KINDS[kind]);
  $("values-note").textContent = `${kinds.join("; ")}. ★: its interval lies clear of those of all others in its column, hidden ones included; none is marked where intervals overlap.`;
}

function draw() {
  const rows = rowsOf(false);
  drawBars(rows); drawFew(rows); drawSize(rows); drawCurves(); drawTable(rows);
}

function fill(select, options, chosen) {
  select.replaceChildren(...options.map(([value, text]) => cell("option", text, { value })));
  select.value = String(chosen);
}

// What there is to choose follows what was chosen before: metrics of the target, numbers of images of both.
function fillSelects() {
  const metrics = [...new Set(data.rows.filter(r => r[T] === state.target).map(r => r[M]))];
  if (!metrics.includes(state.metric)) state.metric = metrics.includes(data.targets[state.target].main) ? data.targets[state.target].main : metrics[0];
  fill($("metric"), metrics.map(m => [m, data.metrics[m].title]), state.metric);
  const shots = shotsOf(rowsOf(true));
  if (!shots.includes(state.shot)) state.shot = shots[shots.length - 1];
  fill($("shot"), shots.map(shot => [shot, shot === 0 ? "all" : `${shot} per class`]), state.shot);
  const curves = [...new Set(data.curves.filter(c => c.target === state.target).map(c => c.metric))];
  if (!curves.includes(state.curve)) state.curve = curves[0] || "";
  fill($("curve-metric"), curves.map(c => [c, data.curveMetrics[c].title]), state.curve);
}

function chips(fieldset, names, set, swatch) {
  names.forEach((name, index) => {
    const box = document.createElement("input"), chip = document.createElement("label");
    box.type = "checkbox"; box.checked = true; box.value = index;
    box.addEventListener("change", () => { if (box.checked) set.delete(index); else set.add(index); draw(); });
    chip.className = "chip";
    const icon = swatch && swatch(index);
    chip.append(box, ...(icon ? [icon] : []), document.createTextNode(name));
    fieldset.append(chip);
  });
  fieldset.hidden = names.length < 2;
}

function icon(width, ...parts) {
  const svg = make("svg", { width, height: 14, viewBox: `0 0 ${width} 14`, "aria-hidden": "true" });
  svg.append(...parts);
  return svg;
}

function start() {
  fill($("target"), data.targets.map((t, i) => [i, t.title]), 0);
  state.metric = data.targets[0].main;
  $("target").addEventListener("change", event => { state.target = Number(event.target.value); state.metric = data.targets[state.target].main; fillSelects(); draw(); });
  $("metric").addEventListener("change", event => { state.metric = Number(event.target.value); fillSelects(); draw(); });
  $("shot").addEventListener("change", event => { state.shot = Number(event.target.value); draw(); });
  $("curve-metric").addEventListener("change", event => { state.curve = event.target.value; draw(); });
  chips($("pretrainings"), data.pretrainings, hidden.p, p => icon(14, shape({ p }, 7, 7)));
    chips($("networks"), data.networks.map(n => n || "not said"), hidden.n, index => {
    const n = wayOf(index);
    const square = make("g");
    square.append(make("rect", { x: 30, y: 1, width: 12, height: 12, class: "f9" }));
    if (n % 4) square.append(make("rect", { x: 30, y: 1, width: 12, height: 12, fill: `url(#hatch${n % 4})` }));
    return icon(44, line({ p: 9, n }, [[0, 7], [26, 7]]), square);
  });
  chips($("sources"), data.sources.map(s => s || "here"), hidden.s);
  $("theme").addEventListener("change", event => {
    if (event.target.value) document.documentElement.dataset.theme = event.target.value; else delete document.documentElement.dataset.theme;
  });
  $("filters").addEventListener("submit", event => event.preventDefault());
  $("filters").hidden = $("charts").hidden = false;
  fillSelects();
  draw();
  let width = window.innerWidth;
  window.addEventListener("resize", () => { if (window.innerWidth !== width) { width = window.innerWidth; draw(); } });
  window.addEventListener("beforeprint", () => { printing = true; draw(); });
  window.addEventListener("afterprint", () => { printing = false; draw(); });
}
start();
