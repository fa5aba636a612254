"use strict";
// Draws the figures in the reader's colours and shows the trial under the pointer. No row text becomes HTML here:
// the page's data is JSON, and text enters the document through textContent alone.
(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const tip = document.getElementById("tip");
  const plots = [...document.querySelectorAll("[data-figure]")];
  const config = { responsive: true, displayModeBar: false };

  const make = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };

  const themed = (figure) => {
    const text = JSON.stringify(figure);
    return JSON.parse(dark.matches ? text.replace(/#[0-9a-f]{6}/g, (hex) => data.twins[hex] ?? hex) : text);
  };

  const drawPanel = (canvas, rows) => {
    const style = getComputedStyle(document.documentElement);
    const brush = canvas.getContext("2d");
    const cell = Math.max(1, Math.floor(canvas.width / Math.max(rows.length, rows[0].length)));
    canvas.width = cell * rows[0].length;
    canvas.height = cell * rows.length;
    rows.forEach((row, y) => [...row].forEach((mark, x) => {
      brush.fillStyle = style.getPropertyValue(mark === "." ? "--card" : "--picture" + mark);
      brush.fillRect(x * cell, y * cell, cell, cell);
    }));
  };

  const picture = (rows, side) => {
    const canvas = make("canvas");
    canvas.width = canvas.height = side;
    canvas.dataset.rows = JSON.stringify(rows);
    drawPanel(canvas, rows);
    return canvas;
  };

  const pictures = (drawing, width) => {
    const box = make("div", "pictures");
    const side = drawing.panels.length > 1 ? Math.floor(width / 2) - 6 : width;
    for (const [caption, rows] of drawing.panels) {
      const figure = make("figure");
      figure.append(picture(rows, side), make("figcaption", "", caption));
      box.append(figure);
    }
    box.append(make("p", "note", drawing.problem ?? `at ${drawing.tokens.toLocaleString("en")} tokens`));
    return box;
  };

  const thumbnail = (drawing) => drawing.panels.length ? picture(drawing.panels[0][1], 64) : "";

  const facts = (trial) => {
    const list = make("dl");
    for (const [name, value] of trial.facts) list.append(make("dt", "", name), make("dd", "", value));
    return list;
  };

  const copyButton = (source) => {
    const button = make("button", "", "Copy");
    button.type = "button";
    button.addEventListener("click", () => copy(button, source));
    return button;
  };

  const copy = (button, source) => {
    const done = (text) => { button.textContent = text; setTimeout(() => { button.textContent = "Copy"; }, 2500); };
    const select = () => { getSelection().selectAllChildren(source); done("selected: press Ctrl+C"); };
    const late = new Promise((_, fail) => setTimeout(fail, 800));  // a browser may leave its permission undecided
    if (navigator.clipboard) Promise.race([navigator.clipboard.writeText(source.textContent), late]).then(() => done("copied"), select);
    else select();
  };

  const showPanel = (panel, id) => {
    const trial = data.trials[id];
    const paste = make("pre", "", trial.paste);
    panel.replaceChildren(make("h4", "", trial.label), pictures(data.drawings[trial.drawing], 256), facts(trial), paste, copyButton(paste));
    panel.dataset.trial = id;
  };

  const showTip = (id, box) => {
    const trial = data.trials[id];
    tip.replaceChildren(make("h4", "", trial.label), pictures(data.drawings[trial.drawing], 192), facts(trial));
    tip.hidden = false;
    const right = box.right + 14 + tip.offsetWidth < innerWidth;
    tip.style.left = Math.max(8, right ? box.right + 14 : box.left - 14 - tip.offsetWidth) + "px";
    tip.style.top = Math.max(8, Math.min(box.top - 40, innerHeight - tip.offsetHeight - 8)) + "px";
  };

  const boxOf = (div, point) => {
    const frame = div.getBoundingClientRect();
    const x = frame.left + point.xaxis._offset + point.xaxis.d2p(point.x);
    const y = frame.top + point.yaxis._offset + point.yaxis.d2p(point.y);
    const reach = (point["marker.size"] ?? 20) / 2;
    return { left: x - reach, right: x + reach, top: y };
  };

  const listen = (div) => {
    const panel = document.getElementById(div.dataset.panel);
    div.on("plotly_hover", (event) => showTip(event.points[0].customdata, boxOf(div, event.points[0])));
    div.on("plotly_unhover", () => { tip.hidden = true; });
    div.on("plotly_click", (event) => showPanel(panel, event.points[0].customdata));
  };

  const draw = () => Promise.all(plots.map((div) => {
    const figure = themed(data.figures[div.dataset.figure]);
    return Plotly.react(div, figure.data, figure.layout, config);
  }));

  const redraw = () => {
    document.querySelectorAll("canvas[data-rows]").forEach((c) => drawPanel(c, JSON.parse(c.dataset.rows)));
    return draw();
  };

  document.querySelectorAll("[data-trial]").forEach((panel) => showPanel(panel, panel.dataset.trial));
  document.querySelectorAll("td.paste").forEach((box) => box.append(copyButton(box.querySelector("pre"))));
  document.querySelectorAll("[data-drawing]").forEach((box) => box.append(thumbnail(data.drawings[box.dataset.drawing])));
  draw().then(() => {
    plots.filter((div) => div.dataset.panel).forEach(listen);
    document.body.dataset.drawn = String(plots.length);
  });
  dark.addEventListener("change", redraw);
})();
