// Chat with OpenAI's JavaScript client: whole, and as a stream that is stopped in the middle.
//
// npm install; start a server with gear-serve; node openai_client.mjs

import OpenAI from "openai";

const client = new OpenAI({
  baseURL: `${process.env.GEAR_URL ?? "http://127.0.0.1:8000"}/v1`,
  apiKey: process.env.GEAR_API_KEY ?? "none",
});
const model = (await client.models.list()).data[0].id;

const answer = await client.chat.completions.create({
  model,
  messages: [{ role: "user", content: "What is the capital of France?" }],
  temperature: 0,
});
console.log("whole:", answer.choices[0].message.content);

const stream = await client.chat.completions.create({
  model,
  messages: [{ role: "user", content: "Write a long story about the sea." }],
  stream: true,
});
let numChunks = 0;
for await (const chunk of stream) {
  process.stdout.write(chunk.choices[0]?.delta?.content ?? "");
  numChunks += 1;
  if (numChunks === 20) break; // the server hears of it and frees the pages
}
console.log(`\nstopped after ${numChunks} chunks`);

const response = await client.responses.create({ model, input: "What is the capital of Japan?", temperature: 0 });
console.log("response:", response.output_text);
