// The page at /: POST v1/completions streamed, POST route for the place of the text; all paths relative to this page.

const $ = id => document.getElementById(id);
const el = (name, attributes = {}, ...children) => {
  const svg = ["circle", "g", "line", "path", "polyline", "text"].includes(name);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
};

let map;  // page/map.json
let running = null;  // AbortController of the answer that is being written
const wrote = new Map();  // kernel -> tokens of this answer
const trail = [];  // places of the text so far

// ---- kernels: a hue each, evenly around the circle; the generalist is nearly grey ----------------------------------

const paint = (node, kernel) => {
  const k = map.kernels.findIndex(one => one.name === kernel);
  if (k >= 0) node.style.setProperty("--hue", String(20 + k * 360 / map.kernels.length));
  else node.style.setProperty("--own-chroma", "0.025");
  node.dataset.kernel = kernel;
  return node;
};

const mark = kernel => {
  for (const node of document.querySelectorAll(".kernel, #legend tr[data-kernel]")) {
    node.classList.toggle("in-force", node.dataset.kernel === kernel);
  }
};

// ---- the map -------------------------------------------------------------------------------------------------------

const flip = ([x, y]) => [x, -y];  // y of a picture points down

const drawMap = () => {
  const roots = map.roots.map(flip), rings = roots.map(([x, y]) => Math.round(Math.hypot(x, y) * 1e3));
  const webs = new Map();  // edges between the same two rings are one path: where webs cross, the picture is denser
  for (let e = 0; e < map.edges.length; e += 2) {
    const [i, j] = [map.edges[e], map.edges[e + 1]], key = [rings[i], rings[j]].sort().join();
    webs.set(key, `${webs.get(key) ?? ""}M${roots[i]}L${roots[j]}`);
  }
  $("edges").append(...[...webs.values()].map(d => el("path", {d})));
  $("roots").append(...roots.map(([cx, cy]) => el("circle", {cx, cy, r: 0.011})));
  const places = map.kernels.map(one => one.root === null ? null : {name: one.name, at: roots[one.root], mean: flip(one.centre)});
  for (const {name, at: [cx, cy], mean: [x2, y2]} of [...places.filter(Boolean), {name: map.generalist, at: [0, 0], mean: [0, 0]}]) {
    const right = cx >= 0, text = el("text", {x: cx + (right ? 0.055 : -0.055), y: cy, "text-anchor": right ? "start" : "end"}, name);
    const mean = name === map.generalist ? [] :
      [el("line", {x1: cx, y1: cy, x2, y2}), el("circle", {cx: x2, cy: y2, r: 0.016, class: "mean"})];
    const node = el("g", {class: "kernel"}, ...mean, el("circle", {cx, cy, r: 0.095, class: "halo"}), el("circle", {cx, cy, r: 0.032}), text);
    $("kernels").append(paint(node, name));
  }
};

const drawLegend = () => {
  for (const name of [...map.kernels.map(one => one.name), map.generalist]) {
    const meter = name === map.generalist ? "" :
      el("div", {role: "meter", "aria-valuemin": 0, "aria-valuemax": 1, "aria-valuenow": 0, "aria-label": `posterior of ${name}`}, el("div"));
    $("legend").tBodies[0].append(paint(el("tr", {}, el("th", {scope: "row"}, name), el("td", {}, meter), el("td")), name));
  }
};

// Where a text lies: view @ u, u = z[:8] * scale on the unit sphere.
const placeOf = z => {
  if (!map.view || z.length < map.scale.length) return null;
  const u = map.scale.map((s, i) => s * z[i]), length = Math.hypot(...u);
  return length > 0 ? flip(map.view.map(row => row.reduce((sum, v, i) => sum + v * u[i], 0) / length)) : null;
};

const percent = p => `${Math.round(100 * p)} %`;

const drawPlace = found => {
  const at = placeOf(found.z), likely = Object.entries(found.posterior).sort((a, b) => b[1] - a[1]);
  for (const [name, p] of likely) {
    const meter = document.querySelector(`#legend tr[data-kernel="${CSS.escape(name)}"] [role=meter]`);
    meter.setAttribute("aria-valuenow", p);
    meter.firstChild.style.setProperty("--share", p);
  }
  if (!running) mark(found.kernel);  // else who is writing is marked: hysteresis may keep it
  const next = likely.slice(0, 3).map(([name, p]) => `${name} ${percent(p)}`).join(", ");
  $("place").textContent = (found.abstained ? `${found.kernel} answers (${found.reason}). Nearest: ` : "Nearest: ") + next +
    `. Neighbours: ${found.neighbours.slice(0, 3).join(", ")}.`;
  $("ties").replaceChildren();
  $("query").replaceChildren();
  if (!at) return;
  trail.push(at);
  const [x1, y1] = at;
  for (const {name, root} of map.kernels) {
    const p = found.posterior[name];
    if (root === null || p < 0.02) continue;
    const [x2, y2] = flip(map.roots[root]), tie = paint(el("line", {x1, y1, x2, y2}), name);
    tie.style.setProperty("--share", String(0.25 + 0.75 * p));
    $("ties").append(tie);
  }
  $("query").append(el("polyline", {points: trail.slice(-40).join(" ")}),
    el("circle", {class: "glow", cx: x1, cy: y1, r: 0.085}), el("circle", {class: "star", cx: x1, cy: y1, r: 0.026}));
};

// One look at a time; what was written meanwhile is looked at next.
let looking = false, unseen = null;
const look = async text => {
  unseen = text;
  if (looking) return;
  looking = true;
  while (unseen !== null) {
    const prompt = unseen;
    unseen = null;
    try {
      drawPlace(await (await post("route", {prompt})).json());
    } catch (error) {
      $("place").textContent = error.message;
    }
  }
  looking = false;
};

// ---- the API -------------------------------------------------------------------------------------------------------

const post = async (path, body, signal) => {
  const key = $("key").value.trim(), headers = {"Content-Type": "application/json"};
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, {method: "POST", headers, body: JSON.stringify(body), signal});
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error(`The service does not answer (${error.message}).`);
  }
  if (response.ok) return response;
  const said = await response.text();
  let message = said.slice(0, 300);
  try { message = JSON.parse(said).error.message; } catch { /* not an error object */ }
  const wait = response.headers.get("Retry-After");
  throw new Error(`${response.status}: ${message}${wait && !message.includes("try again") ? ` Try again in ${wait} s.` : ""}`);
};

// Server-sent events of a response, as text.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = ""; ;) {
    const {value, done} = await reader.read();
    if (done) return;
    const parts = (held + value).split(/\r?\n\r?\n/);
    held = parts.pop();
    for (const part of parts) {
      const data = part.split(/\r?\n/).filter(line => line.startsWith("data:")).map(line => line.slice(5).trimStart());
      if (data.length) yield data.join("\n");
    }
  }
}

// ---- the answer ----------------------------------------------------------------------------------------------------

const request = () => {
  const number = id => $(id).valueAsNumber, body = {
    prompt: $("prompt").value, mode: $("mode").value, max_tokens: number("max_tokens"), stream: true,
    truncate_prompt_tokens: -1,  // of a prompt longer than kernels read, they read the end
    stream_options: {include_usage: true, continuous_usage_stats: true}, temperature: number("temperature"), top_p: number("top_p"),
    top_k: number("top_k"), min_p: number("min_p"), repetition_penalty: number("repetition_penalty"), top_kernels: number("top_kernels"),
  };
  if ($("seed").value !== "") body.seed = number("seed");
  return body;
};

const append = (text, kernel) => {
  let last = $("answer").lastElementChild;
  if (last.dataset.kernel !== kernel) {
    const name = el("span", {class: "name"}, kernel);
    last = paint(el("span", {class: "by", title: `written by ${kernel}`}, name), kernel);
    $("answer").append(last);
    mark(kernel);
  }
  last.append(text);
  last.normalize();
};

const write = async () => {
  const body = request(), began = performance.now();
  running = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  $("error").hidden = true;
  $("answer").setAttribute("aria-busy", "true");
  $("answer").replaceChildren(el("span", {class: "prompt"}, body.prompt));
  $("status").textContent = "";
  wrote.clear();
  trail.length = 0;
  let text = body.prompt, first = null, tokens = 0, reason = "", kernel = map.generalist;
  const path = [];
  const tell = () => {
    const seconds = (performance.now() - began) / 1e3, rate = tokens && seconds > 0 ? `, ${(tokens / seconds).toFixed(0)} tokens/s` : "";
    $("status").textContent = `${tokens} tokens${rate}${first === null ? "" : `, first after ${first.toFixed(0)} ms`}` +
      (path.length ? ` · ${path.slice(-6).join(" → ")}` : "") + (reason ? ` · ${reason}` : "");
    for (const row of $("legend").tBodies[0].rows) row.cells[2].textContent = wrote.has(row.dataset.kernel) ? `${wrote.get(row.dataset.kernel)} tokens` : "";
  };
  try {
    look(text);
    for await (const data of events(await post("v1/completions", body, running.signal))) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      kernel = chunk.constellation?.kernel ?? kernel;
      const made = (chunk.usage?.completion_tokens ?? tokens) - tokens;
      tokens += made;
      if (made > 0) wrote.set(kernel, (wrote.get(kernel) ?? 0) + made);
      const [choice] = chunk.choices;
      if (!choice) continue;
      if (choice.text) {
        first ??= performance.now() - began;
        if (path.at(-1) !== kernel) path.push(kernel);
        append(choice.text, kernel);
        text += choice.text;
        look(text);
      }
      reason = choice.finish_reason ?? reason;
      tell();
    }
    tell();
  } catch (error) {
    if (error.name === "AbortError") reason = "stopped";
    else {
      $("error").textContent = error.message;
      $("error").hidden = false;
    }
    tell();
  } finally {
    running = null;
    $("send").disabled = false;
    $("stop").disabled = true;
    $("answer").setAttribute("aria-busy", "false");
  }
};

// ---- controls ------------------------------------------------------------------------------------------------------

const start = async () => {
  try {
    map = await (await fetch("page/map.json")).json();
  } catch {
    $("error").textContent = "The service does not answer; load the page again.";
    $("error").hidden = false;
    return;
  }
  $("mode").append(...map.modes.map(mode => el("option", {value: mode}, mode)));
  drawMap();
  drawLegend();
  $("ask").addEventListener("submit", event => {
    event.preventDefault();
    if (!running) write();
  });
  $("stop").addEventListener("click", () => running?.abort());
  addEventListener("keydown", event => {
    if (event.key === "Escape") running?.abort();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
  });
  $("temperature").addEventListener("input", () => { $("shown").textContent = $("temperature").value; });
  let pause;
  $("prompt").addEventListener("input", () => {
    clearTimeout(pause);
    pause = setTimeout(() => { if (!running && $("prompt").value) { trail.length = 0; look($("prompt").value); } }, 150);
  });
  document.documentElement.dataset.ready = "";
};

start();
