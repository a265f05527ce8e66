"use strict";
// Charts as SVG. Text from the data goes in as text alone (textContent), never as markup.
const SVG = "http://www.w3.org/2000/svg";
const SHAPES = ["M-4,-4H4V4H-4Z", "M0,-5L5,4H-5Z", "M0,-5.4L5.4,0L0,5.4L-5.4,0Z", "M0,5L5,-4H-5Z", "M-1.7,-5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5V-1.7H-1.7Z",
  "M-5,0A5,5 0 1,0 5,0A5,5 0 1,0 -5,0Z", "M5,0L-4,5V-5Z", "M-5,0L4,5V-5Z", "M-5,-2H5V2H-5Z", "M-2,-5H2V5H-2Z"];
const DASHES = ["", "7 3", "2 3", "9 3 2 3"];

function make(name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes || {})) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function colour(index, way) { return `${way}${index % 10}`; }

// Round ticks that cover low to high: about `count` of them.
function ticks(low, high, count) {
  const raw = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(n => n * power).find(n => n >= raw * 0.999);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) found.push(Number((n * step).toPrecision(12)));
  return found;
}

// The range of an axis that holds all values with some room; a percentage stays within 0 and 100.
function extent(values, percent) {
  let low = Math.min(...values), high = Math.max(...values);
  if (percent) { low = Math.max(0, low); high = Math.min(100, high); }
  const room = Math.max((high - low) * 0.06, high === low ? Math.abs(high) * 0.05 || 1 : 0);
  low -= room; high += room;
  return percent ? [Math.max(0, low), Math.min(100, high)] : [low, high];
}

class Chart {
  // box: the element to fill; label: what a screen reader says; the marks can be reached by pointer and by arrow keys
  constructor(box, label, width, height, margin) {
    this.box = box; this.width = width; this.height = height; this.margin = margin; this.marks = []; this.at = -1;
    this.svg = make("svg", { viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "application",
      "aria-roledescription": "chart", "aria-label": `${label} Arrow keys go through the values.` });
    this.said = document.createElement("p");
    this.said.className = "unseen"; this.said.setAttribute("aria-live", "polite");
    this.front = make("g"); this.ring = make("circle", { class: "focus", r: 8, visibility: "hidden" });
    box.replaceChildren(this.svg, this.said);
  }
  get right() { return this.width - this.margin.right; }
  get bottom() { return this.height - this.margin.bottom; }
  add(name, attributes, text) { const node = make(name, attributes, text); this.svg.append(node); return node; }
  yAxis(range, label) {
    this.y = value => this.bottom - (value - range[0]) / (range[1] - range[0]) * (this.bottom - this.margin.top);
    for (const tick of ticks(range[0], range[1], Math.max(3, Math.round((this.bottom - this.margin.top) / 50)))) {
      this.add("line", { class: "grid", x1: this.margin.left, x2: this.right, y1: this.y(tick), y2: this.y(tick) });
      this.add("text", { class: "soft", x: this.margin.left - 6, y: this.y(tick) + 4, "text-anchor": "end" }, String(tick));
    }
    this.add("text", { class: "soft", x: 2, y: 12 }, label);
  }
  xLabels(places, label) {
    this.add("line", { class: "axis", x1: this.margin.left, x2: this.right, y1: this.bottom, y2: this.bottom });
    for (const [x, text] of places) this.add("text", { x, y: this.bottom + 17, "text-anchor": "middle" }, text);
    this.add("text", { class: "soft", x: (this.margin.left + this.right) / 2, y: this.height - 4, "text-anchor": "middle" }, label);
  }
  whisker(x, low, high, cap, way) {
    const a = this.y(high), b = this.y(low);
    this.add("path", { class: `whisker ${way || ""}`, d: `M${x - cap},${a}H${x + cap}M${x},${a}V${b}M${x - cap},${b}H${x + cap}` });
  }
  // A value that can be pointed at: where it is drawn, what is said of it, and its mean for whoever reads the page.
  mark(node, x, y, lines, mean) {
    node.classList.add("mark"); node.dataset.mean = mean; node.dataset.says = lines.join("; ");
    this.marks.push({ x, y, lines });
  }
  finish() {
    this.svg.append(this.ring);
    this.svg.addEventListener("pointermove", event => this.show(this.nearest(event)));
    this.svg.addEventListener("pointerdown", event => this.show(this.nearest(event)));
    this.svg.addEventListener("pointerleave", () => this.hide());
    this.svg.addEventListener("blur", () => this.hide());
    this.svg.addEventListener("keydown", event => {
      const last = this.marks.length - 1;
      const to = { ArrowRight: this.at + 1, ArrowDown: this.at + 1, ArrowLeft: this.at - 1, ArrowUp: this.at - 1, Home: 0, End: last }[event.key];
      if (event.key === "Escape") this.hide();
      if (to === undefined || last < 0) return;
      event.preventDefault();
      this.show(Math.min(last, Math.max(0, to)));
      this.said.textContent = this.marks[this.at].lines.join(", ");
    });
  }
  nearest(event) {
    const frame = this.svg.getBoundingClientRect(), scale = this.width / frame.width;
    const x = (event.clientX - frame.left) * scale, y = (event.clientY - frame.top) * scale;
    let best = -1, least = 45 * 45;
    this.marks.forEach((mark, index) => {
      const d = (mark.x - x) ** 2 + (mark.y - y) ** 2 * (this.tall ? 0.02 : 1);
      if (d < least) { least = d; best = index; }
    });
    return best;
  }
  show(index) {
    if (index < 0) return this.hide();
    this.at = index;
    const mark = this.marks[index], frame = this.svg.getBoundingClientRect(), scale = frame.width / this.width;
    this.ring.setAttribute("cx", mark.x); this.ring.setAttribute("cy", mark.y); this.ring.setAttribute("visibility", "visible");
    const tip = document.getElementById("tip");
    tip.textContent = mark.lines.join("\n"); tip.hidden = false;
    const wide = document.documentElement.clientWidth, x = frame.left + mark.x * scale, y = frame.top + mark.y * scale;
    tip.style.left = `${window.scrollX + Math.max(6, Math.min(x + 12, wide - tip.offsetWidth - 6))}px`;
    const above = y - tip.offsetHeight - 14;
    tip.style.top = `${window.scrollY + (above < 4 ? y + 16 : above)}px`;
  }
  hide() {
    this.at = -1;
    this.ring.setAttribute("visibility", "hidden");
    document.getElementById("tip").hidden = true;
  }
}

// What tells models apart: colour and shape a pre-training, dashes or hatching a network, hollow and paler another source.
function shape(look, x, y) {
  return make("path", { d: SHAPES[(look.p + 3 * Math.floor(look.p / 10)) % SHAPES.length], transform: `translate(${x},${y})`,
    class: `${colour(look.p, "s")} ${look.theirs ? "hollow theirs" : colour(look.p, "f")}`, "stroke-width": 1.5 });
}
function line(look, points) {
  return make("polyline", { points: points.map(p => p.join(",")).join(" "), class: `series ${colour(look.p, "s")}${look.theirs ? " theirs" : ""}`,
    "stroke-dasharray": DASHES[look.n % DASHES.length] });
}
function hatching(svg) {
  const definitions = make("defs");
  const stripes = make("pattern", { id: "hatch1", width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" });
  stripes.append(make("line", { class: "hatch", x1: 0, x2: 0, y1: 0, y2: 5 }));
  const dots = make("pattern", { id: "hatch2", width: 5, height: 5, patternUnits: "userSpaceOnUse" });
  dots.append(make("circle", { class: "dots", cx: 2.5, cy: 2.5, r: 1.3 }));
  const level = make("pattern", { id: "hatch3", width: 5, height: 5, patternUnits: "userSpaceOnUse" });
  level.append(make("line", { class: "hatch", x1: 0, x2: 5, y1: 2, y2: 2 }));
  definitions.append(stripes, dots, level);
  svg.append(definitions);
}
function bar(chart, look, x, y, width, height) {
  const group = make("g", { class: look.theirs ? "theirs" : "" });
  const plain = { x, y, width: Math.max(0, width), height: Math.max(0, height) };
  group.append(make("rect", { ...plain, class: colour(look.p, "f"), "fill-opacity": look.theirs ? 0.45 : 1 }));
  if (look.n % 4) group.append(make("rect", { ...plain, fill: `url(#hatch${look.n % 4})` }));
  chart.svg.append(group);
  return group;
}
