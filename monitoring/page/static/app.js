// Follows the server's stream and shows the run. The stream says everything at first, and then only what changed.
import { Charts } from "./charts.js";
import { byId, count, duration, fixed, make, percent, say, short, words } from "./format.js";
import { showCheckpoints, showEvaluations, showGoodput, showTimeline } from "./lists.js";
import { changed, empty, whole } from "./state.js";
import { showWorkers } from "./workers.js";

const SILENCE_MS = 15000; // The server says something every five seconds.
const charts = new Charts();
let state = empty();
let heard = Date.now();
let ahead = 0; // The server's clock less ours, in seconds.
let source = null;

connect();
setInterval(tick, 1000);
for (const axis of ["time", "step"]) byId(`by-${axis}`).addEventListener("click", () => choose(axis));

function connect() {
  source?.close();
  source = new EventSource("/api/stream");
  source.addEventListener("state", (event) => receive(event, whole, false));
  source.addEventListener("changes", (event) => receive(event, (message) => changed(state, message), true));
  source.addEventListener("ping", (event) => { hear(JSON.parse(event.data)); });
  source.onerror = () => {
    lost();
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, 2000); // Refused: the browser gives up, we do not.
  };
}

function receive(event, apply, live) {
  const message = JSON.parse(event.data);
  hear(message);
  const was = state;
  state = apply(message);
  show(was, live);
}

function hear(message) {
  heard = Date.now();
  ahead = message.now - heard / 1000;
  byId("connection").hidden = true;
  document.body.dataset.connected = "yes";
}

function lost() {
  document.body.dataset.connected = "no";
  say(byId("connection"), "The connection to the page's server is lost; what is shown may be old. Trying again…");
  byId("connection").hidden = false;
}

function tick() {
  if (Date.now() - heard > SILENCE_MS) {
    heard = Date.now();
    lost();
    connect();
  }
  showAges();
}

function show(was, live) {
  const differs = (...parts) => parts.some((part) => was[part] !== state[part]);
  if (differs("status")) showHead();
  if (differs("status", "goodput", "workers")) showTiles();
  if (differs("points", "world", "timeline")) charts.show(state);
  if (differs("workers") || was.status.layout !== state.status.layout) showWorkers(state.workers, state.status.layout);
  if (differs("timeline")) showTimeline(state.timeline, state.start, live);
  if (differs("goodput")) showGoodput(state.goodput);
  if (differs("evaluations")) showEvaluations(state.evaluations);
  showAges();
  document.body.dataset.ready = "yes";
}

const STATES = { running: "training", waiting: "waiting for workers", settling: "settling after an incident",
  forming: "forming a generation", finalizing: "finishing", starting: "starting", over: "ending" };

function stateText(status) {
  switch (status.life) {
    case "finished": return "finished";
    case "failed": return "failed";
    case "stopped": return "stopped";
    case "interrupted": return "interrupted";
    case "silent": return "controller silent";
    default: return STATES[status.state] ?? words(status.state ?? "starting");
  }
}

function showHead() {
  const { status } = state;
  const text = stateText(status);
  const pill = byId("state");
  pill.dataset.life = status.life ?? "starting";
  pill.dataset.state = status.state ?? "";
  say(byId("state-text"), text);
  say(byId("name"), status.name ?? "run");
  say(byId("run-id"), status.run ?? "");
  document.title = `${status.step ?? 0}/${status.steps ?? "?"} ${text} – ${status.name ?? "run"}`;
  say(byId("loss-unit"), status.loss_unit ?? "");
  say(byId("step"), count(status.step));
  say(byId("steps"), count(status.steps));
  const share = status.steps ? Math.min(1, status.step / status.steps) : 0;
  byId("progress-bar").style.width = `${100 * share}%`;
  const bar = byId("progress");
  bar.setAttribute("aria-valuenow", status.step ?? 0);
  bar.setAttribute("aria-valuemax", status.steps ?? 0);
  const left = status.life === "live" && status.median_step_seconds ? (status.steps - status.step) * status.median_step_seconds : null;
  say(byId("left"), left == null ? "" : `about ${duration(left)} left`);
  showNotice(status);
}

/** What needs attention now: how a run ended, or what it is recovering from. */
function showNotice(status) {
  const notice = byId("notice");
  let text = "", mild = false;
  const open = status.open_incidents ?? [];
  if (status.life === "interrupted") text = "This run was interrupted: nothing steers it any more, and it has not said that it ended. `orchestrator resume` goes on from its newest checkpoint.";
  else if (status.life === "failed") text = `The run failed: ${status.reason ?? "no reason is on record"}`;
  else if (status.life === "silent") { text = "The controller has not been heard of for some seconds; workers go on meanwhile."; mild = true; }
  else if (open.length) { text = `Recovering: ${open.map((one) => `${words(one.incident)}${one.worker == null ? "" : ` of worker ${one.worker}`}${one.cause ? ` (${one.cause})` : ""}`).join("; ")}`; mild = true; }
  notice.classList.toggle("mild", mild);
  say(notice, text);
  notice.hidden = !text;
}

function showTiles() {
  const { status, goodput } = state;
  const layout = status.layout ?? {};
  const axes = ["data", "pipeline", "tensor"].filter((axis) => layout[axis] > 1).map((axis) => `${axis} ${layout[axis]}`);
  if (layout.shard && layout.shard !== "none") axes.push(`shard ${layout.shard}`);
  const training = Object.values(state.workers).filter((worker) => worker.state === "member").length;
  const limits = status.target == null ? "" : `${status.min} to ${status.max} allowed`;
  const wanted = status.target == null ? "" : ` / ${status.target}`;
  const recovery = status.last_recovery;
  const ratio = goodput?.wall_seconds ? goodput.productive_seconds / goodput.wall_seconds : null;
  tile("Loss", fixed(status.loss, 4), status.grad_norm == null ? "" : `gradient norm ${fixed(status.grad_norm, 3)}`);
  tile("Tokens/s", short(status.tokens_per_second), status.median_step_seconds ? `${duration(status.median_step_seconds)} a step` : "");
  if (status.mfu != null) tile("MFU", percent(status.mfu, 1), "of peak FLOP/s");
  tile("Workers", status.life === "live" || status.life === "silent" ? `${training}${wanted}` : "–", limits);
  tile("Generation", status.generation == null ? "–" : String(status.generation), axes.join(" · "));
  tile("Goodput", percent(ratio, 1), goodput ? `of ${duration(goodput.wall_seconds)}` : "");
  tile("Incidents", String(status.incidents ?? 0), recovery ? `last stalled ${duration(recovery.stall_seconds)}` : "");
}

const tiles = new Map();

function tile(name, value, note) {
  let entry = tiles.get(name);
  if (!entry) {
    entry = { value: make("span"), note: make("small") };
    byId("tiles").append(make("div", "tile", make("dt", "", name), make("dd", "", entry.value, entry.note)));
    tiles.set(name, entry);
  }
  say(entry.value, value);
  say(entry.note, note);
  entry.note.title = note;
}

/** What changes by the clock alone. */
function showAges() {
  const now = Date.now() / 1000 + ahead;
  const { status } = state;
  const last = status.checkpoint;
  if (document.body.dataset.ready || last) {
    tile("Checkpoint", last ? `step ${count(last.committed)}` : "–", last ? `${duration(now - last.time)} ago${last.saving ? ", next being written" : ""}` : "none yet");
  }
  showCheckpoints(state.checkpoints, status, now);
  const end = status.ended ?? status.silent_since ?? now;
  say(byId("updated"), state.start == null ? "" : `began ${new Date(1000 * state.start).toLocaleString()}, ${status.ended ? "ran" : "running"} for ${duration(end - state.start)}`);
  say(byId("timeline-sub"), status.incidents ? `${status.incidents} ${status.incidents === 1 ? "incident" : "incidents"}` : "");
}

function choose(axis) {
  for (const name of ["time", "step"]) byId(`by-${name}`).setAttribute("aria-pressed", String(name === axis));
  charts.setAxis(axis);
}
