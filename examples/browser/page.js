// SPDX-License-Identifier: Apache-2.0
// The page: a camera or a picture, a question, and an answer that starts again as soon as it is finished.

import { load } from "./fastvlm.js";

const part = (id) => document.getElementById(id);
const [video, canvas, status, answer, question] = ["video", "canvas", "status", "answer", "question"].map(part);
const [cameraButton, fileInput, askButton] = ["camera", "file", "ask"].map(part);
const address = new URLSearchParams(location.search);

let model = null;
let stream = null;
let picture = null; // a canvas with the picture that was chosen, while the camera is off
let running = false;

function say(text, kind = "") {
  status.textContent = text;
  status.dataset.kind = kind;
}

function draw(source, width, height) {
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").drawImage(source, 0, 0, width, height);
  return canvas;
}

async function describe() {
  const source = stream ? draw(video, video.videoWidth, video.videoHeight) : picture;
  if (!source || !source.width) return;
  let text = "";
  const start = performance.now();
  await model.answer(source, question.value.trim() || "Describe the picture.", {
    onText: (piece) => {
      text += piece;
      answer.textContent = text;
    },
  });
  say(`${((performance.now() - start) / 1000).toFixed(1)} s`);
}

async function run() {
  if (running || !model) return;
  running = true;
  askButton.textContent = "Stop";
  try {
    do await describe();
    while (running && stream);
  } catch (error) {
    say(String(error.message ?? error), "error");
  }
  running = false;
  askButton.textContent = "Ask";
}

function halt() {
  running = false;
  model?.stop();
}

async function startCamera() {
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" }, audio: false });
  } catch (error) {
    say(`No camera: ${error.message}`, "error");
    return;
  }
  video.srcObject = stream;
  await video.play();
  document.body.dataset.view = "camera";
  cameraButton.textContent = "Camera off";
  run();
}

function stopCamera() {
  halt();
  stream.getTracks().forEach((track) => track.stop());
  stream = null;
  document.body.dataset.view = picture ? "picture" : "";
  cameraButton.textContent = "Camera";
}

cameraButton.addEventListener("click", () => (stream ? stopCamera() : startCamera()));
askButton.addEventListener("click", () => (running ? halt() : run()));
question.addEventListener("keydown", (event) => event.key === "Enter" && run());
fileInput.addEventListener("change", async () => {
  const [file] = fileInput.files;
  if (!file) return;
  if (stream) stopCamera();
  try {
    const bitmap = await createImageBitmap(file);
    picture = draw(bitmap, bitmap.width, bitmap.height);
  } catch {
    say(`${file.name} is not a picture that this browser can read.`, "error");
    return;
  }
  document.body.dataset.view = "picture";
  run();
});

const device = address.get("device") ?? (navigator.gpu ? "webgpu" : "wasm");
say("Loading the model …");
try {
  model = await load({
    directory: address.get("model") ?? "model",
    dtype: address.get("dtype") ?? (device === "webgpu" ? "q4f16" : "q4"),
    device,
    onProgress: ({ status: state, file, progress }) => {
      if (state === "progress") say(`Loading ${file}: ${Math.round(progress)} %`);
    },
  });
  for (const control of [cameraButton, fileInput, askButton]) control.disabled = false;
  document.body.dataset.ready = "yes";
  say(`Ready, on ${device}.`);
} catch (error) {
  say(`The model could not be loaded: ${error.message ?? error}`, "error");
}
