// SPDX-License-Identifier: Apache-2.0
// The page: an image or a camera, a question, and an answer. An image waits for Ask; about what the camera sees there is
// one answer after the other.

const part = (id) => document.getElementById(id);
const [video, canvas, status, answer, question] = ["video", "canvas", "status", "answer", "question"].map(part);
const [cameraButton, fileInput, askButton, stopButton] = ["camera", "file", "ask", "stop"].map(part);
const parameters = new URLSearchParams(location.search);
const worker = new Worker("./worker.js", { type: "module" });

let stream = null; // of the camera, while it is on
let chosen = false; // whether the canvas has an image
let wish = 0; // counts the user's actions: work for an earlier one ends
let running = false;
let last = Promise.resolve(); // ends with the answer that is being written
let onText = () => {};

function say(text, kind = "") {
  status.textContent = text;
  status.dataset.kind = kind;
}

/** Send a message to the model's thread and wait for its end. */
function request(message, transferred = []) {
  return new Promise((resolve, reject) => {
    worker.onmessage = ({ data }) => {
      if (data.kind === "progress") say(`Loading ${data.file}: ${data.percent} %`);
      else if (data.kind === "text") onText(data.text);
      else if (data.kind === "error") reject(new Error(data.message));
      else resolve();
    };
    worker.onerror = (event) => reject(new Error(event.message ?? "worker.js could not be loaded"));
    worker.postMessage(message, transferred);
  });
}

function show(isRunning) {
  running = isRunning;
  stopButton.disabled = !running;
}

function halt() {
  wish += 1;
  if (running) worker.postMessage({ kind: "stop" });
  show(false);
}

async function describe(mine) {
  const start = performance.now();
  const image = await createImageBitmap(stream ? video : canvas);
  let text = "";
  onText = (added) => {
    text += added;
    if (mine === wish) answer.textContent = text;
  };
  const words = question.value.trim() || "Describe the picture.";
  await request({ kind: "answer", image, question: words }, [image]);
  if (mine === wish) say(`${((performance.now() - start) / 1000).toFixed(1)} s`);
}

function run() {
  if (askButton.disabled) return;
  if (!stream && !chosen) {
    say("Choose an image first, or turn the camera on.");
    return;
  }
  halt();
  const mine = wish;
  show(true);
  say("");
  last = last.then(async () => {
    try {
      while (mine === wish) {
        await describe(mine);
        if (!stream) break;
      }
    } catch (error) {
      if (mine === wish) say(error.message, "error");
    }
    if (mine === wish) show(false);
  });
}

async function startCamera() {
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" }, audio: false });
  } catch (error) {
    say(`No camera: ${error.message}`, "error");
    return;
  }
  stream.getVideoTracks()[0].addEventListener("ended", stopCamera);
  video.srcObject = stream;
  await video.play();
  document.body.dataset.view = "camera";
  cameraButton.textContent = "Camera off";
  run();
}

function stopCamera() {
  halt();
  stream?.getTracks().forEach((track) => track.stop());
  stream = null;
  document.body.dataset.view = chosen ? "image" : "";
  cameraButton.textContent = "Camera";
}

async function choose(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    say(`${file.name} is not an image that this browser can read.`, "error");
    return;
  }
  if (stream) stopCamera();
  else halt();
  canvas.width = bitmap.width;
  canvas.height = bitmap.height;
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  bitmap.close();
  chosen = true;
  document.body.dataset.view = "image";
  answer.textContent = "";
  say("Ask a question about this image.");
}

cameraButton.addEventListener("click", () => (stream ? stopCamera() : startCamera()));
askButton.addEventListener("click", run);
stopButton.addEventListener("click", halt);
question.addEventListener("keydown", (event) => event.key === "Enter" && run());
fileInput.addEventListener("change", () => fileInput.files.length && choose(fileInput.files[0]));

/** Return WebGPU's adapter, or null: a browser may know WebGPU and have no adapter for it. */
async function gpuAdapter() {
  try {
    return (await navigator.gpu?.requestAdapter()) ?? null;
  } catch {
    return null;
  }
}

say("Loading the model …");
try {
  const device = parameters.get("device") ?? ((await gpuAdapter()) ? "webgpu" : "wasm");
  await request({
    kind: "load",
    directory: parameters.get("model") ?? "model",
    dtype: parameters.get("dtype") ?? (device === "webgpu" ? "q4f16" : "q4"),
    device,
  });
  for (const control of [cameraButton, fileInput, askButton]) control.disabled = false;
  document.body.dataset.ready = "yes";
  say(`Ready, on ${device}.`);
} catch (error) {
  say(`The model could not be loaded: ${error.message}`, "error");
}
