// The Studio, in one module and without a library. It asks the service through its public API, as
// any client would: /v1/models says what may be asked, /v1/images/generations draws, one stream a
// picture. Text only ever becomes text: the page's policy forbids markup made of strings.
//
// A run is what one press of Draw asked for; its pictures differ in seed or version.

const PREVIEWS = 3;
const AT_ONCE = 4; // streams; a browser holds six connections to a service, and one asks for models
const SMALL = 128; // pixels of a side up to which a picture is scaled up in squares
const MAX_RUNS = 40;
const MAX_HELD = 64_000_000; // characters of pictures on the page
const MAX_KEPT = 4_000_000; // characters of history in the tab's storage, which holds five million
const FIELDS = {
  prompt: "prompt", negative_prompt: "negative", size: "size", num_inference_steps: "steps",
  guidance_scale: "guidance", seed: "seed", model: "version",
};
const SHAPES = [["Landscape", 3 / 2], ["Portrait", 2 / 3], ["Wide", 2], ["Tall", 1 / 2]];

const NARROW = matchMedia("(max-width: 820px)"); // as in the style
const $ = (id) => document.getElementById(id);

function make(tag, fields = {}, ...children) {
  const element = Object.assign(document.createElement(tag), fields);
  element.append(...children);
  return element;
}

let offer = null; // what the service says may be asked
let running = null; // the run being drawn
let shown = null; // the run on the stage
let runs = []; // newest first
const empty = $("stage").firstElementChild;

// -- The service ---------------------------------------------------------------------------------

class Refusal extends Error {
  constructor(message, { status = 0, param = null, after = 0 } = {}) {
    super(message);
    Object.assign(this, { status, param, after });
  }
}

async function ask(path, options = {}) {
  const key = sessionStorage.getItem("studio.key");
  const headers = options.body ? { "Content-Type": "application/json" } : {};
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The service cannot be reached. Is it running?");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Refusal(sentence(body?.error?.message ?? `The service answered ${response.status}`), {
    status: response.status,
    param: body?.error?.param,
    after: Number(response.headers.get("Retry-After")) || 0,
  });
}

async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Refusal("The connection was lost while drawing.");
    });
    if (done) return;
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data: "));
      if (data.length) yield JSON.parse(data.map((line) => line.slice(6)).join("\n"));
    }
  }
}

const sentence = (text) => text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

// -- What may be asked ---------------------------------------------------------------------------

async function loadOffer() {
  const first = offer === null;
  offer = (await (await ask("v1/models")).json()).data[0];
  const { side, grid, max_side: longest } = offer;
  $("model").textContent = `${offer.id} · version ${offer.version}`;
  document.title = `Studio · ${offer.id}`;
  $("number").max = offer.max_pictures;
  $("steps").max = offer.max_steps;
  for (const id of ["width", "height"]) {
    Object.assign($(id), { min: grid, step: grid, max: Math.floor(longest / grid) * grid });
  }
  listSizes(side, grid, longest);
  listVersions($("version"), `Live (${offer.version})`);
  listVersions($("beside"), "None");
  if (first) {
    $("steps").value = offer.default_steps;
    $("guidance").value = offer.default_guidance;
    $("width").value = $("height").value = side;
  }
  showValues();
}

function fill(select, entries) {
  const chosen = select.value;
  select.replaceChildren(...entries.map(([value, text]) => new Option(text, value)));
  select.value = entries.some(([value]) => value === chosen) ? chosen : entries[0][0];
}

function listSizes(side, grid, longest) {
  const sizes = new Map([["auto", `Native ${side} × ${side}`]]);
  for (const [name, ratio] of SHAPES) {
    const [width, height] = [Math.sqrt(ratio), Math.sqrt(1 / ratio)].map((scale) =>
      Math.max(1, Math.round((side * scale) / grid)) * grid);
    const known = [...sizes.keys()].includes(`${width}x${height}`);
    if (Math.max(width, height) <= longest && width !== height && !known) {
      sizes.set(`${width}x${height}`, `${name} ${width} × ${height}`);
    }
  }
  fill($("size"), [...sizes, ["other", "Another…"]]);
}

function listVersions(select, none) {
  const entries = offer.versions.map(({ version, aliases }) =>
    [String(version), [version, ...aliases].join(" · ")]);
  fill(select, [["", none], ...entries, ["other", "Another…"]]);
  showOther(select);
}

function showOther(select) {
  const other = $(`${select.id}-other`);
  other.hidden = other.disabled = select.value !== "other";
}

function chosenVersion(id) {
  return $(id).value === "other" ? $(`${id}-other`).value.trim() : $(id).value;
}

function showValues() {
  $("steps-value").textContent = $("steps").value;
  $("guidance-value").textContent = Number($("guidance").value).toFixed(1);
  const custom = $("size").value === "other";
  $("custom-size").hidden = !custom;
  $("width").disabled = $("height").disabled = !custom;
}

// -- Drawing -------------------------------------------------------------------------------------

function readForm() {
  const keeps = $("composer").elements.seeding.value === "keep";
  if (!keeps || !$("seed").value) $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
  const size = $("size").value;
  return {
    prompt: $("prompt").value,
    negative: $("negative").value,
    size: size === "other" ? `${$("width").valueAsNumber}x${$("height").valueAsNumber}` : size,
    number: $("number").valueAsNumber,
    steps: $("steps").valueAsNumber,
    guidance: $("guidance").valueAsNumber,
    seed: Number($("seed").value),
    version: chosenVersion("version"),
    beside: chosenVersion("beside"),
  };
}

function begin(asked) {
  // Side by side, "live" must mean one version, whatever share a challenger has.
  const versions = asked.beside ? [asked.version || offer.version, asked.beside] : [asked.version];
  const pictures = [];
  for (let i = 0; i < asked.number; i += 1) {
    for (const version of versions) {
      pictures.push({ seed: asked.seed + i, asked: version, state: "waiting", preview: 0 });
    }
  }
  return { at: Date.now(), asked, pictures, stop: new AbortController(), error: null };
}

async function draw() {
  if (running || !$("composer").reportValidity()) return;
  hideNotice();
  try {
    if (!offer) await loadOffer();
  } catch (error) {
    await refuse(error, draw);
    return;
  }
  if (running || !$("composer").reportValidity()) return; // now that the limits are known
  const run = begin(readForm());
  running = run;
  runs = [run, ...runs];
  showBusy();
  show(run);
  listRuns();
  tell(run);
  if (NARROW.matches) $("stage").scrollIntoView({ block: "nearest" });
  const waiting = [...run.pictures];
  const work = async () => {
    while (waiting.length && !run.error && !run.stop.signal.aborted) {
      await drawPicture(run, waiting.shift());
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, work));
  for (const picture of waiting) {
    picture.state = "dropped";
    paint(run, picture);
  }
  running = null;
  showBusy();
  finish(run);
  if (run.error) await refuse(run.error, draw);
}

async function drawPicture(run, picture) {
  const { asked } = run;
  const started = performance.now();
  picture.state = "drawing";
  paint(run, picture);
  try {
    const response = await ask("v1/images/generations", {
      method: "POST",
      signal: run.stop.signal,
      body: JSON.stringify({
        model: picture.asked ? `${offer.id}@${picture.asked}` : offer.id,
        prompt: asked.prompt,
        negative_prompt: asked.negative || null,
        size: asked.size,
        num_inference_steps: asked.steps,
        guidance_scale: asked.guidance,
        seed: picture.seed,
        stream: true,
        partial_images: PREVIEWS,
      }),
    });
    for await (const event of eventsOf(response)) {
      if (event.type === "error") throw new Refusal(sentence(event.error.message), event.error);
      picture.source = `data:image/${event.output_format};base64,${event.b64_json}`;
      picture.version = event.model_version;
      if (event.type === "image_generation.completed") {
        picture.state = "done";
        picture.seconds = (performance.now() - started) / 1000;
      } else {
        picture.preview = event.partial_image_index + 1;
      }
      paint(run, picture);
      tell(run);
    }
    if (picture.state !== "done") throw new Refusal("The connection ended before the picture was there.");
  } catch (error) {
    picture.state = "dropped";
    paint(run, picture);
    if (error.name !== "AbortError") run.error ??= error;
  }
}

function cancel() {
  running?.stop.abort();
}

function finish(run) {
  const drawn = drawnOf(run);
  if (!drawn.length) runs = runs.filter((other) => other !== run);
  let room = MAX_HELD;
  runs = runs.slice(0, MAX_RUNS).filter((other) => (room -= weightOf(other)) > 0 || other === run);
  if (shown === run && !run.pictures.some(({ source }) => source)) show(runs[0] ?? null);
  keepRuns();
  listRuns();
  tell(run);
  const known = new Set(offer.versions.map(({ version }) => version));
  if (drawn.some(({ version }) => !known.has(version) || (!run.asked.version && version !== offer.version))) {
    loadOffer().catch(() => {}); // what is live has moved; the next press would say what is wrong
  }
}

function tell(run) {
  const all = run.pictures.length;
  const done = drawnOf(run);
  const pictures = `${all} picture${all > 1 ? "s" : ""}`;
  if (run === running) {
    const preview = all === 1 && run.pictures[0].preview;
    $("status").textContent = preview
      ? `Drawing: preview ${preview}`
      : `Drawing ${pictures}${done.length ? `, ${done.length} done` : ""}`;
  } else if (run.stop.signal.aborted) {
    $("status").textContent = done.length ? `Cancelled after ${done.length} of ${pictures}` : "Cancelled";
  } else if (run.error) {
    $("status").textContent = done.length ? `${done.length} of ${pictures} drawn` : "Nothing was drawn";
  } else {
    const versions = [...new Set(done.map(({ version }) => version))];
    const drawers = `version${versions.length > 1 ? "s" : ""} ${versions.join(" and ")}`;
    $("status").textContent = `Drawn by ${drawers} in ${((Date.now() - run.at) / 1000).toFixed(1)} s`;
  }
}

function showBusy() {
  $("draw").setAttribute("aria-disabled", String(running !== null));
  if (!running && document.activeElement === $("cancel")) $("draw").focus();
  $("cancel").hidden = !running;
}

// -- Pictures ------------------------------------------------------------------------------------

function show(run) {
  shown = run;
  markShown();
  if (!run) {
    $("stage").replaceChildren(empty);
    return;
  }
  const { asked, pictures } = run;
  const columns = asked.beside ? 2 : Math.min(pictures.length, pictures.length > 4 ? 3 : 2);
  const sheet = make("div", { className: "sheet" });
  sheet.dataset.columns = columns;
  sheet.append(...pictures.map((picture) => (picture.figure = make("figure"))));
  for (const picture of pictures) paint(run, picture);
  const facts = [
    asked.size === "auto" ? "native size" : asked.size.replace("x", " × "),
    `${asked.steps} steps`, `guidance ${asked.guidance}`, ...(asked.negative ? [`not: ${asked.negative}`] : []),
  ];
  const reuse = make("button", { type: "button", className: "quiet", textContent: "Use these settings" });
  reuse.onclick = () => restore(asked);
  $("stage").replaceChildren(sheet, make("div", { className: "about" },
    make("p", { className: "words", dir: "auto", textContent: asked.prompt }),
    make("p", { className: "facts", textContent: facts.join(" · ") }), reuse));
}

function markShown() {
  for (const button of $("runs").querySelectorAll("button")) {
    button.setAttribute("aria-current", String(button.run === shown));
  }
}

function paint(run, picture) {
  if (shown !== run || !picture.figure) return;
  const { figure, state } = picture;
  const [width, height] = run.asked.size === "auto" ? [1, 1] : run.asked.size.split("x");
  const frame = make("div", { className: `frame ${state}` });
  frame.style.aspectRatio = `${width} / ${height}`;
  if (picture.source) {
    const image = make("img", { src: picture.source, alt: run.asked.prompt });
    image.dataset.preview = state === "done" ? "" : picture.preview;
    image.onload = () => {
      image.classList.toggle("small-picture", Math.max(image.naturalWidth, image.naturalHeight) <= SMALL);
    };
    frame.append(image);
  }
  if (state === "drawing") {
    const bar = make("progress", { max: Math.min(PREVIEWS, run.asked.steps - 1) + 1, value: picture.preview });
    bar.setAttribute("aria-label", "Drawing");
    frame.append(bar);
  }
  const word = { waiting: "waiting", drawing: picture.source ? "" : "drawing", dropped: "not finished" }[state];
  if (word) frame.append(make("span", { className: "word", textContent: word }));
  figure.replaceChildren(frame, caption(picture));
}

function caption(picture) {
  const { seed, seconds } = picture;
  const version = picture.version ?? picture.asked;
  const line = make("figcaption");
  if (version) line.append(make("strong", { textContent: `Version ${version}` }));
  line.append(make("span", { textContent: `seed ${seed}` }));
  if (picture.state !== "done") return line;
  line.append(make("span", { textContent: `${seconds.toFixed(1)} s` }));
  const keep = make("button", { type: "button", textContent: "Keep seed" });
  keep.onclick = () => {
    keepSeed(seed);
    $("status").textContent = `Seed ${seed} is kept`;
  };
  const name = `${offer?.id ?? "picture"}-v${version}-seed${seed}.${picture.source.slice(11, picture.source.indexOf(";"))}`;
  const save = make("a", { href: picture.source, download: name, textContent: "Save" });
  line.append(make("span", { className: "links" }, keep, save));
  return line;
}

function keepSeed(seed) {
  $("seed").value = seed;
  $("composer").elements.seeding.value = "keep";
}

const weightOf = (run) => run.pictures.reduce((sum, { source = "" }) => sum + source.length, 0);
const drawnOf = (run) => run.pictures.filter((picture) => picture.state === "done");

// -- What was drawn earlier ----------------------------------------------------------------------

function listRuns() {
  $("earlier").hidden = !runs.length;
  $("runs").replaceChildren(...runs.map((run) => {
    const drawn = drawnOf(run);
    const thumbs = drawn.slice(0, run.asked.beside ? 2 : 1).map(({ source }) => {
      const image = make("img", { src: source, alt: "" });
      image.onload = () => image.classList.toggle("small-picture", image.naturalWidth <= SMALL);
      return image;
    });
    const versions = [...new Set(drawn.map(({ version }) => `v${version}`))].join(" and ");
    const time = new Date(run.at).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
    const count = drawn.length > 1 ? ` · ${drawn.length} pictures` : "";
    const button = make("button", { type: "button", run },
      make("span", { className: "thumbs" }, ...thumbs),
      make("span", { className: "text" },
        make("span", { className: "words", dir: "auto", textContent: run.asked.prompt }),
        make("span", { className: "facts", textContent: `${versions || "being drawn"} · ${time}${count}` })));
    button.onclick = () => show(run);
    return make("li", {}, button);
  }));
  markShown();
}

function keepRuns() {
  const kept = [];
  let room = MAX_KEPT;
  for (const { at, asked, pictures } of runs.filter((run) => run !== running)) {
    const drawn = drawnOf({ pictures })
      .map(({ seed, version, source, seconds, state }) => ({ seed, version, source, seconds, state }));
    const text = JSON.stringify({ at, asked, pictures: drawn });
    room -= text.length;
    if (room < 0) break;
    kept.push(text);
  }
  try {
    sessionStorage.setItem("studio.runs", `[${kept.join(",")}]`);
  } catch {
    sessionStorage.removeItem("studio.runs"); // no room at all: the page still has them
  }
}

function restore(asked) {
  for (const id of ["prompt", "negative", "number", "steps", "guidance"]) $(id).value = asked[id];
  $("size").value = asked.size;
  if ($("size").value !== asked.size) {
    $("size").value = "other";
    [$("width").value, $("height").value] = asked.size.split("x");
  }
  for (const id of ["version", "beside"]) {
    $(id).value = asked[id];
    if ($(id).value !== asked[id]) {
      $(id).value = "other";
      $(`${id}-other`).value = asked[id];
    }
    showOther($(id));
  }
  keepSeed(asked.seed);
  showValues();
  $("prompt").focus();
  $("status").textContent = "These settings are in the form again";
}

// -- What went wrong -----------------------------------------------------------------------------

let countdown = 0;
let asking = null;

async function refuse(error, retry) {
  if (error.status === 401) {
    const wrong = sessionStorage.getItem("studio.key") !== null;
    sessionStorage.removeItem("studio.key");
    if (await askForKey(wrong ? "That key is not known here." : "This service wants a key before it draws.")) {
      await retry();
      return;
    }
  }
  $("notice-text").textContent = error.message;
  $("notice").hidden = false;
  const field = $(FIELDS[error.param]);
  if (field && error.status === 400) {
    if ($("settings").contains(field)) $("settings").open = true;
    field.setAttribute("aria-invalid", "true");
    field.setAttribute("aria-describedby", "notice-text");
    field.focus();
  }
  $("again").hidden = error.status === 400 || error.status === 404;
  $("again").onclick = retry;
  const free = Date.now() + error.after * 1000;
  const count = () => {
    const left = Math.ceil((free - Date.now()) / 1000);
    $("again").disabled = left > 0;
    $("again").textContent = left > 0 ? `Try again in ${left} s` : "Try again";
    if (left <= 0) clearInterval(countdown);
  };
  clearInterval(countdown);
  countdown = setInterval(count, 250);
  count();
}

function hideNotice() {
  clearInterval(countdown);
  if (document.activeElement === $("again")) $("draw").focus();
  $("notice").hidden = true;
  $("notice-text").textContent = "";
  for (const field of document.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-describedby");
  }
}

function askForKey(text) {
  if (asking) return asking;
  const dialog = $("key-dialog");
  $("change-key").hidden = false;
  $("key-text").textContent = text;
  $("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  asking = new Promise((resolve) => {
    dialog.onclose = () => {
      asking = null;
      if (dialog.returnValue === "key") sessionStorage.setItem("studio.key", $("key").value.trim());
      $("key").value = "";
      resolve(dialog.returnValue === "key");
    };
  });
  return asking;
}

// -- The page ------------------------------------------------------------------------------------

async function open() {
  hideNotice();
  try {
    await loadOffer();
  } catch (error) {
    await refuse(error, open);
  }
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  draw();
});
$("composer").addEventListener("input", (event) => {
  event.target.removeAttribute("aria-invalid");
  if (event.target.id === "seed") $("composer").elements.seeding.value = "keep";
  if (["version", "beside"].includes(event.target.id)) showOther(event.target);
  showValues();
});
$("settings").addEventListener("invalid", () => {
  $("settings").open = true; // or the browser could not show what is wrong
}, true);
$("cancel").addEventListener("click", cancel);
$("clear").addEventListener("click", () => {
  runs = running ? [running] : [];
  keepRuns();
  listRuns();
  show(runs[0] ?? null);
  $("prompt").focus();
});
$("key-dialog").querySelector("form").addEventListener("submit", (event) => {
  event.preventDefault();
  $("key-dialog").close("key");
});
$("no-key").addEventListener("click", () => $("key-dialog").close(""));
$("change-key").addEventListener("click", async () => {
  if (await askForKey("Another key for this tab.")) open();
});
document.addEventListener("keydown", (event) => {
  if ($("key-dialog").open) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    draw();
  } else if (event.key === "Escape") {
    cancel();
  }
});

if (NARROW.matches) $("settings").open = false;
$("change-key").hidden = sessionStorage.getItem("studio.key") === null;
try {
  runs = JSON.parse(sessionStorage.getItem("studio.runs") ?? "[]");
} catch {
  sessionStorage.removeItem("studio.runs");
}
listRuns();
if (runs.length) show(runs[0]);
open();
