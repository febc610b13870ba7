// The page without topics and messages: state and counters, from /health.

import { sparkline } from "./chart.js";
import { element, visible } from "./text.js";

const $ = id => document.getElementById(id);
const rates = [];
let before = null;
const format = (n, digits = 0) => n.toLocaleString("en", { maximumFractionDigits: digits });

function show(health) {
  const good = health.status === "ok", a = health.accounting, now = performance.now();
  $("status").className = `pill ${good ? "good" : "bad"}`;
  $("status").textContent = good ? "Every message is being stored" : visible(health.problems.join(" · "));
  if (before) rates.push(Math.max(0, (a.inserted - before.inserted) * 1000 / (now - before.now)));
  if (rates.length > 60) rates.shift();
  before = { inserted: a.inserted, now };
  const rows = [
    ["Stored per second", format(rates.at(-1) ?? 0, 1)],
    ["Received", format(a.received)],
    ["Stored", format(a.inserted)],
    ["Sent again, stored once", format(a.duplicates)],
    ["Dead letters", format(a.dead_letters)],
    ["In flight", format(a.in_flight)],
    ["Oldest in flight, seconds", format(health.oldest_unacked_seconds, 3)],
    ["Topic filters", visible(health.broker.topics.join(", "))],
  ];
  $("numbers").replaceChildren(...rows.map(([name, value]) => {
    const head = element("th", "", name);
    head.scope = "row";
    return element("tr", "", head, element("td", "number", value));
  }));
  sparkline($("rate-spark"), rates, 60);
}

async function poll() {
  try {
    show(await (await fetch("health", { cache: "no-store" })).json());
  } catch {
    Object.assign($("status"), { className: "pill bad", textContent: "The collector does not answer" });
  }
  setTimeout(poll, 2000);
}
poll();
