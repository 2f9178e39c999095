// The timeline of generations and incidents, evaluations, checkpoints, and where the time went.
import { byId, bytes, clock, count, duration, make, percent, say, words } from "./format.js";

const SIGNS = { bad: "✕", warn: "▲", good: "✓", info: "·" };
const LABELS = { bad: "bad", warn: "warning", good: "good", info: "" };
let shown = -1;

/** New entries go on top; `live` says that they came while the page was open, and how long that took is kept. */
export function showTimeline(entries, start, live) {
  const list = byId("timeline");
  if (!entries.length || entries[0].id > shown + 1 || (entries.at(-1).id < shown)) { list.replaceChildren(); shown = -1; }
  for (const entry of entries) {
    if (entry.id <= shown) continue;
    shown = entry.id;
    const item = make("li");
    item.dataset.level = entry.level;
    item.dataset.kind = entry.kind;
    const time = make("time", "", clock(entry.time - (start ?? entry.time)));
    time.dateTime = new Date(1000 * entry.time).toISOString();
    time.title = new Date(1000 * entry.time).toLocaleString();
    const sign = make("span", "sign", SIGNS[entry.level] ?? "·");
    if (LABELS[entry.level]) { sign.setAttribute("role", "img"); sign.setAttribute("aria-label", LABELS[entry.level]); }
    else sign.setAttribute("aria-hidden", "true");
    const text = make("span", "text");
    if (entry.kind === "incident") text.append(make("b", "", `${words(entry.incident)} `), entry.text.replace(`${entry.incident}: `, ""));
    else text.append(entry.text);
    item.append(time, sign, text);
    list.prepend(item);
    if (live) {
      item.classList.add("new");
      requestAnimationFrame(() => { item.dataset.shownAfter = (Date.now() / 1000 - entry.time).toFixed(3); });
    }
  }
  while (list.children.length > 300) list.lastChild.remove();
}

export function showCheckpoints(checkpoints, status, now) {
  const rows = checkpoints.map((entry) => {
    const failed = entry.kind !== "checkpoint_saved";
    const name = entry.committed == null ? String(entry.path ?? "").split("/").at(-1) : `step ${count(entry.committed)}`;
    const row = make("tr", failed ? "failed" : "", header(name));
    if (failed) {
      const cell = make("td", "failed", `${words(entry.kind.replace("checkpoint_", ""))}: ${entry.error ?? entry.reason ?? ""}`);
      cell.colSpan = 4;
      row.append(cell);
    } else {
      const held = entry.blocked_seconds == null ? "–" : duration(entry.blocked_seconds);
      row.append(make("td", "", bytes(entry.bytes)), make("td", "", duration(entry.seconds)), make("td", "", held), make("td", "", duration(now - entry.time)));
    }
    return row;
  });
  const table = byId("checkpoints");
  const head = make("thead", "", make("tr", "", ...["saved", "size", "written in", "held up", "age"].map((name) => { const cell = make("th", "", name); cell.scope = "col"; return cell; })));
  replace(table, ...(rows.length ? [head, make("tbody", "", ...rows)] : []));
  const last = status.checkpoint;
  const sub = status.checkpoint?.saving ? "one is being written" : last ? "" : "none yet";
  say(byId("checkpoints-sub"), sub);
}

const MAX_METRICS = 6;

/** Newest first; the best so far in bold. Runs that evaluate nothing are not shown the card. */
export function showEvaluations(evaluations) {
  byId("evaluations-card").hidden = !evaluations.length;
  if (!evaluations.length) return;
  const names = Object.keys(evaluations[0].metrics).slice(0, MAX_METRICS);
  const rows = evaluations.map((entry) => {
    const name = header(`step ${count(entry.step)}`);
    const row = make("tr", entry.best ? "best" : "", name);
    for (const metric of names) row.append(make("td", "", entry.metrics[metric] == null ? "–" : Number(entry.metrics[metric].toPrecision(4)).toString()));
    return row;
  });
  const head = make("thead", "", make("tr", "", ...["after", ...names].map((name) => { const cell = make("th", "", words(name)); cell.scope = "col"; return cell; })));
  replace(byId("evaluations"), head, make("tbody", "", ...rows));
  const best = evaluations.find((entry) => entry.best);
  say(byId("evaluations-sub"), `${count(evaluations[0].samples)} samples, ${duration(evaluations[0].seconds)}${best ? `; the best was step ${count(best.step)}` : ""}`);
}

export function showGoodput(goodput) {
  const bar = byId("goodput-bar"), table = byId("goodput-table");
  if (!goodput || !goodput.wall_seconds) { bar.replaceChildren(); replace(table); say(byId("goodput-sub"), "nothing to account for yet"); return; }
  const bad = Object.entries(goodput.badput_seconds).sort(([, a], [, b]) => b - a);
  const parts = [["productive", goodput.productive_seconds], ...bad];
  const wall = goodput.wall_seconds;
  bar.replaceChildren(...parts.map(([reason, seconds]) => {
    const piece = make("i");
    piece.style.width = `${(100 * seconds) / wall}%`;
    piece.style.background = `var(--${reason}, var(--other))`;
    return piece;
  }));
  const rows = parts.map(([reason, seconds]) => make("tr", "", header(words(reason), swatch(reason)), make("td", "", duration(seconds)), make("td", "", percent(seconds / wall, 1))));
  const sum = parts.reduce((total, [, seconds]) => total + seconds, 0);
  const foot = make("tfoot", "", make("tr", "", header("wall time"), make("td", "", duration(wall)), make("td", "", percent(sum / wall, 1))));
  replace(table, make("tbody", "", ...rows), foot);
  say(byId("goodput-sub"), `${percent(goodput.productive_seconds / wall, 1)} of the time went into steps that stayed`);
}

function swatch(reason) {
  const element = make("span", "swatch");
  element.style.background = `var(--${reason}, var(--other))`;
  return element;
}

function header(text, ...before) {
  const cell = make("th", "", ...before, text);
  cell.scope = "row";
  return cell;
}

function replace(table, ...parts) {
  table.replaceChildren(table.caption, ...parts);
}
