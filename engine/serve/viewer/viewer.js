"use strict";
// The page of the service: no framework, nothing from elsewhere. One job is shown at a time; its id and token are in
// the address, so that a link to it can be given away.

const $ = (id) => document.getElementById(id);
const LOOK_MS = 250, REFRESH_MS = 1500; // how soon a change is shown, and how long the next one waits after it
let key = sessionStorage.getItem("key") || "";
let picture = null; // what is being prepared: {file, bitmap, mask, factor}
let looks = 0; // how often something else was chosen to be shown
let shown = null; // the job on the screen: {job, viewer, mode, items, source}

// ---------------------------------------------------------------- requests

async function ask(path, options = {}) {
  const headers = { ...(options.headers || {}), ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const answer = await fetch(path, { ...options, headers });
  if (answer.ok) return answer.status === 204 ? null : answer.json();
  const problem = await answer.json().catch(() => ({ detail: `the service answered ${answer.status}` }));
  if (answer.status === 401) $("key-form").hidden = false;
  throw new Error(problem.detail);
}

function say(error) {
  $("message").textContent = error ? error.message || String(error) : "";
  $("message").hidden = !error;
}

function guarded(act) {
  return async (...given) => {
    try { say(null); await act(...given); } catch (error) { say(error); }
  };
}

// ---------------------------------------------------------------- a new picture

const open = guarded(async (file) => {
  let bitmap = null;
  try { bitmap = await createImageBitmap(file); } catch { /* a TIFF, say: restored without being shown before */ }
  picture = { file, bitmap, mask: document.createElement("canvas"), factor: 1, maskFile: null };
  $("mask-file").value = "";
  $("prepare").hidden = false;
  $("drop-hint").textContent = `${file.name}, ${(file.size / 1e6).toFixed(1)} MB`;
  $("paint-hint").textContent = bitmap
    ? "Paint over what is missing or damaged. What stays unpainted is kept."
    : "This browser cannot show the file; give a mask file, or restore it without one.";
  if (bitmap) {
    picture.factor = Math.min(1, 1600 / Math.max(bitmap.width, bitmap.height));
    for (const canvas of [$("paint"), picture.mask]) {
      canvas.width = Math.max(1, Math.round(bitmap.width * picture.factor));
      canvas.height = Math.max(1, Math.round(bitmap.height * picture.factor));
    }
  }
  $("paint").hidden = !bitmap;
  drawPainting();
  tellSize();
});

function drawPainting() {
  if (!picture || !picture.bitmap) return;
  const canvas = $("paint"), context = canvas.getContext("2d");
  context.drawImage(picture.bitmap, 0, 0, canvas.width, canvas.height);
  context.globalAlpha = 0.6;
  context.drawImage(picture.mask, 0, 0);
  context.globalAlpha = 1;
}

function stroke(from, to) {
  const context = picture.mask.getContext("2d");
  context.globalCompositeOperation = $("erase").getAttribute("aria-pressed") === "true" ? "destination-out" : "source-over";
  context.strokeStyle = "#ff2020";
  context.lineWidth = Number($("brush").value);
  context.lineCap = "round";
  context.beginPath();
  context.moveTo(from.x, from.y);
  context.lineTo(to.x, to.y + 0.01);
  context.stroke();
  picture.painted = true;
  drawPainting();
}

function place(event) {
  const box = $("paint").getBoundingClientRect();
  return {
    x: ((event.clientX - box.left) / box.width) * $("paint").width,
    y: ((event.clientY - box.top) / box.height) * $("paint").height,
  };
}

let last = null;
$("paint").addEventListener("pointerdown", (event) => {
  $("paint").setPointerCapture(event.pointerId);
  last = place(event);
  stroke(last, last);
});
$("paint").addEventListener("pointermove", (event) => {
  if (!last) return;
  const now = place(event);
  stroke(last, now);
  last = now;
});
for (const name of ["pointerup", "pointercancel"]) $("paint").addEventListener(name, () => { last = null; });

let cursor = null; // painting by keys
$("paint").addEventListener("keydown", (event) => {
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const canvas = $("paint");
  cursor = cursor || { x: canvas.width / 2, y: canvas.height / 2 };
  if (event.key in steps) {
    const step = Number($("brush").value) / 2;
    const next = {
      x: Math.min(canvas.width, Math.max(0, cursor.x + steps[event.key][0] * step)),
      y: Math.min(canvas.height, Math.max(0, cursor.y + steps[event.key][1] * step)),
    };
    if (event.shiftKey) stroke(cursor, next);
    cursor = next;
  } else if (event.key === " ") stroke(cursor, cursor);
  else return;
  event.preventDefault();
  drawPainting();
  const context = canvas.getContext("2d");
  context.strokeStyle = "#ffffff";
  context.strokeRect(cursor.x - 5, cursor.y - 5, 10, 10);
});

$("erase").addEventListener("click", () => {
  $("erase").setAttribute("aria-pressed", String($("erase").getAttribute("aria-pressed") !== "true"));
});
$("clear").addEventListener("click", () => {
  picture.mask.getContext("2d").clearRect(0, 0, picture.mask.width, picture.mask.height);
  picture.painted = false;
  picture.maskFile = null;
  $("mask-file").value = "";
  drawPainting();
});
$("mask-file").addEventListener("change", () => { picture.maskFile = $("mask-file").files[0] || null; });
$("scale").addEventListener("change", tellSize);

function tellSize() {
  if (!picture || !picture.bitmap) { $("size").textContent = ""; return; }
  const scale = Number($("scale").value);
  $("size").textContent = `${picture.bitmap.width * scale} × ${picture.bitmap.height * scale} pixels`;
}

async function maskBlob() {
  if (picture.maskFile) return picture.maskFile;
  if (!picture.painted || !picture.bitmap) return null;
  const canvas = document.createElement("canvas");
  canvas.width = picture.bitmap.width;
  canvas.height = picture.bitmap.height;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(picture.mask, 0, 0, canvas.width, canvas.height);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  let missing = 0;
  for (let at = 0; at < pixels.data.length; at += 4) {
    const value = pixels.data[at + 3] > 127 ? 255 : 0;
    missing += value;
    pixels.data[at] = pixels.data[at + 1] = pixels.data[at + 2] = value;
    pixels.data[at + 3] = 255;
  }
  context.putImageData(pixels, 0, 0);
  if (!missing) return null;
  const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
  if (!blob) throw new Error("this browser cannot make a mask as large as the picture; give a mask file");
  return blob;
}

function send(form) {
  return new Promise((done, fail) => { // fetch tells nothing of an upload's progress
    const request = new XMLHttpRequest();
    request.open("POST", "/v1/restorations");
    if (key) request.setRequestHeader("Authorization", `Bearer ${key}`);
    request.upload.onprogress = (event) => { $("sending").value = event.loaded / event.total; };
    request.onerror = () => fail(new Error("the connection was lost"));
    request.onload = () => {
      let body = {};
      try { body = JSON.parse(request.responseText); } catch { /* told below */ }
      if (request.status === 401) $("key-form").hidden = false;
      if (request.status < 300) done(body);
      else fail(new Error(body.detail || `the service answered ${request.status}`));
    };
    request.send(form);
  });
}

$("start").addEventListener("click", guarded(async () => {
  $("start").disabled = true;
  $("sending").hidden = false;
  try {
    const form = new FormData();
    form.append("options", JSON.stringify({ scale: Number($("scale").value) }));
    const mask = await maskBlob();
    if (mask) form.append("mask", mask, mask.name || "mask.png");
    form.append("image", picture.file, picture.file.name);
    const job = await send(form);
    location.hash = job.links.view.slice(2);
    await list();
    $("job-title").focus();
  } finally {
    $("start").disabled = false;
    $("sending").hidden = true;
  }
}));

$("file").addEventListener("change", () => { if ($("file").files[0]) open($("file").files[0]); });
for (const [name, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  $("drop").addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", over);
    if (name === "drop" && event.dataTransfer.files[0]) {
      $("file").files = event.dataTransfer.files;
      open($("file").files[0]);
    }
  });
}

// ---------------------------------------------------------------- a job

function leave() {
  looks += 1;
  if (!shown) return;
  shown.source.close();
  clearInterval(shown.timer);
  if (shown.viewer) shown.viewer.destroy();
  shown = null;
}

const go = guarded(async () => {
  leave();
  const mine = looks;
  const [id, token] = location.hash.slice(1).split(".");
  $("job").hidden = true;
  $("new").hidden = Boolean(id);
  if (!id) return;
  $("link").hidden = true;
  const job = await ask(`/v1/restorations/${id}?token=${token || ""}`).catch((error) => {
    if (mine === looks) $("new").hidden = false;
    throw error;
  });
  if (mine !== looks) return; // another one was chosen meanwhile
  $("job").hidden = false;
  press("slider");
  shown = { job, viewer: null, mode: "slider", items: {}, source: null };
  listen();
  shown.timer = setInterval(refresh, LOOK_MS);
  update(job);
});

function listen() {
  const own = shown, source = new EventSource(own.job.links.events);
  own.source = source;
  source.onmessage = (event) => { if (own === shown) update(JSON.parse(event.data)); };
  source.onerror = () => {
    if (own !== shown) return;
    if (["done", "failed"].includes(own.job.state)) source.close();
    // a refusal, by the service or a proxy before it: the browser does not ask again
    else if (source.readyState === EventSource.CLOSED) setTimeout(() => { if (own === shown) listen(); }, 3000);
  };
}

function press(mode) {
  for (const button of document.querySelectorAll("[data-mode]")) {
    button.setAttribute("aria-pressed", String(button.dataset.mode === mode));
  }
}

function update(job) {
  const before = shown.job;
  shown.job = job;
  $("job-title").textContent = job.name;
  $("progress").value = job.progress;
  $("state").textContent = stateText(job);
  const step = job.state === "running" ? `${25 * Math.floor(4 * job.progress)} % restored` : stateText(job);
  if (step !== $("spoken").textContent) $("spoken").textContent = step; // not every percent is read aloud
  for (const [mode, layer] of Object.entries({ slider: "original", sides: "original", difference: "difference", mask: "mask" })) {
    document.querySelector(`[data-mode="${mode}"]`).hidden = !job.links.iiif[layer];
  }
  $("downloads").replaceChildren(...(job.state === "done" ? downloads(job) : []));
  if (job.state === "failed") say(new Error(job.problem.detail));
  else if (!shown.viewer && job.state !== "queued") look().catch(() => setTimeout(() => { if (shown) update(shown.job); }, 400));
  if (job.state === "done" && before.state !== "done") { refresh(true); list(); }
}

function stateText(job) {
  const pixels = `${job.width} × ${job.height} pixels`;
  if (job.state === "queued") return `Waiting${job.queue_position ? `, number ${job.queue_position}` : ""}. ${pixels}`;
  if (job.state === "running") {
    const left = job.seconds_left === null ? "" : `, about ${Math.max(1, Math.round(job.seconds_left))} s left`;
    return `${Math.round(100 * job.progress)} % restored${left}. ${pixels}`;
  }
  return job.state === "done" ? `Done. ${pixels}` : "Not restored.";
}

function downloads(job) {
  return Object.entries({ tiff: "TIFF", png: "PNG", jpeg: "JPEG", "ome-zarr": "OME-Zarr" }).map(([format, label]) => {
    const link = document.createElement("a");
    link.href = job.links.result[format];
    link.download = "";
    link.textContent = label;
    link.style.marginRight = "1rem";
    return link;
  });
}

async function look() {
  if (!window.OpenSeadragon) { say(new Error("the viewer's library is missing on the server; see `make viewer`")); return; }
  if (shown.opening) return;
  shown.opening = true;
  const own = shown, layers = own.job.links.iiif, found = {};
  try {
    for (const name of Object.keys(layers)) {
      const answer = await fetch(`${layers[name]}/info.json`, { headers: { Accept: "application/json" } });
      if (!answer.ok) throw new Error("not there yet");
      found[name] = await answer.json();
    }
  } finally { own.opening = false; }
  if (own !== shown) return;
  const viewer = OpenSeadragon({
    element: $("show"),
    prefixUrl: "/viewer/openseadragon/images/",
    drawer: "canvas",
    showNavigator: false,
    animationTime: 0.5,
    maxZoomPixelRatio: 4,
    visibilityRatio: 0.5,
    minZoomImageRatio: 0.8,
    gestureSettingsMouse: { clickToZoom: false },
  });
  shown.viewer = viewer;
  for (const name of ["original", "restored", "difference", "mask"]) {
    if (!found[name]) continue;
    viewer.addTiledImage({
      tileSource: found[name],
      width: 1,
      success: (event) => { own.items[name] = event.item; if (own === shown) arrange(); },
    });
  }
  viewer.addHandler("update-viewport", clip);
  viewer.addHandler("animation", clip);
}

function arrange() {
  const { items, mode, viewer } = shown;
  const sides = mode === "sides";
  const visible = { slider: ["original", "restored"], sides: ["original", "restored"], difference: ["difference"], mask: ["original", "mask"] }[mode];
  for (const [name, item] of Object.entries(items)) {
    item.setOpacity(visible.includes(name) ? (name === "mask" && mode === "mask" ? 0.5 : 1) : 0);
    item.setPreload(false);
    item.setPosition(new OpenSeadragon.Point(sides && name === "restored" ? 1.02 : 0, 0), true);
    if (mode !== "slider") item.setClip(null);
  }
  if (viewer && mode !== shown.arranged && items.restored) {
    shown.arranged = mode;
    viewer.viewport.goHome(true);
  }
  $("split-label").hidden = mode !== "slider" || !items.original;
  clip();
}

function clip() {
  if (!shown || !shown.viewer || shown.mode !== "slider") return;
  const item = shown.items.restored;
  if (!item || !shown.job.links.iiif.original) return;
  const bounds = shown.viewer.viewport.getBoundsNoRotate(true);
  const size = item.getContentSize();
  const x = Math.round(Math.min(size.x, Math.max(0, (bounds.x + (bounds.width * $("split").value) / 1000) * size.x)));
  if (x !== shown.clipped) {
    shown.clipped = x;
    item.setClip(new OpenSeadragon.Rect(x, 0, Math.max(1, size.x - x), size.y));
    shown.viewer.forceRedraw();
  }
}

function refresh(force) {
  if (!shown || !shown.viewer) return;
  const rested = performance.now() - (shown.refreshedAt || 0) > REFRESH_MS;
  if (force === true || (rested && shown.job.progress !== shown.refreshed)) {
    shown.refreshed = shown.job.progress;
    shown.refreshedAt = performance.now();
    for (const name of ["restored", "difference"]) if (shown.items[name]) shown.items[name].reset();
    shown.viewer.forceRedraw();
  }
}

$("split").addEventListener("input", () => { if (shown) { shown.clipped = null; clip(); } });
for (const button of document.querySelectorAll("[data-mode]")) {
  button.addEventListener("click", () => {
    press(button.dataset.mode);
    if (!shown) return;
    shown.mode = button.dataset.mode;
    shown.clipped = null;
    arrange();
  });
}
$("share").addEventListener("click", guarded(async () => {
  if (navigator.clipboard) { // only over TLS and on this machine
    await navigator.clipboard.writeText(location.href);
    $("spoken").textContent = $("state").textContent = "The link is copied. Who has it may look at this picture.";
  } else {
    $("link").value = location.href;
    $("link").hidden = false;
    $("link").select();
  }
}));
$("delete").addEventListener("click", guarded(async () => {
  await ask(`/v1/restorations/${shown.job.id}`, { method: "DELETE" });
  location.hash = "";
  await list();
}));

// ---------------------------------------------------------------- all jobs

async function list() {
  const jobs = await ask("/v1/restorations");
  $("mine").replaceChildren(...jobs.map((job) => {
    const item = document.createElement("li"), link = document.createElement("a");
    link.href = job.links.view.slice(1);
    link.textContent = job.name;
    item.append(link, `, ${job.width} × ${job.height}, ${job.state}`);
    return item;
  }));
}

$("key-form").addEventListener("submit", guarded(async (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  sessionStorage.setItem("key", key);
  await list();
  $("key-form").hidden = true;
}));

window.addEventListener("hashchange", go);
go();
list().catch((error) => { if (!location.hash) say(error); }); // who was given a link alone has no list
