"use strict";
(() => {
  const SIZE = 420, LEFT = 42, BOTTOM = 38, RIGHT = 8, TOP = 8;
  const views = JSON.parse(document.getElementById("views").textContent);

  function element(name, attributes = {}, parent = null) {
    const svg = ["svg", "circle", "line", "text", "g"].includes(name);
    const made = svg
      ? document.createElementNS("http://www.w3.org/2000/svg", name)
      : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (parent) parent.append(made);
    return made;
  }

  const signed = (value, digits = 2) => value.toFixed(digits).replace("-", "−");

  // The subscript of a latent counts from 1, as in the figures.
  const latent = (index) =>
    "z" + String(index + 1).replace(/\d/g, (digit) => "₀₁₂₃₄₅₆₇₈₉"[digit]);

  function colour(label, count) {
    if (label === null) return "var(--train)";
    if (count <= 10) {
      return ["#4c8fc4", "#f28e2b", "#4aa564", "#e15759", "#a07cc5",
        "#9c755f", "#e377c2", "#8b8b8b", "#b6a414", "#2bb5c4"][label];
    }
    return `hsl(${Math.round((360 * label) / count)} 65% 52%)`;
  }

  /** Round values within an interval, about five. */
  function ticks(low, high) {
    const raw = (high - low) / 5;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw);
    const found = [];
    for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(i * step);
    return found;
  }

  /** Points in a frame with axes, one of them ringed on demand. */
  class Plane {
    constructor(host, label) {
      this.svg = element("svg", {
        viewBox: `0 0 ${SIZE} ${SIZE}`, tabindex: "0", role: "application", "aria-label": label,
      }, host);
    }

    draw(points, labels, classes, limits, names) {
      this.svg.replaceChildren();
      [this.low, this.high] = [limits.map((l) => l[0]), limits.map((l) => l[1])];
      this.points = points;
      for (const [axis, name] of names.entries()) {
        if (!name) continue; // there is a single latent
        for (const value of ticks(this.low[axis], this.high[axis])) {
          const [x, y] = this.place(axis === 0 ? [value, this.low[1]] : [this.low[0], value]);
          const end = axis === 0 ? { x2: x, y2: TOP } : { x2: SIZE - RIGHT, y2: y };
          element("line", { x1: x, y1: y, ...end }, this.svg);
          element("text", axis === 0
            ? { x, y: y + 14, "text-anchor": "middle" }
            : { x: x - 5, y: y + 4, "text-anchor": "end" }, this.svg)
            .textContent = signed(value, 10).replace(/\.?0+$/, "");
        }
        const middle = (SIZE + LEFT - RIGHT) / 2;
        element("text", axis === 0
          ? { x: middle, y: SIZE - 6, "text-anchor": "middle" }
          : { x: 11, y: SIZE - middle, "text-anchor": "middle",
              transform: `rotate(-90 11 ${SIZE - middle})` }, this.svg).textContent = name;
      }
      const group = element("g", {}, this.svg);
      this.dots = points.map((point, i) => {
        const [x, y] = this.place(point);
        const inside = x >= LEFT && x <= SIZE - RIGHT && y >= TOP && y <= SIZE - BOTTOM;
        return inside ? element("circle", {
          cx: x, cy: y, r: points.length > 400 ? 2.4 : 3.4,
          fill: colour(labels ? labels[i] : null, classes.length),
        }, group) : null;
      });
      this.ring = element("circle", { class: "ring", r: 6, visibility: "hidden" }, this.svg);
    }

    /** Coordinates on the plane → pixels of the drawing, and back. */
    place([u, v]) {
      return [
        LEFT + ((u - this.low[0]) / (this.high[0] - this.low[0])) * (SIZE - LEFT - RIGHT),
        SIZE - BOTTOM - ((v - this.low[1]) / (this.high[1] - this.low[1])) * (SIZE - BOTTOM - TOP),
      ];
    }

    under(event) {
      const box = this.svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * SIZE;
      const y = ((event.clientY - box.top) / box.height) * SIZE;
      return [
        this.low[0] + ((x - LEFT) / (SIZE - LEFT - RIGHT)) * (this.high[0] - this.low[0]),
        this.low[1] + ((SIZE - BOTTOM - y) / (SIZE - BOTTOM - TOP)) * (this.high[1] - this.low[1]),
      ];
    }

    enclose(point) {
      this.ring.setAttribute("visibility", point ? "visible" : "hidden");
      if (!point) return;
      const [x, y] = this.place(point);
      this.ring.setAttribute("cx", x);
      this.ring.setAttribute("cy", y);
    }
  }

  const sheets = new Map();
  function sheet(source) {
    if (!sheets.has(source)) {
      const image = new Image();
      image.src = source;
      sheets.set(source, image.decode().then(() => image));
    }
    return sheets.get(source);
  }

  const profiles = new Map(); // canvas → what is drawn on it, in the ink of the theme

  /** Draw a tile of a sheet; a row of a table as a profile. */
  function drawTile(canvas, image, [height, width], column, row, profile = false) {
    if (profile) profiles.set(canvas, [image, [height, width], column, row, true]);
    canvas.width = profile ? 300 : width;
    canvas.height = profile ? 150 : height;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    if (!profile) {
      context.drawImage(
        image, column * width, row * height, width, height, 0, 0, width, height);
      return;
    }
    const strip = new OffscreenCanvas(width, 1).getContext("2d");
    strip.drawImage(image, column * width, row, width, 1, 0, 0, width, 1);
    const values = strip.getImageData(0, 0, width, 1).data;
    context.strokeStyle = getComputedStyle(canvas).color;
    context.beginPath();
    for (let i = 0; i < width; i++) {
      const x = width > 1 ? 5 + (290 * i) / (width - 1) : 150;
      context.lineTo(x, 145 - (140 * values[4 * i]) / 255);
      if (width === 1) context.lineTo(x + 1, 145 - (140 * values[0]) / 255);
    }
    context.stroke();
  }

  const clamp = (value, high) => Math.min(Math.max(value, 0), high);
  const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowDown: [0, -1], ArrowUp: [0, 1] };

  function explorer(host, view) {
    const data = view.explorer;
    const single = data.latents.length === 1, table = view.row === "row";
    const find = (selector) => host.querySelector(selector);
    const canvas = find(".decoded canvas"), output = find("output");
    const plane = new Plane(
      find(".plane"), "Latent plane: the arrow keys move the point that is decoded");
    const side = data.grid[0].length;
    const state = { anchor: 0, pair: single ? [0, 0] : [0, 1], node: [0, 0], drawing: 0 };
    let marks = [];

    async function show() {
      const [first, second] = state.pair, [i, j] = state.node;
      // The sheets hold each pair once, the earlier of the two across.
      const [key, column, row] = first <= second
        ? [`${first} ${second}`, i, j] : [`${second} ${first}`, j, i];
      const point = [data.grid[first][i], single ? 0 : data.grid[second][j]];
      const [x, y] = plane.place(point);
      marks[0].setAttribute("x1", x);
      marks[0].setAttribute("x2", x);
      marks[1].setAttribute("y1", y);
      marks[1].setAttribute("y2", y);
      const names = single ? [first] : [first, second];
      const text = names.map((k, n) => `${latent(data.latents[k])} = ${signed(point[n])}`).join(", ");
      const number = ++state.drawing;
      const image = await sheet(data.sheets[`${state.anchor} ${key}`]);
      if (number !== state.drawing) return; // the pointer has gone on
      drawTile(canvas, image, data.tile, column, row, table);
      output.textContent = text;
      canvas.setAttribute("aria-label", `Decoded ${view.row} at ${text}`);
      Object.assign(host.dataset, { first, second, i, j, anchor: state.anchor });
    }

    function redraw() {
      const [first, second] = state.pair;
      const grid = data.grid, ends = (k) => [grid[k][0], grid[k][side - 1]];
      const limits = [ends(first), single ? [-1, 1] : ends(second)];
      const points = data.codes.map((code) => [code[first], single ? 0 : code[second]]);
      const names = [latent(data.latents[first]), single ? "" : latent(data.latents[second])];
      plane.draw(points, view.labels, view.classes, limits, names);
      marks = [
        element("line", { class: "mark", y1: TOP, y2: SIZE - BOTTOM }, plane.svg),
        element("line", { class: "mark", x1: LEFT, x2: SIZE - RIGHT }, plane.svg),
      ];
      const code = points[data.anchors[state.anchor]];
      if (data.more) plane.enclose(code);
      goto(data.more ? code : [0, 0]);
    }

    function goto(point) {
      state.node = state.pair.map((k, axis) => {
        const values = data.grid[k], low = values[0], high = values[side - 1];
        if (single && axis === 1) return 0;
        return clamp(Math.round(((point[axis] - low) / (high - low)) * (side - 1)), side - 1);
      });
      show();
    }

    for (const kind of ["pointermove", "pointerdown"]) {
      plane.svg.addEventListener(kind, (event) => goto(plane.under(event)));
    }
    plane.svg.addEventListener("keydown", (event) => {
      const step = STEPS[event.key];
      if (!step) return;
      event.preventDefault();
      const far = event.shiftKey ? 5 : 1;
      state.node = state.node.map((value, axis) =>
        single && axis === 1 ? 0 : clamp(value + far * step[axis], side - 1));
      show();
    });

    if (data.latents.length > 2) {
      const row = find(".axes");
      row.hidden = false;
      const selects = ["across", "up"].map((word, axis) => {
        const label = element("label", {}, row);
        label.append(`${word} `);
        const select = element("select", {}, label);
        data.latents.forEach((index, k) => {
          element("option", { value: k }, select).textContent = latent(index);
        });
        select.value = state.pair[axis];
        return select;
      });
      selects.forEach((select, axis) => select.addEventListener("change", () => {
        const chosen = selects.map((one) => Number(one.value));
        if (chosen[0] === chosen[1]) {
          chosen[1 - axis] = state.pair[axis]; // they change places
        }
        state.pair = chosen;
        selects.forEach((one, k) => { one.value = state.pair[k]; });
        redraw();
      }));
    }
    if (data.more) {
      const row = find(".anchors");
      row.hidden = false;
      row.append("others as in ");
      data.anchors.forEach((which, m) => {
        const name = view.labels ? view.classes[view.labels[which]] : String(m + 1);
        const button = element("button", { type: "button", "aria-label": name, title: name,
          "aria-pressed": m === 0 }, row);
        const small = element("canvas", {}, button);
        sheet(data.images).then((image) => drawTile(small, image, data.tile, m, 0, table));
        button.addEventListener("click", () => {
          row.querySelectorAll("button").forEach((one) =>
            one.setAttribute("aria-pressed", one === button));
          state.anchor = m;
          redraw();
        });
      });
    }
    redraw();
  }

  function scatter(host, view) {
    const find = (selector) => host.querySelector(selector);
    const frame = find(".plane");
    const plane = new Plane(frame, "Latent codes: the arrow keys walk from dot to dot");
    const tip = element("div", { class: "tip", hidden: "" }, frame);
    const canvas = view.thumbnails ? element("canvas", {}, tip) : null;
    const words = element("span", {}, tip);
    let current = null, only = null, points = [];

    function describe(i) {
      const name = view.labels ? view.classes[view.labels[i]] : `${view.row} ${i + 1}`;
      return name;
    }

    async function choose(i) {
      current = i;
      plane.enclose(i === null ? null : points[i]);
      tip.hidden = i === null;
      if (i === null) return;
      words.textContent = describe(i);
      find(".shown").textContent = describe(i);
      const [x, y] = plane.place(points[i]);
      const far = 100 / SIZE;
      tip.style.left = x < SIZE / 2 ? `calc(${x * far}% + 12px)` : "auto";
      tip.style.right = x < SIZE / 2 ? "auto" : `calc(${100 - x * far}% + 12px)`;
      tip.style.top = y < SIZE / 2 ? `calc(${y * far}% + 8px)` : "auto";
      tip.style.bottom = y < SIZE / 2 ? "auto" : `calc(${100 - y * far}% + 8px)`;
      if (canvas) {
        const image = await sheet(view.thumbnails.sheet);
        const across = view.thumbnails.columns;
        if (current === i) {
          drawTile(canvas, image, view.thumbnails.tile, i % across, Math.floor(i / across));
        }
      }
    }

    const seen = (i) => plane.dots[i] && (only === null || view.labels[i] === only);

    /** The nearest of the dots that `allowed` lets through, in pixels of the drawing. */
    function nearest([x, y], allowed, most) {
      let best = null, least = most;
      points.forEach((point, i) => {
        if (!seen(i)) return;
        const [u, v] = plane.place(point);
        const distance = Math.hypot(u - x, v - y);
        if (distance < least && allowed(u - x, v - y, i)) [best, least] = [i, distance];
      });
      return best;
    }

    plane.svg.addEventListener("pointermove", (event) =>
      choose(nearest(plane.place(plane.under(event)), () => true, 16)));
    plane.svg.addEventListener("pointerdown", (event) =>
      choose(nearest(plane.place(plane.under(event)), () => true, 24)));
    plane.svg.addEventListener("pointerleave", () => choose(null));
    plane.svg.addEventListener("blur", () => choose(null));
    plane.svg.addEventListener("keydown", (event) => {
      if (event.key === "Escape") choose(null);
      const step = STEPS[event.key];
      if (!step) return;
      event.preventDefault();
      if (current === null) {
        choose(nearest([SIZE / 2, SIZE / 2], () => true, Infinity));
        return;
      }
      const next = nearest(plane.place(points[current]), (dx, dy, i) => {
        const along = dx * step[0] - dy * step[1];
        return i !== current && along > 0 && along >= Math.abs(dx * step[1] + dy * step[0]);
      }, Infinity);
      if (next !== null) choose(next);
    });

    function use(k) {
      const chosen = view.planes[k];
      points = chosen.points;
      const limits = [0, 1].map((axis) => {
        const values = points.map((point) => point[axis]);
        const low = Math.min(...values), high = Math.max(...values);
        const room = 0.04 * (high - low) || 1;
        return [low - room, high + room];
      });
      plane.draw(points, view.labels, view.classes, limits, chosen.names);
      choose(null);
      dim();
    }

    function dim() {
      plane.dots.forEach((dot, i) => {
        if (dot) dot.classList.toggle("dim", only !== null && view.labels[i] !== only);
      });
    }

    if (view.planes.length > 1) {
      const row = find(".views");
      row.hidden = false;
      view.planes.forEach((one, k) => {
        const button = element("button", { type: "button", "aria-pressed": k === 0 }, row);
        button.textContent = one.title;
        button.addEventListener("click", () => {
          row.querySelectorAll("button").forEach((other) =>
            other.setAttribute("aria-pressed", other === button));
          use(k);
        });
      });
    }
    const legend = find(".legend");
    legend.hidden = !view.classes.length;
    view.classes.forEach((name, label) => {
      const button = element("button", { type: "button", "aria-pressed": "false" }, legend);
      element("span", { class: "swatch" }, button).style.background =
        colour(label, view.classes.length);
      button.append(name);
      button.addEventListener("click", () => {
        only = only === label ? null : label;
        legend.querySelectorAll("button").forEach((other, k) =>
          other.setAttribute("aria-pressed", k === only));
        choose(null);
        dim();
      });
    });
    use(0);
  }

  document.querySelectorAll(".explorer").forEach((host) => explorer(host, views[host.dataset.run]));
  document.querySelectorAll(".scatter").forEach((host) => scatter(host, views[host.dataset.run]));

  const button = document.getElementById("theme");
  const dark = () => {
    const chosen = document.documentElement.style.colorScheme;
    return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  };
  const name = () => { button.textContent = dark() ? "Light" : "Dark"; };
  button.hidden = false;
  button.addEventListener("click", () => {
    document.documentElement.style.colorScheme = dark() ? "light" : "dark";
    follow();
  });
  const follow = () => {
    name();
    profiles.forEach((drawn, canvas) => drawTile(canvas, ...drawn));
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", follow);
  name();
})();
