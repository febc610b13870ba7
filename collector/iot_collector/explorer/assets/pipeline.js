// The state of the pipeline in words.

import { sparkline } from "./chart.js";
import { age, duration, number, plural, visible } from "./text.js";

const $ = id => document.getElementById(id);
const FEWEST = 12; // samples that the rate line has room for at first; later there are up to 180

export class Pipeline {
  constructor() {
    Object.assign(this, { health: null, rates: [], at: 0, reason: undefined, readError: null, offset: 0 });
  }

  update({ now, health, rates, every }) {
    if (every) this.every = every;
    Object.assign(this, { health, at: Date.now(), reason: undefined, offset: now - Date.now() / 1000 });
    if (rates) this.rates = rates;
    this.draw();
    if (rates) sparkline($("rate-spark"), rates.map(sample => sample[2]), Math.max(FEWEST, rates.length));
  }

  // The stream is lost; reason is the text of the collector, if it refused the request.
  lost(reason) {
    this.reason = reason;
    this.draw();
  }

  // error: why the topics and messages cannot be read from the database, or null.
  read(error) {
    this.readError = error;
    this.draw();
  }

  draw() {
    const { health } = this;
    this.notice();
    if (!health) return;
    const { broker, database, accounting } = health;
    const failing = this.reason !== undefined || health.status !== "ok";
    $("status").className = `pill ${failing ? "bad" : this.readError ? "" : "good"}`;
    $("status").textContent = this.reason !== undefined ? "No connection to the collector"
      : !failing ? this.readError ? "The database cannot be read" : "Every message is being stored"
        : !database.connected ? "The database cannot be reached: messages wait"
          : !broker.connected ? "The broker cannot be reached" : "Something is wrong";
    state("broker", broker.connected, "Connected", "Not connected");
    $("broker-note").textContent = broker.connected ? broker.address : `${broker.address}: ${short(broker.error ?? "not subscribed yet")}`;
    state("database", database.connected, "Connected", "Not connected");
    $("database-note").textContent = database.connected ? "messages are acknowledged after COMMIT" : short(database.error ?? "");
    const last = this.rates.at(-1);
    $("rate").textContent = last ? number(+last[2].toPrecision(3)) : "–";
    $("rate-note").textContent = last ? `received ${number(+last[1].toPrecision(3))}; last ${Math.max(1, Math.round(this.rates.length * this.every / 60))} min` : "measuring …";
    const delays = this.rates.filter(sample => sample[4] !== null);
    $("delay").textContent = delays.length ? duration(delays.at(-1)[4]) : "–";
    $("delay-note").textContent = "from receipt to COMMIT, on average";
    $("in-flight").textContent = number(accounting.in_flight);
    $("in-flight-note").textContent = accounting.in_flight ? `the oldest has waited ${duration(health.oldest_unacked_seconds)}` : "no message waits for its COMMIT";
    $("stored").textContent = accounting.inserted.toLocaleString("en");
    const more = [`of ${accounting.received.toLocaleString("en")} received`];
    if (accounting.duplicates) more.push(`${accounting.duplicates.toLocaleString("en")} sent again`);
    if (accounting.dead_letters) more.push(plural(accounting.dead_letters, "dead letter"));
    $("stored-note").textContent = more.join(", ");
    $("footer").textContent = `Counters, delay and connections are those of this collector (${visible(broker.client_id)}, version ${health.version}) since its start. Topics, messages and dead letters are those of the whole database, from all collectors.`;
  }

  notice() {
    const { health } = this, texts = [];
    const ago = this.at ? `The values shown are ${age((Date.now() - this.at) / 1000)} old. ` : "";
    if (this.reason !== undefined) texts.push(this.reason ? `The collector refuses the request: ${this.reason}.` : `The collector does not answer. ${ago}Trying again.`);
    else if (health && health.status !== "ok") texts.push(...health.problems.map(short));
    if (this.reason === undefined && this.readError) texts.push(`Topics and messages may be out of date, because the database cannot be read: ${short(this.readError)}`);
    texts.push(...health?.warnings ?? []);
    const text = texts.map(part => visible(part)).join(" · ");
    if ($("notice").textContent !== text) $("notice").textContent = text;
    $("notice").hidden = !text;
    document.body.classList.toggle("stale", this.reason !== undefined || Boolean(this.readError));
  }
}

function state(id, good, yes, no) {
  $(id).textContent = good ? yes : no;
  $(id).className = `value state ${good ? "good" : "bad"}`;
}

function short(text) {
  return text.length > 220 ? text.slice(0, 220) + "…" : text;
}
