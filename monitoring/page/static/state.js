// The run as this page knows it: what the server sent at first, and what it said has changed since. No DOM.

export const empty = () => ({ now: 0, start: null, status: {}, points: [], world: [], workers: {}, timeline: [],
  checkpoints: [], evaluations: [], goodput: null, findings: [] });

const MAX_TIMELINE = 300;

/** A whole state; the points are rows of [step, seconds since the start, loss, tokens/s, generation]. */
export function whole(message) {
  return { ...empty(), ...message, points: message.points.rows };
}

/** The state after a message of changes. */
export function changed(state, message) {
  const next = { ...state, ...message };
  next.points = message.points ? withPoints(state.points, message.points) : state.points;
  next.status = message.status ? patched(state.status, message.status) : state.status;
  next.workers = message.workers ? withWorkers(state.workers, message.workers) : state.workers;
  next.timeline = message.timeline ? withEntries(state.timeline, message.timeline) : state.timeline;
  return next;
}

function withPoints(points, { from, rows }) {
  let keep = points.length;
  while (keep > 0 && points[keep - 1][0] >= from) keep -= 1;
  return [...points.slice(0, keep), ...rows];
}

function patched(was, patch) {
  return { ...was, ...patch };
}

function withWorkers(workers, patch) {
  const next = { ...workers };
  for (const [key, part] of Object.entries(patch)) {
    if (part === null) delete next[key];
    else next[key] = patched(next[key] ?? {}, part);
  }
  return next;
}

function withEntries(entries, added) {
  const last = entries.length ? entries[entries.length - 1].id : -1;
  return [...entries, ...added.filter((entry) => entry.id > last)].slice(-MAX_TIMELINE);
}
