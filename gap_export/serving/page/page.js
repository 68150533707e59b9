// The page to try a server with: /v1/ground for boxes, /v1/chat/completions for answers in words, /v1/models for what may be chosen.

const at = id => document.getElementById(id);
const TINY = 200; // Up to this side, images are enlarged, and their pixels shown as squares.
const ENLARGED = 576;
const PHASES = { queue: "waited", decode_image: "image decoded", vision: "image encoded", prefill: "prompt read", decode: "answer made" };

const state = { model: null, image: null, running: null };

// ---------------------------------------------------------------------------------------------------------------------
// The server

class Failure extends Error {}

async function call(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if (at("key").value) headers.Authorization = `Bearer ${at("key").value}`;
  let response;
  try {
    response = await fetch(path, body === undefined ? { headers, signal } : { method: "POST", headers, body: JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server cannot be reached. Is it still running?");
  }
  if (response.ok) return response;
  if (response.status === 401) at("key-row").hidden = false;
  throw new Failure(await reason(response));
}

async function reason(response) {
  const wait = response.headers.get("Retry-After");
  const again = wait ? ` Ask again in ${wait} s.` : "";
  try {
    return `${sentence((await response.json()).error.message)}${again}`;
  } catch {
    return `The server answered with status ${response.status}.${again}`;
  }
}

const sentence = text => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?)]$/.test(text) ? "" : ".");

async function connect() {
  try {
    const found = await (await call("v1/models")).json();
    state.model = found.data[0];
  } catch (error) {
    at("model").textContent = error.message;
    return;
  }
  const facts = state.model.gap;
  at("model").textContent = `${state.model.id}: pruner ${facts.pruner}, position ids ${facts.positions}, ${facts.precision}, ` +
    (facts.one_at_a_time_because ? "one request at a time" : `${facts.rows} requests at a time`);
  at("ask").hidden = !facts.answers_questions;
  at("keep-row").hidden = !facts.keep_range;
  if (facts.keep_range) {
    const [least, most] = facts.keep_range;
    Object.assign(at("keep"), { min: Math.ceil(least * 100) / 100, max: most, value: facts.keep });
  }
  const offered = facts.positions_offered || [];
  at("positions-row").hidden = offered.length < 2;
  showKeep();
}

async function ready() {
  for (;;) {
    const response = await fetch("v1/health/ready").catch(() => null);
    if (response && response.ok) return;
    at("model").textContent = response ? "The server is starting: it is being checked ..." : "The server cannot be reached.";
    await new Promise(done => setTimeout(done, 2000));
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// What is asked

const keep = () => (at("keep-row").hidden ? undefined : Number(at("keep").value));
const positions = () => (at("positions-row").hidden ? undefined : document.querySelector("[name=positions]:checked").value);

async function find() {
  if (!state.image) throw new Failure("Choose an image first: there is nothing to find it in.");
  const body = { image: await state.image.url(), expression: at("text").value.trim(), evidence: true, keep: keep(), positions: positions() };
  const answer = await (await call("v1/ground", body, state.running.signal)).json();
  const [result] = answer.results;
  if (result.error) throw new Failure(sentence(result.error.message));
  at("said").textContent = result.raw;
  show(result, answer.image, answer);
}

async function ask() {
  const content = [{ type: "text", text: at("text").value.trim() }];
  if (state.image) content.unshift({ type: "image_url", image_url: { url: await state.image.url() } });
  const body = { model: state.model.id, messages: [{ role: "user", content }], stream: true, gap: { keep: state.image ? keep() : undefined, evidence: true } };
  const response = await call("v1/chat/completions", body, state.running.signal);
  let last = null;
  at("said").textContent = "";
  for await (const event of events(response)) {
    if (event.error) throw new Failure(sentence(event.error.message));
    at("said").textContent += event.choices[0]?.delta?.content ?? "";
    if (event.gap) last = event;
  }
  if (!last) throw new Failure("The answer broke off.");
  if (last.choices[0].finish_reason === "length") at("said").textContent += " ...";
  show(last.gap, last.gap.image, last);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const text = part.replace(/^data: /, "");
      if (text === "[DONE]") return;
      yield JSON.parse(text);
    }
  }
}

async function run(question) {
  at("error").textContent = "";
  if (!at("text").value.trim()) {
    at("error").textContent = "Write an expression or a question first.";
    at("text").focus();
    return;
  }
  clear();
  state.running = new AbortController();
  at("answer").setAttribute("aria-busy", "true");
  busy(true);
  at("said").textContent = "Working ...";
  try {
    if (!state.model) await connect();
    if (!state.model) throw new Failure(at("model").textContent);
    await question();
  } catch (error) {
    if (error.name === "AbortError") {
      at("said").textContent += " (stopped)";
    } else {
      at("said").textContent = "No answer.";
      at("error").textContent = error instanceof Failure ? error.message : "The answer cannot be read.";
      if (!(error instanceof Failure)) console.error(error);
    }
  } finally {
    busy(false);
    at("answer").removeAttribute("aria-busy");
  }
}

// The focus stays on something that can be used.
function busy(is) {
  const held = document.activeElement;
  for (const id of ["find", "ask"]) at(id).disabled = is;
  at("stop").disabled = !is;
  if (is && (held === at("find") || held === at("ask"))) at("stop").focus();
  if (!is && (held === at("stop") || held === document.body) && state.asked) at(state.asked).focus();
}

// ---------------------------------------------------------------------------------------------------------------------
// What is shown

function clear() {
  at("overlay").replaceChildren();
  at("overlay").setAttribute("aria-label", "Nothing is found yet.");
  at("boxes").replaceChildren();
  at("kept").textContent = "";
  at("times").hidden = at("whole").hidden = true;
}

function show(result, size, whole) {
  const boxes = result.boxes;
  at("boxes").replaceChildren(...boxes.map(box => element("li", `box ${box.pixels.map(edge => edge.toFixed(1)).join(", ")} in pixels of ${size.width} x ${size.height}`)));
  if (!boxes.length && result.reason) at("boxes").append(element("li", result.reason));
  if (size) {
    const share = result.keep;
    const lessened = share.requested === null && state.model.gap.keep !== share.used ? " (chosen by the server)" : "";
    at("kept").textContent = `${share.tokens} of ${share.of} visual tokens were kept${lessened}` + (result.positions ? `; position ids: ${result.positions}.` : ".");
    draw(result, size);
  }
  bar(result.timings);
  at("json").textContent = JSON.stringify(whole, null, 1);
  at("whole").hidden = false;
}

function draw(result, { width, height }) {
  const overlay = at("overlay");
  overlay.setAttribute("viewBox", `0 0 ${width} ${height}`);
  overlay.setAttribute("preserveAspectRatio", "none");
  const { kept_indices: kept, patches } = result;
  if (patches && kept.length) {
    const cells = kept.map(index => cell(index, patches)).join("");
    overlay.append(drawn("path", { class: "pruned", d: `M0 0H${width}V${height}H0Z${cells}` }));
    overlay.append(drawn("path", { class: "kept", d: cells, "data-count": kept.length }));
  }
  for (const { pixels: [left, top, right, bottom] } of result.boxes) {
    const place = { x: left, y: top, width: right - left, height: bottom - top };
    overlay.append(drawn("rect", { class: "casing", ...place }), drawn("rect", { class: "box", ...place }));
  }
  overlay.setAttribute("aria-label", `${result.boxes.length || "No"} ${result.boxes.length === 1 ? "box" : "boxes"} on the image; ${result.keep.tokens} of ${result.keep.of} patches kept.`);
}

function cell(index, { rows, columns, area: [left, top, width, height] }) {
  const across = width / columns, down = height / rows;
  const x = left + (index % columns) * across, y = top + Math.floor(index / columns) * down;
  return `M${x} ${y}h${across}v${down}h${-across}Z`;
}

function bar(timings) {
  const total = Object.keys(PHASES).reduce((sum, name) => sum + timings[name], 0) || 1;
  at("bar").replaceChildren(...Object.keys(PHASES).map(name => {
    const part = element("span", "");
    part.className = name;
    part.style.width = `${100 * timings[name] / total}%`;
    return part;
  }));
  at("phases").replaceChildren(...Object.entries(PHASES).flatMap(([name, words]) => {
    const term = element("dt", words);
    term.className = name;
    return [term, element("dd", milliseconds(timings[name]))];
  }));
  at("total").textContent = milliseconds(timings.total);
  at("times").hidden = false;
}

const milliseconds = seconds => `${(1000 * seconds).toFixed(1)} ms`;

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

function drawn(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function showKeep() {
  const share = Number(at("keep").value), all = state.model?.gap.visual_tokens;
  const words = `${Math.round(100 * share)} %`;
  at("keep-shown").textContent = words;
  at("keep").setAttribute("aria-valuetext", all ? `${words} of ${all}` : words);
}

// ---------------------------------------------------------------------------------------------------------------------
// The image

function choose(file) {
  at("error").textContent = "";
  if (!file) return;
  if (state.image) URL.revokeObjectURL(state.image.shown);
  const url = () => new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(new Failure("The file cannot be read. Choose it again."));
    reader.readAsDataURL(file);
  });
  state.image = { url, shown: URL.createObjectURL(file) };
  clear();
  at("said").textContent = "Nothing was asked yet.";
  at("image-name").textContent = `${file.name || "the pasted image"} (${Math.ceil(file.size / 1024)} KiB)`;
  at("stage").hidden = false;
  at("shown").alt = `the chosen image, ${file.name || "pasted"}`;
  at("shown").src = state.image.shown;
}

at("shown").addEventListener("load", event => {
  const { naturalWidth, naturalHeight } = event.target;
  const longest = Math.max(naturalWidth, naturalHeight);
  event.target.classList.toggle("small", longest <= TINY);
  if (longest <= TINY) event.target.width = naturalWidth * Math.floor(ENLARGED / longest);
  else event.target.removeAttribute("width");
  at("image-name").textContent += `, ${naturalWidth} x ${naturalHeight} pixels`;
});
at("shown").addEventListener("error", () => {
  at("stage").hidden = true;
  at("error").textContent = "This browser cannot show the file. It can be sent all the same; boxes are then given in numbers alone.";
});

at("choose").addEventListener("click", () => at("file").click());
at("file").addEventListener("change", event => choose(event.target.files[0]));
for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(name, event => {
    if (!event.dataTransfer) return;
    event.preventDefault();
    at("choose").classList.toggle("over", name === "dragenter" || name === "dragover");
    if (name === "drop") choose(event.dataTransfer.files[0]);
  });
}
document.addEventListener("paste", event => {
  const [file] = [...event.clipboardData.files].filter(each => each.type.startsWith("image/"));
  if (file) {
    event.preventDefault();
    choose(file);
  }
});

// ---------------------------------------------------------------------------------------------------------------------
// The form

function begin(name, question) {
  if (at(name).disabled) return;
  state.asked = name;
  run(question);
}

at("form").addEventListener("submit", event => {
  event.preventDefault();
  begin("find", find);
});
at("form").noValidate = true;
at("ask").addEventListener("click", () => begin("ask", ask));
at("stop").addEventListener("click", () => state.running?.abort());
at("text").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("form").requestSubmit();
  }
});
at("keep").addEventListener("input", showKeep);
at("key").addEventListener("change", connect);
at("patches").addEventListener("change", event => at("overlay").classList.toggle("whole", !event.target.checked));

await ready();
await connect();
