// The page's calls to its server: one stream of updates, and questions. The token came in the link's fragment, which a
// browser never sends; from here it goes into a header.

const TOKEN = "pdctl-token";
const HIDDEN_MS = 60_000;
// Updates come every second; so long without one, and the connection counts as lost.
const SILENCE_MS = 15_000;
const [FIRST_WAIT_MS, LONGEST_WAIT_MS] = [500, 8_000];

/** Take the token out of the address, so that it is not in the browser's history or in a picture of the screen. */
export function takeToken() {
  const given = location.hash.slice(1);
  if (/^[0-9a-f]{40}$/.test(given)) {
    sessionStorage.setItem(TOKEN, given);
    history.replaceState(null, "", location.pathname);
  }
}

class Refused extends Error {
  constructor(status, reason) {
    super(reason);
    this.status = status;
  }
}

async function ask(method, path, signal) {
  const headers = { authorization: `Bearer ${sessionStorage.getItem(TOKEN) ?? ""}` };
  const answer = await fetch(path, { method, headers, signal, cache: "no-store" });
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  throw new Refused(answer.status, told.reason || `The server answered ${answer.status}.`);
}

/** The JSON answer to a question. Throws an Error with the reason. */
export async function call(method, path) {
  return (await ask(method, path, AbortSignal.timeout(20_000))).json();
}

const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

function untilVisible() {
  if (!document.hidden) return Promise.resolve();
  return new Promise((done) => document.addEventListener("visibilitychange", done, { once: true }));
}

/** Call `onFrame` with every update, and `onLink(tone, words)` when the connection changes. Ends if it is refused. */
export async function follow(onFrame, onLink) {
  let wait = FIRST_WAIT_MS;
  for (;;) {
    await untilVisible();
    try {
      await stream((frame) => {
        wait = FIRST_WAIT_MS;
        onLink("good", "live");
        onFrame(frame);
      });
      onLink("bad", "the supervisor has ended");
    } catch (failure) {
      if (failure.status === 401 || failure.status === 403) {
        onLink("bad", "refused", failure.message);
        return;
      }
      onLink(document.hidden ? "idle" : "bad", document.hidden ? "paused" : "connection lost", failure.message);
    }
    await sleep(wait * (0.75 + Math.random() / 2));
    wait = Math.min(2 * wait, LONGEST_WAIT_MS);
  }
}

/** Read one stream to its end. A page that nobody sees stops reading after a while: the server then does less, too. */
async function stream(onFrame) {
  const stop = new AbortController();
  const timers = { silence: 0, hidden: 0 };
  const heard = () => {
    clearTimeout(timers.silence);
    timers.silence = setTimeout(() => stop.abort(), SILENCE_MS);
  };
  const seen = () => {
    clearTimeout(timers.hidden);
    if (document.hidden) timers.hidden = setTimeout(() => stop.abort(), HIDDEN_MS);
  };
  document.addEventListener("visibilitychange", seen);
  heard();
  try {
    const answer = await ask("GET", "/api/live", stop.signal);
    await readLines(answer.body.getReader(), (line) => {
      heard();
      onFrame(JSON.parse(line));
    });
  } finally {
    document.removeEventListener("visibilitychange", seen);
    clearTimeout(timers.silence);
    clearTimeout(timers.hidden);
  }
}

async function readLines(reader, onLine) {
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
    rest = lines.pop();
    lines.forEach(onLine);
  }
}
