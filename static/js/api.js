// The API as the page calls it: the session's XSRF value in a header, problems as errors.
//
// This module neither shows messages (ui.js does) nor retries: that is the user's decision.

const proof = document.querySelector('meta[name="xsrf"]')?.content ?? "";
let onSignedOut = () => {};

/** Milliseconds after which a request has failed. */
export const PATIENCE = 10_000;

/** A failed request, for people: the problem that the server answered with, or that there was no answer. */
export class Problem extends Error {
  constructor(status, { title = "No answer", detail = "", code = "" }) {
    super(detail ? `${title}: ${detail}` : title);
    this.status = status;
    this.code = code;
  }

  /** What a fetch threw. `then` goes on from what happened. */
  static of(error, then = "") {
    const late = error.name === "TimeoutError";
    const detail = late ? `the server has taken longer than ${PATIENCE / 1000} s` : "the server can't be reached";
    return new Problem(0, { title: late ? "No answer" : "No connection", detail: detail + then });
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
  let response, text;
  try {
    response = await fetch(path, {
      method,
      headers,
      body: form || body === undefined ? body : JSON.stringify(body),
      signal: AbortSignal.timeout(PATIENCE),
    });
    text = await response.text();
  } catch (error) {
    throw Problem.of(error, method === "GET" ? "" : "; whether the call took effect isn't known");
  }
  if (response.status === 401) onSignedOut();
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
