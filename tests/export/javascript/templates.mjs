// SPDX-License-Identifier: Apache-2.0
// node templates.mjs FILE: render each [template, messages, add_generation_prompt] of a JSON file.

import fs from "node:fs";
import { Template } from "@huggingface/jinja";

const rendered = JSON.parse(fs.readFileSync(process.argv[2], "utf8")).map(([template, messages, add_generation_prompt]) =>
  new Template(template).render({ messages, add_generation_prompt }),
);
console.log(JSON.stringify(rendered));
