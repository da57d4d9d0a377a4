/**
 * Blade Fused LoRA shows the rows in use and one empty row below them.
 *
 * Hidden rows stay widgets of the node with their values: they are saved and queued like the
 * others, so that a workflow means the same with and without this file.
 */

import { app } from "../../scripts/app.js";

/** The node's rows: lists of the widgets whose names end in the row's number, `lora_1` first. */
function rowsOf(node) {
  const rows = [];
  for (const widget of node.widgets) {
    const number = /_(\d+)$/.exec(widget.name)?.[1];
    if (number) (rows[number - 1] ??= []).push(widget);
  }
  return rows;
}

/** Whether a row names a LoRA, or takes any of its values from another node. */
function isUsed(node, row) {
  const linked = node.inputs.filter((_, slot) => node.isInputConnected(slot)).map((input) => input.name);
  return row[0].value !== "None" || row.some((widget) => linked.includes(widget.name));
}

// Before frontend 1.34, Vue nodes do not see that an option changes: they show all rows.
const [major, minor] = (window.__COMFYUI_FRONTEND_VERSION__ ?? "").split(".").map(Number);
const optionsAreFollowed = major > 1 || minor >= 34;

function setHidden(widget, hidden) {
  widget.hidden = hidden; // for the canvas
  if (optionsAreFollowed) widget.options.hidden = hidden; // for Vue nodes
  // Before 1.34, the canvas keeps a hidden widget's room; with its gap of 4, this makes none.
  if (hidden) widget.computeSize = () => [0, -4];
  else delete widget.computeSize;
}

function fitHeight(node) {
  node.setSize([node.size[0], node.computeSize()[1]]);
}

/** Have `then` called after a callback that others may have set, too. */
function after(object, name, then) {
  const before = object[name];
  object[name] = function (...args) {
    const result = before?.apply(this, args);
    then();
    return result;
  };
}

app.registerExtension({
  name: "Blade.FusedLoRA",
  nodeCreated(node) {
    if (node.comfyClass !== "BladeFusedLoRA") return;
    const rows = rowsOf(node);
    let shown = 0;
    const update = () => {
      const wanted = rows.findLastIndex((row) => isUsed(node, row)) + 2;
      if (wanted === shown) return;
      shown = wanted;
      rows.forEach((row, index) => row.forEach((widget) => setHidden(widget, index >= shown)));
      fitHeight(node);
    };
    after(node, "onConfigure", () => {
      update(); // a node that was loaded, pasted or undone has got its values
      fitHeight(node); // and perhaps the height of one saved where all rows are shown
    });
    after(node, "onConnectionsChange", update);
    for (const [lora] of rows) after(lora, "callback", update);
    update();
  },
});
