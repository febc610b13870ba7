// The topic tree, after the tree view pattern of WAI-ARIA: one tab stop, and arrow keys inside.

import { age, cut, element, isolated, plural, rate, valueText, visible } from "./text.js";

const FEW = 40; // topics; up to this number, all levels are expanded at first

export class Tree {
  // changed() is called when a node is expanded or collapsed; choose(topic) when a topic is chosen.
  constructor(list, changed, choose) {
    Object.assign(this, {
      list, changed, choose, branches: {}, open: new Set([""]), found: null,
      rows: new Map(), topics: new Map(), latest: new Map(), counts: {}, window: 10, focused: null, chosen: null, offset: 0,
    });
    list.addEventListener("keydown", event => this.key(event));
    list.addEventListener("click", event => this.click(event));
    this.typed = ""; this.typedAt = 0;
  }

  // Prefixes whose children are shown: those of open nodes whose ancestors are open as well.
  prefixes() {
    if (this.found) return [];
    const shown = [];
    const walk = prefix => {
      shown.push(prefix);
      for (const node of this.branches[prefix]?.nodes ?? [])
        if (node.below && this.open.has(node.path + "/")) walk(node.path + "/");
    };
    walk("");
    return shown.slice(0, 40);
  }

  // Expands a level with a single node by itself, and with few topics every level.
  setBranches(branches, topics) {
    for (const [prefix, branch] of Object.entries(branches)) {
      this.branches[prefix] = branch;
      if (this.seen(prefix) || (branch.nodes.length > 1 && topics > FEW)) continue;
      for (const node of branch.nodes) if (node.below) this.open.add(node.path + "/");
    }
    this.draw();
  }

  seen(prefix) {
    this.opened ??= new Set();
    if (this.opened.has(prefix)) return true;
    this.opened.add(prefix);
    return false;
  }

  setFound(found) {
    this.found = found;
    this.draw();
  }

  setLatest(latest) {
    for (const [topic, at, fields, payload, size] of latest) {
      const before = this.latest.get(topic);
      const text = valueText(fields, payload, size);
      if (before && (before.at > at || (before.at === at && before.text === text))) continue;
      if (this.latest.size > 2000) this.latest.clear();
      this.latest.set(topic, { at, text });
      const row = this.topics.get(topic);
      if (!row) continue;
      this.fill(row);
      if (before) this.flash(row);
    }
  }

  setCounts(counts, window) {
    this.counts = counts;
    this.window = window;
    for (const row of this.rows.values()) this.fill(row);
  }

  // Updates the ages between two events of the server.
  tick(offset) {
    this.offset = offset;
    for (const row of this.rows.values()) this.fillAge(row);
  }

  *nodes() {
    if (this.found) {
      for (const node of this.found.nodes) yield { node, level: 1, parent: null, name: node.path, of: this.found.nodes.length };
      if (this.found.left_out) yield { more: this.found.left_out, level: 1, key: "more:" };
      return;
    }
    yield* this.below("", 1, null, 0);
  }

  *below(prefix, level, parent, depth) {
    const branch = this.branches[prefix];
    if (!branch || depth > 30) return;
    for (const node of branch.nodes) {
      yield { node, level, parent, name: (node.below ? node.path : node.topic).slice(prefix.length), of: branch.nodes.length };
      if (node.below && this.open.has(node.path + "/")) yield* this.below(node.path + "/", level + 1, node.path, depth + 1);
    }
    if (branch.left_out) yield { more: branch.left_out, level, key: "more:" + prefix };
  }

  draw() {
    const before = this.rows, inOrder = [];
    this.rows = new Map();
    this.topics = new Map();
    for (const item of this.nodes()) {
      if (item.more) {
        const more = element("li", "more note", `and ${plural(item.more, "more node")}: use the search to find them`);
        more.setAttribute("role", "none");
        inOrder.push(more);
        continue;
      }
      const row = before.get(item.node.path) ?? this.make(item);
      Object.assign(row, { node: item.node, level: item.level, parent: item.parent });
      this.rows.set(item.node.path, row);
      if (item.node.topic) this.topics.set(item.node.topic, row);
      this.fill(row);
      const { line } = row;
      line.title = cut(visible(item.node.topic ?? item.node.path), 300);
      line.setAttribute("aria-level", item.level);
      line.setAttribute("aria-setsize", item.of);
      const indent = `level-${Math.min(item.level, 9)}`;
      line.className = `row ${indent}`;
      row.label.textContent = cut(visible(item.name) || "(empty level)", 120);
      if (item.node.below) line.setAttribute("aria-expanded", !this.found && this.open.has(item.node.path + "/"));
      else line.removeAttribute("aria-expanded");
      inOrder.push(line);
    }
    const hadFocus = this.list.contains(document.activeElement);
    // Only rows that differ are moved, so that focus, selection and scroll position stay.
    inOrder.forEach((line, i) => {
      if (this.list.children[i] !== line) this.list.insertBefore(line, this.list.children[i] ?? null);
    });
    while (this.list.children.length > inOrder.length) this.list.lastChild.remove();
    if (!this.rows.has(this.focused)) this.focused = this.rows.keys().next().value ?? null;
    this.focus(this.focused, hadFocus);
    this.mark();
  }

  make({ node }) {
    const label = isolated("", "name"), value = isolated("", "last"), time = element("span", "number age");
    const count = element("span", "number count"), speed = element("span", "number rate");
    const twisty = element("span", "twisty"), below = element("span", "below");
    twisty.setAttribute("aria-hidden", "true");
    const line = element("li", "row", element("span", "topic", twisty, label, below), value, count, speed, time);
    line.setAttribute("role", "treeitem");
    line.tabIndex = -1;
    line.dataset.path = node.path;
    return { line, label, value, count, speed, time, below, node };
  }

  fill(row) {
    const { node } = row, latest = this.latest.get(node.topic), count = this.counts[node.path];
    set(row.below, node.below ? plural(node.below, "topic") : "");
    set(row.value, node.topic && latest ? cut(visible(latest.text), 60) : "");
    set(row.count, count ? count.toLocaleString("en") : "");
    set(row.speed, count ? rate(count / this.window) : "");
    this.fillAge(row);
  }

  fillAge(row) {
    const at = Math.max(row.node.last, this.latest.get(row.node.topic)?.at ?? 0);
    const seconds = Date.now() / 1000 + this.offset - at;
    set(row.time, at ? age(seconds) : "");
    row.time.classList.toggle("old", seconds > 600);
  }

  flash({ value }) {
    if (value.getAnimations().length || matchMedia("(prefers-reduced-motion: reduce)").matches) return;
    value.animate([{ color: "var(--accent)" }, { color: "var(--text)" }], 900);
  }

  mark() {
    for (const { line, node } of this.rows.values()) line.setAttribute("aria-selected", node.topic !== null && node.topic === this.chosen);
  }

  setChosen(topic) {
    this.chosen = topic;
    this.mark();
  }

  focus(path, really = true) {
    for (const { line } of this.rows.values()) line.tabIndex = -1;
    const row = this.rows.get(path);
    if (!row) return;
    this.focused = path;
    row.line.tabIndex = 0;
    if (really) row.line.focus();
  }

  toggle(row, open = !this.open.has(row.node.path + "/")) {
    if (!row.node.below || this.found) return;
    if (open) this.open.add(row.node.path + "/"); else this.open.delete(row.node.path + "/");
    this.draw();
    this.changed();
  }

  click(event) {
    const line = event.target.closest("[role=treeitem]");
    const row = line && this.rows.get(line.dataset.path);
    if (!row) return;
    this.focus(row.node.path);
    if (row.node.below && (event.target.closest(".twisty") || !row.node.topic)) this.toggle(row);
    else this.choose(row.node.topic);
  }

  key(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const row = this.rows.get(this.focused);
    if (!row) return;
    const paths = [...this.rows.keys()], at = paths.indexOf(this.focused);
    const open = row.node.below && !this.found && this.open.has(row.node.path + "/");
    const go = {
      ArrowDown: () => this.focus(paths[at + 1]),
      ArrowUp: () => this.focus(paths[at - 1]),
      Home: () => this.focus(paths[0]),
      End: () => this.focus(paths.at(-1)),
      ArrowRight: () => open ? this.focus(paths[at + 1]) : this.toggle(row, true),
      ArrowLeft: () => open ? this.toggle(row, false) : this.focus(row.parent),
      Enter: () => row.node.topic ? this.choose(row.node.topic) : this.toggle(row),
      " ": () => row.node.topic ? this.choose(row.node.topic) : this.toggle(row),
    }[event.key];
    if (go) go();
    else if (event.key.length === 1 && event.key !== "/") this.type(event.key, paths, at);
    else return;
    event.preventDefault();
  }

  // Typing moves the focus to the next node whose name begins with the typed text.
  type(letter, paths, at) {
    const now = Date.now();
    this.typed = now - this.typedAt < 700 ? this.typed + letter.toLowerCase() : letter.toLowerCase();
    this.typedAt = now;
    const from = this.typed.length > 1 ? at : at + 1;
    const next = [...paths.slice(from), ...paths.slice(0, from)]
      .find(path => this.rows.get(path).label.textContent.toLowerCase().startsWith(this.typed));
    if (next !== undefined) this.focus(next);
  }
}

function set(node, text) {
  if (node.textContent !== text) node.textContent = text;
}
