// SPDX-License-Identifier: Apache-2.0
// Decodes a GGUF file by node-llama-cpp, for benchmarks/llamacpp.py: `node llamacpp_decode.mjs FILE THREADS PROMPT TOKENS`.
// For each line of standard input it decodes TOKENS tokens after a prompt of PROMPT tokens, greedily, and writes the
// tokens a second after the first one as a line of JSON.

import { createInterface } from "node:readline";
import { getLlama } from "node-llama-cpp";

const [modelPath, ...numbers] = process.argv.slice(2);
const [threads, promptTokens, newTokens] = numbers.map(Number);
const llama = await getLlama({ gpu: false, build: "never", logLevel: "error", maxThreads: threads });
const model = await llama.loadModel({ modelPath });
const context = await model.createContext({ contextSize: promptTokens + newTokens + 16, threads });
const sequence = context.getSequence();
const prompt = Array.from({ length: promptTokens }, (_, index) => index % 256);

for await (const _ of createInterface({ input: process.stdin })) {
  await sequence.clearHistory();
  let first = 0;
  let last = 0;
  let tokens = 0;
  for await (const _token of sequence.evaluate(prompt, { temperature: 0, yieldEogToken: true })) {
    last = performance.now();
    first ||= last;
    tokens += 1;
    if (tokens === newTokens) break;
  }
  console.log(JSON.stringify({ tokens_per_second: (1000 * (tokens - 1)) / (last - first) }));
}
process.exit(0);
