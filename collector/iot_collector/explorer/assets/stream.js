// The stream of server-sent events, read with fetch. It can send the view, and read the reason of a
// refusal; EventSource can do neither.

const viewer = Array.from(crypto.getRandomValues(new Uint8Array(12)), b => b.toString(16).padStart(2, "0")).join("");
const WAITS = [0.3, 1, 2, 4]; // seconds before the next attempt
const SILENCE = 8000; // milliseconds; the server sends something every second

export class Stream {
  // view() returns what is on the screen; handle(name, content) is called for each event, and
  // lost(reason) when the stream is lost.
  constructor(view, handle, lost) {
    Object.assign(this, { view, handle, lost, failures: 0, timer: 0, abort: null, sent: "" });
    document.addEventListener("visibilitychange", () => document.hidden ? this.stop() : this.restart(true));
  }

  // Opens another stream because the view has changed. It waits a moment, because somebody may hold
  // down an arrow key.
  restart(always = false) {
    if (document.hidden || (!always && this.sent === JSON.stringify(this.view()))) return;
    this.again(0.12);
  }

  stop() {
    clearTimeout(this.timer);
    this.abort?.abort();
    this.abort = null;
    this.sent = "";
  }

  again(seconds) {
    this.stop();
    this.timer = setTimeout(() => this.open(), seconds * 1000);
  }

  async open() {
    const abort = this.abort = new AbortController();
    const view = this.view();
    this.sent = JSON.stringify(view);
    let watchdog;
    const alive = () => {
      clearTimeout(watchdog);
      watchdog = setTimeout(() => abort.abort(new Error("it is silent")), SILENCE);
    };
    let reason = null;
    try {
      alive();
      const response = await fetch("explorer/stream", {
        method: "POST", signal: abort.signal, cache: "no-store",
        headers: { "Content-Type": "application/json" }, body: JSON.stringify({ viewer, ...view }),
      });
      if (!response.ok) throw new Refusal((await response.json()).error ?? `status ${response.status}`);
      await this.read(response.body, alive, abort.signal);
    } catch (error) {
      reason = error;
    }
    clearTimeout(watchdog);
    if (this.abort !== abort) return; // a newer stream has replaced it
    if (reason === null) return this.again(0.05); // the server ended it after its lifetime
    const wait = WAITS[Math.min(this.failures++, WAITS.length - 1)];
    this.lost(reason instanceof Refusal ? reason.message : null);
    this.again(wait);
  }

  async read(body, alive, signal) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done || signal.aborted) return;
      alive();
      this.failures = 0;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const [, name, content] = event.match(/^event: (\w+)\ndata: (.*)$/s) ?? [];
        if (name) this.handle(name, JSON.parse(content));
      }
    }
  }
}

class Refusal extends Error {}

export async function ask(path, parameters, signal) {
  const response = await fetch(`explorer/${path}?${new URLSearchParams(parameters)}`, { signal, cache: "no-store" });
  const content = await response.json();
  if (!response.ok) throw new Error(content.error);
  return content;
}
