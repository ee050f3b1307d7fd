// SPDX-License-Identifier: Apache-2.0
// A FastVLM that `fastvlm export onnx` wrote, in transformers.js: load it, ask it about images. Use it in a worker, as
// worker.js does: WebAssembly computes without a pause, and a page that does so itself stands still.

import {
  AutoModelForImageTextToText,
  AutoProcessor,
  InterruptableStoppingCriteria,
  RawImage,
  TextStreamer,
  env,
} from "./node_modules/@huggingface/transformers/dist/transformers.min.js";

/**
 * Load the model in a directory of this server, or anywhere a URL leads to. Nothing is fetched from elsewhere.
 *
 * @param {{directory?: string, dtype?: string, device?: string, onProgress?: (info: object) => void}} options
 *   directory: beside this page; dtype: a precision that was exported (fp32, fp16, q8, q4, q4f16);
 *   device: "webgpu" or "wasm"; onProgress: gets transformers.js' reports about the files.
 */
export async function load({ directory = "model", dtype = "q4", device = "wasm", onProgress = () => {} } = {}) {
  const here = new URL(".", import.meta.url);
  env.allowRemoteModels = false;
  env.allowLocalModels = true;
  env.useBrowserCache = false;
  env.localModelPath = here.pathname;
  const runtime = new URL("node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify", here).href;
  env.backends.onnx.wasm.wasmPaths = { mjs: `${runtime}.mjs`, wasm: `${runtime}.wasm` };
  const processor = await AutoProcessor.from_pretrained(directory);
  const model = await AutoModelForImageTextToText.from_pretrained(directory, {
    dtype,
    device,
    progress_callback: onProgress,
  });
  return new FastVLM(processor, model);
}

class FastVLM {
  constructor(processor, model) {
    this.processor = processor;
    this.model = model;
    this.stopping = new InterruptableStoppingCriteria();
    // A pause before each token, in which messages arrive: without it nobody could say stop.
    const forward = model.forward.bind(model);
    model.forward = async (inputs) => {
      await new Promise((resolve) => setTimeout(resolve));
      return forward(inputs);
    };
  }

  /** Answer a question about a canvas, an <img>'s URL or a RawImage; `onText` is called with each new part of the answer. */
  async answer(source, question, options) {
    this.stopping.reset();
    const image = await RawImage.read(source);
    const messages = [{ role: "user", content: `<image>\n${question}` }];
    const prompt = this.processor.apply_chat_template(messages, { add_generation_prompt: true });
    const inputs = await this.processor(image, prompt);
    return this.#write(inputs, options);
  }

  /** Continue prepared inputs: input_ids, attention_mask and pixel_values. Returns the answer's text. */
  async generate(inputs, options) {
    this.stopping.reset();
    return this.#write(inputs, options);
  }

  async #write(inputs, { maxNewTokens = 64, onText = () => {} } = {}) {
    const streamer = new TextStreamer(this.processor.tokenizer, {
      skip_prompt: true,
      skip_special_tokens: true,
      callback_function: onText,
    });
    const output = await this.model.generate({
      ...inputs,
      max_new_tokens: maxNewTokens,
      do_sample: false,
      streamer,
      stopping_criteria: this.stopping,
    });
    const answer = output.slice(null, [inputs.input_ids.dims.at(-1), null]);
    return this.processor.batch_decode(answer, { skip_special_tokens: true })[0].trim();
  }

  /** End the answer that is being written. */
  stop() {
    this.stopping.interrupt();
  }
}
