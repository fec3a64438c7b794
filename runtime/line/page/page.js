// Brings the next state of the line into the page that is open, and says when none comes.
"use strict";

const EVERY_MS = 1000;
const LOST_MS = 5000;
const parser = new DOMParser();
const lost = document.getElementById("lost");
let heard = performance.now();
let heardAt = new Date();

// Make `from` like `to`, and touch only what differs: pictures stay loaded, what is open stays open.
function morph(from, to) {
  for (const { name, value } of to.attributes) {
    if (from.getAttribute(name) !== value) from.setAttribute(name, value);
  }
  for (const { name } of [...from.attributes]) {
    if (!to.hasAttribute(name) && name !== "open") from.removeAttribute(name);
  }
  if (to.hasAttribute("data-keyed")) keyed(from, to);
  else inOrder(from, to);
}

function alike(a, b) {
  return a.nodeType === b.nodeType && a.nodeName === b.nodeName && a.id === b.id;
}

function inOrder(from, to) {
  const wanted = [...to.childNodes];
  wanted.forEach((node, index) => {
    const there = from.childNodes[index];
    if (!there) from.append(document.importNode(node, true));
    else if (!alike(there, node)) there.replaceWith(document.importNode(node, true));
    else if (node.nodeType === Node.ELEMENT_NODE) morph(there, node);
    else if (there.nodeValue !== node.nodeValue) there.nodeValue = node.nodeValue;
  });
  while (from.childNodes.length > wanted.length) from.lastChild.remove();
}

function keyed(from, to) {
  const known = new Map([...from.children].map((child) => [child.dataset.key, child]));
  const wanted = [...to.children].map((node) => {
    const there = known.get(node.dataset.key);
    if (!there) return document.importNode(node, true);
    known.delete(node.dataset.key);
    morph(there, node);
    return there;
  });
  for (const gone of known.values()) gone.remove();
  wanted.forEach((node, index) => {
    if (from.children[index] !== node) from.insertBefore(node, from.children[index] ?? null);
  });
}

function show(text) {
  const fresh = parser.parseFromString(text, "text/html").querySelector("main");
  const shown = document.querySelector("main");
  if (!fresh) throw new Error("an answer without a page");
  if (fresh.dataset.version !== shown.dataset.version) location.reload();
  morph(shown, fresh);
  document.title = fresh.dataset.title;
  document.body.classList.remove("lost");
  lost.hidden = true;
  heard = performance.now();
  heardAt = new Date();
}

function miss() {
  if (performance.now() - heard < LOST_MS) return;
  const text = `No connection: this page last heard from the device at ${heardAt.toLocaleTimeString()}. ` +
    "Nothing below is current.";
  if (lost.textContent !== text) lost.textContent = text;
  lost.hidden = false;
  document.body.classList.add("lost");
  document.title = "No connection";
}

async function next() {
  try {
    const answer = await fetch("live", { cache: "no-store", signal: AbortSignal.timeout(LOST_MS) });
    if (!answer.ok) throw new Error(answer.status);
    show(await answer.text());
  } catch {
    miss();
  }
  setTimeout(next, EVERY_MS);
}

setTimeout(next, EVERY_MS);
