// Requests to the server that this page came from: the key, errors in one sentence, and streamed answers.
// Knows nothing of the document.

const KEY = "gear-api-key";

/** One sentence for people; `status` 0 means that no answer came. */
export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** For this tab and no longer: never in localStorage, cookies or addresses. */
export function rememberKey(key) {
  sessionStorage.setItem(KEY, key);
}

export async function request(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch {
    throw new ServerError("The server does not answer.", 0);
  }
  if (!response.ok) throw new ServerError(await reason(response), response.status);
  return response;
}

async function reason(response) {
  try {
    return sentence((await response.json()).error.message);
  } catch {
    return `The server answered ${response.status} ${response.statusText}`.trim() + ".";
  }
}

function sentence(text) {
  const trimmed = text.trim();
  return trimmed[0].toUpperCase() + trimmed.slice(1) + (/[.!?]$/.test(trimmed) ? "" : ".");
}

/** Yields `{text}`, `{finish}` and `{usage}` as they come. Aborting `signal` closes the connection, which ends the answer. */
export async function* streamChat(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(sentence(chunk.error.message), 200);
    if (chunk.usage) yield { usage: chunk.usage };
    for (const { delta, finish_reason: finish } of chunk.choices) {
      if (delta.content) yield { text: delta.content };
      if (finish) yield { finish };
    }
  }
  throw new ServerError("The connection ended before the answer did.", 0);
}

/** The data of server-sent events; one may be split anywhere, also within a character. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6);
  }
}
