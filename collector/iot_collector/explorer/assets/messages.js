// The last messages of the chosen topic.

import { cut, element, isolated, leaves, moment, payloadText, size, valueText, visible } from "./text.js";

const MOST = 200;

export class Messages {
  constructor(list) {
    Object.assign(this, { list, known: new Map() });
  }

  clear() {
    this.known.clear();
    this.list.replaceChildren();
  }

  get oldest() {
    return Math.min(...Array.from(this.known.values(), message => message.at));
  }

  // Returns the messages that were not known, the oldest first.
  add(messages, older = false) {
    const fresh = messages.filter(message => !this.known.has(message.id)).sort((a, b) => a.at - b.at || a.id - b.id);
    for (const message of fresh) {
      const row = show(message);
      this.known.set(message.id, { at: message.at, fields: message.fields });
      let before = this.list.firstElementChild;
      while (before && (before.dataset.at - message.at || before.dataset.id - message.id) > 0) before = before.nextElementSibling;
      this.list.insertBefore(row, before);
    }
    while (!older && this.known.size > MOST) {
      const last = this.list.lastElementChild;
      this.known.delete(last.dataset.id);
      last.remove();
    }
    return fresh;
  }
}

function show(message) {
  const { text, binary } = payloadText(message.payload, message.size);
  const one = visible(valueText(message.fields, message.payload, message.size));
  const summary = element("summary", "",
    element("time", "", moment(message.at)),
    isolated(cut(one, 160), binary ? "what hex" : "what"),
    element("span", "tags", tag(`QoS ${message.qos}`), message.retained ? tag("retained", "strong") : null,
      message.properties ? tag("MQTT 5") : null, binary && message.fields === null ? tag("binary") : null));
  const row = element("li", "", element("details", "", summary));
  const shown = binary ? 4096 : message.size;
  row.dataset.at = message.at;
  row.dataset.id = message.id;
  row.firstChild.addEventListener("toggle", () => {
    if (row.firstChild.childElementCount > 1) return;
    const body = element("dl", "");
    const add = (name, content) => content && body.append(element("dt", "", name), element("dd", "", content));
    add("Received", new Date(message.at * 1000).toISOString());
    add("Payload", `${size(message.size)}${binary ? ", in hexadecimal" : ""}${message.size > 4096 ? ", only the first 4 KiB shown" : ""}`);
    add("", block(visible(text, true), binary));
    if (message.fields !== null && typeof message.fields === "object") add("Fields", table(message.fields));
    if (message.properties) add("Properties", block(visible(pretty(message.properties), true)));
    row.firstChild.append(body);
  });
  return row;
}

function tag(text, more = "") {
  return element("span", `tag ${more}`, text);
}

function block(text, binary = false) {
  const made = element("pre", binary ? "hex" : "", isolated(text));
  made.tabIndex = 0;
  return made;
}

function table(fields) {
  const made = element("table", "");
  for (const [name, value] of leaves(fields)) {
    const row = made.insertRow();
    row.append(element("th", "", isolated(cut(visible(name), 120))), element("td", "", isolated(cut(visible(String(value)), 400))));
    row.firstChild.scope = "row";
  }
  return made;
}

function pretty(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json; // truncated, so not valid JSON
  }
}
