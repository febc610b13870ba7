// Turns data from devices into text that is safe to show, and formats numbers.

// Invisible characters, and characters that reorder or break the text around them.
const UNSEEN = /[\u0000-\u001f\u007f-\u00a0\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/g;
const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

export function visible(text, keepLines = false) {
  return text.replace(UNSEEN, c => keepLines && (c === "\n" || c === "\t") ? c
    : `⟨${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

export function cut(text, length) {
  const characters = Array.from(text.slice(0, 2 * length + 2));
  return characters.length > length ? characters.slice(0, length).join("") + "…" : text;
}

export function bytesOf(base64) {
  return Uint8Array.from(atob(base64), c => c.charCodeAt(0));
}

// A payload as text if it is UTF-8, else in hexadecimal. If it is truncated, its last character may
// be incomplete.
export function payloadText(base64, size) {
  const bytes = bytesOf(base64);
  for (let spare = 0; spare < (size > bytes.length ? 4 : 1) && spare <= bytes.length; spare++) {
    try {
      const text = decoder.decode(bytes.subarray(0, bytes.length - spare));
      if (!/[\u0000-\u0008\u000e-\u001f]/.test(text)) return { text, binary: false };
      break;
    } catch { /* not UTF-8, or cut within a character */ }
  }
  const hex = Array.from(bytes, byte => byte.toString(16).padStart(2, "0")).join(" ");
  return { text: hex, binary: true };
}

// The values in a document, at most `most`: [path, value]. Paths are as in the view `readings`.
export function leaves(document, topic = "", most = 200) {
  const found = [], nested = document !== null && typeof document === "object";
  const collect = (name, value) => {
    if (found.length >= most) return;
    if (value === null || typeof value !== "object") found.push([name, value]);
    else if (Array.isArray(value)) value.forEach((each, i) => collect(`${name}[${i}]`, each));
    else for (const [key, each] of Object.entries(value)) collect(name ? `${name}.${key}` : key, each);
  };
  if (document !== null) collect(nested ? "" : topic.split("/").at(-1), document);
  return found;
}

// The content of a message, on one line.
export function valueText(fields, base64, size) {
  if (fields !== null) {
    const entries = leaves(fields);
    if (entries.length === 1) return one(entries[0][1]);
    return entries.map(([name, value]) => `${name} ${one(value)}`).join("  ");
  }
  if (size === 0) return "(empty)";
  return payloadText(base64, size).text.replace(/\s+/g, " ");
}

function one(value) {
  return typeof value === "number" ? number(value) : String(value);
}

export function number(value) {
  if (!Number.isFinite(value)) return String(value);
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-4 || size >= 1e12)) return value.toExponential(3);
  return value.toLocaleString("en", { maximumSignificantDigits: size >= 1e5 ? 12 : 6 });
}

export function rate(perSecond) {
  if (!perSecond) return "0/s";
  if (perSecond < 0.1) return `${number(+(perSecond * 60).toPrecision(2))}/min`;
  return `${number(perSecond < 100 ? +perSecond.toPrecision(2) : Math.round(perSecond))}/s`;
}

export function duration(seconds) {
  if (seconds < 0.0005) return "0 ms";
  if (seconds < 1) return `${Math.max(1, Math.round(seconds * 1000))} ms`;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  return age(seconds);
}

export function age(seconds) {
  if (seconds < 1) return "now";
  if (seconds < 60) return `${Math.floor(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 2 * 86400) return `${Math.floor(seconds / 3600)} h`;
  return `${Math.floor(seconds / 86400)} d`;
}

export function size(bytes) {
  if (bytes < 1024) return `${bytes} B`;
  return bytes < 1 << 20 ? `${(bytes / 1024).toFixed(1)} KiB` : `${(bytes / (1 << 20)).toFixed(1)} MiB`;
}

export function moment(at) {
  const date = new Date(at * 1000), pad = (n, width = 2) => String(n).padStart(width, "0");
  const time = `${pad(date.getHours())}:${pad(date.getMinutes())}:${pad(date.getSeconds())}.${pad(date.getMilliseconds(), 3)}`;
  const day = `${date.getFullYear()}-${pad(date.getMonth() + 1)}-${pad(date.getDate())}`;
  return new Date().toDateString() === date.toDateString() ? time : `${day} ${time}`;
}

export function plural(count, what) {
  return `${count.toLocaleString("en")} ${what}${count === 1 ? "" : "s"}`;
}

// An element with text in it. Text is never parsed as HTML.
export function element(name, className, ...content) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...content.filter(part => part !== null && part !== undefined));
  return made;
}

export function isolated(text, className) {
  const made = element("bdi", className, text);
  made.dir = "auto";
  return made;
}
