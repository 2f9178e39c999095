// Numbers and times as people read them, and the few ways this page makes elements. Never innerHTML: what a run says
// of itself is text.

export function count(value) {
  return value == null ? "–" : Math.round(value).toLocaleString("en-US");
}

export function fixed(value, digits) {
  return value == null ? "–" : value.toFixed(digits);
}

export function percent(value, digits = 0) {
  return value == null ? "–" : `${(100 * value).toFixed(digits)} %`;
}

/** Thousands as k, millions as M. */
export function short(value) {
  if (value == null) return "–";
  const size = Math.abs(value);
  if (size >= 1e9) return `${(value / 1e9).toPrecision(3)} G`;
  if (size >= 1e6) return `${(value / 1e6).toPrecision(3)} M`;
  if (size >= 1e4) return `${(value / 1e3).toPrecision(3)} k`;
  return count(value);
}

export function bytes(value) {
  if (!value) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  const power = Math.min(4, Math.floor(Math.log10(value) / 3));
  const scaled = value / 1000 ** power;
  return `${scaled < 10 && power ? scaled.toFixed(1) : Math.round(scaled)} ${units[power]}`;
}

/** Seconds as 0.21 s, 42 s, 3:07 min, 5:02 h, 2 d 3 h. */
export function duration(seconds) {
  if (seconds == null || !Number.isFinite(seconds)) return "–";
  if (seconds < 0.095) return `${Math.round(1000 * seconds)} ms`;
  if (seconds < 10) return `${seconds.toFixed(seconds < 1 ? 2 : 1)} s`;
  if (seconds < 100) return `${Math.round(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)}:${two(seconds % 60)} min`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)}:${two((seconds % 3600) / 60)} h`;
  return `${Math.floor(seconds / 86400)} d ${Math.floor((seconds % 86400) / 3600)} h`;
}

/** Time since the start of a run, as 1:07 or 2:05:09. */
export function clock(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  const minutes = Math.floor(whole / 60);
  if (minutes < 60) return `${minutes}:${two(whole % 60)}`;
  return `${Math.floor(minutes / 60)}:${two(minutes % 60)}:${two(whole % 60)}`;
}

function two(value) {
  return String(Math.floor(value)).padStart(2, "0");
}

export const words = (name) => String(name).replaceAll("_", " ");

export const byId = (id) => document.getElementById(id);

/** An element with a class, and text or children in it. */
export function make(tag, name = "", ...children) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.append(...children.filter((child) => child != null));
  return element;
}

/** Sets the text only where it differs, so that nothing is laid out, or read out, anew. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
