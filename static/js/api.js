// The API as the page calls it: the session's XSRF value in a header, problems as errors.
//
// This module neither shows messages (ui.js does) nor retries: that is the user's decision.

const proof = document.querySelector('meta[name="xsrf"]')?.content ?? "";
let onSignedOut = () => {};

/** A failed request: the problem that the server answered with, or that it couldn't be reached. */
export class Problem extends Error {
  constructor(status, body) {
    super(body.detail || body.title || "The server can't be reached.");
    this.status = status;
    this.code = body.code || "";
    this.title = body.title || "No answer";
  }
}

/** Call `then` when the server answers that the session has ended. */
export function whenSignedOut(then) {
  onSignedOut = then;
}

/** One request, with JSON or a form; the JSON of its answer, null if it has none. Throws Problem. */
export async function request(method, path, body) {
  const headers = { Accept: "application/json", "X-Keypool-Xsrf": proof };
  const form = body instanceof URLSearchParams;
  if (body !== undefined && !form) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, body: form || body === undefined ? body : JSON.stringify(body) });
  } catch {
    throw new Problem(0, { title: "No connection", detail: "The server can't be reached; whether the call took effect isn't known." });
  }
  if (response.status === 401) onSignedOut();
  const text = await response.text();
  const answer = text && response.headers.get("Content-Type")?.includes("json") ? JSON.parse(text) : null;
  if (!response.ok) throw new Problem(response.status, answer ?? { title: response.statusText });
  return answer;
}

/** The beginning of the paths of this page's pool: empty for `default`, else /pools/NAME. */
export const { base } = document.body.dataset;

/** A call about this page's pool: `path` is below /api/v1, or below the pool's own path there. */
export function call(method, path, body) {
  return request(method, `/api/v1${base}${path}`, body);
}

/** A call about pools: `path` is below /api/v1/pools. */
export function callPools(method, path, body) {
  return request(method, `/api/v1/pools${path}`, body);
}
