// SPDX-License-Identifier: Apache-2.0
// The thread of the model. It is sent {kind: "load", ...options of load()}, {kind: "answer", image, question} with an
// ImageBitmap, and {kind: "stop"}; it sends {kind: "progress", file, percent}, {kind: "ready"}, {kind: "text", text} for
// each part of an answer, {kind: "done"}, and {kind: "error", message}.

import { load } from "./fastvlm.js";

let model = null;

const actions = {
  async load(options) {
    const onProgress = ({ status, file, progress }) =>
      status === "progress" && postMessage({ kind: "progress", file, percent: Math.round(progress) });
    model = await load({ ...options, onProgress });
    postMessage({ kind: "ready" });
  },

  async answer({ image, question }) {
    const canvas = new OffscreenCanvas(image.width, image.height);
    canvas.getContext("2d", { willReadFrequently: true }).drawImage(image, 0, 0);
    image.close();
    await model.answer(canvas, question, { onText: (text) => postMessage({ kind: "text", text }) });
    postMessage({ kind: "done" });
  },

  async stop() {
    model.stop();
  },
};

addEventListener("message", async ({ data: { kind, ...options } }) => {
  try {
    await actions[kind](options);
  } catch (error) {
    postMessage({ kind: "error", message: String(error.message ?? error) });
  }
});
