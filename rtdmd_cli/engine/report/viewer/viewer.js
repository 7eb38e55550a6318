"use strict";
// The page of `rtdmd runs view`. Names, prompts and messages are set as text, never as markup.

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const SPARSE = 20; // a line of fewer points is drawn point by point, without smoothing
const COLOURS = 5, W = 420, H = 220, LEFT = 52, RIGHT = 8, TOP = 8, BOTTOM = 26;
const POLL = 10000; // ms between two looks at the runs
const REFERENCES = { "teacher": "teacher", "few-step-teacher": "teacher in few steps", "start": "stage 1" };

const state = { runs: [], shown: new Set(), metrics: new Map(), sheets: new Map(), chosen: null, open: null, first: true };

function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  Object.assign(made, properties);
  made.append(...children);
  return made;
}

function drawn(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

async function get(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer.json();
}

function number(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(3)));
}

function duration(seconds) {
  if (seconds === null) return "";
  if (seconds < 60) return `${Math.round(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
}

// ---- the list ----

const place = (run) => state.runs.filter((each) => state.shown.has(each.id)).findIndex((each) => each.id === run.id);

async function look() {
  try {
    state.runs = await get("/api/runs");
  } catch (error) {
    $("news").textContent = "The server does not answer: is `rtdmd runs view` still running?";
    return;
  }
  if (state.first) {
    state.runs.slice(0, 2).forEach((run) => state.shown.add(run.id));
    state.first = false;
    if (!state.runs.length) charts();
  }
  list();
  await load(false);
}

async function load(changed) { // changed: whether to draw anew although nothing is new
  for (const run of state.runs.filter((each) => state.shown.has(each.id))) {
    const known = state.metrics.get(run.id);
    if (!known || known.stamp !== run.stamp) {
      state.metrics.set(run.id, { stamp: run.stamp, ...(await get(`/api/runs/${run.id}/metrics`)) });
      state.sheets.set(run.id, await get(`/api/runs/${run.id}/pictures`));
      changed = true;
    }
  }
  if (!changed) return; // else the page would jump under the reader's hand
  charts();
  choices();
  sheet();
}

function list() {
  const running = state.runs.filter((run) => run.state === "running").length;
  $("news").textContent = state.runs.length
    ? `${state.runs.length} in all, ${running} running. Tick the ones to look at; the page follows those that run.`
    : "There are no runs here yet.";
  const body = $("runs").tBodies[0];
  body.replaceChildren(...state.runs.map((run) => {
    const box = element("input", { type: "checkbox", checked: state.shown.has(run.id), id: `run-${run.id}` });
    box.addEventListener("change", () => {
      if (box.checked) state.shown.add(run.id); else state.shown.delete(run.id);
      list();
      load(true);
    });
    const at = place(run), swatch = element("span", { className: `swatch${at >= 0 ? ` s${at % COLOURS}` : ""}` });
    const name = element("td", {}, element("label", {}, box, " ", swatch, run.name));
    if (run.problem) name.append(element("div", { className: "note", textContent: run.problem }));
    const done = run.target ? `${run.iterations} of ${run.target} ${run.unit}s` : String(run.iterations);
    return element("tr", {},
      name,
      element("td", {}, element("span", { className: `state ${run.state}`, textContent: run.state })),
      element("td", { className: "number", textContent: done }),
      element("td", { className: "number", textContent: duration(run.left) }),
      element("td", { textContent: run.preset || "" }),
      element("td", { textContent: run.date }));
  }));
}

// ---- curves ----

function smoothed(values, weight) { // exponential mean without the bias of its start (Adam's correction)
  let mean = 0, sum = 0;
  return values.map((value) => {
    mean = weight * mean + (1 - weight) * value;
    sum = weight * sum + (1 - weight);
    return mean / sum;
  });
}

function bounds(values, clip) {
  const sorted = [...values].sort((a, b) => a - b), cut = clip ? Math.floor(sorted.length / 50) : 0;
  return [sorted[cut], sorted[sorted.length - 1 - cut]];
}

function ticks(low, high, log) {
  if (log) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) {
      for (const factor of [1, 2, 5]) {
        const tick = factor * 10 ** power;
        if (tick >= low && tick <= high) found.push(tick);
      }
    }
    const step = Math.ceil(found.length / 6);
    return found.filter((_, index) => index % step === 0);
  }
  const rough = (high - low) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((each) => each >= rough);
  const found = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + 1e-9 * step; tick += step) found.push(Math.abs(tick) < step / 1e6 ? 0 : tick);
  return found;
}

function charts() {
  const weight = Number($("smoothing").value), log = $("log").checked, clip = $("clip").checked;
  const wanted = $("find").value.trim().toLowerCase();
  const runs = state.runs.filter((run) => state.shown.has(run.id) && state.metrics.has(run.id));
  const names = [...new Set(runs.flatMap((run) => Object.keys(state.metrics.get(run.id).series)))];
  const order = (name) => (name.startsWith("previews/") ? 0 : name.startsWith("measured/") ? 1 : name.startsWith("watch/") ? 2
    : name.startsWith("reward/") ? 3 : 4);
  names.sort((a, b) => order(a) - order(b) || a.localeCompare(b));
  $("charts").replaceChildren(...names.filter((name) => name.toLowerCase().includes(wanted)).map((name) => {
    const lines = runs.map((run, at) => ({ run, at, points: state.metrics.get(run.id).series[name] }))
      .filter((line) => line.points && line.points.x.length);
    const known = lines.map((line) => state.metrics.get(line.run.id).explained[name]).find(Boolean) || "";
    return chart(name, known, lines, weight, log, clip);
  }));
  if (!names.length) $("charts").replaceChildren(element("p", { className: "note", textContent: "Nothing to draw: tick a run above." }));
}

function chart(name, known, lines, weight, log, clip) {
  const prepared = lines.map((line) => {
    const pairs = line.points.x.map((x, i) => [x, line.points.y[i]]).filter(([, y]) => !log || y > 0);
    const smooth = smoothed(pairs.map(([, y]) => y), pairs.length > SPARSE ? weight : 0);
    return { ...line, pairs, smooth };
  }).filter((line) => line.pairs.length);
  const box = element("div", { className: "chart" }, element("h3", { textContent: name }));
  if (!prepared.length) {
    box.append(element("p", { textContent: "No values above 0 for a log scale." }));
    return box;
  }
  const xs = prepared.flatMap((line) => line.pairs.map(([x]) => x));
  const ys = prepared.flatMap((line) => [...bounds(line.pairs.map(([, y]) => y), clip), ...bounds(line.smooth, false)]);
  let [x0, x1] = [Math.min(...xs), Math.max(...xs)], [y0, y1] = [Math.min(...ys), Math.max(...ys)];
  if (x0 === x1) { x0 -= 1; x1 += 1; }
  if (y1 - y0 <= 1e-9 * Math.abs(y1)) { const pad = Math.abs(y1) / 10 || 1; y0 = log ? y0 / 2 : y0 - pad; y1 = log ? y1 * 2 : y1 + pad; }
  const scale = log ? Math.log : (value) => value;
  const px = (x) => LEFT + (x - x0) / (x1 - x0) * (W - LEFT - RIGHT);
  const py = (y) => {
    const share = (scale(Math.min(Math.max(y, y0), y1)) - scale(y0)) / (scale(y1) - scale(y0));
    return H - BOTTOM - share * (H - TOP - BOTTOM);
  };
  const svg = drawn("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${name}: ${known}` });
  for (const tick of ticks(y0, y1, log)) {
    svg.append(drawn("line", { class: "rule", x1: LEFT, x2: W - RIGHT, y1: py(tick), y2: py(tick) }));
    svg.append(drawn("text", { x: LEFT - 6, y: py(tick) + 4, "text-anchor": "end" }, number(tick)));
  }
  for (const tick of ticks(x0, x1, false)) {
    svg.append(drawn("text", { x: Math.min(px(tick), W - 16), y: H - 8, "text-anchor": "middle" }, number(tick)));
  }
  const path = (pairs) => pairs.map(([x, y]) => `${px(x).toFixed(1)},${py(y).toFixed(1)}`).join(" ");
  for (const line of prepared) {
    const colour = `l${line.at % COLOURS}`, smooth = line.pairs.map(([x], i) => [x, line.smooth[i]]);
    if (weight && line.pairs.length > SPARSE) svg.append(drawn("polyline", { class: `raw ${colour}`, points: path(line.pairs) }));
    svg.append(drawn("polyline", { class: `line ${colour}`, points: path(smooth) }));
    if (line.pairs.length <= 40) line.pairs.forEach(([x], i) => svg.append(
      drawn("circle", { class: `dot ${colour}`, cx: px(x), cy: py(line.smooth[i]), r: 2.5 })));
  }
  const hair = drawn("line", { class: "hair", y1: TOP, y2: H - BOTTOM, visibility: "hidden" });
  svg.append(hair);
  const tip = element("div", { className: "tip", hidden: true }), plot = element("div", { className: "plot" }, svg, tip);
  const leave = () => { tip.hidden = true; hair.setAttribute("visibility", "hidden"); };
  svg.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect(), x = x0 + ((event.clientX - frame.left) / frame.width * W - LEFT) / (W - LEFT - RIGHT) * (x1 - x0);
    const rows = prepared.map((line) => {
      const i = nearest(line.pairs, x);
      return { line, i, x: line.pairs[i][0] };
    });
    const closest = rows.reduce((a, b) => (Math.abs(b.x - x) < Math.abs(a.x - x) ? b : a));
    hair.setAttribute("x1", px(closest.x));
    hair.setAttribute("x2", px(closest.x));
    hair.setAttribute("visibility", "visible");
    tip.replaceChildren(element("div", { textContent: `${lines[0].run.unit} ${closest.x}` }), ...rows.map(({ line, i }) => element("div", {},
      element("span", { className: `swatch s${line.at % COLOURS}` }), `${line.run.name.slice(0, 24)}: ${number(line.pairs[i][1])}`)));
    tip.hidden = false;
    const left = px(closest.x) / W * frame.width, room = frame.width - tip.offsetWidth;
    tip.style.left = `${Math.max(0, Math.min(left + 8, room))}px`;
  });
  svg.addEventListener("pointerleave", leave);
  box.append(plot, element("p", { textContent: known }));
  return box;
}

function nearest(pairs, x) { // by bisection: x rises
  let low = 0, high = pairs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (pairs[middle][0] < x) low = middle; else high = middle;
  }
  return Math.abs(pairs[low][0] - x) <= Math.abs(pairs[high][0] - x) ? low : high;
}

// ---- pictures ----

const label = (run, name) => REFERENCES[name] || `${run.unit} ${Number(name.slice(5))}`;
const source = (id, file) => `/pictures/${id}/${file}`;

function choices() {
  const runs = state.runs.filter((run) => state.sheets.has(run.id) && state.sheets.get(run.id).columns.length);
  if (!runs.some((run) => run.id === state.chosen)) state.chosen = runs.length ? runs[0].id : null;
  $("chosen").replaceChildren(...runs.map((run) => element("option", { value: run.id, textContent: run.name, selected: run.id === state.chosen })));
}

function rows(data) { return [...data.references, ...data.steps]; }

function sheet() {
  const run = state.runs.find((each) => each.id === state.chosen), data = run && state.sheets.get(run.id);
  if (!data) {
    $("sheet").replaceChildren(element("p", { className: "note", textContent: "No run that is ticked has pictures." }));
    return;
  }
  const head = element("tr", {}, element("th", { scope: "col" }), ...data.columns.map((column) => element("th",
    { scope: "col", textContent: data.seeds > 1 ? `${column.prompt} (seed ${column.seed})` : column.prompt })));
  const body = rows(data).map((name) => element("tr", {}, element("th", { scope: "row", textContent: label(run, name) }),
    ...data.columns.map((column) => cell(run, data, name, column))));
  $("sheet").replaceChildren(element("table", {}, element("thead", {}, head), element("tbody", {}, ...body)));
}

function cell(run, data, name, column) {
  const file = data.files[name] && data.files[name][column.key];
  if (!file) return element("td");
  const image = element("img", { src: source(run.id, file), alt: `${column.prompt}, ${label(run, name)}`, loading: "lazy" });
  const sharpen = () => image.classList.toggle("small", image.naturalWidth > 0 && image.naturalWidth < 128);
  image.addEventListener("load", sharpen);
  sharpen();
  const button = element("button", { type: "button" }, image);
  button.addEventListener("click", () => show({ run, name, key: column.key }));
  return element("td", {}, button);
}

function show(open) {
  state.open = open;
  const data = state.sheets.get(open.run.id), column = data.columns.find((each) => each.key === open.key);
  const file = data.files[open.name] && data.files[open.name][open.key];
  $("prompt").textContent = `${column.prompt} (seed ${column.seed})`;
  $("picture-a").src = source(open.run.id, file);
  $("picture-a").alt = `${column.prompt}, ${label(open.run, open.name)}`;
  others(data);
  compare();
  if (!$("large").open) $("large").showModal();
}

function others(data) {
  const kept = $("other").value, made = [element("option", { value: "", textContent: "nothing" })];
  for (const name of data.references) made.push(element("option", { value: `${state.open.run.id}/${name}`, textContent: label(state.open.run, name) }));
  made.push(element("option", { value: "before", textContent: "the checkpoint before" }));
  for (const run of state.runs) {
    const sheetOf = state.sheets.get(run.id);
    if (run.id !== state.open.run.id && sheetOf && sheetOf.columns.some((each) => each.key === state.open.key)) {
      made.push(element("option", { value: run.id, textContent: `${run.name}, same or newest step` }));
    }
  }
  $("other").replaceChildren(...made);
  if (made.some((each) => each.value === kept)) $("other").value = kept;
}

function partner() { // [run, name, file] of what stands beside the open picture, or null
  const value = $("other").value, { run, name, key } = state.open;
  if (!value) return null;
  if (value === "before") {
    const steps = state.sheets.get(run.id).steps, at = steps.indexOf(name);
    return at > 0 ? found(run, steps[at - 1], key) : null;
  }
  const [id, reference] = value.split("/"), other = state.runs.find((each) => each.id === id);
  if (reference) return found(other, reference, key);
  const steps = state.sheets.get(id).steps.filter((each) => state.sheets.get(id).files[each][key]);
  return found(other, other.unit === run.unit && steps.includes(name) ? name : steps[steps.length - 1], key);
}

function found(run, name, key) {
  const files = state.sheets.get(run.id).files[name];
  return files && files[key] ? [run, name, files[key]] : null;
}

function compare() {
  const { run, name } = state.open, beside = partner(), split = Number($("split").value);
  $("picture-b").hidden = $("edge").hidden = $("slide").hidden = !beside;
  const own = `${run.name}: ${label(run, name)}`;
  if (beside) {
    $("picture-b").src = source(beside[0].id, beside[2]);
    $("picture-b").style.clipPath = `inset(0 0 0 ${split}%)`;
    place_edge();
    $("where").textContent = `A ${own}  |  B ${beside[0].name}: ${label(beside[0], beside[1])}`;
  } else {
    $("where").textContent = own;
  }
}

function place_edge() {
  const image = $("picture-a"), split = Number($("split").value);
  $("edge").style.left = `${image.offsetLeft + image.offsetWidth * split / 100}px`;
}

function move(rowsOn, columnsOn) {
  const { run, name, key } = state.open, data = state.sheets.get(run.id), names = rows(data);
  const there = (each, column) => data.files[each] && data.files[each][column];
  if (rowsOn) {
    for (let at = names.indexOf(name) + rowsOn; at >= 0 && at < names.length; at += rowsOn) {
      if (there(names[at], key)) { show({ run, name: names[at], key }); return; }
    }
  }
  if (columnsOn) {
    const keys = data.columns.map((each) => each.key);
    for (let at = keys.indexOf(key) + columnsOn; at >= 0 && at < keys.length; at += columnsOn) {
      if (there(name, keys[at])) { show({ run, name, key: keys[at] }); return; }
    }
  }
}

function slide(event) {
  const frame = $("picture-a").getBoundingClientRect();
  if (!frame.width || $("picture-b").hidden) return;
  $("split").value = String(Math.round(100 * Math.min(1, Math.max(0, (event.clientX - frame.left) / frame.width))));
  compare();
}

// ---- what the page listens to ----

function tab(name) {
  for (const each of ["curves", "pictures"]) {
    $(each).hidden = each !== name;
    $(`tab-${each}`).setAttribute("aria-selected", String(each === name));
  }
}

$("tab-curves").addEventListener("click", () => tab("curves"));
$("tab-pictures").addEventListener("click", () => tab("pictures"));
$("smoothing").addEventListener("input", () => { $("smoothed").textContent = Number($("smoothing").value).toFixed(2); charts(); });
for (const id of ["log", "clip"]) $(id).addEventListener("change", charts);
$("find").addEventListener("input", charts);
$("chosen").addEventListener("change", () => { state.chosen = $("chosen").value; sheet(); });
$("other").addEventListener("change", compare);
$("split").addEventListener("input", compare);
$("earlier").addEventListener("click", () => move(-1, 0));
$("later").addEventListener("click", () => move(1, 0));
for (const id of ["picture-a", "picture-b"]) $(id).addEventListener("load", (event) => {
  event.target.classList.toggle("small", event.target.naturalWidth < 128);
  place_edge();
});
$("stage").addEventListener("pointerdown", slide);
$("stage").addEventListener("pointermove", (event) => { if (event.buttons) slide(event); });
addEventListener("resize", () => { if (state.open) place_edge(); });
$("large").addEventListener("keydown", (event) => {
  if (event.target.tagName === "INPUT" || event.target.tagName === "SELECT") return;
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (steps) { event.preventDefault(); move(...steps); }
});

look();
setInterval(() => { if (document.visibilityState === "visible") look(); }, POLL);
