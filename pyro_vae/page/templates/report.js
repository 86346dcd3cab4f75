"use strict";
(() => {
  const SIZE = 420, LEFT = 42, BOTTOM = 38, RIGHT = 8, TOP = 8;
  const WIDTH = SIZE - LEFT - RIGHT, HEIGHT = SIZE - BOTTOM - TOP;
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

  /** A row of buttons, one of them pressed, or none; `fill` makes the contents of each. */
  function choice(row, items, pressed, fill, choose) {
    row.hidden = !items.length;
    const buttons = items.map((item, k) => {
      const button = element("button", { type: "button" }, row);
      fill(button, item, k);
      button.addEventListener("click", () => press(choose(k)));
      return button;
    });
    const press = (k) => buttons.forEach((one, j) => one.setAttribute("aria-pressed", j === k));
    press(pressed);
  }

  const clamp = (value, high) => Math.min(Math.max(value, 0), high);
  const signed = (value, digits = 2) => value.toFixed(digits).replace("-", "−");

  // The subscript of a latent counts from 1, as in the figures.
  const latent = (index) =>
    "z" + String(index + 1).replace(/\d/g, (digit) => "₀₁₂₃₄₅₆₇₈₉"[digit]);

  const COLOURS = ["#4c8fc4", "#f28e2b", "#4aa564", "#e15759", "#a07cc5",
    "#9c755f", "#e377c2", "#8b8b8b", "#b6a414", "#2bb5c4"];
  const colour = (label, count) => (count <= COLOURS.length
    ? COLOURS[label] : `hsl(${Math.round((360 * label) / count)} 65% 52%)`);

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
    constructor(host, label, view) {
      this.view = view;
      this.svg = element("svg", {
        viewBox: `0 0 ${SIZE} ${SIZE}`, tabindex: "0", role: "application", "aria-label": label,
      }, host);
    }

    draw(points, limits, names) {
      this.svg.replaceChildren();
      this.limits = limits;
      names.forEach((name, axis) => this.drawAxis(name, axis));
      const group = element("g", {}, this.svg);
      const { labels, classes } = this.view;
      this.dots = points.map((point, i) => {
        const [x, y] = this.place(point);
        const inside = x >= LEFT && x <= SIZE - RIGHT && y >= TOP && y <= SIZE - BOTTOM;
        return inside ? element("circle", {
          cx: x, cy: y, r: points.length > 400 ? 2.4 : 3.4,
          fill: labels ? colour(labels[i], classes.length) : "var(--train)",
        }, group) : null;
      });
      this.ring = element("circle", { class: "ring", r: 6, visibility: "hidden" }, this.svg);
    }

    drawAxis(name, axis) {
      if (!name) return; // there is a single latent
      const [[left], [bottom]] = this.limits, across = axis === 0;
      for (const value of ticks(...this.limits[axis])) {
        const [x, y] = this.place(across ? [value, bottom] : [left, value]);
        element("line", across
          ? { x1: x, y1: y, x2: x, y2: TOP } : { x1: x, y1: y, x2: SIZE - RIGHT, y2: y }, this.svg);
        element("text", across
          ? { x, y: y + 14, "text-anchor": "middle" }
          : { x: x - 5, y: y + 4, "text-anchor": "end" }, this.svg)
          .textContent = signed(value, 10).replace(/\.?0+$/, "");
      }
      const middle = LEFT + WIDTH / 2, y = SIZE - middle;
      element("text", across
        ? { x: middle, y: SIZE - 6, "text-anchor": "middle" }
        : { x: 11, y, "text-anchor": "middle", transform: `rotate(-90 11 ${y})` }, this.svg)
        .textContent = name;
    }

    /** Coordinates on the plane → pixels of the drawing. */
    place([u, v]) {
      const [[left, right], [bottom, top]] = this.limits;
      return [
        LEFT + ((u - left) / (right - left)) * WIDTH,
        SIZE - BOTTOM - ((v - bottom) / (top - bottom)) * HEIGHT,
      ];
    }

    /** The pixel of the drawing under the pointer. */
    pixel(event) {
      const box = this.svg.getBoundingClientRect();
      return [
        ((event.clientX - box.left) / box.width) * SIZE,
        ((event.clientY - box.top) / box.height) * SIZE,
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

  const profiles = new Map(); // canvas → the profile on it, in the ink of the theme

  /** Draw a tile of a sheet. */
  function drawTile(canvas, image, [height, width], column, row) {
    [canvas.width, canvas.height] = [width, height];
    canvas.getContext("2d", { willReadFrequently: true })
      .drawImage(image, column * width, row * height, width, height, 0, 0, width, height);
  }

  /** Draw a tile of a table's or sequence's sheet as a profile for each line of its pixels. */
  function drawProfile(canvas, image, tile, column, row) {
    profiles.set(canvas, [image, tile, column, row]);
    const strip = element("canvas"), [height, width] = tile;
    drawTile(strip, image, tile, column, row);
    const values = strip.getContext("2d").getImageData(0, 0, width, height).data;
    [canvas.width, canvas.height] = [300, 150];
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.strokeStyle = getComputedStyle(canvas).color;
    for (let line = 0; line < height; line++) {
      context.globalAlpha = 1 - (0.7 * line) / height; // later channels are paler
      context.beginPath();
      for (let i = 0; i < width; i++) {
        const x = width > 1 ? 5 + (290 * i) / (width - 1) : 150;
        const y = 145 - (140 * values[4 * (line * width + i)]) / 255;
        context.lineTo(x, y);
        if (width === 1) context.lineTo(x + 1, y);
      }
      context.stroke();
    }
  }

  const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowDown: [0, -1], ArrowUp: [0, 1] };

  function onArrow(plane, move) {
    plane.svg.addEventListener("keydown", (event) => {
      if (!STEPS[event.key]) return;
      event.preventDefault();
      move(STEPS[event.key], event.shiftKey ? 5 : 1);
    });
  }

  function explorer(host, view) {
    const { latents, grid, anchors, sheets: sources, images, tile, codes, more } = view.explorer;
    const { labels = [], own = [] } = view.explorer; // of a model with labels
    const single = latents.length === 1;
    const draw = ["row", "sequence"].includes(view.row) ? drawProfile : drawTile;
    const find = (selector) => host.querySelector(selector);
    const canvas = find(".decoded canvas"), output = find("output");
    const plane = new Plane(
      find(".plane"), "Latent plane: the arrow keys move the point that is decoded", view);
    const side = grid[0].length;
    let anchor = 0, pair = single ? [0, 0] : [0, 1], node = [0, 0], drawing = 0, marks = [];
    let given = own.length ? own[0] : null;

    async function show() {
      const [first, second] = pair, [i, j] = node;
      // The sheets hold each pair once, the earlier of the two across.
      const [key, column, row] = first <= second
        ? [`${first} ${second}`, i, j] : [`${second} ${first}`, j, i];
      const point = [grid[first][i], single ? 0 : grid[second][j]];
      const [x, y] = plane.place(point);
      for (const end of ["1", "2"]) {
        marks[0].setAttribute(`x${end}`, x);
        marks[1].setAttribute(`y${end}`, y);
      }
      const text = (single ? [first] : pair)
        .map((k, n) => `${latent(latents[k])} = ${signed(point[n])}`)
        .concat(given === null ? [] : [`label ${labels[given]}`]).join(", ");
      const number = ++drawing;
      const at = given === null ? "" : `${given} `;
      const image = await sheet(sources[`${at}${anchor} ${key}`]);
      if (number !== drawing) return; // the pointer has moved on
      draw(canvas, image, tile, column, row);
      output.textContent = text;
      canvas.setAttribute("aria-label", `Decoded ${view.row} at ${text}`);
      Object.assign(host.dataset, { first, second, i, j, anchor });
      if (given !== null) host.dataset.given = given;
    }

    function redraw() {
      const [first, second] = pair;
      const ends = (k) => [grid[k][0], grid[k][side - 1]];
      const limits = [ends(first), single ? [-1, 1] : ends(second)];
      const points = codes.map((code) => [code[first], single ? 0 : code[second]]);
      const names = [latent(latents[first]), single ? "" : latent(latents[second])];
      plane.draw(points, limits, names);
      marks = [
        element("line", { class: "mark", y1: TOP, y2: SIZE - BOTTOM }, plane.svg),
        element("line", { class: "mark", x1: LEFT, x2: SIZE - RIGHT }, plane.svg),
      ];
      const code = points[anchors[anchor]];
      if (more) plane.enclose(code);
      goto(plane.place(more ? code : [0, 0]));
    }

    function goto([x, y]) {
      const share = [(x - LEFT) / WIDTH, (SIZE - BOTTOM - y) / HEIGHT];
      move(share.map((value) => Math.round(value * (side - 1))));
    }

    function move(to) {
      node = to.map((value, axis) => (single && axis === 1 ? 0 : clamp(value, side - 1)));
      show();
    }

    for (const kind of ["pointermove", "pointerdown"]) {
      plane.svg.addEventListener(kind, (event) => goto(plane.pixel(event)));
    }
    onArrow(plane, (step, far) => move(node.map((value, axis) => value + far * step[axis])));

    let choiceOfLabel = null;
    if (labels.length) {
      const row = find(".axes");
      row.hidden = false;
      const label = element("label", {}, row);
      label.append("label ");
      choiceOfLabel = element("select", { class: "given" }, label);
      labels.forEach((name, k) => {
        element("option", { value: k }, choiceOfLabel).textContent = name;
      });
      choiceOfLabel.value = given;
      choiceOfLabel.addEventListener("change", () => {
        given = Number(choiceOfLabel.value);
        show();
      });
    }
    if (latents.length > 2) {
      const row = find(".axes");
      row.hidden = false;
      const selects = ["across", "up"].map((word, axis) => {
        const label = element("label", {}, row);
        label.append(`${word} `);
        const select = element("select", {}, label);
        latents.forEach((index, k) => {
          element("option", { value: k }, select).textContent = latent(index);
        });
        select.value = pair[axis];
        return select;
      });
      selects.forEach((select, axis) => select.addEventListener("change", () => {
        const chosen = selects.map((one) => Number(one.value));
        if (chosen[0] === chosen[1]) chosen[1 - axis] = pair[axis]; // they change places
        pair = chosen;
        selects.forEach((one, k) => { one.value = pair[k]; });
        redraw();
      }));
    }
    if (more) {
      find(".anchors").append("others as in ");
      choice(find(".anchors"), anchors, 0, (button, which, m) => {
        const name = view.labels ? view.classes[view.labels[which]] : m + 1;
        for (const key of ["title", "aria-label"]) button.setAttribute(key, name);
        const small = element("canvas", {}, button);
        sheet(images).then((image) => draw(small, image, tile, m, 0));
      }, (m) => {
        anchor = m;
        if (choiceOfLabel) {
          given = own[m];
          choiceOfLabel.value = given;
        }
        redraw();
        return m;
      });
    }
    redraw();
  }

  function scatter(host, view) {
    const { labels, classes, thumbnails } = view;
    const find = (selector) => host.querySelector(selector);
    const plane = new Plane(
      find(".plane"), "Latent codes: the arrow keys move from dot to dot", view);
    const tip = element("div", { class: "tip", hidden: "" }, find(".plane"));
    const canvas = thumbnails ? element("canvas", {}, tip) : null;
    const words = element("span", {}, tip);
    let current = null, only = null, points = [];

    async function choose(i) {
      current = i;
      plane.enclose(i === null ? null : points[i]);
      tip.hidden = i === null;
      if (i === null) return;
      words.textContent = labels ? classes[labels[i]] : `${view.row} ${i + 1}`;
      find(".shown").textContent = words.textContent;
      const [x, y] = plane.place(points[i]).map((pixel) => (100 * pixel) / SIZE);
      tip.style.left = x < 50 ? `calc(${x}% + 12px)` : "auto";
      tip.style.right = x < 50 ? "auto" : `calc(${100 - x}% + 12px)`;
      tip.style.top = y < 50 ? `calc(${y}% + 8px)` : "auto";
      tip.style.bottom = y < 50 ? "auto" : `calc(${100 - y}% + 8px)`;
      if (!canvas) return;
      const image = await sheet(thumbnails.sheet), across = thumbnails.columns;
      if (current !== i) return;
      drawTile(canvas, image, thumbnails.tile, i % across, Math.floor(i / across));
    }

    /** The nearest visible dot that `allowed` accepts, in pixels of the drawing. */
    function nearest([x, y], most, allowed = () => true) {
      let best = null, least = most;
      points.forEach((point, i) => {
        if (!plane.dots[i] || (only !== null && labels[i] !== only)) return;
        const [u, v] = plane.place(point);
        const distance = Math.hypot(u - x, v - y);
        if (distance < least && allowed(u - x, v - y, i)) [best, least] = [i, distance];
      });
      return best;
    }

    for (const [kind, most] of [["pointermove", 16], ["pointerdown", 24]]) {
      plane.svg.addEventListener(kind, (event) => choose(nearest(plane.pixel(event), most)));
    }
    for (const kind of ["pointerleave", "blur"]) {
      plane.svg.addEventListener(kind, () => choose(null));
    }
    plane.svg.addEventListener("keydown", (event) => {
      if (event.key === "Escape") choose(null);
    });
    onArrow(plane, (step) => {
      if (current === null) {
        choose(nearest([SIZE / 2, SIZE / 2], Infinity));
        return;
      }
      const next = nearest(plane.place(points[current]), Infinity, (dx, dy, i) => {
        const along = dx * step[0] - dy * step[1];
        return i !== current && along > 0 && along >= Math.abs(dx * step[1] + dy * step[0]);
      });
      if (next !== null) choose(next);
    });

    function use(k) {
      points = view.planes[k].points;
      const limits = [0, 1].map((axis) => {
        const values = points.map((point) => point[axis]);
        const low = Math.min(...values), high = Math.max(...values);
        const room = 0.04 * (high - low) || 1;
        return [low - room, high + room];
      });
      plane.draw(points, limits, view.planes[k].names);
      dim();
      return k;
    }

    function dim() {
      choose(null);
      plane.dots.forEach((dot, i) => {
        if (dot) dot.classList.toggle("dim", only !== null && labels[i] !== only);
      });
    }

    choice(find(".views"), view.planes.length > 1 ? view.planes : [], 0, (button, one) => {
      button.textContent = one.title;
    }, use);
    choice(find(".legend"), classes, null, (button, name, label) => {
      const swatch = element("span", { class: "swatch" }, button);
      swatch.style.background = colour(label, classes.length);
      button.append(name);
    }, (label) => {
      only = only === label ? null : label;
      dim();
      return only;
    });
    use(0);
  }

  document.querySelectorAll(".explorer").forEach((host) => explorer(host, views[host.dataset.run]));
  document.querySelectorAll(".scatter").forEach((host) => scatter(host, views[host.dataset.run]));

  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement.style;
  const dark = () => (root.colorScheme ? root.colorScheme === "dark" : system.matches);
  function follow() {
    button.textContent = dark() ? "Light" : "Dark";
    profiles.forEach((drawn, canvas) => drawProfile(canvas, ...drawn));
  }
  button.hidden = false;
  button.addEventListener("click", () => {
    root.colorScheme = dark() ? "light" : "dark";
    follow();
  });
  system.addEventListener("change", follow);
  follow();
})();
