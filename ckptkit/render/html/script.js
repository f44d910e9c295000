"use strict";
// Names from files reach the page as text only: nothing here makes markup of a string.
(() => {
  const ROWS_AT_ONCE = 50;
  const BODIES_AT_ONCE = 10; // that are filled before the browser draws
  const BINS = 40;
  const FEWEST_BINS = 12; // so that one or two are not drawn as walls
  const UNITS = { B: 1, kB: 1e3, MB: 1e6, GB: 1e9, TB: 1e12, PB: 1e15, "%": 1 };
  const SVG = "http://www.w3.org/2000/svg";
  // Each word as a test of a text in lower case. A word of digits is this number only: 3 is not in layers.30.
  const wordsOf = (text) =>
    text
      .toLowerCase()
      .split(/\s+/)
      .filter(Boolean)
      .map((word) => {
        const number = /^\d+$/.test(word) && new RegExp(`(^|\\D)${word}(?!\\d)`);
        return number ? (found) => number.test(found) : (found) => found.includes(word);
      });
  const byId = (id) => document.getElementById(id);
  const grouped = (count) => count.toLocaleString("en-US");

  function element(name, text, parent) {
    const made = document.createElement(name);
    made.textContent = text;
    if (parent) parent.append(made);
    return made;
  }

  // ---- tooltips: one for the whole page, for the pointer and for the keyboard

  const tip = byId("tip");

  function showTip(mark) {
    tip.textContent = mark.getAttribute("aria-label");
    tip.hidden = false;
    const at = mark.getBoundingClientRect();
    const left = Math.min(Math.max(at.left + at.width / 2 - tip.offsetWidth / 2, 4), document.documentElement.clientWidth - tip.offsetWidth - 4);
    const above = at.top - tip.offsetHeight - 6;
    tip.style.left = `${Math.max(left, 4)}px`;
    tip.style.top = `${above > 0 ? above : at.bottom + 6}px`;
  }

  function hideTip() {
    tip.hidden = true;
  }

  // The marks of a picture are one tab stop. Arrow keys go to the nearest mark in their direction.
  function watchMarks(picture, marks) {
    marks.forEach((mark, place) => {
      mark.setAttribute("tabindex", place ? "-1" : "0");
      mark.setAttribute("role", "img");
    });
    let stop = marks[0];
    const markAt = (event) => event.target.closest("[tabindex]");
    picture.addEventListener("pointerover", (event) => {
      const mark = markAt(event);
      if (mark) showTip(mark);
      else hideTip();
    });
    picture.addEventListener("pointerleave", hideTip);
    picture.addEventListener("focusin", (event) => {
      const mark = markAt(event);
      if (!mark) return;
      stop.setAttribute("tabindex", "-1");
      stop = mark;
      stop.setAttribute("tabindex", "0");
      showTip(mark);
    });
    picture.addEventListener("focusout", hideTip);
    picture.addEventListener("keydown", (event) => {
      const mark = markAt(event);
      const next = mark && nearest(mark, marks, event.key);
      if (!next) return;
      event.preventDefault();
      next.focus();
    });
  }

  function nearest(mark, marks, key) {
    if (key === "Home") return marks[0];
    if (key === "End") return marks[marks.length - 1];
    const direction = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
    if (!direction) return null;
    const middle = (box) => [box.left + box.width / 2, box.top + box.height / 2];
    const here = middle(mark.getBoundingClientRect());
    let best = null;
    let least = Infinity;
    for (const other of marks) {
      if (other === mark) continue;
      const there = middle(other.getBoundingClientRect());
      const along = (there[0] - here[0]) * direction[0] + (there[1] - here[1]) * direction[1];
      const aside = Math.abs((there[0] - here[0]) * direction[1]) + Math.abs((there[1] - here[1]) * direction[0]);
      const distance = along + 3 * aside;
      if (along > 0.5 && distance < least) {
        best = other;
        least = distance;
      }
    }
    return best;
  }

  function watchPicture(picture) {
    const marks = [];
    for (const title of picture.querySelectorAll("* > title")) {
      const mark = title.parentNode;
      if (mark === picture) continue;
      mark.setAttribute("aria-label", title.textContent);
      title.remove(); // the browser would show it beside the tooltip
      marks.push(mark);
    }
    if (!marks.length) return;
    picture.setAttribute("role", "group"); // the children of an image cannot be reached
    watchMarks(picture, marks);
  }

  // ---- tables: sorted and filtered rows, some in each body, so that a browser lays out only the bodies in sight

  // Digits have one length, so that layers.10 follows layers.9.
  const natural = (text) => text.toLowerCase().replace(/\d+/g, (digits) => digits.padStart(12, "0"));

  function numeric(text) {
    const match = /^(< )?(-?[\d.,]+(?:e-?\d+)?)(?:.*?([kMGTP]?B|%))?/.exec(text);
    if (match) return Number(match[2].replaceAll(",", "")) * (UNITS[match[3]] || 1) - (match[1] ? 1e-9 : 0);
    if (/^-inf/i.test(text)) return -Number.MAX_VALUE;
    return text ? Number.MAX_VALUE : -Infinity; // NaN and Inf are the largest, and an empty cell is the least
  }

  class RowTable {
    constructor(section) {
      this.table = section.querySelector(".rows > table");
      this.bodies = [...this.table.tBodies];
      this.rows = [...this.table.querySelectorAll("tbody > tr")];
      this.order = this.rows.map((_, place) => place);
      this.orders = new Map();
      this.headers = [...this.table.tHead.rows[0].cells];
      this.sorted = null;
      this.matches = section.querySelector(".matches");
      this.controls = this.matches.parentNode;
      this.box = this.controls.querySelector("input");
      this.choices = [...this.controls.querySelectorAll("select")];
      this.names = this.table.querySelector("[role=rowheader]")?.cellIndex ?? 0;
      this.controls.hidden = false;
      this.headers.forEach((header, column) => this.addButton(header, column));
      if (this.box) this.box.addEventListener("input", () => this.show());
      for (const choice of this.choices) choice.addEventListener("change", () => this.show());
      addEventListener("beforeprint", () => this.placeAll());
      if (this.box && window.requestIdleCallback) requestIdleCallback(() => this.prepare());
    }

    addButton(header, column) {
      if (!header.dataset.order || this.rows.length < 2) return;
      const name = header.textContent;
      header.textContent = "";
      const button = element("button", name, header);
      button.type = "button";
      button.addEventListener("click", () => this.sort(column));
    }

    // The first click sorts numbers from the largest, names from the first; the third gives the first order back.
    sort(column) {
      const isNumber = this.headers[column].dataset.order === "number";
      const first = isNumber ? "descending" : "ascending";
      const second = isNumber ? "ascending" : "descending";
      const before = this.sorted && this.sorted.column === column ? this.sorted.direction : null;
      const direction = before === null ? first : before === first ? second : null;
      this.sorted = direction && { column, direction };
      this.headers.forEach((header, place) => {
        if (place === column && direction) header.setAttribute("aria-sort", direction);
        else header.removeAttribute("aria-sort");
      });
      this.order = direction ? this.ordered(column, isNumber)[direction] : this.rows.map((_, place) => place);
      this.show();
    }

    // Rows with equal cells stay in their first order, in both directions.
    ordered(column, isNumber) {
      if (!this.orders.has(column)) {
        const key = isNumber ? numeric : natural;
        const keys = this.rows.map((row) => key(this.cell(row, column)));
        const ascending = this.rows.map((_, place) => place);
        ascending.sort((a, b) => (keys[a] < keys[b] ? -1 : keys[a] > keys[b] ? 1 : a - b));
        const descending = [];
        for (let end = ascending.length; end > 0; ) {
          let start = end - 1;
          while (start > 0 && keys[ascending[start - 1]] === keys[ascending[end - 1]]) start--;
          for (let place = start; place < end; place++) descending.push(ascending[place]);
          end = start;
        }
        this.orders.set(column, { ascending, descending });
      }
      return this.orders.get(column);
    }

    // The cell of a mark also has the word for it.
    cell(row, column) {
      const cell = row.cells[column];
      return (cell.firstElementChild || cell).textContent;
    }

    // Done while nothing else happens, so that the first key press and the first click need not wait for it.
    prepare() {
      this.texts();
      const column = this.headers.findIndex((header) => header.dataset.order === "text" && header.firstElementChild);
      if (column >= 0) this.ordered(column, false);
    }

    // The names of the rows, and what else is in each row.
    texts() {
      if (!this.known) {
        const names = this.rows.map((row) => row.cells[this.names].textContent.toLowerCase());
        const others = this.rows.map((row) =>
          Array.from(row.cells, (cell, column) => (column === this.names ? "" : cell.textContent)).join("\n").toLowerCase(),
        );
        this.known = { names, others };
      }
      return this.known;
    }

    // A word that is in no name is looked for in the other columns.
    wanted() {
      const words = this.box ? wordsOf(this.box.value) : [];
      const chosen = this.choices.filter((choice) => choice.selectedIndex > 0);
      if (!words.length && !chosen.length) return this.order;
      const { names, others } = words.length ? this.texts() : {};
      const tests = words.map((has) => [has, names.some(has) ? names : others]);
      return this.order.filter(
        (place) =>
          tests.every(([has, texts]) => has(texts[place])) &&
          chosen.every((choice) => this.cell(this.rows[place], Number(choice.dataset.column)) === choice.value),
      );
    }

    show() {
      this.shown = this.wanted();
      this.placed = 0;
      for (const body of this.bodies) body.remove();
      this.place(BODIES_AT_ONCE);
      this.table.parentNode.scrollTop = 0;
      const isAll = this.shown.length === this.rows.length;
      this.isUsed = this.isUsed || !isAll; // a table that is only sorted needs no count
      const count = isAll ? "all" : `${grouped(this.shown.length)} of`;
      this.matches.textContent = this.isUsed ? `${count} ${grouped(this.rows.length)} rows` : "";
      this.table.dispatchEvent(new Event("rows"));
    }

    // Bodies follow each other with pauses: Firefox and Safari need a second for ten thousand rows.
    place(count) {
      clearTimeout(this.later);
      const bodies = this.bodies.slice(this.placed, Math.min(this.placed + count, Math.ceil(this.shown.length / ROWS_AT_ONCE)));
      for (const body of bodies) {
        const start = this.placed * ROWS_AT_ONCE;
        const some = this.shown.slice(start, start + ROWS_AT_ONCE).map((place) => this.rows[place]);
        body.replaceChildren(...some);
        body.style.containIntrinsicBlockSize = some.length < ROWS_AT_ONCE ? `auto ${some.length * 29}px` : "";
        this.placed++;
      }
      this.table.append(...bodies);
      if (this.placed * ROWS_AT_ONCE < this.shown.length) this.later = setTimeout(() => this.place(BODIES_AT_ONCE));
    }

    placeAll() {
      if (this.shown) this.place(this.bodies.length);
    }
  }

  // ---- findings: lines that a filter hides; the others, such as the name of a checkpoint, stay

  function watchFindings(section) {
    const controls = section.querySelector(".controls");
    if (!controls) return;
    controls.hidden = false;
    const box = controls.querySelector("input");
    const choice = controls.querySelector("select");
    const lines = [...section.querySelectorAll("li[data-tone]")].filter((line) => line.dataset.tone !== "good");
    const texts = lines.map((line) => line.textContent.toLowerCase());
    const show = () => {
      const words = wordsOf(box.value);
      let count = 0;
      lines.forEach((line, place) => {
        const isShown = words.every((has) => has(texts[place])) && (!choice.value || choice.value === line.dataset.tone);
        line.hidden = !isShown;
        count += isShown;
      });
      controls.querySelector(".matches").textContent = `${grouped(count)} of ${grouped(lines.length)} findings`;
    };
    box.addEventListener("input", show);
    choice.addEventListener("change", show);
  }

  // ---- the histogram of a chosen tensor

  class Histogram {
    constructor(table, numbers) {
      this.panel = byId("histogram");
      this.table = table;
      this.sides = numbers.sides;
      this.facts = numbers.facts;
      this.tensors = new Map(numbers.tensors.map((entry) => [entry[0], entry]));
      this.input = byId("histogram-name");
      this.drawing = byId("histogram-drawing");
      this.column = table.headers.findIndex((header) => ["key", "module"].includes(header.textContent));
      this.panel.hidden = false;
      byId(`${table.table.id}-note`).hidden = false;
      this.input.addEventListener("input", () => this.suggest());
      this.input.addEventListener("change", () => this.choose(this.input.value));
      this.input.addEventListener("focus", () => this.input.select());
      new ResizeObserver(() => this.draw()).observe(this.drawing);
      this.watchRows();
      this.choose(numbers.tensors[0][0]);
    }

    nameOf(row) {
      const text = row.cells[this.column].textContent;
      return this.tensors.has(text) ? text : text.replace(/ \(tied\)$/, "");
    }

    suggest() {
      const words = wordsOf(this.input.value);
      const list = byId("histogram-names");
      list.replaceChildren();
      for (const name of this.tensors.keys()) {
        if (list.children.length === 50) break;
        if (words.every((has) => has(name.toLowerCase()))) {
          const option = document.createElement("option");
          option.value = name;
          list.append(option);
        }
      }
      if (this.tensors.has(this.input.value)) this.choose(this.input.value);
    }

    choose(name) {
      if (!this.tensors.has(name)) return;
      this.chosen = name;
      this.input.value = name;
      const rows = this.table.rows;
      if (this.row) this.row.removeAttribute("aria-selected");
      this.row = rows.find((row) => this.nameOf(row) === name);
      if (this.row) this.row.setAttribute("aria-selected", "true");
      const sides = this.tensors.get(name).slice(1);
      this.places = [...sides.keys()].filter((place) => sides[place]);
      this.found = this.bins(this.places.map((place) => sides[place]));
      this.describe();
      this.draw();
      this.list();
    }

    // The cells of the rows are one tab stop; arrow keys move, Enter and space choose.
    watchRows() {
      const { table } = this.table;
      table.parentNode.removeAttribute("tabindex"); // a cell takes the focus, and scrolls the rows
      let stop = null;
      const stopAt = (cell) => {
        if (stop) stop.removeAttribute("tabindex");
        stop = cell;
        if (stop) stop.tabIndex = 0;
      };
      const first = () => {
        if (!stop || !stop.isConnected) stopAt(table.querySelector("tbody > tr > td"));
      };
      first();
      table.addEventListener("rows", first);
      const focus = (cell) => {
        if (!cell) return;
        if (!cell.isConnected) this.table.placeAll();
        stopAt(cell);
        cell.focus();
      };
      table.addEventListener("click", (event) => {
        const row = event.target.closest("tbody > tr");
        if (!row || String(getSelection())) return; // text that is being copied
        focus(event.target.closest("td") || row.cells[0]);
        this.choose(this.nameOf(row));
      });
      table.addEventListener("keydown", (event) => {
        const cell = event.target.closest("td");
        if (!cell) return;
        const row = cell.parentNode;
        const shown = this.table.shown || this.table.order;
        const place = shown.indexOf(this.table.rows.indexOf(row));
        const at = (to) => this.table.rows[shown[Math.min(Math.max(to, 0), shown.length - 1)]].cells[cell.cellIndex];
        const moves = {
          ArrowDown: () => at(place + 1),
          ArrowUp: () => at(place - 1),
          PageDown: () => at(place + 10),
          PageUp: () => at(place - 10),
          ArrowRight: () => row.cells[cell.cellIndex + 1],
          ArrowLeft: () => row.cells[cell.cellIndex - 1],
          Home: () => (event.ctrlKey ? at(0) : row.cells[0]),
          End: () => (event.ctrlKey ? at(shown.length - 1) : row.cells[row.cells.length - 1]),
        };
        if (moves[event.key]) {
          event.preventDefault();
          focus(moves[event.key]());
        } else if (event.key === "Enter" || event.key === " ") {
          event.preventDefault();
          this.choose(this.nameOf(row));
        }
      });
    }

    // The lowest bar has all smaller numbers, so that a few of them do not make all others narrow.
    bins(sides) {
      const ends = sides.filter((side) => side[3].length);
      if (!ends.length) return null;
      const last = Math.max(...ends.map((side) => side[2] + side[3].length));
      const first = Math.max(Math.min(...ends.map((side) => side[2])), last - BINS);
      const room = Math.max(FEWEST_BINS - (last - first), 0);
      const [low, top] = [first - Math.floor(room / 2), last + Math.ceil(room / 2)];
      const shares = sides.map(([count, zeros, start, counts]) => {
        const bars = new Array(top - low).fill(0);
        counts.forEach((times, place) => (bars[Math.max(start + place - low, 0)] += times));
        return { count, zeros, bars };
      });
      const isCut = ends.some((side) => side[2] < low);
      return { low, top, shares, isCut, hasZeros: shares.some((side) => side.zeros) };
    }

    describe() {
      const caption = byId("histogram-caption");
      caption.replaceChildren();
      if (!this.found) {
        caption.textContent = `${this.chosen}: no numbers but zeros, NaN and Inf`;
        return;
      }
      if (this.sides.length > 1) {
        for (const place of this.places) {
          element("span", "", caption).className = `key-${place}`;
          element("b", this.sides[place], caption);
          caption.append(" ");
        }
      }
      const cut = this.found.isCut ? `; the first bar has all below ${power(this.found.low + 1)}` : "";
      caption.append("share of the numbers of ");
      element("code", this.chosen, caption);
      caption.append(` by magnitude, in powers of two${cut}`);
    }

    draw() {
      this.drawing.replaceChildren(...(this.found ? [this.picture(this.found, this.places)] : []));
    }

    picture({ low, top, shares, isCut, hasZeros }, places) {
      const width = Math.max(this.drawing.clientWidth, 240);
      const height = 200;
      const [left, bottom, above] = [44, 24, 8];
      const slots = top - low + (hasZeros ? 2 : 0);
      const slot = (width - left) / slots;
      const heights = shares.map((side) => [...(hasZeros ? [side.zeros, 0] : []), ...side.bars].map((times) => times / (side.count || 1)));
      const most = Math.max(...heights.flat()) || 1;
      const y = (share) => above + (height - above - bottom) * (1 - share / most);
      const picture = document.createElementNS(SVG, "svg");
      const add = (name, attributes, text = "") => {
        const made = document.createElementNS(SVG, name);
        for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
        made.textContent = text;
        picture.append(made);
        return made;
      };
      picture.setAttribute("viewBox", `0 0 ${width} ${height}`); // printed pages are narrower
      picture.setAttribute("width", width);
      picture.setAttribute("height", height);
      picture.setAttribute("role", "group");
      picture.setAttribute("aria-label", `Histogram of ${this.chosen}`);
      for (const share of [0, most / 2, most]) {
        add("path", { class: "axis", d: `M${left} ${y(share)}H${width}` });
        add("text", { x: left - 6, y: y(share) + 4, "text-anchor": "end" }, percent(share));
      }
      heights.forEach((bars, number) => {
        if (places[number] === 0) {
          bars.forEach((share, place) => {
            if (share) add("rect", { class: "side-0", x: left + place * slot + 0.5, y: y(share), width: Math.max(slot - 1, 0.5), height: y(0) - y(share) });
          });
        } else {
          let line = `M${left} ${y(0)}`;
          bars.forEach((share, place) => (line += `V${y(share)}H${left + (place + 1) * slot}`));
          add("path", { class: "side-1", d: `${line}V${y(0)}` });
        }
      });
      const marks = [];
      const each = Math.max(Math.ceil(44 / slot), 1);
      for (let place = 0; place < slots; place++) {
        const exponent = low + place - (hasZeros ? 2 : 0);
        const isZero = hasZeros && place === 0;
        if (isZero || (hasZeros && place < 2)) {
          if (isZero) add("text", { x: left + slot / 2, y: height - 6, "text-anchor": "middle" }, "0");
          else continue;
        } else if ((top - exponent) % each === 0) {
          add("text", { x: left + place * slot, y: height - 6, "text-anchor": "middle" }, power(exponent));
        }
        const from = isCut && exponent === low ? "below" : `${power(exponent)} to`;
        const where = isZero ? "0" : `${from} ${power(exponent + 1)}`;
        const values = shares.map((side, number) => {
          const times = isZero ? side.zeros : side.bars[exponent - low];
          return `${this.sides[places[number]]}: ${grouped(times)} (${percent(times / (side.count || 1))})`;
        });
        marks.push(add("rect", { class: "hit", x: left + place * slot, y: above, width: slot, height: height - above - bottom, "aria-label": [where, ...values].join("\n") }));
      }
      watchMarks(picture, marks);
      return picture;
    }

    list() {
      const table = byId("histogram-facts");
      table.replaceChildren();
      const head = table.createTHead().insertRow();
      head.insertCell();
      for (const name of this.facts) element("th", name, head).scope = "col";
      const body = table.createTBody();
      this.tensors.get(this.chosen).slice(1).forEach((side, place) => {
        const row = body.insertRow();
        element("th", this.sides[place], row).scope = "row";
        if (side) for (const fact of side[4]) element("td", fact, row);
        else {
          const cell = element("td", "not measured", row);
          cell.colSpan = this.facts.length;
        }
      });
    }
  }

  const power = (exponent) => `2${[...String(exponent)].map((digit) => (digit === "-" ? "\u207b" : "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"[digit])).join("")}`;

  function percent(share) {
    if (!share) return "0 %";
    const text = (100 * share).toFixed(share < 0.01 ? 2 : share < 0.1 ? 1 : 0);
    return Number(text) === 0 ? "< 0.01 %" : `${text} %`;
  }

  // ---- the document

  function watchSave() {
    const button = byId("save");
    if (!button) return;
    button.hidden = false;
    button.addEventListener("click", () => {
      const text = `${byId("document").textContent}\n`; // not parsed: that would round large integers
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
      link.download = button.dataset.name;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    });
  }

  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hideTip();
  });
  addEventListener("scroll", hideTip, { capture: true, passive: true });
  document.querySelectorAll("svg.ck-picture").forEach(watchPicture);
  document.querySelectorAll("section.summary").forEach(watchFindings);
  for (const section of document.querySelectorAll("section.table")) {
    const table = new RowTable(section);
    if (table.table.getAttribute("role") === "grid") {
      new Histogram(table, JSON.parse(byId("histogram-numbers").textContent));
    }
  }
  watchSave();
})();
