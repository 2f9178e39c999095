// The grid of workers, by node: who is where in the layout, how fast, and in what state.
import { byId, bytes, duration, fixed, make, percent, say } from "./format.js";

const NAMES = { member: "training", idle: "standing by", starting: "starting", requested: "requested", lost: "lost",
  released: "released", ended: "ended" };
const SLOW = 0.75, MANY = 16;
const cards = new Map();
const nodes = new Map();

export function showWorkers(workers, layout) {
  const host = byId("workers");
  const entries = Object.entries(workers).sort(([, a], [, b]) => a.worker - b.worker || a.incarnation - b.incarnation);
  const many = entries.length > MANY;
  host.classList.toggle("many", many);
  const byNode = new Map();
  for (const [key, worker] of entries) {
    const node = worker.node ?? "";
    if (!byNode.has(node)) byNode.set(node, []);
    byNode.get(node).push([key, worker]);
  }
  for (const [node, section] of nodes) if (!byNode.has(node)) { section.root.remove(); nodes.delete(node); }
  for (const key of cards.keys()) if (!(key in workers)) { cards.get(key).root.remove(); cards.delete(key); }
  const order = [...byNode.keys()].sort((a, b) => (a === "") - (b === "") || a.localeCompare(b));
  order.forEach((node, index) => {
    const section = nodes.get(node) ?? newNode(node);
    if (host.children[index] !== section.root) host.insertBefore(section.root, host.children[index] ?? null);
    byNode.get(node).forEach(([key, worker], place) => {
      const card = cards.get(key) ?? newCard(key);
      if (section.list.children[place] !== card.root) section.list.insertBefore(card.root, section.list.children[place] ?? null);
      fill(card, worker, layout, many);
    });
  });
  summary(entries.map(([, worker]) => worker), order.filter(Boolean).length);
}

function summary(workers, numNodes) {
  const counts = {};
  for (const worker of workers) counts[worker.state] = (counts[worker.state] ?? 0) + 1;
  const parts = Object.keys(NAMES).filter((state) => counts[state]).map((state) => `${counts[state]} ${NAMES[state]}`);
  if (numNodes) parts.push(numNodes === 1 ? "on one node" : `on ${numNodes} nodes`);
  say(byId("workers-sub"), parts.join(", ") || "none yet");
}

function newNode(node) {
  const list = make("ul", "workers");
  const title = make("h3", "", node === "" ? "not placed yet" : `node ${node.slice(0, 12)}`);
  if (node) title.title = node;
  const section = { root: make("section", "node", title, list), list };
  nodes.set(node, section);
  return section;
}

function newCard(key) {
  const card = { who: make("span", "who"), what: make("span", "what"), where: make("span", "where"), speed: make("span", "speed"),
    bar: make("i"), work: make("span"), memory: make("span"), finding: make("p", "finding") };
  card.meter = make("div", "meter", card.bar);
  card.detail = make("div", "row detail", card.work, card.memory);
  card.root = make("li", "worker", make("div", "row", card.who, card.what), make("div", "row", card.where, card.speed), card.meter, card.detail, card.finding);
  card.root.dataset.key = key;
  cards.set(key, card);
  return card;
}

function fill(card, worker, layout, many) {
  const { root } = card;
  const gone = worker.state === "lost" || worker.state === "released";
  if (root.dataset.state !== worker.state) {
    root.dataset.state = worker.state;
    if (worker.state === "lost") requestAnimationFrame(() => { root.dataset.shownAfter = (Date.now() / 1000 - worker.lost_at).toFixed(3); });
  }
  say(card.who, worker.incarnation ? `worker ${worker.worker}.${worker.incarnation}` : `worker ${worker.worker}`);
  let what = NAMES[worker.state] ?? worker.state;
  if (worker.state === "member" && worker.phase && worker.phase !== "compute") what = worker.phase;
  if (worker.leaving && !gone) what = "leaving";
  const quiet = worker.quiet && !gone;
  if (quiet) what = `silent ${duration(worker.quiet)}`;
  card.what.classList.toggle("quiet", Boolean(quiet));
  say(card.what, what);
  const where = place(worker, layout, false);
  say(card.where, many ? place(worker, layout, true) : where);
  root.title = `${where}; worker ${worker.worker}, incarnation ${worker.incarnation}, pid ${worker.pid ?? "unknown"}, node ${worker.node ?? "none"}`;
  const speed = gone ? null : worker.speed;
  root.classList.toggle("slow", speed != null && speed < SLOW);
  card.meter.hidden = speed == null;
  card.bar.style.width = `${Math.min(100, 100 * (speed ?? 0))}%`;
  say(card.speed, speed == null ? "" : `${fixed(speed, 2)}×`);
  card.speed.title = "speed, as a share of the fastest worker's";
  const work = worker.step_seconds == null ? "" : `${duration(worker.step_seconds)}, ${percent(worker.wait_share ?? 0)} wait`;
  say(card.work, gone ? "" : work);
  say(card.memory, gone ? "" : bytes(worker.device_bytes || worker.host_bytes).replace("–", ""));
  card.work.title = "its own work in the last step, and the share of the step that it waited for others";
  card.detail.hidden = gone || !card.work.textContent;
  say(card.finding, gone ? "" : worker.finding ?? "");
  card.finding.hidden = !card.finding.textContent;
}

/** Rank and coordinates; only axes of the layout that are longer than one. */
function place(worker, layout, isShort) {
  if (worker.rank == null) return "no rank";
  const coordinates = worker.coordinates ?? {};
  const axes = ["data", "pipeline", "tensor"].filter((axis) => coordinates[axis] != null && (layout?.[axis] ?? 2) > 1);
  if (isShort) return [`r${worker.rank}`, axes.map((axis) => `${axis[0]}${coordinates[axis]}`).join(" ")].filter(Boolean).join(" ");
  return [`rank ${worker.rank}`, ...axes.map((axis) => `${axis} ${coordinates[axis]}`)].join(" · ");
}
