"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const one = (name, value) => all(`[${name}]`).find((element) => element.getAttribute(name) === value);

  // -- theme ---------------------------------------------------------------------------------------------
  const button = document.getElementById("theme");
  const isDark = () => root.dataset.theme === "dark";
  function setTheme(dark) {
    root.dataset.theme = dark ? "dark" : "light";
    button.textContent = dark ? "Light theme" : "Dark theme";
  }
  setTheme(window.matchMedia("(prefers-color-scheme: dark)").matches);
  button.addEventListener("click", () => {
    setTheme(!isDark());
    for (const figure of views.keys()) draw(figure);
  });

  // -- charts --------------------------------------------------------------------------------------------
  const views = new Map();
  const chosen = {};   // chapter -> which BatchNorm
  const state = {};    // chart -> values of its parameters

  const isNarrow = (figure) => figure.clientWidth < 480;

  function specOf(figure) {
    const quantity = figure.dataset.quantity;
    if (!quantity) {
      const spec = structuredClone(data.charts[figure.dataset.chart]);
      for (const param of spec.params || []) {
        const held = state[figure.dataset.chart];
        if (held && param.name in held) param.value = held[param.name];
        if (param.name === "name_length" && isNarrow(figure)) param.value = 13;
      }
      return spec;
    }
    const chapter = figure.dataset.channels;
    const norm = data.norms[chapter][chosen[chapter]];
    const spec = structuredClone(data.channels[quantity]);
    spec.data.values = norm[quantity]
      .map((value, i) => ({ channel: norm.at ? norm.at[i] : i, value }))
      .filter((row) => row.value !== null);
    if (quantity === "variance") for (const row of spec.data.values) row.value = Math.max(row.value, data.least);
    return spec;
  }

  async function draw(figure) {
    const place = figure.querySelector(".vega");
    const spec = specOf(figure);
    const narrow = isNarrow(figure);
    const config = structuredClone(isDark() ? data.themes.dark : data.themes.light);
    config.background = null;
    config.axisY = { labelLimit: narrow ? 100 : 240 };
    if (narrow) Object.assign(config.legend, { columns: 2, layout: { top: { direction: "vertical" } } });
    config.axisX = { titleLimit: place.clientWidth - 90 };
    const ticket = (views.get(figure) || { ticket: 0 }).ticket + 1;
    const earlier = (views.get(figure) || {}).view;
    views.set(figure, { ticket, view: earlier });
    const options = { actions: false, renderer: "svg", ast: true, config, mode: "vega-lite", tooltip: { theme: isDark() ? "dark" : "light" } };
    const result = await vegaEmbed(place, spec, options);
    if (views.get(figure).ticket !== ticket) return result.finalize();
    if (earlier) earlier.finalize();
    views.set(figure, { ticket, view: result.view });
    place.querySelector("svg").setAttribute("aria-hidden", "true");  // told in a sentence, and as a table
  }

  function tableOf(figure) {
    const rows = specOf(figure).data.values.slice(0, 2000);
    const params = state[figure.dataset.chart] || {};
    const shown = rows.filter((row) =>
      (params.at_step === undefined || row.step === params.at_step) &&
      (params.of_layer === undefined || row.layer === params.of_layer));
    const table = document.createElement("table");
    const head = table.createTHead().insertRow();
    const keys = Object.keys(rows[0] || {});
    for (const key of keys) {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.textContent = key;
      head.append(cell);
    }
    const body = table.createTBody();
    for (const row of shown) {
      const line = body.insertRow();
      for (const key of keys) {
        const value = row[key];
        const cell = line.insertCell();
        cell.textContent = typeof value === "number" ? String(Number(value.toPrecision(5))) : String(value);
        if (typeof value !== "number") cell.className = "text";
      }
    }
    const scroll = document.createElement("div");
    scroll.className = "scroll";
    scroll.tabIndex = 0;
    scroll.setAttribute("role", "group");
    scroll.setAttribute("aria-label", figure.querySelector("figcaption").textContent);
    scroll.append(table);
    figure.querySelector(".figures > div").replaceChildren(scroll);
  }

  function refresh(figure) {
    if (views.has(figure)) draw(figure);
    if (figure.querySelector(".figures").open) tableOf(figure);
  }

  for (const details of all(".figures")) {
    details.addEventListener("toggle", () => { if (details.open) tableOf(details.closest(".chart")); });
  }

  // -- BatchNorm by BatchNorm ----------------------------------------------------------------------------
  function choose(chapter, index) {
    chosen[chapter] = index;
    const norm = data.norms[chapter][index];
    const some = norm.shown < norm.channels ? `, ${norm.shown} drawn` : "";
    one("data-norm-told", chapter).textContent = `${norm.name || "(root)"}: ${norm.channels} channels${some}, ${norm.dead} dead`;
    all(".chart").filter((figure) => figure.dataset.channels === chapter).forEach(refresh);
  }
  for (const select of all("select[data-norm]")) {
    const chapter = select.dataset.norm;
    choose(chapter, Number(select.value));
    select.addEventListener("change", () => choose(chapter, Number(select.value)));
    for (const step of all("button[data-step]").filter((b) => b.dataset.of === chapter)) {
      step.addEventListener("click", () => {
        const next = select.selectedIndex + Number(step.dataset.step);
        if (next < 0 || next >= select.options.length) return;
        select.selectedIndex = next;
        choose(chapter, Number(select.value));
      });
    }
  }

  // -- training: the slider, and the layer -----------------------------------------------------------------
  const figureOf = (name) => all(".chart").find((figure) => figure.dataset.chart === name);
  function setParam(name, key, value) {
    state[name] = { ...state[name], [key]: value };
    const figure = figureOf(name);
    const held = views.get(figure);
    if (held && held.view) held.view.signal(key, value).runAsync();
    if (figure.querySelector(".figures").open) tableOf(figure);
  }
  for (const slider of all("input[data-slider]")) {
    const chapter = slider.dataset.slider;
    const name = `${chapter}-distributions`;
    const steps = [...new Set(data.charts[name].data.values.map((row) => row.step))].sort((a, b) => a - b);
    const move = () => {
      const step = steps[Number(slider.value)];
      slider.setAttribute("aria-valuetext", `step ${step}`);
      one("data-slider-told", chapter).textContent = step;
      setParam(name, "at_step", step);
    };
    slider.addEventListener("input", move);
    move();
  }
  for (const select of all("select[data-layer]")) {
    const set = () => setParam(`${select.dataset.layer}-over-training`, "of_layer", select.value);
    select.addEventListener("change", set);
    set();
  }

  // -- draw what is looked at first, the rest when there is time -------------------------------------------
  const waiting = new Set(all(".chart"));
  function drawOnce(figure) {
    if (!waiting.delete(figure)) return Promise.resolve();
    seen.unobserve(figure);
    return draw(figure);
  }
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) drawOnce(entry.target);
  }, { rootMargin: "200px" });
  for (const figure of waiting) seen.observe(figure);
  const later = window.requestIdleCallback || ((f) => setTimeout(f, 50));
  async function drawRest() {
    const [next] = waiting;
    if (!next) { root.dataset.ready = "yes"; return; }
    await drawOnce(next);
    later(drawRest);
  }
  later(drawRest);

  // -- the diagram: fold, search, sides ---------------------------------------------------------------------
  const model = (chapter) => document.getElementById(`${chapter}-model`);
  const modules = (chapter) => all("details[data-path]", model(chapter));
  for (const unfold of all("[data-unfold]")) {
    unfold.addEventListener("click", () => modules(unfold.dataset.unfold).forEach((d) => { d.open = true; }));
  }
  for (const fold of all("[data-fold]")) {
    fold.addEventListener("click", () => modules(fold.dataset.fold).forEach((d) => { d.open = false; }));
  }
  for (const summary of all("details[data-path] > summary")) {
    // the same module on the other side goes with it; only for what a person did
    summary.addEventListener("click", () => {
      const here = summary.parentElement;
      const part = here.closest(".part");
      const side = here.closest(".side");
      for (const twin of all("details[data-path]", part)) {
        if (twin.dataset.path === here.dataset.path && twin.closest(".side") !== side) twin.open = !here.open;
      }
    });
  }

  for (const input of all("input[data-search]")) {
    const chapter = input.dataset.search;
    const told = one("data-found", chapter);
    let before = null;
    input.addEventListener("input", () => {
      const wanted = input.value.trim().toLowerCase();
      const article = document.getElementById(chapter);
      const leaves = all(".leaf", article);
      const rows = all("tr[data-find]", article);
      if (wanted && before === null) before = modules(chapter).map((d) => [d, d.open]);
      if (!wanted) {
        all(".miss", article).forEach((element) => element.classList.remove("miss"));
        (before || []).forEach(([details, open]) => { details.open = open; });
        before = null;
        told.textContent = "";
        return;
      }
      const fits = (element) => element.dataset.find.toLowerCase().includes(wanted);
      let count = 0;
      for (const leaf of leaves) {
        const hit = fits(leaf);
        leaf.classList.toggle("miss", !hit);
        if (hit) count += 1;
      }
      rows.forEach((row) => row.classList.toggle("miss", !fits(row)));
      for (const details of modules(chapter)) {
        const hit = details.querySelector(".leaf:not(.miss)") !== null;
        details.parentElement.classList.toggle("miss", !hit);
        details.open = hit;
      }
      told.textContent = count === 1 ? "1 layer found" : `${count} layers found`;
    });
  }

  for (const sides of all(".sides")) {
    const part = sides.closest(".part");
    const radios = all("input[type=radio]", part);
    const show = (which) => {
      sides.classList.toggle("both", which === "both" && radios.length > 0);
      for (const side of all(".side", sides)) {
        side.hidden = radios.length > 0 && which !== "both" && side.dataset.side !== which;
      }
    };
    for (const radio of radios) radio.addEventListener("change", () => show(radio.value));
    let first = "both";
    if (radios.length && window.innerWidth < 900) {
      first = sides.querySelector('[data-side="after"] .leaf.inserted') ? "after" : "before";
      radios.find((radio) => radio.value === first).checked = true;
    }
    show(first);
  }

  function reveal() {
    const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    for (let d = target.closest("details"); d; d = d.parentElement.closest("details")) d.open = true;
    target.scrollIntoView();
  }
  window.addEventListener("hashchange", reveal);
  reveal();

  // -- hints go away at Escape, and come back at the next look ------------------------------------------------
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") all(".hint").forEach((hint) => hint.classList.add("hushed"));
  });
  for (const hint of all(".hint")) {
    for (const kind of ["mouseenter", "focusin"]) hint.addEventListener(kind, () => hint.classList.remove("hushed"));
  }
  window.addEventListener("beforeprint", () => all(".verdicts").forEach((d) => { d.open = true; }));

  // -- paper is white; printing waits for no drawing, so the colours are exchanged where they stand ------------
  const onPaper = new Map();
  (function pair(dark, light) {
    if (typeof dark === "string" && dark.startsWith("#")) onPaper.set(dark, light);
    else if (dark && typeof dark === "object") for (const key of Object.keys(dark)) pair(dark[key], light[key]);
  })(data.themes.dark, data.themes.light);
  let exchanged = [];
  window.addEventListener("beforeprint", () => {
    if (!isDark()) return;
    for (const mark of all(".vega svg *")) {
      for (const name of ["fill", "stroke"]) {
        const colour = mark.getAttribute(name);
        if (!onPaper.has(colour)) continue;
        mark.setAttribute(name, onPaper.get(colour));
        exchanged.push(() => mark.setAttribute(name, colour));
      }
    }
  });
  window.addEventListener("afterprint", () => {
    for (const back of exchanged) back();
    exchanged = [];
  });
})();
