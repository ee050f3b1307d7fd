// SPDX-License-Identifier: Apache-2.0
// node run.mjs DIRECTORY DTYPE CASES: answer each case twice in transformers.js, from prepared tensors and from the
// image and the words; print one JSON object a case.

import fs from "node:fs";
import path from "node:path";
import { AutoModelForImageTextToText, AutoProcessor, RawImage, Tensor, env } from "@huggingface/transformers";

const [directory, dtype, file] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(directory) + path.sep;
const name = path.basename(directory);
const processor = await AutoProcessor.from_pretrained(name);
const model = await AutoModelForImageTextToText.from_pretrained(name, { dtype, device: "cpu" });

async function generate(inputs) {
  const output = await model.generate({ ...inputs, max_new_tokens: 32, do_sample: false });
  const tokens = output.slice(null, [inputs.input_ids.dims.at(-1), null]);
  return [Array.from(tokens.data, Number), processor.batch_decode(tokens, { skip_special_tokens: true })[0].trim()];
}

for (const { image, question, pixels, shape, input_ids } of JSON.parse(fs.readFileSync(file, "utf8"))) {
  const bytes = fs.readFileSync(pixels);
  const values = new Float32Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 4);
  const size = [1, input_ids.length];
  const [tokens, text] = await generate({
    pixel_values: new Tensor("float32", values, shape),
    input_ids: new Tensor("int64", BigInt64Array.from(input_ids, BigInt), size),
    attention_mask: new Tensor("int64", new BigInt64Array(input_ids.length).fill(1n), size),
  });
  const prompt = processor.apply_chat_template([{ role: "user", content: `<image>\n${question}` }], {
    add_generation_prompt: true,
  });
  const inputs = await processor(await RawImage.read(image), prompt);
  const sameIds = inputs.input_ids.dims.at(-1) === input_ids.length && input_ids.every((id, i) => BigInt(id) === inputs.input_ids.data[i]);
  const distance = inputs.pixel_values.data.reduce((sum, value, i) => sum + Math.abs(value - values[i]), 0) / values.length;
  const [, own] = await generate(inputs);
  console.log(JSON.stringify({ tokens, text, own, sameIds, distance: 255 * distance }));
}
