// The page: the chosen topic, and what each event updates.

import { Charts } from "./chart.js";
import { Messages } from "./messages.js";
import { Pipeline } from "./pipeline.js";
import { Stream, ask } from "./stream.js";
import { age, bytesOf, cut, element, isolated, leaves, payloadText, plural, rate, size, visible } from "./text.js";
import { Tree } from "./tree.js";

const $ = id => document.getElementById(id);
const SPANS = [["15 min", 900], ["1 h", 3600], ["24 h", 86400], ["7 d", 7 * 86400], ["30 d", 30 * 86400]];

let topic = null, span = 3600, question = null, searching = null, letters = [], latestSilent = null;
const pipeline = new Pipeline(), charts = new Charts($("charts")), messages = new Messages($("messages"));
const tree = new Tree($("tree"), () => stream.restart(), choose);
const stream = new Stream(view, handle, reason => pipeline.lost(reason));

function view() {
  const found = tree.found ? tree.found.nodes.map(node => node.path).slice(0, 50) : [];
  return { open: fitting(tree.prefixes()), watch: fitting(found), topic };
}

// A topic may have 65 535 bytes; a request must not have megabytes.
function fitting(topics) {
  let room = 60_000;
  return topics.filter(name => (room -= name.length) > 0);
}

function handle(name, content) {
  ({
    pipeline: () => pipeline.update(content),
    database: () => { pipeline.read(content.error); if (content.error === null && topic !== null) readings(); },
    tree: () => showTree(content),
    latest: () => tree.setLatest(content),
    activity: () => showActivity(content),
    messages: () => showMessages(content),
    dead_letters: () => { letters = content; showLetters(); },
  })[name]?.();
}

// Topics --------------------------------------------------------------------------------------

function showTree(content) {
  tree.setBranches(content.branches, content.topics);
  const empty = content.complete && content.topics === 0;
  $("empty").hidden = !empty;
  document.body.classList.toggle("no-topics", empty);
  if (empty) showFirstSteps();
  const since = new Date(content.since * 1000).toLocaleDateString("en", { day: "numeric", month: "long", timeZone: "UTC" });
  $("topics-note").textContent = empty ? "" : !content.complete && !content.topics ? "Reading the topics from the database …"
    : `${plural(content.topics, "topic")} with messages since ${since}${content.cut ? "; further topics are not listed" : ""}.`;
  showSilent(content.silent);
  stream.restart(); // a level may have opened by itself
}

function showFirstSteps() {
  const broker = pipeline.health?.broker;
  if (!broker) return;
  const [, host, port] = broker.address.match(/^(.*):(\d+)$/) ?? [null, broker.address, "1883"];
  const filter = (broker.topics[0] ?? "iot/data").replace(/^\$share\/[^/]+\//, "");
  const example = filter === "#" ? "iot/data" : filter.replace(/[+#]/g, "test");
  $("empty-one").textContent = `mosquitto_pub -h ${host} -p ${port} -q 1 -t '${visible(example)}' -m temperature:23`;
  $("empty-many").textContent = `iot-collector simulate --topic '${visible(example)}' --count 100`;
  $("empty-filters").textContent = `The collector subscribes to ${broker.topics.map(t => visible(t)).join(", ")}.`;
}

function showActivity(content) {
  tree.setCounts(content.nodes, content.window);
  const window = `${content.window} s`;
  $("count-head").textContent = `Last ${window}`;
  $("busiest-note").textContent = content.messages
    ? `${plural(content.messages, "message")} from ${plural(content.topics, "topic")} in the last ${window}.`
    : `No message in the last ${window}.`;
  const top = content.busiest[0]?.[1] ?? 1;
  $("busiest").replaceChildren(...content.busiest.map(([name, n]) => {
    const share = element("span", "share", element("span", ""));
    share.firstChild.style.width = `${100 * n / top}%`;
    return entry(name, rate(n / content.window), share);
  }));
}

function showSilent(silent) {
  latestSilent = silent;
  const after = age(silent.after);
  if (document.body.classList.contains("no-topics")) {
    $("silent-note").textContent = "No topic is known yet.";
    return;
  }
  $("silent-note").textContent = silent.count
    ? `${plural(silent.count, "topic")} without a message for ${after}${silent.count > silent.latest.length ? "; the list has those that became silent last" : ""}.`
    : `Every topic had a message in the last ${after}.`;
  $("silent").replaceChildren(...silent.latest.map(([name, at]) => entry(name, age(now() - at))));
}

function entry(name, text, ...more) {
  const button = element("button", "link", isolated(cut(visible(name), 90)));
  button.type = "button";
  button.title = cut(visible(name), 300);
  button.addEventListener("click", () => choose(name));
  return element("li", "", button, ...more, element("span", "number", text));
}

function showLetters() {
  $("letters-note").textContent = letters.length ? "Messages that PostgreSQL refused, with the reason. They are kept." : "None: PostgreSQL has accepted every message.";
  $("letters").replaceChildren(...letters.map(letter => {
    const name = new TextDecoder().decode(bytesOf(letter.topic));
    const { text } = payloadText(letter.payload, letter.size);
    const row = element("li", "letter",
      element("div", "", isolated(cut(visible(name), 90), "name"), element("span", "number", age(now() - letter.at))),
      element("p", "reason", cut(visible(letter.reason), 300), element("span", "tag", letter.sqlstate)),
      element("pre", "", isolated(cut(visible(text), 200))),
      element("p", "note", `${size(letter.size)}, in ${letter.table}`));
    return row;
  }));
}

// Search --------------------------------------------------------------------------------------

async function search() {
  const text = $("search").value;
  searching?.abort();
  if (!text) {
    tree.setFound(null);
    return stream.restart();
  }
  const abort = searching = new AbortController();
  try {
    const found = await ask("search", { text }, abort.signal);
    tree.setFound(found);
    if (!found.nodes.length) $("tree").replaceChildren(Object.assign(element("li", "more note", "No topic contains this text."), { role: "none" }));
    stream.restart();
  } catch (error) {
    if (!abort.signal.aborted) tree.setFound({ nodes: [], left_out: 0 });
  }
}

let typing = 0;
$("search").addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(search, 150); });
$("search").addEventListener("keydown", event => {
  if (event.key === "ArrowDown" && tree.rows.size) { tree.focus(tree.rows.keys().next().value); event.preventDefault(); }
  if (event.key === "Escape") { $("search").value = ""; search(); }
});
document.addEventListener("keydown", event => {
  if (event.key === "/" && !/^(input|textarea)$/i.test(event.target.tagName)) { $("search").focus(); event.preventDefault(); }
  if (event.key === "Escape" && topic !== null && event.target !== $("search")) choose(null);
});

// One topic -----------------------------------------------------------------------------------

function choose(name, remember = true) {
  if (name === topic) return;
  topic = name;
  tree.setChosen(name);
  charts.clear();
  messages.clear();
  $("older").hidden = true;
  $("detail").hidden = name === null;
  $("overview").hidden = name !== null;
  document.body.classList.toggle("chosen", name !== null);
  if (remember) history.pushState(name, "", name === null ? location.pathname + location.search : "#" + encodeURIComponent(name));
  if (name !== null) {
    $("detail-title").replaceChildren(isolated(cut(visible(name), 300)));
    if (matchMedia("(max-width: 60rem)").matches) { scrollTo(0, 0); $("detail-title").focus(); }
    readings();
  }
  stream.restart();
}

async function readings() {
  question?.abort();
  const abort = question = new AbortController(), asked = topic;
  $("chart-note").textContent = "Reading the history …";
  try {
    const found = await ask("readings", { topic: asked, seconds: span }, abort.signal);
    if (abort.signal.aborted || asked !== topic) return;
    charts.show(found.series, span);
    // Add the messages that have arrived since the query.
    const last = Math.max(0, ...Object.values(found.series).map(points => points.at(-1)[0]));
    charts.append(Array.from(messages.known.values(), m => [m.at, leaves(m.fields, topic)]).filter(([at]) => at > last));
    const shown = Object.keys(found.series).length;
    const parts = [];
    if (!found.names) parts.push(found.messages ? "No numbers in these messages, so there is no chart." : "No message in this time range.");
    else if (found.sampled) parts.push("Averages of the last 8 messages in each of 240 time steps.");
    else parts.push(`Every reading of ${plural(found.messages, "message")}.`);
    if (found.names > shown) parts.push(`${found.names - shown} more names are not shown.`);
    $("chart-note").textContent = parts.join(" ");
  } catch (error) {
    if (!abort.signal.aborted) $("chart-note").textContent = `No history: ${error.message}.`;
  }
}

function showMessages(content) {
  const fresh = messages.add(content);
  charts.append(fresh.filter(m => m.at > now() - span).map(m => [m.at, leaves(m.fields, topic)]));
  $("older").hidden = messages.known.size === 0;
}

$("older").addEventListener("click", async () => {
  const asked = topic;
  try {
    const found = await ask("messages", { topic: asked, before: messages.oldest });
    if (asked !== topic) return;
    messages.add(found, true);
    $("older").hidden = !found.length;
  } catch (error) {
    $("chart-note").textContent = `No older messages: ${error.message}.`;
  }
});
$("back").addEventListener("click", () => choose(null));
$("spans").replaceChildren(...SPANS.map(([text, seconds]) => {
  const button = element("button", "", text);
  button.type = "button";
  button.setAttribute("aria-pressed", seconds === span);
  button.addEventListener("click", () => {
    span = seconds;
    for (const other of $("spans").children) other.setAttribute("aria-pressed", other === button);
    readings();
  });
  return button;
}));
addEventListener("popstate", () => choose(chosenInAddress(), false));

function chosenInAddress() {
  try {
    return decodeURIComponent(location.hash.slice(1)) || null;
  } catch {
    return null;
  }
}

// Time ----------------------------------------------------------------------------------------

// The clocks of this machine and of the collector may differ.
function now() {
  return Date.now() / 1000 + pipeline.offset;
}

setInterval(() => {
  tree.tick(pipeline.offset);
  charts.tick();
  if (pipeline.reason !== undefined) pipeline.draw();
  if (latestSilent) showSilent(latestSilent);
}, 1000);

choose(chosenInAddress(), false);
stream.restart(true);
